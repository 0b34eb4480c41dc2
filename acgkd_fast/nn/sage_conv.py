"""The GraphSAGE layer, with the interface of PyTorch Geometric and edge weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InputError, check, check_choice
from .adjacency import Edges
from .gcn_conv import FLOWS
from .linear import commutes, linear, make_linear, widens
from .messages import (
    Ends,
    Nodes,
    Size,
    both_ends,
    check_widths,
    entries_of,
    gather,
    matrix,
    neighbour_mean,
    neighbour_sum,
    reduce_messages,
    split_size,
)

LINEAR_AGGREGATIONS = ("mean", "add", "sum")
_OWN = (*LINEAR_AGGREGATIONS, "max", "min")


class SAGEConv(nn.Module):
    """W_1 x_i + W_2 mean_j x_j + b, with edge weights.

    Arguments, state-dict keys (``lin_l.*``, ``lin_r.weight``, ``lin.*``, ``aggr_module.*``), initialisation and,
    without weights, results are those of ``torch_geometric.nn.SAGEConv``, which takes no weights.

    With weights w of at least 0, "mean" is sum_j w_ij x_j / sum_j w_ij, and "add" is sum_j w_ij x_j; every other
    aggregation sees w_ij x_j, and no edges of weight 0. So weight 0 is absence and weight 1 PyTorch Geometric.

    Args:
        in_channels: width of the node features, or those of senders and receivers; -1 takes it from the
            first call.
        out_channels: width of the result, at least 1.
        aggr: "mean", "add", "sum", "max" or "min"; or whatever torch_geometric resolves to an
            aggregation ("lstm", a list, a module), which needs that package.
        normalize: scale every row of the result to length 1.
        root_weight: learn W_1; without it a node's own features do not count.
        project: apply relu(W_3 x_j + b_3) to the neighbours' features first.
        bias: learn b.
        flow: "source_to_target", or "target_to_source" for edge lists whose first row receives.
        aggr_kwargs: options of an aggregation of torch_geometric's.
        node_dim, decomposed_layers: by name, see :class:`GCNConv`.

    Gradients:
        Parameters, `x` and edge weights; for "mean", "add" and "sum" absent candidates of a sample too.

    Raises:
        InputError: a width below 1, an unknown flow, or an aggregation that cannot be had.

    Source: Hamilton et al., arXiv 1706.02216.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        aggr: Any = "mean",
        normalize: bool = False,
        root_weight: bool = True,
        project: bool = False,
        bias: bool = True,
        *,
        flow: str = "source_to_target",
        node_dim: int = -2,
        decomposed_layers: int = 1,
        aggr_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_choice("flow", flow, FLOWS)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.normalize = normalize
        self.root_weight = root_weight
        self.project = project
        self.flow = flow
        senders, receivers = in_channels if isinstance(in_channels, (tuple, list)) else (in_channels, in_channels)
        self.aggr = [str(one) for one in aggr] if isinstance(aggr, (tuple, list)) else str(aggr)
        self.aggr_module: nn.Module | None = None
        width = senders
        if self.aggr not in _OWN:
            self.aggr_module = _resolve(aggr, senders, dict(aggr_kwargs or {}))
            widths = getattr(self.aggr_module, "get_out_channels", None)
            width = senders if widths is None else widths(senders)
        if project:
            wanted = "at least 1 where project is True (PyTorch Geometric does not support lazy initialization there)"
            check(senders >= 1, "in_channels", wanted, senders)
            self.lin = make_linear(senders, senders, bias=True)
        self.lin_l = make_linear(width, out_channels, bias=bias)
        if root_weight:
            self.lin_r = make_linear(receivers, out_channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.aggr_module is not None:
            self.aggr_module.reset_parameters()  # type: ignore[operator]
        if self.project:
            self.lin.reset_parameters()
        self.lin_l.reset_parameters()
        if self.root_weight:
            self.lin_r.reset_parameters()

    def forward(
        self, x: Nodes, edge_index: Edges, edge_weight: torch.Tensor | Size = None, size: Size = None
    ) -> torch.Tensor:
        """One layer.

        Args:
            x: node features [..., N, F_in], or a pair of senders' and receivers'; without the latter (None)
                W_1 has no part.
            edge_index, edge_weight, size: see :meth:`acgkd_fast.nn.GINConv.forward`.

        Returns:
            [..., N_r, F_out].

        Raises:
            InputError: features, edges or weights of the wrong form.
        """
        check_widths(x, self.in_channels)
        weight, size = split_size(edge_weight, size)
        return sample_and_aggregate(self, x, edge_index, weight, size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, aggr={self.aggr})"


def _resolve(aggr: Any, in_channels: int, options: dict[str, Any]) -> nn.Module:
    try:
        from torch_geometric.nn.resolver import aggregation_resolver
    except ImportError as error:
        raise InputError(
            f"aggr: expected one of {', '.join(_OWN)} where torch-geometric is not installed, got {aggr!r}"
        ) from error
    if aggr == "lstm":
        options = {"in_channels": in_channels, "out_channels": in_channels, **options}
    try:
        module: nn.Module = aggregation_resolver(aggr, **options)
    except ValueError as error:
        raise InputError(f"aggr: expected an aggregation that torch-geometric knows, got {aggr!r}") from error
    return module


def sample_and_aggregate(
    layer: Any, x: Nodes, edges: Edges, edge_weight: torch.Tensor | None, size: Size
) -> torch.Tensor:
    """A SAGE layer, ours or PyTorch Geometric's by its attributes."""
    ends = both_ends(x, size, layer.flow, edges)
    if layer.project:
        ends = ends._replace(senders=layer.lin(ends.senders).relu())
    lin = layer.lin_l
    if layer.aggr in LINEAR_AGGREGATIONS and commutes(lin) and not widens(lin):
        ends_narrow = ends._replace(senders=linear(ends.senders, lin.weight))
        out = _aggregate(layer, ends_narrow, edges, edge_weight)
        out = out if lin.bias is None else out + lin.bias
    else:
        out = lin(_aggregate(layer, ends, edges, edge_weight))
    if layer.root_weight and ends.receivers is not None:
        out = out + layer.lin_r(ends.receivers)
    return nn.functional.normalize(out, p=2.0, dim=-1) if layer.normalize else out


def _aggregate(layer: Any, ends: Ends, edges: Edges, edge_weight: torch.Tensor | None) -> torch.Tensor:
    if layer.aggr in LINEAR_AGGREGATIONS:
        sample, weighted = matrix(ends, edges, edge_weight, layer.flow)
        if layer.aggr == "mean":
            return neighbour_mean(ends.senders, sample, ends.num_receivers, weighted)
        return neighbour_sum(ends.senders, sample, ends.num_receivers)
    entries = entries_of(ends, edges, None, edge_weight, layer.flow)
    if layer.aggr in ("max", "min"):
        return reduce_messages(gather(ends.senders, ends, entries), ends, entries, layer.aggr)
    weight = entries.weight
    if weight is not None:
        there = (weight != 0).nonzero().squeeze(1)
        entries = entries._replace(sender=entries.sender[there], receiver=entries.receiver[there])
        weight = weight[there]
    messages = gather(ends.senders, ends, entries)
    if weight is not None:
        messages = messages * weight.to(messages.dtype)[:, None]
    out: torch.Tensor = layer.aggr_module(messages, entries.receiver, dim_size=ends.num_receivers, dim=-2)
    return out
