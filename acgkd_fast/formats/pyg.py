"""Pseudo-graphs as a PyTorch Geometric data set, to be used like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_geometric.data.in_memory_dataset import InMemoryDataset

from ..checkpoints import load_graphs
from ..errors import DataError
from ..graphs import GraphBatch

_POOL = "pseudo_graphs.safetensors"


class PseudoGraphDataset(InMemoryDataset):
    """The graphs of a run folder, of a file of :func:`acgkd_fast.checkpoints.save_graphs`, or of a GraphBatch.

    Graphs have ``x``, ``edge_index`` and ``y``, and ``edge_weight`` only where a weight is not 1, so that they can be
    mixed with real graphs.

    Args:
        source: run folder, file or graphs.
        transform, pre_transform, pre_filter: as for every data set of PyTorch Geometric.

    Raises:
        DataError: no such file, or no graphs in it.
    """

    def __init__(
        self,
        source: str | Path | GraphBatch,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(None, transform, pre_transform, pre_filter)
        graphs = source if isinstance(source, GraphBatch) else _read(Path(source))
        graphs = GraphBatch(graphs.x.detach(), graphs.edges.drop_zeros(), graphs.y)
        items = graphs.to_pyg().to_data_list()
        if bool((graphs.edges.value == 1).all()):
            for item in items:
                del item.edge_weight
        if pre_filter is not None:
            items = [item for item in items if pre_filter(item)]
        if pre_transform is not None:
            items = [pre_transform(item) for item in items]
        self.data, self.slices = self.collate(items)


def _read(path: Path) -> GraphBatch:
    if path.is_dir():
        path = path / _POOL
    graphs, _ = load_graphs(path)
    if graphs.num_graphs == 0:
        raise DataError(f"{path}: expected at least one graph, got none")
    return graphs
