"""Graphs of a ragged batch, and their conversions to and from other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from .edge_sample import EdgeSample, graph_of_node
from .errors import InputError, check, check_tensor, fail

if TYPE_CHECKING:
    from torch_geometric.data.batch import Batch
    from torch_geometric.data.data import Data
    from torch_sparse import SparseTensor

__all__ = ["EdgeSample", "GraphBatch"]


@dataclass(eq=False)
class GraphBatch:
    """Graphs with node features, edges and, optionally, labels.

    Attributes:
        x: node features [N, F].
        edges: the edges of the batch.
        y: int64 [B] graph labels, or None.
    """

    x: torch.Tensor
    edges: EdgeSample
    y: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("x", self.x, shape=(self.edges.num_nodes, None), device=self.edges.rowptr.device)
        if self.y is not None:
            check_tensor("y", self.y, shape=(self.edges.num_graphs,), dtypes=(torch.int64,), device=self.x.device)

    @property
    def ptr(self) -> torch.Tensor:
        return self.edges.ptr

    @property
    def sizes(self) -> torch.Tensor:
        """int64 [B], nodes of each graph."""
        return self.ptr[1:] - self.ptr[:-1]

    @property
    def num_graphs(self) -> int:
        return self.edges.num_graphs

    @property
    def num_nodes(self) -> int:
        return self.edges.num_nodes

    def batch(self) -> torch.Tensor:
        """int64 [N], the graph of each node."""
        return graph_of_node(self.ptr, self.num_nodes)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> GraphBatch:
        """A copy on another device."""
        y = None if self.y is None else self.y.to(device, non_blocking=non_blocking)
        return GraphBatch(self.x.to(device, non_blocking=non_blocking), self.edges.to(device, non_blocking), y)

    def cuda(self, device: torch.device | str | int | None = None, non_blocking: bool = False) -> GraphBatch:
        """As ``tensor.cuda``, for loops that move what a sampler hands them."""
        return self.to("cuda" if device is None else device, non_blocking)

    def cpu(self) -> GraphBatch:
        return self.to("cpu")

    def detach(self) -> GraphBatch:
        """The same graphs without gradients: neither for features nor for edges, absent candidates included."""
        return GraphBatch(self.x.detach(), self.edges.detach(), self.y)

    def select(self, graphs: torch.Tensor | Sequence[int]) -> GraphBatch:
        """Some of the graphs, in the order given; repeats are allowed.

        Raises:
            InputError: positions that are no ints in 0..B-1, or straight-through edges whose `port`
                has open gradients, which would be lost.
        """
        _check_closed(self.edges)
        chosen = torch.as_tensor(graphs, device=self.x.device).reshape(-1)
        # Cast silently, a boolean mask would pick graphs 0 and 1 over and over.
        unfit = chosen.numel() > 0 and (chosen.is_floating_point() or chosen.dtype == torch.bool)
        check(not unfit, "graphs", "integer positions", chosen)
        chosen = chosen.long()
        low, high = torch.aminmax(chosen) if chosen.numel() else (0, -1)
        if chosen.numel() and not 0 <= int(low) <= int(high) < self.num_graphs:
            raise fail("graphs", f"positions in 0..{self.num_graphs - 1}", chosen.tolist())
        edges = self.edges
        nodes, ptr = _concatenated_ranges(self.ptr, chosen)
        # Sizes of the part alone: a training loop takes hundreds of small parts of one large pool.
        entries, entry_ptr = _concatenated_ranges(edges.rowptr[self.ptr].long(), chosen)
        shift = (ptr[:-1] - self.ptr[chosen]).int()
        col = edges.col[entries] + shift.repeat_interleave(entry_ptr.diff(), output_size=entries.numel())
        rowptr = edges.rowptr.new_zeros(nodes.numel() + 1)
        torch.cumsum(edges.rowptr[nodes + 1] - edges.rowptr[nodes], 0, dtype=torch.int32, out=rowptr[1:])
        picked = EdgeSample(rowptr, col, edges.value[entries], ptr, edges.symmetric)
        # What no graph has, no part has: saves training loops a test per mini-batch.
        picked._has_self_loops = False if edges.layout is not None or edges._has_self_loops is False else None
        return GraphBatch(self.x[nodes], picked, None if self.y is None else self.y[chosen])

    @staticmethod
    def concatenate(batches: Sequence[GraphBatch]) -> GraphBatch:
        """One batch holding the graphs of all, in order.

        Raises:
            InputError: no batches, feature widths that differ, labels on some but not all of them, or
                straight-through edges whose `port` has open gradients, which would be lost.
        """
        check(len(batches) > 0, "batches", "at least one", batches)
        for batch in batches:
            _check_closed(batch.edges)
        labelled = [b.y is not None for b in batches]
        check(all(labelled) or not any(labelled), "batches", "labels on all or on none", labelled)
        widths = {b.x.shape[1] for b in batches}
        check(len(widths) == 1, "batches", "node features of one width", sorted(widths))
        rowptr, col, ptr = [batches[0].edges.rowptr[:1]], [], [batches[0].ptr[:1]]
        nodes = edges = 0
        for batch in batches:
            count = batch.edges.num_edges
            rowptr.append(batch.edges.rowptr[1:] + edges)
            col.append(batch.edges.col[:count] + nodes)
            ptr.append(batch.ptr[1:] + nodes)
            nodes, edges = nodes + batch.num_nodes, edges + count
        joined = EdgeSample(
            torch.cat(rowptr),
            torch.cat(col),
            torch.cat([b.edges.value[: b.edges.num_edges] for b in batches]),
            torch.cat(ptr),
            all(b.edges.symmetric for b in batches),
        )
        y = torch.cat([b.y for b in batches if b.y is not None]) if all(labelled) else None
        return GraphBatch(torch.cat([b.x for b in batches]), joined, y)

    @classmethod
    def from_pyg(cls, graphs: Batch | Sequence[Data]) -> GraphBatch:
        """From PyTorch Geometric graphs (``x``, ``edge_index``, optional ``edge_weight`` and ``y``).

        Raises:
            InputError: no graphs, a graph without node features, labels that are not one int per graph,
                or torch-geometric is not installed.
        """
        Batch = _pyg_data("from_pyg").Batch
        check(isinstance(graphs, Batch) or len(graphs) > 0, "graphs", "at least one", graphs)
        batch: Any = graphs if isinstance(graphs, Batch) else Batch.from_data_list(list(cast("Sequence[Data]", graphs)))
        if batch.x is None:
            raise InputError("graphs: expected node features x on every graph, got none (add degree features first)")
        edges = EdgeSample.from_edge_index(batch.edge_index, batch.ptr, batch.get("edge_weight"))
        y = batch.get("y")
        if y is not None:
            check(torch.equal(y, y.long().to(y.dtype)), "y", "integer class labels", y)
            y = y.reshape(-1).long()
        x = batch.x if batch.x.is_floating_point() else batch.x.float()
        return cls(x, edges, y)

    def to_pyg(self) -> Batch:
        """A PyTorch Geometric Batch with ``x``, ``edge_index``, ``edge_weight``, ``y``, ``batch``, ``ptr``.

        Raises:
            InputError: no graphs, or torch-geometric is not installed.
        """
        check(self.num_graphs > 0, "graphs", "at least one", self.num_graphs)
        pyg = _pyg_data("to_pyg")
        edge_index, weight = self.edges.to_edge_index()
        node_ptr = self.ptr.tolist()
        edge_ptr = self.edges.rowptr[self.ptr].tolist()
        graphs = []
        for g in range(self.num_graphs):
            entries = slice(edge_ptr[g], edge_ptr[g + 1])
            graphs.append(
                pyg.Data(
                    x=self.x[node_ptr[g] : node_ptr[g + 1]],
                    edge_index=edge_index[:, entries] - node_ptr[g],
                    edge_weight=weight[entries],
                    num_nodes=node_ptr[g + 1] - node_ptr[g],
                    **({} if self.y is None else {"y": self.y[g : g + 1]}),
                )
            )
        return pyg.Batch.from_data_list(graphs)

    def to_dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Padded (x [B, n, F], adjacency [B, n, n], mask [B, n])."""
        adjacency, mask = self.edges.to_dense()
        x = self.x.new_zeros(*mask.shape, self.x.shape[1])
        x[mask] = self.x
        return x, adjacency, mask

    @classmethod
    def from_dense(
        cls, x: torch.Tensor, adjacency: torch.Tensor, mask: torch.Tensor | None = None, y: torch.Tensor | None = None
    ) -> GraphBatch:
        """From padded x [B, n, F], adjacency [B, n, n] (non-zeros are edges) and mask [B, n] (default: all).

        Each graph's nodes must come before its padding.
        """
        check_tensor("x", x, shape=(None, None, None))
        graphs, width, _ = x.shape
        check_tensor("adjacency", adjacency, shape=(graphs, width, width), device=x.device)
        if mask is None:
            mask = torch.ones(graphs, width, dtype=torch.bool, device=x.device)
        check_tensor("mask", mask, shape=(graphs, width), dtypes=(torch.bool,), device=x.device)
        check(bool((mask[:, 1:] <= mask[:, :-1]).all()), "mask", "nodes before padding in every graph", mask)
        ptr = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        number = torch.full(mask.shape, -1, device=x.device)
        number[mask] = torch.arange(int(ptr[-1]), device=x.device)
        graph, row, col = adjacency.detach().nonzero(as_tuple=True)
        check(bool(mask[graph, torch.maximum(row, col)].all()), "adjacency", "no edges in the padding", adjacency)
        edge_index = torch.stack([number[graph, col], number[graph, row]])
        weight = adjacency[graph, row, col]
        # Entries that want gradients are not tied to their mirror image, whatever their values.
        symmetric = not adjacency.requires_grad and torch.equal(adjacency, adjacency.transpose(1, 2))
        return cls(x[mask], EdgeSample.from_edge_index(edge_index, ptr, weight, symmetric=symmetric), y)

    def to_dgl(self) -> Any:
        """A batched DGLGraph: node data "attr", edge data "weight", both differentiable.

        Labels stay here (``.y``); DGL keeps none per graph.

        Raises:
            InputError: DGL cannot be imported.
        """
        try:
            import dgl
        except (ImportError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"to_dgl: expected DGL to be installed, got none ({reason})") from error
        edge_index, weight = self.to_edge_index()
        graph = dgl.graph((edge_index[0], edge_index[1]), num_nodes=self.num_nodes)
        graph.set_batch_num_nodes(self.sizes)
        first = self.edges.rowptr.long()[self.ptr]
        graph.set_batch_num_edges(first[1:] - first[:-1])
        graph.ndata["attr"] = self.x
        graph.edata["weight"] = weight
        return graph

    def to_edge_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`EdgeSample.to_edge_index`."""
        return self.edges.to_edge_index()

    def to_sparse_tensor(self) -> SparseTensor:
        """See :meth:`EdgeSample.to_sparse_tensor`."""
        return self.edges.to_sparse_tensor()


def _check_closed(edges: EdgeSample) -> None:
    if edges.port is not None and edges.port.requires_grad:
        raise InputError("edges: expected no open gradients of absent candidates, got a sample drawn with grad enabled")


def _pyg_data(wanted_by: str) -> Any:
    try:
        import torch_geometric.data
    except ImportError as error:
        raise InputError(f"{wanted_by}: expected torch-geometric to be installed, got none") from error
    return torch_geometric.data


def _concatenated_ranges(ptr: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices ptr[c] .. ptr[c + 1] - 1 of every c in `chosen`, one after the other, and their offsets."""
    first = ptr[chosen]
    counts = ptr[chosen + 1] - first
    offsets = ptr.new_zeros(chosen.numel() + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    total = int(offsets[-1])
    start = (first - offsets[:-1]).repeat_interleave(counts, output_size=total)
    return torch.arange(total, device=ptr.device).add_(start), offsets
