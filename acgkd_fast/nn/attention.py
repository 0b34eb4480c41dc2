"""Graph attention on an EdgeSample: a softmax over each node's neighbours, by the weighted sums of message passing."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import check, check_tensor
from ..graphs import EdgeSample
from ..propagate import gin_propagate
from .conv import Edges, as_edges


class GATConv(nn.Module):
    """out_i = sum_j a_ij W x_j + b over the neighbours j of node i and i itself, heads side by side.

    a_ij = v_ij exp(e_ij) / sum_k v_ik exp(e_ik) with e_ij = LeakyReLU(<s, W x_j> + <t, W x_i>) and edge
    weights v, so that an edge of weight 2 counts as two and one of weight 0 as none; a node itself has
    weight 1. With weights 1, results, state-dict keys (``lin.weight``, ``att_src``, ``att_dst``,
    ``bias``) and initialisation are those of ``torch_geometric.nn.GATConv``. Arguments after the widths go by name.

    Args:
        in_channels: width F_in of the node features, at least 1.
        out_channels: width F_out of each head, at least 1.
        heads: number of heads, at least 1; the result has width heads * F_out.
        negative_slope: of the LeakyReLU.

    Gradients:
        Parameters, `x` and the weights of stored edges; absent candidates get none, as a softmax has no
        finite slope in log-weight where an edge is missing.

    Raises:
        InputError: a width or number of heads below 1.

    Source: Velickovic et al., arXiv 1710.10903.
    """

    def __init__(self, in_channels: int, out_channels: int, *, heads: int = 1, negative_slope: float = 0.2) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("heads", heads)):
            check(value >= 1, name, "at least 1", value)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.heads = heads
        self.negative_slope = negative_slope
        self.lin = nn.Linear(in_channels, heads * out_channels, bias=False)
        self.att_src = nn.Parameter(torch.empty(1, heads, out_channels))
        self.att_dst = nn.Parameter(torch.empty(1, heads, out_channels))
        self.bias = nn.Parameter(torch.empty(heads * out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.lin.weight)
        bound = (6.0 / (self.heads + self.out_channels)) ** 0.5
        nn.init.uniform_(self.att_src, -bound, bound)
        nn.init.uniform_(self.att_dst, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, edge_index: Edges, edge_weight: torch.Tensor | None = None) -> torch.Tensor:
        """One layer.

        Args:
            x: node features [N, F_in].
            edge_index: an EdgeSample, or int64 [2, E] with sources first. A stored self-loop gives way to
                the node's own term.
            edge_weight: [E], at least 0, only with an edge list; default ones.

        Returns:
            [N, heads * F_out], dtype of `x`. Equal input gives equal bits.

        Raises:
            InputError: features, edges or weights of the wrong form.
        """
        check_tensor("x", x, shape=(None, self.in_channels))
        edges = as_edges(x, edge_index, edge_weight)
        h = self.lin(x).view(-1, self.heads, self.out_channels)
        weight, own = self._weights(h, edges)
        transposed = None
        parts = []
        for head in range(self.heads):
            # A column of ones brings the softmax's denominator along in the same sweep.
            sent = torch.cat([h[:, head], h.new_ones(len(h), 1)], 1)
            sample = edges.with_value(weight[:, head].contiguous())
            sample._transposed = transposed
            transposed = sample.transposed()
            received = gin_propagate(sent, sample, eps=-1.0) + own[:, head, None] * sent
            parts.append(received[:, :-1] / received[:, -1:])
        return torch.cat(parts, 1) + self.bias

    def _weights(self, h: torch.Tensor, edges: EdgeSample) -> tuple[torch.Tensor, torch.Tensor]:
        """v_ij exp(e_ij - m_i) of the edges [capacity, heads], and exp(e_ii - m_i) of the nodes [N, heads]."""
        source, target = (h * self.att_src).sum(-1), (h * self.att_dst).sum(-1)
        size = edges.num_edges
        row, col = edges.row(), edges.col[:size].long()
        # Indexing, not index_select: its gradient on CUDA adds in sorted order, without atomics.
        score = nn.functional.leaky_relu(source[col] + target[row], self.negative_slope)
        own = nn.functional.leaky_relu(source + target, self.negative_slope)
        with torch.no_grad():
            # The row's largest score cancels in the quotient, and keeps one term at exp(0).
            offsets = edges.rowptr.long()
            highest = torch.segment_reduce(score, "max", offsets=offsets, initial=-torch.inf).maximum(own)
        value = edges.value[:size].to(h.dtype)
        if edges.has_self_loops():
            value = value.where(row != col, 0.0)
        weight = value[:, None] * (score - highest[row]).exp()
        unused = edges.value.numel() - size
        return nn.functional.pad(weight, (0, 0, 0, unused)), (own - highest).exp()

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, heads={self.heads}"
