"""GFKD's pseudo-graphs: the text that its students read, and the lists of logits behind it.

An entry (j, k) of a structure matrix, and a number k in the line of node j, is an edge from j to k.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import DataError, InputError, check, check_tensor
from ..files import existing_file, write_text
from ..graphs import EdgeSample, GraphBatch
from ..layout import PairLayout
from ..pseudo_graphs import PseudoGraphs
from .pickles import load_pickle, save_pickle

Matrices = list[torch.Tensor]


def read_fake_graphs(path: str | Path, num_features: int | None = None) -> GraphBatch:
    """Read GFKD's fake-graph text, whose form is that of the powerful-gnns archive.

    First the number of graphs; per graph a line ``nodes label``; per node a line ``label degree neighbours...``. GFKD
    writes a literal ``[]`` behind a degree of 0.

    Args:
        path: the file.
        num_features: width of the one-hot node labels; default the largest label + 1.

    Returns:
        Directed edges as listed, without self-loops of the models' own; one-hot features; labels.

    Raises:
        DataError: no file, or text of another form; it names the line.
    """
    path = existing_file(path, "GFKD's text of fake graphs")
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text, got bytes that are none ({error.reason})") from error
    reader = _Reader(path, rows)
    (count,) = reader.integers("the number of graphs", 1)
    sizes, labels, kinds = [], [], []
    sources: list[int] = []
    targets: list[int] = []
    first = 0
    for _ in range(count):
        nodes, label = reader.integers("'nodes label' of a graph", 2)
        if nodes < 1 or label < 0:
            raise reader.fail("at least one node and a label from 0", f"{nodes} {label}")
        for node in range(first, first + nodes):
            kind, neighbours = reader.node(nodes)
            kinds.append(kind)
            sources += [node] * len(neighbours)
            targets += [first + k for k in neighbours]
        sizes.append(nodes)
        labels.append(label)
        first += nodes
    reader.finish()
    width = max(kinds, default=0) + 1 if num_features is None else num_features
    if max(kinds, default=0) >= width:
        raise DataError(f"{path}: expected node labels below {width}, got {max(kinds)}")
    ptr = torch.nn.functional.pad(torch.tensor(sizes, dtype=torch.int64).cumsum(0), (1, 0))
    edges = EdgeSample.from_edge_index(torch.tensor([sources, targets], dtype=torch.int64), ptr)
    x = torch.nn.functional.one_hot(torch.tensor(kinds, dtype=torch.int64), width).float()
    return GraphBatch(x, edges, torch.tensor(labels, dtype=torch.int64))


class _Reader:
    def __init__(self, path: Path, rows: list[list[str]]) -> None:
        self.path, self.rows, self.line = path, rows, 0

    def fail(self, expected: str, got: str) -> DataError:
        return DataError(f"{self.path}, line {self.line}: expected {expected}, got {got[:60]!r}")

    def integers(self, expected: str, count: int) -> list[int]:
        tokens = self._next(expected)
        if len(tokens) != count:
            raise self.fail(expected, " ".join(tokens))
        return self._parse(tokens, expected)

    def node(self, nodes: int) -> tuple[int, list[int]]:
        """(label, neighbours) of the next node of a graph of `nodes` nodes."""
        expected = "'label degree neighbours...' of a node"
        tokens = self._next(expected)
        numbers = self._parse([token for token in tokens if token != "[]"], expected)
        if len(numbers) < 2:
            raise self.fail(expected, " ".join(tokens))
        label, degree, *neighbours = numbers
        if label < 0 or len(neighbours) != degree:
            raise self.fail(f"a label from 0 and {max(degree, 0)} neighbours", " ".join(tokens))
        if not all(0 <= k < nodes for k in neighbours):
            raise self.fail(f"neighbours in 0..{nodes - 1}", " ".join(tokens))
        return label, neighbours

    def finish(self) -> None:
        for tokens in self.rows[self.line :]:
            self.line += 1
            if tokens:
                raise self.fail("the end of the file", " ".join(tokens))

    def _next(self, expected: str) -> list[str]:
        self.line += 1
        if self.line > len(self.rows):
            raise self.fail(expected, "the end of the file")
        return self.rows[self.line - 1]

    def _parse(self, tokens: list[str], expected: str) -> list[int]:
        try:
            return [int(token) for token in tokens]
        except ValueError:
            raise self.fail(expected, " ".join(tokens)) from None


def write_fake_graphs(path: str | Path, graphs: GraphBatch) -> None:
    """Write what :func:`read_fake_graphs` and GFKD read.

    Args:
        path: the file; replaced atomically.
        graphs: labelled graphs with one-hot features and edge values 0 (left out) or 1, without self-loops.

    Raises:
        InputError: graphs that the format cannot hold.
        DataError: the file cannot be written.
    """
    if graphs.y is None:
        raise InputError("graphs: expected labels y, got none")
    x = graphs.x.detach()
    one_hot = bool(((x == 0) | (x == 1)).all()) and bool((x.sum(1) == 1).all())
    check(one_hot, "graphs", "one-hot node features", x)
    value = graphs.edges.value[: graphs.edges.num_edges].detach()
    check(bool(((value == 0) | (value == 1)).all()), "graphs", "edge values 0 or 1", value)
    edges = graphs.edges.drop_zeros()
    (source, target), _ = edges.to_edge_index()
    check(not bool((source == target).any()), "graphs", "no self-loops (GFKD adds them when it reads)", edges)
    order = torch.argsort(source * graphs.num_nodes + target)
    counts = torch.bincount(source, minlength=graphs.num_nodes).tolist()
    # Entries are numbered inside their graph.
    local = (target - graphs.ptr[graphs.batch()[source]])[order].tolist()
    kinds, ptr, labels = x.argmax(1).tolist(), graphs.ptr.tolist(), graphs.y.tolist()
    lines, entry = [str(graphs.num_graphs)], 0
    for g, label in enumerate(labels):
        lines.append(f"{ptr[g + 1] - ptr[g]} {label}")
        for node in range(ptr[g], ptr[g + 1]):
            neighbours = local[entry : entry + counts[node]]
            entry += counts[node]
            lines.append(f"{kinds[node]} {counts[node]} {' '.join(map(str, neighbours)) or '[]'}")
    write_text(path, "\n".join(lines) + "\n")


def read_parameters(structure: str | Path, features: str | Path) -> tuple[Matrices, Matrices]:
    """Read GFKD's stru_paras*.pt and feature_paras*.pt.

    Returns:
        Structure logits n_g x n_g and feature logits n_g x d of every graph.

    Raises:
        DataError: a file that is missing, holds other things than a list of finite matrices, or does not fit the other.
    """
    logits, rows = (_read_matrices(path) for path in (structure, features))
    for path, matrices in ((structure, logits), (features, rows)):
        if not matrices or len({m.shape[1] for m in rows}) > 1:
            raise DataError(f"{path}: expected at least one matrix, features of one width, got other ones")
    wanted = [(len(x), len(x)) for x in rows]
    found = [tuple(theta.shape) for theta in logits]
    if found != wanted:
        raise DataError(f"{structure}: expected square matrices as large as the features of {features}, got others")
    return logits, rows


def _read_matrices(path: str | Path) -> Matrices:
    matrices = load_pickle(path, "a list of matrices of torch.save")
    fits = isinstance(matrices, (list, tuple)) and all(isinstance(m, torch.Tensor) and m.dim() == 2 for m in matrices)
    if not fits:
        raise DataError(f"{path}: expected a list of matrices, got {type(matrices).__name__} of other things")
    if not all(m.is_floating_point() and bool(m.isfinite().all()) for m in matrices):
        raise DataError(f"{path}: expected finite floating-point numbers, got others")
    return [m.detach() for m in matrices]


def write_parameters(structure: str | Path, features: str | Path, pseudo_graphs: PseudoGraphs) -> None:
    """Write logits and features of directed pseudo-graphs as GFKD's two lists; diagonals, which it ignores, are 0.

    Raises:
        InputError: undirected pseudo-graphs, whose two directions GFKD would draw separately, or a budget of pairs.
        DataError: a file cannot be written.
    """
    layout = pseudo_graphs.layout
    check(layout.directed and layout.is_complete, "pseudo_graphs", "a complete directed layout", layout)
    check(pseudo_graphs.noise == "logistic", "pseudo_graphs", "logistic noise", pseudo_graphs.noise)
    save_pickle(structure, [m.cpu().clone() for m in matrices_from_pairs(pseudo_graphs.logits.detach(), layout)])
    rows = pseudo_graphs.features.detach().cpu().split(list(layout.sizes))
    save_pickle(features, [x.clone() for x in rows])


def to_pseudo_graphs(
    params: Sequence[torch.Tensor], feature_paras: Sequence[torch.Tensor], y: torch.Tensor
) -> PseudoGraphs:
    """GFKD's logits as learnable pseudo-graphs.

    Args:
        params, feature_paras: as :func:`read_parameters` returns them.
        y: int64 [B], labels, which the files do not hold (the text does).
    """
    layout, logits = pairs_from_matrices(params)
    return PseudoGraphs(logits, torch.cat(list(feature_paras)), y, layout, feature_kind="one-hot")


def pairs_from_matrices(params: Sequence[torch.Tensor]) -> tuple[PairLayout, torch.Tensor]:
    """A directed layout and the logits of its pairs [P], from matrices whose entry (j, k) is an edge j -> k.

    Raises:
        InputError: no matrices, or matrices that are not square and of one dtype.
    """
    check(len(params) > 0, "params", "at least one matrix of logits", list(params))
    for theta in params:
        check_tensor("params", theta, shape=(len(theta), len(theta)), dtypes=(params[0].dtype,))
    layout, position = _layout(tuple(len(theta) for theta in params), params[0].device)
    return layout, torch.cat([theta.flatten() for theta in params])[position]


def matrices_from_pairs(pairs: torch.Tensor, layout: PairLayout, diagonal: float = 0.0) -> Matrices:
    """The inverse of :func:`pairs_from_matrices`, with `diagonal` where no pair is."""
    _, position = _layout(layout.sizes, layout.device)
    lengths = [n * n for n in layout.sizes]
    flat = pairs.new_full((sum(lengths),), diagonal)
    flat[position] = pairs
    return [matrix.view(n, n) for matrix, n in zip(flat.split(lengths), layout.sizes, strict=True)]


@functools.lru_cache(maxsize=8)
def _layout(sizes: tuple[int, ...], device: torch.device) -> tuple[PairLayout, torch.Tensor]:
    """A directed layout, and where in the concatenated matrices the logit of each of its pairs stands."""
    layout = PairLayout.complete(sizes, directed=True, device=device)
    target, source = layout.pair_nodes()
    graph = layout.graph_of_pair(torch.arange(layout.num_pairs, device=device))
    n = torch.tensor(sizes, device=device)
    first_entry = torch.nn.functional.pad((n * n).cumsum(0), (1, 0))[graph]
    first_node = layout.node_ptr[graph]
    return layout, first_entry + (source - first_node) * n[graph] + (target - first_node)
