"""The graph convolution of Kipf and Welling, with the interface of PyTorch Geometric."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import InputError, check, check_choice
from ..graphs import EdgeSample
from ..propagate import gcn_propagate, gin_propagate
from .adjacency import EdgeList, Edges, check_sample, edge_list, entry_rows, sorted_edges
from .linear import commutes, linear, make_linear, widens
from .messages import check_features, handed_out

FLOWS = ("source_to_target", "target_to_source")


class GCNConv(nn.Module):
    """D^-1/2 (A + I) D^-1/2 X W + b, with D from the edge weights.

    Arguments, weights, state-dict keys (``lin.weight``, ``bias``), initialisation and results are those of
    ``torch_geometric.nn.GCNConv``.

    Args:
        in_channels: width F_in of the node features; -1 takes it from the first call.
        out_channels: width F_out of the result, at least 1.
        improved: add 2 I. As in PyTorch Geometric, an edge list without weights gets I all the same.
        cached: normalise the edges of the first call and use them in every later one, whatever is passed.
        add_self_loops: add I; a node that has a self-loop keeps it, with its weight, and gets no
            second one. Default: as `normalize`. As in PyTorch Geometric, a SparseTensor's own self-loops are
            replaced, and those of a torch.sparse matrix are added to.
        normalize: scale by the degrees; without it the layer computes A X W + b.
        bias: learn b.
        aggr: "add" or "sum".
        flow: "source_to_target", or "target_to_source" for edge lists whose first row receives.
        node_dim, decomposed_layers, aggr_kwargs: taken for the sake of the signature; nodes are always the
            last but one dimension, and the features are never split up.

    Gradients:
        Parameters, `x` and edge weights, as :func:`acgkd_fast.gcn_propagate` says.

    Raises:
        InputError: a width below 1, self-loops without normalisation, or an unknown aggregation or flow.

    Source: Kipf and Welling, arXiv 1609.02907.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        improved: bool = False,
        cached: bool = False,
        add_self_loops: bool | None = None,
        normalize: bool = True,
        bias: bool = True,
        *,
        aggr: str = "add",
        flow: str = "source_to_target",
        node_dim: int = -2,
        decomposed_layers: int = 1,
        aggr_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_sum(aggr)
        check_choice("flow", flow, FLOWS)
        # The wording of PyTorch Geometric's own error is part of it: its tests look for that.
        wanted = "False where normalize is False (GCNConv does not support adding self-loops then)"
        check(normalize or not add_self_loops, "add_self_loops", wanted, add_self_loops)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.improved = improved
        self.cached = cached
        self.add_self_loops = normalize if add_self_loops is None else add_self_loops
        self.normalize = normalize
        self.aggr = aggr
        self.flow = flow
        self.lin = make_linear(in_channels, out_channels, bias=False, glorot=True)
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self._cached_edge_index: tuple[torch.Tensor, torch.Tensor] | None = None
        self._cached_adj_t: tuple[torch.Tensor, torch.Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self._cached_edge_index = None
        self._cached_adj_t = None

    def forward(self, x: torch.Tensor, edge_index: Edges, edge_weight: torch.Tensor | None = None) -> torch.Tensor:
        """One layer.

        Args:
            x: node features [N, F_in], or [..., N, F_in] for several on one graph; may be a torch.sparse matrix.
            edge_index: an EdgeSample, int64 [2, E] with sources first, or a sparse matrix whose rows receive.
            edge_weight: [E], only with an edge list; default ones.

        Returns:
            [..., N, F_out], dtype of `x`.

        Raises:
            InputError: features, edges or weights of the wrong form.
        """
        if isinstance(x, (tuple, list)):
            raise InputError("x: expected one tensor, as GCNConv joins nodes of one kind, received a tuple")
        check_features("x", x, self.in_channels)
        return convolve(self, x, edge_index, edge_weight)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def check_sum(aggr: Any) -> None:
    check(aggr in ("add", "sum"), "aggr", "add or sum (other aggregations: SAGEConv, or torch_geometric's layer)", aggr)


def convolve(layer: Any, x: torch.Tensor, edges: Edges, edge_weight: torch.Tensor | None) -> torch.Tensor:
    """A GCN layer, ours or PyTorch Geometric's by its attributes, on features of the right form."""
    lin, bias = layer.lin, layer.bias
    if x.layout == torch.strided and commutes(lin) and widens(lin):
        return linear(_propagate(layer, x, edges, edge_weight), lin.weight, bias)
    out = _propagate(layer, lin(x), edges, edge_weight)
    return handed_out(out) if bias is None else out + bias


def _propagate(layer: Any, x: torch.Tensor, edges: Edges, edge_weight: torch.Tensor | None) -> torch.Tensor:
    if x.dim() > 2:
        nodes_first = x.movedim(-2, 0)
        out = _propagate(layer, nodes_first.flatten(1), edges, edge_weight)
        return out.view(nodes_first.shape).movedim(0, -2)
    if layer.cached and layer.normalize:
        return gin_propagate(x, _cached(layer, x, edges, edge_weight), eps=-1.0)
    sample, add_self_loops = _matrix(layer, x, edges, edge_weight)
    if not layer.normalize:
        return gin_propagate(x, sample, eps=-1.0)
    return gcn_propagate(x, sample, add_self_loops=add_self_loops)


def _matrix(layer: Any, x: torch.Tensor, edges: Edges, edge_weight: torch.Tensor | None) -> tuple[EdgeSample, bool]:
    """The matrix of a layer before normalisation, and whether I is still to be added."""
    loops = layer.normalize and layer.add_self_loops
    if isinstance(edges, EdgeSample):
        check_sample(x, edges, edge_weight)
        if loops and edges.has_self_loops():
            return _fill_self_loops(edges, 2.0 if layer.improved else 1.0), False
        return (_halved(edges) if loops and layer.improved else edges), loops
    nodes = x.shape[0]
    given = edge_list(edges, edge_weight)
    if given.attr is not None:
        raise InputError(f"edge_index: expected one weight per entry, got values of shape {tuple(given.attr.shape)}")
    # PyTorch Geometric's rule, by which `improved` does nothing for an edge list without weights.
    fill = 2.0 if layer.improved and (given.weight is not None or given.kind != "list") else 1.0
    if loops and given.kind != "list":
        given, loops = _with_self_loops(given, nodes, fill, x.dtype), False
    made = sorted_edges(given.ends, nodes, flow=layer.flow)
    if not loops or (fill == 1.0 and not made.has_loops):
        return made.sample(given.weight, x.dtype), loops
    filled = sorted_edges(given.ends, nodes, flow=layer.flow, loops=nodes)
    if given.weight is None:
        return filled.sample(None, x.dtype), False
    weight, own = given.weight, given.weight.new_full((nodes,), fill)
    if filled.kept is not None:
        at = (given.ends[0] == given.ends[1]).nonzero().squeeze(1)
        own = own.index_put((given.ends[0, at].long(),), weight[at])
        weight = weight[filled.kept]
    return filled.sample(torch.cat([weight, own]), x.dtype), False


def _with_self_loops(given: EdgeList, nodes: int, fill: float, dtype: torch.dtype) -> EdgeList:
    """A sparse matrix plus self-loops: in the place of its own for a SparseTensor, beside them for torch.sparse."""
    index, weight = given.ends, given.weight
    if weight is None:
        weight = torch.ones(index.shape[1], dtype=dtype, device=index.device)
    if given.kind == "SparseTensor":
        others = index[0] != index[1]
        index, weight = index[:, others], weight[others]
    own = torch.arange(nodes, device=index.device).expand(2, -1)
    return EdgeList(torch.cat([index, own], dim=1), torch.cat([weight, weight.new_full((nodes,), fill)]))


def _fill_self_loops(edges: EdgeSample, fill: float) -> EdgeSample:
    """One self-loop on every node: of weight `fill`, or of the weight of the last one that is there."""
    edge_index, weight = edges.to_edge_index()
    loop = edge_index[0] == edge_index[1]
    nodes = torch.arange(edges.num_nodes, device=loop.device)
    if torch.equal(edge_index[0, loop], nodes):
        return edges
    own = weight.new_full((edges.num_nodes,), fill).index_put((edge_index[0, loop],), weight[loop])
    return EdgeSample.from_edge_index(
        torch.cat([edge_index[:, ~loop], nodes.expand(2, -1)], dim=1),
        edges.ptr,
        torch.cat([weight[~loop], own]),
        symmetric=edges.symmetric,
    )


def _halved(edges: EdgeSample) -> EdgeSample:
    """A / 2: normalised, A / 2 + I is A + 2 I, and this way the gradients of absent candidates stay."""
    port = None if edges.port is None else 0.5 * edges.port
    return replace(edges, value=0.5 * edges.value, port=port, draw=None)


def _cached(layer: Any, x: torch.Tensor, edges: Edges, edge_weight: torch.Tensor | None) -> EdgeSample:
    """The normalised matrix of the first call, kept as PyTorch Geometric keeps it: an edge list and its weights."""
    name = "_cached_edge_index" if isinstance(edges, (torch.Tensor, EdgeSample)) else "_cached_adj_t"
    found = getattr(layer, name)
    if found is None:
        found = _normalized(*_matrix(layer, x, edges, edge_weight))
        setattr(layer, name, found)
    index, weight = found
    return sorted_edges(index, x.shape[0]).sample(weight, x.dtype)


def _normalized(edges: EdgeSample, add_self_loops: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(edge index [2, E'], weights [E']) of D^-1/2 (A + I) D^-1/2, receivers in the second row."""
    row, col, value = entry_rows(edges), edges.col.long(), edges.value
    if add_self_loops:
        nodes = torch.arange(edges.num_nodes, device=row.device)
        row, col, value = (
            torch.cat([row, nodes]),
            torch.cat([col, nodes]),
            torch.cat([value, value.new_ones(len(nodes))]),
        )
    degree = value.new_zeros(edges.num_nodes).index_add(0, row, value)
    scale = torch.where(degree > 0, degree, 1.0).rsqrt() * (degree > 0)
    return torch.stack([col, row]), scale[row] * value * scale[col]
