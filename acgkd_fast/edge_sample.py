"""Edges of a ragged batch in CSR form, and their conversions to and from other libraries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError, check, check_tensor
from .layout import PairLayout

if TYPE_CHECKING:
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
        draw: (logits, table, rng, temperature, kind, noise) behind `port`, None without one.
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
    draw: tuple[Any, ...] | None = field(default=None, repr=False)
    _transposed: Transposed | None = field(default=None, init=False, repr=False)
    _has_self_loops: bool | None = field(default=None, init=False, repr=False)

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
            InputError: wrong shapes, node numbers outside 0..N-1, or an edge between two graphs.
        """
        check_tensor("edge_index", edge_index, shape=(2, None), dtypes=(torch.int64,))
        check_tensor("ptr", ptr, shape=(None,), dtypes=(torch.int64,), device=edge_index.device)
        check(ptr.numel() > 0, "ptr", "the B + 1 node offsets of the graphs", ptr)
        nodes = int(ptr[-1])
        if edge_index.numel():
            low, high = int(edge_index.min()), int(edge_index.max())
            check(low >= 0 and high < nodes, "edge_index", f"node numbers in 0..{nodes - 1}", (low, high))
        source, target = edge_index
        if ptr.numel() > 2:
            graph = graph_of_node(ptr)
            inside = torch.equal(graph[source], graph[target])
            check(inside, "edge_index", "both ends of an edge in one graph", edge_index)
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
        """CSR of the transpose and the position of its entries here; all None if symmetric.

        As long as `col`; no device read, so that a directed step can be captured as well.
        """
        if self.symmetric:
            return None, None, None
        if self._transposed is None:
            nodes, device = self.num_nodes, self.col.device
            entries = torch.arange(self.col.numel(), dtype=torch.int32, device=device)
            row = torch.searchsorted(self.rowptr[1:], entries, right=True, out_int32=True)
            used = row < nodes
            # Rows ascend already, so sorting by column alone gives (column, row); unused capacity goes last.
            col, order = torch.sort(self.col.where(used, nodes), stable=True)
            bounds = torch.arange(nodes + 1, dtype=torch.int32, device=device)
            rowptr = torch.searchsorted(col, bounds, out_int32=True)
            self._transposed = rowptr, row.where(used, 0)[order], order.int()
        return self._transposed

    def has_self_loops(self) -> bool:
        """Whether an entry joins a node to itself. Drawn edges never do; otherwise reads the device once."""
        if self._has_self_loops is None:
            self._has_self_loops = self.layout is None and bool((self.row() == self.col[: self.num_edges]).any())
        return self._has_self_loops

    def with_value(self, value: torch.Tensor, *, symmetric: bool = False) -> EdgeSample:
        """The same structure with other weights; gradients no longer reach the logits by themselves."""
        check_tensor("value", value, shape=tuple(self.value.shape), device=self.value.device)
        return replace(self, value=value, symmetric=symmetric, port=None, draw=None)

    def drop_zeros(self) -> EdgeSample:
        """Without entries of value 0, such as the absent pairs of sparse straight-through. Detached."""
        keep = self.value[: self.num_edges].detach() != 0
        counts = torch.bincount(self.row()[keep], minlength=self.num_nodes)
        rowptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        size = self.num_edges
        pair = None if self.pair is None else self.pair[:size][keep]
        value = self.value[:size].detach()[keep]
        return EdgeSample(rowptr, self.col[:size][keep], value, self.ptr, self.symmetric, pair, self.layout)

    def detach(self) -> EdgeSample:
        """The same edges without a way back to the logits."""
        return replace(self, value=self.value.detach(), port=None, draw=None)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> EdgeSample:
        """A copy on another device (differentiable through `value`)."""

        def move(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return EdgeSample(
            move(self.rowptr),
            move(self.col),
            move(self.value),
            move(self.ptr),
            self.symmetric,
            move(self.pair),
            None if self.layout is None else self.layout.to(torch.empty(0, device=device).device),
            move(self.port),
            move(self.needed),
            None if self.antithetic is None else self.antithetic.to(device, non_blocking),
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
        graph = graph_of_node(self.ptr)
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


def graph_of_node(ptr: torch.Tensor, num_nodes: int | None = None) -> torch.Tensor:
    """int64 [N], the graph of each node; without a device read where `num_nodes` is given."""
    graphs = torch.arange(ptr.numel() - 1, device=ptr.device)
    return graphs.repeat_interleave(ptr[1:] - ptr[:-1], output_size=num_nodes)
