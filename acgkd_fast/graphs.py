"""Edges and graphs of a ragged batch, and their conversions to and from other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError, check, check_tensor, fail
from .layout import PairLayout

if TYPE_CHECKING:
    from torch_geometric.data import Batch, Data
    from torch_sparse import SparseTensor

Transposed = tuple[torch.Tensor, torch.Tensor, torch.Tensor] | tuple[None, None, None]


@dataclass(eq=False)
class EdgeSample:
    """Edges of a batch of B graphs with N nodes in all, in CSR form. Row i receives from its columns.

    Attributes:
        rowptr: int32 [N + 1]; row i owns entries rowptr[i] .. rowptr[i + 1] - 1.
        col: int32 [E], node numbers of the whole batch, ascending in each row.
        value: edge weights [E]; may require grad.
        ptr: int64 [B + 1], node offsets of the graphs.
        symmetric: structure and values equal their transpose (undirected edges with tied values).
        pair: int64 [E], the logit of each edge, -1 in unused capacity; None for given graphs.
        layout: the candidate pairs the edges were drawn from; None for given graphs.
        port: zeros [P] stored once, through which message passing sends the gradients of absent
            candidates; only for straight-through samples.
        needed: int64 [1] on the device, the edges that the sample wanted; None without capacity.
        antithetic: the mirrored draw of an ARM pair.
        rng: int64 [2], seed and step of an ARM pair.
    """

    rowptr: torch.Tensor
    col: torch.Tensor
    value: torch.Tensor
    ptr: torch.Tensor
    symmetric: bool
    pair: torch.Tensor | None = None
    layout: PairLayout | None = None
    port: torch.Tensor | None = None
    needed: torch.Tensor | None = None
    antithetic: EdgeSample | None = None
    rng: torch.Tensor | None = None
    _transposed: Transposed | None = field(default=None, init=False, repr=False)

    @classmethod
    def from_edge_index(
        cls,
        edge_index: torch.Tensor,
        ptr: torch.Tensor,
        edge_weight: torch.Tensor | None = None,
        *,
        symmetric: bool | None = None,
    ) -> EdgeSample:
        """Sort an edge list into CSR.

        Args:
            edge_index: int64 [2, E]; first row the sources, second the targets, as in PyTorch
                Geometric. Repeated edges stay repeated.
            ptr: int64 [B + 1], node offsets.
            edge_weight: [E], may require grad; default ones in the default dtype.
            symmetric: promise that the edges (and weights) equal their transpose, which saves the
                transpose in backward. Default: tested when no weights are given, else False.

        Raises:
            InputError: wrong shapes, or node numbers outside 0..N-1.
        """
        check_tensor("edge_index", edge_index, shape=(2, None), dtypes=(torch.int64,))
        check_tensor("ptr", ptr, shape=(None,), dtypes=(torch.int64,), device=edge_index.device)
        check(ptr.numel() > 0, "ptr", "the B + 1 node offsets of the graphs", ptr)
        nodes = int(ptr[-1])
        if edge_index.numel():
            low, high = int(edge_index.min()), int(edge_index.max())
            check(low >= 0 and high < nodes, "edge_index", f"node numbers in 0..{nodes - 1}", (low, high))
        source, target = edge_index
        key, order = torch.sort(target * nodes + source, stable=True)
        if symmetric is None:
            symmetric = edge_weight is None and bool(torch.equal(key, torch.sort(source * nodes + target)[0]))
        if edge_weight is None:
            value = torch.ones(source.numel(), device=edge_index.device)
        else:
            check_tensor("edge_weight", edge_weight, shape=(source.numel(),), device=edge_index.device)
            value = edge_weight[order]
        counts = torch.bincount(target, minlength=nodes)
        rowptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        return cls(rowptr, source[order].int(), value, ptr, symmetric)

    @property
    def num_nodes(self) -> int:
        return self.rowptr.numel() - 1

    @property
    def num_graphs(self) -> int:
        return self.ptr.numel() - 1

    @property
    def num_edges(self) -> int:
        """Stored entries (two per undirected edge). Reads the device when a capacity is in use."""
        return self.col.numel() if self.needed is None else int(self.rowptr[-1])

    def overflowed(self) -> bool:
        """Whether the capacity was too small, in which case the sample is empty. Reads the device."""
        return self.needed is not None and int(self.needed) > self.col.numel()

    def row(self) -> torch.Tensor:
        """int64 [num_edges]: the row of each entry."""
        counts = (self.rowptr[1:] - self.rowptr[:-1]).long()
        nodes = torch.arange(self.num_nodes, device=self.rowptr.device)
        return nodes.repeat_interleave(counts, output_size=self.num_edges)

    def transposed(self) -> Transposed:
        """CSR of the transpose and the position of its entries here; all None if symmetric."""
        if self.symmetric:
            return None, None, None
        if self._transposed is None:
            row, col = self.row(), self.col[: self.num_edges].long()
            order = torch.argsort(col * self.num_nodes + row, stable=True)
            counts = torch.bincount(col, minlength=self.num_nodes)
            rowptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
            self._transposed = rowptr, row[order].int(), order.int()
        return self._transposed

    def with_value(self, value: torch.Tensor, *, symmetric: bool = False) -> EdgeSample:
        """The same structure with other weights; gradients no longer reach the logits by themselves."""
        check_tensor("value", value, shape=tuple(self.value.shape), device=self.value.device)
        return replace(self, value=value, symmetric=symmetric, port=None)

    def drop_zeros(self) -> EdgeSample:
        """Without entries of value 0, such as the absent pairs of sparse straight-through. Detached."""
        keep = self.value[: self.num_edges].detach() != 0
        counts = torch.bincount(self.row()[keep], minlength=self.num_nodes)
        rowptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        size = self.num_edges
        pair = None if self.pair is None else self.pair[:size][keep]
        value = self.value[:size].detach()[keep]
        return EdgeSample(rowptr, self.col[:size][keep], value, self.ptr, self.symmetric, pair, self.layout)

    def to(self, device: torch.device | str) -> EdgeSample:
        """A copy on another device (differentiable through `value`)."""

        def move(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device)

        return EdgeSample(
            move(self.rowptr),
            move(self.col),
            move(self.value),
            move(self.ptr),
            self.symmetric,
            move(self.pair),
            None if self.layout is None else self.layout.to(device),
            move(self.port),
            move(self.needed),
            None if self.antithetic is None else self.antithetic.to(device),
            move(self.rng),
        )

    def to_edge_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(edge_index int64 [2, E] with sources first, edge_weight [E]) as PyTorch Geometric has them."""
        size = self.num_edges
        return torch.stack([self.col[:size].long(), self.row()]), self.value[:size]

    def to_dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded adjacency [B, n, n] (row receives from column) and node mask [B, n], n the largest size."""
        sizes = self.ptr[1:] - self.ptr[:-1]
        width = int(sizes.max()) if sizes.numel() else 0
        graph = torch.arange(self.num_graphs, device=self.ptr.device).repeat_interleave(sizes)
        row, col = self.row(), self.col[: self.num_edges].long()
        first = self.ptr[graph[row]]
        index = (graph[row], row - first, col - first)
        dense = self.value.new_zeros(self.num_graphs, width, width)
        dense = dense.index_put(index, self.value[: self.num_edges], accumulate=True)
        mask = torch.arange(width, device=self.ptr.device) < sizes[:, None]
        return dense, mask

    def to_sparse_tensor(self) -> SparseTensor:
        """A torch-sparse SparseTensor (rows receive).

        Raises:
            InputError: torch-sparse is not installed.
        """
        try:
            from torch_sparse import SparseTensor
        except ImportError as error:
            raise InputError("to_sparse_tensor: expected torch-sparse to be installed (extra 'peers')") from error
        size, nodes = self.num_edges, self.num_nodes
        return SparseTensor(
            rowptr=self.rowptr.long(),
            col=self.col[:size].long(),
            value=self.value[:size],
            sparse_sizes=(nodes, nodes),
            is_sorted=True,
            trust_data=True,
        )


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
        graphs = torch.arange(self.num_graphs, device=self.x.device)
        return graphs.repeat_interleave(self.sizes, output_size=self.num_nodes)

    def to(self, device: torch.device | str) -> GraphBatch:
        y = None if self.y is None else self.y.to(device)
        return GraphBatch(self.x.to(device), self.edges.to(device), y)

    def select(self, graphs: torch.Tensor | Sequence[int]) -> GraphBatch:
        """Some of the graphs, in the order given; repeats are allowed.

        Raises:
            InputError: a position outside 0..B-1, or straight-through edges whose `port` has open
                gradients, which would be lost.
        """
        _check_closed(self.edges)
        chosen = torch.as_tensor(graphs, dtype=torch.int64, device=self.x.device).reshape(-1)
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.num_graphs:
            raise fail("graphs", f"positions in 0..{self.num_graphs - 1}", chosen.tolist())
        edges = self.edges
        nodes, ptr = _concatenated_ranges(self.ptr, chosen)
        entries, entry_ptr = _concatenated_ranges(edges.rowptr.long()[self.ptr], chosen)
        shift = (ptr[:-1] - self.ptr[chosen]).repeat_interleave(entry_ptr[1:] - entry_ptr[:-1])
        counts = (edges.rowptr[1:] - edges.rowptr[:-1])[nodes]
        rowptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        col = (edges.col.long()[entries] + shift).int()
        picked = EdgeSample(rowptr, col, edges.value[entries], ptr, edges.symmetric)
        return GraphBatch(self.x[nodes], picked, None if self.y is None else self.y[chosen])

    @staticmethod
    def concatenate(batches: Sequence[GraphBatch]) -> GraphBatch:
        """One batch holding the graphs of all, in order.

        Raises:
            InputError: no batches, labels on some but not all of them, or straight-through edges
                whose `port` has open gradients, which would be lost.
        """
        check(len(batches) > 0, "batches", "at least one", batches)
        for batch in batches:
            _check_closed(batch.edges)
        labelled = [b.y is not None for b in batches]
        check(all(labelled) or not any(labelled), "batches", "labels on all or on none", labelled)
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
            InputError: a graph without node features, or labels that are not one int per graph.
        """
        from torch_geometric.data import Batch

        batch = graphs if isinstance(graphs, Batch) else Batch.from_data_list(list(graphs))
        if batch.x is None:
            raise InputError("graphs: expected node features x on every graph, got none (add degree features first)")
        edges = EdgeSample.from_edge_index(batch.edge_index, batch.ptr, batch.get("edge_weight"))
        y = batch.get("y")
        if y is not None:
            y = y.reshape(-1).long()
        x = batch.x if batch.x.is_floating_point() else batch.x.float()
        return cls(x, edges, y)

    def to_pyg(self) -> Batch:
        """A PyTorch Geometric Batch with ``x``, ``edge_index``, ``edge_weight``, ``y``, ``batch``, ``ptr``."""
        from torch_geometric.data import Batch, Data

        edge_index, weight = self.edges.to_edge_index()
        node_ptr = self.ptr.tolist()
        edge_ptr = self.edges.rowptr[self.ptr].tolist()
        graphs = []
        for g in range(self.num_graphs):
            entries = slice(edge_ptr[g], edge_ptr[g + 1])
            graphs.append(
                Data(
                    x=self.x[node_ptr[g] : node_ptr[g + 1]],
                    edge_index=edge_index[:, entries] - node_ptr[g],
                    edge_weight=weight[entries],
                    num_nodes=node_ptr[g + 1] - node_ptr[g],
                    **({} if self.y is None else {"y": self.y[g : g + 1]}),
                )
            )
        return Batch.from_data_list(graphs)

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
        edge_index = torch.stack([number[graph, col], number[graph, row]])
        weight = adjacency[graph, row, col]
        symmetric = bool(torch.equal(adjacency, adjacency.transpose(1, 2)))
        return cls(x[mask], EdgeSample.from_edge_index(edge_index, ptr, weight, symmetric=symmetric), y)

    def to_edge_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`EdgeSample.to_edge_index`."""
        return self.edges.to_edge_index()

    def to_sparse_tensor(self) -> SparseTensor:
        """See :meth:`EdgeSample.to_sparse_tensor`."""
        return self.edges.to_sparse_tensor()


def _check_closed(edges: EdgeSample) -> None:
    if edges.port is not None and edges.port.requires_grad:
        raise InputError("edges: expected no open gradients of absent candidates, got a sample drawn with grad enabled")


def _concatenated_ranges(ptr: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices ptr[c] .. ptr[c + 1] - 1 of every c in `chosen`, one after the other, and their offsets."""
    counts = ptr[chosen + 1] - ptr[chosen]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    total = int(offsets[-1])
    start = (ptr[chosen] - offsets[:-1]).repeat_interleave(counts, output_size=total)
    return torch.arange(total, device=ptr.device) + start, offsets
