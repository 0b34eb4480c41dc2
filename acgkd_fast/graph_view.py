"""A batch of graphs as code written for DGL sees it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from .errors import InputError
from .graphs import GraphBatch


def dgl_graph(graphs: GraphBatch) -> Any:
    """A DGL graph where DGL is installed, else a :class:`GraphView`; node data "attr", edge data "weight"."""
    try:
        return graphs.to_dgl()
    except InputError:
        return GraphView(graphs)


def _edges_per_graph(graphs: GraphBatch) -> torch.Tensor:
    bounds = graphs.edges.rowptr[graphs.ptr].long()
    return bounds[1:] - bounds[:-1]


class GraphView:
    """What a DGL graph tells, for modules that do no more than ask: no message passing of DGL's own.

    Attributes:
        ndata, edata: dicts of tensors [N, ...] and [E, ...]; "attr" and "weight" to begin with.
        batch_size: number of graphs.
        device: where the tensors are.
    """

    def __init__(self, graphs: GraphBatch) -> None:
        self._graphs = graphs
        self._edge_index, weight = graphs.to_edge_index()
        self.ndata: dict[str, torch.Tensor] = {"attr": graphs.x}
        self.edata: dict[str, torch.Tensor] = {"weight": weight}
        self.batch_size = graphs.num_graphs
        self.device = graphs.x.device

    def num_nodes(self) -> int:
        return self._graphs.num_nodes

    number_of_nodes = num_nodes

    def num_edges(self) -> int:
        return int(self._edge_index.shape[1])

    number_of_edges = num_edges

    def edges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(sources, targets), int64 [E] each."""
        return self._edge_index[0], self._edge_index[1]

    def batch_num_nodes(self) -> torch.Tensor:
        """int64 [B]."""
        return self._graphs.sizes

    def batch_num_edges(self) -> torch.Tensor:
        """int64 [B]."""
        return _edges_per_graph(self._graphs)

    def in_degrees(self) -> torch.Tensor:
        """int64 [N], edges that arrive."""
        return torch.bincount(self._edge_index[1], minlength=self.num_nodes())

    def out_degrees(self) -> torch.Tensor:
        """int64 [N], edges that leave."""
        return torch.bincount(self._edge_index[0], minlength=self.num_nodes())

    def local_var(self) -> GraphView:
        """A view whose `ndata` and `edata` can be written to without a trace here."""
        view = copy.copy(self)
        view.ndata, view.edata = dict(self.ndata), dict(self.edata)
        return view

    @contextlib.contextmanager
    def local_scope(self) -> Iterator[None]:
        """Writes to `ndata` and `edata` are undone at the end."""
        before = self.ndata, self.edata
        self.ndata, self.edata = dict(self.ndata), dict(self.edata)
        try:
            yield
        finally:
            self.ndata, self.edata = before

    def to(self, device: torch.device | str) -> GraphView:
        return GraphView(self._graphs.to(device))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"graph: expected DGL to be installed, as the teacher uses its graph.{name}, got none")
