"""GCN and GIN layers: the state-dict keys and initialisation of PyTorch Geometric, gradients for every edge weight."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InputError, check, check_tensor
from ..graphs import EdgeSample
from ..propagate import gcn_propagate, gin_propagate
from .linear import linear

Edges = EdgeSample | torch.Tensor


class GCNConv(nn.Module):
    """D^-1/2 (A + I) D^-1/2 X W + b, with D from the edge weights.

    Weights, state-dict keys (``lin.weight``, ``bias``), initialisation and results are those of
    ``torch_geometric.nn.GCNConv``. Arguments after the widths go by name.

    Args:
        in_channels: width F_in of the node features, at least 1.
        out_channels: width F_out of the result, at least 1.
        add_self_loops: add I; a node that has a self-loop keeps it, with its weight, and gets no
            second one. Default: as `normalize`.
        normalize: scale by the degrees; without it the layer computes A X W + b.
        bias: learn b.

    Gradients:
        Parameters, `x` and edge weights, as :func:`acgkd_fast.gcn_propagate` says.

    Raises:
        InputError: a width below 1, or self-loops without normalisation.

    Source: Kipf and Welling, arXiv 1609.02907.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        add_self_loops: bool | None = None,
        normalize: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check(in_channels >= 1, "in_channels", "at least 1", in_channels)
        check(out_channels >= 1, "out_channels", "at least 1", out_channels)
        check(normalize or not add_self_loops, "add_self_loops", "False where normalize is False", add_self_loops)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.add_self_loops = normalize if add_self_loops is None else add_self_loops
        self.normalize = normalize
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.lin.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, edge_index: Edges, edge_weight: torch.Tensor | None = None) -> torch.Tensor:
        """One layer.

        Args:
            x: node features [N, F_in].
            edge_index: an EdgeSample, or int64 [2, E] with sources first.
            edge_weight: [E], only with an edge list; default ones.

        Returns:
            [N, F_out], dtype of `x`.

        Raises:
            InputError: features, edges or weights of the wrong form.
        """
        check_tensor("x", x, shape=(None, self.in_channels))
        edges = as_edges(x, edge_index, edge_weight)
        # Both orders give the same result. The narrow side has fewer numbers to move along the edges, and a
        # linear layer that comes last adds the bias in the same pass.
        if self.in_channels <= self.out_channels:
            return linear(self._propagate(x, edges), self.lin.weight, self.bias)
        out = self._propagate(self.lin(x), edges)
        return out if self.bias is None else out + self.bias

    def _propagate(self, x: torch.Tensor, edges: EdgeSample) -> torch.Tensor:
        if not self.normalize:
            return gin_propagate(x, edges, eps=-1.0)
        if self.add_self_loops and edges.has_self_loops():
            return gcn_propagate(x, _fill_self_loops(edges), add_self_loops=False)
        return gcn_propagate(x, edges, add_self_loops=self.add_self_loops)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"


class GINConv(nn.Module):
    """nn((1 + eps) X + A X): the graph isomorphism layer, with edge weights.

    State-dict keys (``eps``, ``nn.*``), initialisation and, without weights, results are those of
    ``torch_geometric.nn.GINConv``, which takes no weights.

    Args:
        nn: maps [N, F_in] to [N, F_out]; its parameters are drawn anew, as PyTorch Geometric does.
        eps: initial value.
        train_eps: make eps a parameter instead of a buffer.

    Gradients:
        Parameters, eps, `x` and edge weights, as :func:`acgkd_fast.gin_propagate` says.

    Source: Xu et al., arXiv 1810.00826.
    """

    eps: torch.Tensor

    def __init__(self, nn: torch.nn.Module, eps: float = 0.0, train_eps: bool = False) -> None:
        super().__init__()
        self.nn = nn
        self.initial_eps = eps
        if train_eps:
            self.eps = torch.nn.Parameter(torch.empty(1))
        else:
            self.register_buffer("eps", torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset(self.nn)
        torch.nn.init.constant_(self.eps, self.initial_eps)

    def forward(self, x: torch.Tensor, edge_index: Edges, edge_weight: torch.Tensor | None = None) -> torch.Tensor:
        """One layer.

        Args:
            x: node features [N, F_in].
            edge_index: an EdgeSample, or int64 [2, E] with sources first.
            edge_weight: [E], only with an edge list; default ones.

        Returns:
            What `nn` makes of [N, F_in].

        Raises:
            InputError: features, edges or weights of the wrong form.
        """
        check_tensor("x", x, shape=(None, None))
        out: torch.Tensor = self.nn(gin_propagate(x, as_edges(x, edge_index, edge_weight), self.eps))
        return out


def as_edges(
    x: torch.Tensor, edges: Edges, edge_weight: torch.Tensor | None = None, ptr: torch.Tensor | None = None
) -> EdgeSample:
    """Edges of any form that the layers take, as an EdgeSample.

    Args:
        x: node features [N, F].
        edges: an EdgeSample (then nothing else may be given), or int64 [2, E] with sources first.
        edge_weight: [E] floating; default ones.
        ptr: int64 [B + 1], node offsets of an edge list; default one graph.

    Raises:
        InputError: tensors of the wrong form, or weights beside an EdgeSample.
    """
    if isinstance(edges, EdgeSample):
        if edge_weight is not None:
            raise InputError("edge_weight: expected None beside an EdgeSample, which holds its own (edges.with_value)")
        return edges
    check(isinstance(edges, torch.Tensor), "edge_index", "an EdgeSample or an int64 tensor [2, E]", edges)
    if edge_weight is not None:
        check_tensor("edge_weight", edge_weight, shape=(None,), dtypes=(torch.float32, torch.float64, torch.bfloat16))
    if ptr is None:
        ptr = torch.tensor([0, x.shape[0]], device=edges.device)
    return EdgeSample.from_edge_index(edges, ptr, edge_weight)


def _fill_self_loops(edges: EdgeSample) -> EdgeSample:
    """One self-loop on every node: of weight 1, or of the weight of the last one that is there."""
    edge_index, weight = edges.to_edge_index()
    loop = edge_index[0] == edge_index[1]
    nodes = torch.arange(edges.num_nodes, device=loop.device)
    own = weight.new_ones(edges.num_nodes).index_put((edge_index[0, loop],), weight[loop])
    return EdgeSample.from_edge_index(
        torch.cat([edge_index[:, ~loop], nodes.expand(2, -1)], dim=1),
        edges.ptr,
        torch.cat([weight[~loop], own]),
        symmetric=edges.symmetric,
    )


def _reset(module: nn.Module) -> None:
    """Draw anew what can be: the module itself, else its children."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    else:
        for child in module.children():
            _reset(child)
