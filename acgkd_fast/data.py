"""Real graphs to train and measure on: TUDatasets from a local folder, a data set made on the spot, splits."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoints import load_graphs, save_graphs
from .errors import DataError, check, check_tensor
from .graphs import EdgeSample, GraphBatch

DEGREE_BUCKETS = 64
_REQUIRED = ("A", "graph_indicator", "graph_labels")
_MOTIF_NODES = 5


@dataclass(frozen=True)
class GraphDataset:
    """Labelled graphs.

    Attributes:
        name: of the data set.
        graphs: all graphs, with labels 0..num_classes-1.
        num_classes: number of classes.
        feature_kind: "one-hot" (node labels), "degree" (one-hot node degrees), "continuous"
            (attributes) or "constant".
    """

    name: str
    graphs: GraphBatch
    num_classes: int
    feature_kind: str

    @property
    def num_features(self) -> int:
        return self.graphs.x.shape[1]


def load_dataset(
    name: str,
    root: str | Path,
    *,
    max_degree: int | None = None,
    degrees_from: Sequence[int] | torch.Tensor | None = None,
    cache_dir: str | Path | None = None,
) -> GraphDataset:
    """Read a TUDataset from local files; nothing is downloaded and `root` is not written to.

    The first call reads the text files through torch-geometric (COLLAB: about 80 s and 6 GB of
    memory) and keeps the graphs in the cache folder; later calls read that.

    Args:
        name: such as MUTAG, PTC_MR, PROTEINS, IMDB-BINARY, COLLAB, REDDIT-BINARY.
        root: folder with ``NAME/raw/NAME_*.txt``, ``NAME/NAME_*.txt`` or ``NAME.zip``, itself or in
            its subfolder ``TUDataset``.
        max_degree: for data sets without node labels or attributes, whose features are one-hot
            degrees: the last bucket, which holds all degrees from there on. Take a teacher's
            ``num_features - 1`` to fit it. Default: the largest degree, at most 63.
        degrees_from: positions of the graphs that the default of `max_degree` looks at, such as the
            training graphs; default all.
        cache_dir: default ``$ACGKD_FAST_CACHE``, else ``~/.cache/acgkd-fast``.

    Returns:
        All graphs. Features are one-hot node labels where there are some, else node attributes,
        else one-hot degrees.

    Raises:
        DataError: files that are missing or do not parse, no classes in them, torch-geometric not
            installed, or a cache folder that cannot be written.
        InputError: `max_degree` below 0.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise DataError(f"name: expected the name of a TUDataset such as MUTAG, got {name!r}")
    check(max_degree is None or max_degree >= 0, "max_degree", "0 or more", max_degree)
    source = _find(name, Path(root))
    cache = Path(cache_dir or os.environ.get("ACGKD_FAST_CACHE") or Path.home() / ".cache" / "acgkd-fast")
    cached = cache / "TUDataset" / f"{name}-{_fingerprint(source)}.safetensors"
    if not cached.exists():
        graphs, kind = _read_tu(name, source, cache)
        save_graphs(cached, graphs, {"feature_kind": kind, "name": name})
    graphs, metadata = load_graphs(cached)
    kind = metadata["feature_kind"]
    if kind == "degree":
        if max_degree is None:
            counted = graphs if degrees_from is None else graphs.select(degrees_from)
            max_degree = min(int(_degrees(counted.edges).max()), DEGREE_BUCKETS - 1)
        graphs = GraphBatch(degree_features(graphs.edges, max_degree), graphs.edges, graphs.y)
    assert graphs.y is not None
    return GraphDataset(name, graphs, int(graphs.y.max()) + 1, kind)


def degree_features(edges: EdgeSample, max_degree: int) -> torch.Tensor:
    """One-hot degrees, [N, max_degree + 1]; the last bucket holds all degrees from `max_degree` on.

    The degree of a node is its number of incoming entries, whatever their values.
    """
    check(max_degree >= 0, "max_degree", "0 or more", max_degree)
    return torch.nn.functional.one_hot(_degrees(edges).clamp(max=max_degree), max_degree + 1).float()


def _degrees(edges: EdgeSample) -> torch.Tensor:
    return (edges.rowptr[1:] - edges.rowptr[:-1]).long()


def gfkd_split(num_graphs: int, seed: int = 29, fraction: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of (training, held-out) graphs by GFKD's rule: shuffle, then the first floor(fraction N).

    Not stratified. Positions carry over between files only where the graph order is the same.

    Args:
        num_graphs: N, at least 1.
        seed: of numpy's legacy generator.
        fraction: share of the training graphs, in (0, 1).

    Returns:
        Two int64 tensors, in shuffled order, together 0..N-1.

    Raises:
        InputError: a number out of range.
    """
    check(num_graphs >= 1, "num_graphs", "at least 1", num_graphs)
    _check_fraction(fraction)
    positions = np.arange(num_graphs)
    np.random.RandomState(seed).shuffle(positions)
    train, test = np.split(positions, [int(fraction * num_graphs)])
    return torch.from_numpy(train).long(), torch.from_numpy(test).long()


def stratified_split(y: torch.Tensor, seed: int, fraction: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of (training, held-out) graphs with the same share of every class, up to rounding.

    Args:
        y: int64 [N] labels.
        seed: of the shuffling.
        fraction: share of the training graphs, in (0, 1); a class of two or more has graphs on
            both sides.

    Returns:
        Two int64 tensors, in shuffled order, together 0..N-1.

    Raises:
        InputError: labels of the wrong form or a fraction out of range.
    """
    check_tensor("y", y, shape=(None,), dtypes=(torch.int64,))
    _check_fraction(fraction)
    labels, random = y.cpu().numpy(), np.random.RandomState(seed)
    train: list[int] = []
    test: list[int] = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        count = round(fraction * len(members))
        if len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        train += members[:count].tolist()
        test += members[count:].tolist()
    parts = [torch.tensor(random.permutation(part), dtype=torch.int64) for part in (train, test)]
    return parts[0], parts[1]


def _check_fraction(fraction: float) -> None:
    check(0.0 < fraction < 1.0, "fraction", "a number in (0, 1)", fraction)


def house_or_cycle(num_graphs: int = 600, seed: int = 0, num_nodes: int = 25) -> GraphDataset:
    """Graphs whose class only their structure tells: a random tree with a house or with a 5-cycle.

    Each is a Barabasi-Albert tree of ``num_nodes - 5`` nodes joined by one edge to a house motif
    (class 0) or a cycle (class 1), in random node order; every node has the one feature 1. The
    number of edges tells the classes apart too: a house has one more.

    Args:
        num_graphs: at least 2; classes take turns, in random order.
        seed: equal seeds give equal graphs; global random streams are not touched.
        num_nodes: nodes of each graph, at least 7.

    Raises:
        DataError: torch-geometric is not installed.
        InputError: a number out of range.

    Source: motifs of GNNExplainer, arXiv 1903.03894, as torch-geometric has them.
    """
    check(num_graphs >= 2, "num_graphs", "at least 2", num_graphs)
    tree_nodes = num_nodes - _MOTIF_NODES
    check(tree_nodes >= 2, "num_nodes", f"at least {_MOTIF_NODES + 2}", num_nodes)
    _require_pyg("house_or_cycle")
    from torch_geometric.datasets.motif_generator.cycle import CycleMotif
    from torch_geometric.datasets.motif_generator.house import HouseMotif

    motifs: list[Any] = [HouseMotif(), CycleMotif(_MOTIF_NODES)]
    motif_edges = [motif().edge_index.numpy() + tree_nodes for motif in motifs]
    random = np.random.default_rng(seed)
    y = random.permutation(np.arange(num_graphs) % 2)
    trees = _random_trees(num_graphs, tree_nodes, random)
    parts = []
    for g in range(num_graphs):
        bridge = np.array([[random.integers(tree_nodes)], [tree_nodes + random.integers(_MOTIF_NODES)]])
        edges = np.concatenate([trees[g], trees[g][::-1], motif_edges[y[g]], bridge, bridge[::-1]], axis=1)
        parts.append(random.permutation(num_nodes)[edges] + g * num_nodes)
    ptr = torch.arange(num_graphs + 1) * num_nodes
    edge_sample = EdgeSample.from_edge_index(torch.from_numpy(np.concatenate(parts, axis=1)), ptr)
    graphs = GraphBatch(torch.ones(num_graphs * num_nodes, 1), edge_sample, torch.from_numpy(y))
    return GraphDataset("house_or_cycle", graphs, 2, "constant")


def _random_trees(num_graphs: int, num_nodes: int, random: np.random.Generator) -> np.ndarray:
    """Barabasi-Albert trees as (child, parent) pairs, [num_graphs, 2, num_nodes - 1].

    Grown here because torch-geometric's generator lets a new node choose itself and drops the edge,
    so that four of five "trees" of 20 nodes come apart.
    """
    ends = np.zeros((num_graphs, num_nodes - 1, 2), dtype=np.int64)
    for node in range(1, num_nodes):
        # An end of an earlier edge, so that a node is chosen in proportion to its degree.
        known = ends[:, : node - 1].reshape(num_graphs, -1)
        chosen = random.integers(max(known.shape[1], 1), size=(num_graphs, 1))
        parent = np.take_along_axis(known, chosen, axis=1) if node > 1 else 0 * chosen
        ends[:, node - 1] = np.concatenate([np.full_like(parent, node), parent], axis=1)
    return ends.transpose(0, 2, 1)


def _require_pyg(wanted_by: str) -> None:
    try:
        import torch_geometric  # noqa: F401
    except ImportError as error:
        raise DataError(f"{wanted_by}: expected torch-geometric to be installed (extra 'pyg'), got none") from error


def _find(name: str, root: Path) -> list[Path]:
    """The text files of a data set, or its zip file alone."""
    for base in (root, root / "TUDataset"):
        for folder in (base / name / "raw", base / name):
            if all((folder / f"{name}_{part}.txt").is_file() for part in _REQUIRED):
                return sorted(folder.glob(f"{name}_*.txt"))
        if (base / f"{name}.zip").is_file():
            return [base / f"{name}.zip"]
    raise DataError(
        f"root: expected {name}/raw/{name}_A.txt (and _graph_indicator, _graph_labels) or {name}.zip "
        f"in {root} or its TUDataset folder, got neither"
    )


def _fingerprint(files: list[Path]) -> str:
    """Changes when a file is replaced; reading the contents would cost seconds on large sets."""
    stats = [(str(file.resolve()), file.stat()) for file in files]
    facts = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read_tu(name: str, source: list[Path], cache: Path) -> tuple[GraphBatch, str]:
    """The graphs and their kind of features; degree features are left out, [N, 0]."""
    _require_pyg(name)
    from torch_geometric.data.batch import Batch
    from torch_geometric.datasets.tu_dataset import TUDataset

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="reading-") as folder:
            raw = Path(folder) / name / "raw"
            raw.mkdir(parents=True)
            _copy_texts(name, source, raw)
            dataset: Any = TUDataset(root=folder, name=name)
            if dataset.num_node_labels == 0 and dataset.num_node_attributes > 0:
                dataset = TUDataset(root=folder, name=name, use_node_attr=True)
            batch: Any = Batch.from_data_list(list(dataset))
            labelled = len((raw / f"{name}_graph_labels.txt").read_text().split())
    except OSError as error:
        raise DataError(f"{name}: expected to unpack into {cache}, got an error ({error.strerror or error})") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, RuntimeError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{name}: expected TUDataset files in {source[0]}, got some that do not parse ({error})"
        ) from error
    if batch.num_graphs != labelled:
        raise DataError(
            f"{name}: expected {labelled} graphs, got the first {batch.num_graphs} "
            "(torch-geometric leaves out the last ones where they have no edges)"
        )
    if batch.y is None or batch.y.is_floating_point():
        raise DataError(f"{name}: expected a class for every graph, got {'numbers' if batch.y is not None else 'none'}")
    if batch.x is None:
        batch.x = torch.zeros(batch.num_nodes, 0)
        kind = "degree"
    else:
        one_hot = bool(((batch.x == 0) | (batch.x == 1)).all()) and bool((batch.x.sum(1) == 1).all())
        kind = "one-hot" if one_hot else "continuous"
    return GraphBatch.from_pyg(batch), kind


def _copy_texts(name: str, source: list[Path], raw: Path) -> None:
    if source[0].suffix != ".zip":
        for file in source:
            shutil.copyfile(file, raw / file.name)
        return
    with zipfile.ZipFile(source[0]) as packed:
        for member in packed.infolist():
            # Only the base name is used: a zip file may hold paths that lead elsewhere.
            file_name = Path(member.filename).name
            if re.fullmatch(rf"{name}_\w+\.txt", file_name):
                with packed.open(member) as stream, (raw / file_name).open("wb") as text:
                    shutil.copyfileobj(stream, text)
    absent = [part for part in _REQUIRED if not (raw / f"{name}_{part}.txt").exists()]
    if absent:
        raise DataError(f"{name}: expected {name}_{absent[0]}.txt in {source[0]}, got a zip file without it")
