"""Graph attention: a GAT layer's computation, ours or PyTorch Geometric's by its attributes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import dropout, leaky_relu

from ..errors import InputError, check, check_choice
from ..graphs import EdgeSample
from ..propagate import gat_propagate
from ..propagate.attention_reference import STEEPEST
from .adjacency import Edges, SortedEdges, edge_list, entry_rows, revalued, sorted_edges
from .messages import Ends, Entries, Nodes, Size, both_ends, check_square, handed_out, neighbour_sum, reduce_messages


@dataclass
class _Neighbours:
    """Edges in CSR order; where the layer adds self-loops, without their own or with weight 0 on them.

    Attributes:
        matrix: CSR over max(N_s, N_r) nodes; its values do not count.
        weight: of the entries; None for ones.
        attr: features of the entries, or None.
        made: what is known of the edge list; None for an EdgeSample.
        listed: [2, E], the edge list; None for an EdgeSample.
    """

    matrix: EdgeSample
    weight: torch.Tensor | None
    attr: torch.Tensor | None
    made: SortedEdges | None = None
    listed: torch.Tensor | None = None

    @cached_property
    def entries(self) -> Entries:
        """The same as messages."""
        return Entries(self.matrix.col.long(), entry_rows(self.matrix), self.weight, self.attr)

    @property
    def index(self) -> torch.Tensor:
        """[2, E], in the order that a caller knows."""
        return torch.stack([self.entries.sender, self.entries.receiver]) if self.listed is None else self.listed

    def weighted(self) -> EdgeSample:
        """The matrix with the weights as its values."""
        if self.weight is None or self.weight is self.matrix.value:
            return self.matrix
        if self.made is None:
            return self.matrix.with_value(self.weight, symmetric=self.matrix.symmetric)
        return revalued(self.matrix, [self.weight], self.made)[0]

    def unsorted(self, entries: torch.Tensor) -> torch.Tensor:
        return entries if self.made is None else self.made.unsorted(entries)

    def sorted(self, listed: torch.Tensor) -> torch.Tensor:
        return listed if self.made is None or self.made.order is None else listed[self.made.order]


def attend(
    layer: Any,
    x: Nodes,
    edges: Edges,
    edge_attr: torch.Tensor | None = None,
    size: Size = None,
    return_attention_weights: bool | None = None,
    edge_weight: torch.Tensor | None = None,
) -> Any:
    """A GAT layer, ours or PyTorch Geometric's by its attributes."""
    ends = both_ends(x, size, layer.flow, edges)
    check(ends.senders.dim() == 2, "x", "features [N, F] (static graphs are not supported in GATConv)", ends.senders)
    sent, received, residual = _transform(layer, x, ends)
    around = _neighbours(layer, ends, edges, edge_attr, edge_weight)
    loops = min(ends.senders.shape[0], ends.num_receivers) if layer.add_self_loops else 0
    source = (sent * layer.att_src).sum(-1)
    target = None if received is None else (received * layer.att_dst).sum(-1)
    if received is sent and not return_attention_weights and _is_fused(layer, source, sent, around):
        slope, added = layer.negative_slope, layer.add_self_loops
        assert target is not None
        out = gat_propagate(
            sent.flatten(1), source, target, around.weighted(), negative_slope=slope, add_self_loops=added
        )
        copied = layer.bias is not None or residual is not None or not layer.concat
        return _finished(layer, (out if copied else handed_out(out)).view_as(sent), residual)
    share, own, total = _attention(layer, source, target, around, loops, ends.num_receivers)

    kept, kept_own = _dropped_out(layer, share, own, around)
    matrices = revalued(around.matrix, kept.t().contiguous().unbind(), around.made)
    heads = [neighbour_sum(h, m, ends.num_receivers) for h, m in zip(sent.unbind(1), matrices, strict=True)]
    out = torch.stack(heads, dim=1)
    if loops:
        added = kept_own[..., None] * sent[:loops]
        out = out + added if loops == out.shape[0] else torch.cat([out[:loops] + added, out[loops:]])
    out = _finished(layer, out / total[..., None], residual)
    if not return_attention_weights:
        return out
    alpha = torch.cat([around.unsorted(kept / total[around.entries.receiver]), kept_own / total[:loops]])
    return out, _with_attention(edges, around.index, loops, alpha, ends)


def _is_fused(layer: Any, source: torch.Tensor, sent: torch.Tensor, around: _Neighbours) -> bool:
    """Whether one operator does it all, which knows neither edge features nor dropout nor two dtypes at once."""
    drops = layer.training and layer.dropout > 0
    return around.attr is None and not drops and source.dtype == sent.dtype


def _finished(layer: Any, out: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    out = out.flatten(1) if layer.concat else out.mean(dim=1)
    out = out if residual is None else out + residual
    return out if layer.bias is None else out + layer.bias


def _transform(layer: Any, x: Nodes, ends: Ends) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """W x of senders and receivers, [N, heads, F] each, and the residual."""

    def split(h: torch.Tensor) -> torch.Tensor:
        return h.view(-1, layer.heads, layer.out_channels)

    residual = None if layer.res is None or ends.receivers is None else layer.res(ends.receivers)
    if layer.lin is not None:
        sent = split(layer.lin(ends.senders))
        if isinstance(x, torch.Tensor):
            return sent, sent, residual
        return sent, None if ends.receivers is None else split(layer.lin(ends.receivers)), residual
    sent = split(layer.lin_src(ends.senders))
    return sent, None if ends.receivers is None else split(layer.lin_dst(ends.receivers)), residual


def _neighbours(
    layer: Any, ends: Ends, edges: Edges, edge_attr: torch.Tensor | None, edge_weight: torch.Tensor | None
) -> _Neighbours:
    if isinstance(edges, EdgeSample):
        check_square(ends, edges, edge_weight)
        value = edges.value
        if layer.add_self_loops and edges.has_self_loops():
            value = value * (entry_rows(edges) != edges.col)
        return _Neighbours(edges, value, _features(layer, edge_attr, edges.col.shape[0]))
    given = edge_list(edges, edge_weight)
    check(given.attr is None or edge_attr is None, "edge_attr", "None beside a matrix with features", edge_attr)
    senders, receivers = ends.senders.shape[0], ends.num_receivers
    made = sorted_edges(given.ends, senders, receivers, flow=layer.flow)
    index, weight = given.ends, given.weight
    attr = _features(layer, given.attr if edge_attr is None else edge_attr, index.shape[1])
    if layer.add_self_loops and made.has_loops:
        made = sorted_edges(index, senders, receivers, flow=layer.flow, loops=0)
        assert made.kept is not None
        index = index[:, made.kept]
        weight, attr = (None if part is None else part[made.kept] for part in (weight, attr))
    around = _Neighbours(made.sample(None, ends.senders.dtype), None, None, made, index)
    around.weight, around.attr = (None if part is None else around.sorted(part) for part in (weight, attr))
    return around


def _features(layer: Any, attr: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    # As PyTorch Geometric, a layer without edge_dim does not look at them.
    if attr is None or layer.lin_edge is None:
        return None
    check(isinstance(attr, torch.Tensor) and attr.shape[0] == rows, "edge_attr", f"{rows} rows", attr)
    return attr[:, None] if attr.dim() == 1 else attr


def _attention(
    layer: Any,
    source: torch.Tensor,
    target: torch.Tensor | None,
    around: _Neighbours,
    loops: int,
    num_receivers: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(w exp(e - m) [E, heads], the same of added self-loops [loops, heads], sums per receiver [N_r, heads])."""
    sender, receiver, weight, attr = around.entries
    e = source.index_select(0, sender)
    own = source[:loops]
    if target is not None:
        e, own = e + target.index_select(0, receiver), own + target[:loops]
    if attr is not None:
        e = e + _edge_term(layer, attr)
        own = own + _edge_term(layer, _loop_features(layer, around.entries, loops, num_receivers))
    e, own = leaky_relu(e, layer.negative_slope), leaky_relu(own, layer.negative_slope)
    highest = _highest(e.detach(), around, own.detach(), num_receivers)
    share, own = e - highest[receiver], (own - highest[:loops]).exp()
    share = share.exp() if weight is None else weight.to(e.dtype)[:, None] * share.clamp(max=STEEPEST).exp()
    total = share.new_zeros(num_receivers, layer.heads).index_add(0, receiver, share)
    if loops:
        total = torch.cat([total[:loops] + own, total[loops:]])
    # Where nothing is, an edge of weight 1 would have all the attention: its slope there is that step.
    return share, own, torch.where(total == 0, 1.0, total)


def _highest(e: torch.Tensor, around: _Neighbours, own: torch.Tensor, num_receivers: int) -> torch.Tensor:
    """The largest e of every receiver among edges that are there, else among all; 0 where there are none."""
    receiver, weight = around.entries.receiver, around.entries.weight

    def largest(values: torch.Tensor) -> torch.Tensor:
        start = values.new_full((num_receivers, values.shape[1]), -torch.inf)
        start[: own.shape[0]] = own
        return start.scatter_reduce_(0, receiver[:, None].expand_as(values), values, "amax")

    if weight is None:
        highest = largest(e)
    else:
        highest = largest(e.masked_fill((weight.detach() == 0)[:, None], -torch.inf))
        highest = torch.where(highest == -torch.inf, largest(e), highest)
    return highest.masked_fill_(highest == -torch.inf, 0.0)


def _edge_term(layer: Any, attr: torch.Tensor) -> torch.Tensor:
    mapped = layer.lin_edge(attr).view(-1, layer.heads, layer.out_channels)
    term: torch.Tensor = (mapped * layer.att_edge).sum(-1)
    return term


def _loop_features(layer: Any, entries: Entries, loops: int, num_receivers: int) -> torch.Tensor:
    """Features of the self-loops that the layer adds, [loops, D]."""
    fill, attr = layer.fill_value, entries.attr
    assert attr is not None
    if not isinstance(fill, str):
        return torch.as_tensor(fill, dtype=attr.dtype, device=attr.device).expand(loops, attr.shape[1])
    check_choice("fill_value", fill, ("add", "sum", "mean", "min", "max", "mul"))
    ends = Ends(attr, None, num_receivers)
    if fill == "mean":
        ones = attr.new_ones(len(attr), 1)
        total = reduce_messages(ones, ends, entries, "sum")
        features = reduce_messages(attr, ends, entries, "sum") / torch.where(total == 0, 1.0, total)
    elif fill == "mul":
        if entries.weight is not None:
            raise InputError("fill_value: expected add, mean, min or max with edge weights, got mul")
        index = entries.receiver[:, None].expand_as(attr)
        features = attr.new_ones(num_receivers, attr.shape[1]).scatter_reduce(0, index, attr, "prod")
    else:
        features = reduce_messages(attr, ends, entries, "sum" if fill in ("add", "sum") else fill)
    return features[:loops]


def _dropped_out(
    layer: Any, share: torch.Tensor, own: torch.Tensor, around: _Neighbours
) -> tuple[torch.Tensor, torch.Tensor]:
    if not layer.training or layer.dropout == 0:
        return share, own
    # Drawn in the order in which PyTorch Geometric has edges and self-loops: one seed, one answer.
    keep = dropout(share.new_ones(len(share) + len(own), layer.heads), layer.dropout)
    return share * around.sorted(keep[: len(share)]), own * keep[len(share) :]


def _with_attention(edges: Edges, index: torch.Tensor, loops: int, alpha: torch.Tensor, ends: Ends) -> Any:
    own = torch.arange(loops, device=index.device, dtype=index.dtype).expand(2, -1)
    index = torch.cat([index, own], dim=1)
    if isinstance(edges, (EdgeSample, torch.Tensor)) and getattr(edges, "layout", None) in (None, torch.strided):
        return index, alpha
    shape = ends.num_receivers, ends.senders.shape[0]
    if isinstance(edges, torch.Tensor):
        return torch.sparse_coo_tensor(index.flip(0), alpha, (*shape, alpha.shape[1])), alpha
    return type(edges)(row=index[1], col=index[0], value=alpha, sparse_sizes=shape)
