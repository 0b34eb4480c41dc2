"""The graph attention layer, with the interface of PyTorch Geometric and edge weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InputError, check, check_choice
from .adjacency import Edges
from .attention import attend
from .gcn_conv import FLOWS, check_sum
from .linear import make_linear
from .messages import Nodes, Size, check_widths


class GATConv(nn.Module):
    """sum_j alpha_ij W x_j + b with attention alpha over the neighbours and the node itself.

    Arguments, state-dict keys, initialisation and, without edge weights, results are those of
    ``torch_geometric.nn.GATConv``, dropout under one seed included.

    With edge weights w of at least 0 the attention is

        alpha_ij = w_ij exp(e_ij) / sum_k w_ik exp(e_ik),    e_ij = leaky_relu(a_s W x_j + a_t W x_i + a_e W_e f_ij)

    so that weight 0 is absence and weight 1 PyTorch Geometric. Self-loops that the layer adds have weight 1.

    Args:
        in_channels: width of the node features, or those of senders and receivers (with a W each); -1
            takes it from the first call.
        out_channels: width of the result per head.
        heads: attention heads.
        concat: put the heads side by side; else their mean is taken.
        negative_slope: of the leaky rectifier.
        dropout: probability that an alpha is set to 0 in training.
        add_self_loops: exchange self-loops for one on every node.
        edge_dim: width of edge features f, None for none.
        fill_value: features of added self-loops: a number, a tensor, or "add", "mean", "min", "max" or
            "mul" of those of the edges that arrive (weighted as their messages are).
        bias: learn b.
        residual: add a linear map of x_i.
        aggr, flow, node_dim, decomposed_layers, aggr_kwargs: by name, see :class:`GCNConv`.

    Gradients:
        Parameters, `x`, edge features and edge weights, those of stored edges of weight 0 too. Absent
        candidates that a sample does not store get none: the attention is no sum that could be had without
        visiting them, so take ``estimator="sparse_straight_through"`` or "relaxed" where they matter.

    Raises:
        InputError: a width below 1, or an unknown aggregation or flow.

    Source: Veličković et al., arXiv 1710.10903.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        edge_dim: int | None = None,
        fill_value: float | torch.Tensor | str = "mean",
        bias: bool = True,
        residual: bool = False,
        *,
        aggr: str = "add",
        flow: str = "source_to_target",
        node_dim: int = 0,
        decomposed_layers: int = 1,
        aggr_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_sum(aggr)
        check_choice("flow", flow, FLOWS)
        check(heads >= 1, "heads", "at least 1", heads)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.heads = heads
        self.concat = concat
        self.negative_slope = negative_slope
        self.dropout = dropout
        self.add_self_loops = add_self_loops
        self.edge_dim = edge_dim
        self.fill_value = fill_value
        self.residual = residual
        self.aggr = aggr
        self.flow = flow
        width, total = heads * out_channels, out_channels * (heads if concat else 1)
        self.lin = self.lin_src = self.lin_dst = None
        if isinstance(in_channels, (tuple, list)):
            self.lin_src = make_linear(in_channels[0], width, bias=False, glorot=True)
            self.lin_dst = make_linear(in_channels[1], width, bias=False, glorot=True)
        else:
            self.lin = make_linear(in_channels, width, bias=False, glorot=True)
        self.att_src = nn.Parameter(torch.empty(1, heads, out_channels))
        self.att_dst = nn.Parameter(torch.empty(1, heads, out_channels))
        self.att_edge = None if edge_dim is None else nn.Parameter(torch.empty(1, heads, out_channels))
        self.lin_edge = None if edge_dim is None else make_linear(edge_dim, width, bias=False, glorot=True)
        receivers = in_channels[1] if isinstance(in_channels, (tuple, list)) else in_channels
        self.res = make_linear(receivers, total, bias=False, glorot=True) if residual else None
        self.bias = nn.Parameter(torch.empty(total)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for lin in (self.lin, self.lin_src, self.lin_dst, self.lin_edge, self.res):
            if lin is not None:
                lin.reset_parameters()
        for attention in (self.att_src, self.att_dst, self.att_edge):
            if attention is not None:
                # Fans as PyTorch Geometric counts them: the last two dimensions.
                bound = (6.0 / (attention.shape[-2] + attention.shape[-1])) ** 0.5
                nn.init.uniform_(attention, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Nodes,
        edge_index: Edges,
        edge_attr: torch.Tensor | None = None,
        size: Size = None,
        return_attention_weights: bool | None = None,
        edge_weight: torch.Tensor | None = None,
    ) -> Any:
        """One layer.

        Args:
            x: node features [N, F_in], or a pair of senders' and receivers'; the latter may be None.
            edge_index: an EdgeSample, int64 [2, E] with sources first, or a sparse matrix whose rows receive;
                the values of a matrix are weights, or features where there are several per entry.
            edge_attr: [E, edge_dim], or [E] where that is 1.
            size: (N_s, N_r), needed only for a pair without receivers.
            return_attention_weights: return the attention too.
            edge_weight: [E], only with an edge list; default ones.

        Returns:
            [N_r, heads * F_out] (or [N_r, F_out] without `concat`); with attention weights a pair of that and
            (edge index [2, E'], alpha [E', heads]) with self-loops last; for a SparseTensor that is a
            SparseTensor, for a torch.sparse matrix (COO matrix, alpha).

        Raises:
            InputError: features, edges or weights of the wrong form.
        """
        if edge_attr is not None and self.edge_dim is None:
            raise InputError("edge_attr: expected None in a layer without edge_dim (weights go to edge_weight)")
        check_widths(x, self.in_channels)
        return attend(self, x, edge_index, edge_attr, size, return_attention_weights, edge_weight)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, heads={self.heads})"
