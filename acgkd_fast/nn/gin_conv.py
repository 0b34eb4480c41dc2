"""The graph isomorphism layers, with the interface of PyTorch Geometric and edge weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn as torch_nn

from ..errors import InputError, check, check_choice
from ..graphs import EdgeSample
from ..propagate import gin_propagate
from .adjacency import Edges
from .gcn_conv import FLOWS, check_sum
from .linear import first_width, make_linear, reset
from .messages import Nodes, Size, both_ends, entries_of, gather, matrix, neighbour_sum, reduce_messages, split_size


class _GINBase(torch_nn.Module):
    """What both layers share: nn, eps and the options of message passing."""

    eps: torch.Tensor

    def __init__(
        self,
        nn: torch_nn.Module,
        eps: float,
        train_eps: bool,
        aggr: str = "add",
        flow: str = "source_to_target",
        node_dim: int = -2,
        decomposed_layers: int = 1,
        aggr_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_sum(aggr)
        check_choice("flow", flow, FLOWS)
        self.nn = nn
        self.initial_eps = eps
        self.aggr = aggr
        self.flow = flow
        if train_eps:
            self.eps = torch_nn.Parameter(torch.empty(1))
        else:
            self.register_buffer("eps", torch.empty(1))

    def reset_parameters(self) -> None:
        reset(self.nn)
        torch_nn.init.constant_(self.eps, self.initial_eps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(nn={self.nn})"


class GINConv(_GINBase):
    """nn((1 + eps) X + A X): the graph isomorphism layer, with edge weights.

    Arguments, state-dict keys (``eps``, ``nn.*``), initialisation and, without weights, results are those of
    ``torch_geometric.nn.GINConv``, which takes no weights.

    Args:
        nn: maps [N, F_in] to [N, F_out]; its parameters are drawn anew, as PyTorch Geometric does.
        eps: initial value.
        train_eps: make eps a parameter instead of a buffer.
        aggr, flow, node_dim, decomposed_layers, aggr_kwargs: by name, see :class:`GCNConv`.

    Gradients:
        Parameters, eps, `x` and edge weights, as :func:`acgkd_fast.gin_propagate` says.

    Source: Xu et al., arXiv 1810.00826.
    """

    def __init__(self, nn: torch_nn.Module, eps: float = 0.0, train_eps: bool = False, **kwargs: Any) -> None:
        super().__init__(nn, eps, train_eps, **kwargs)
        self.reset_parameters()

    def forward(
        self, x: Nodes, edge_index: Edges, edge_weight: torch.Tensor | Size = None, size: Size = None
    ) -> torch.Tensor:
        """One layer.

        Args:
            x: node features [..., N, F_in], or a pair of senders' [..., N_s, F_in] and receivers'
                [..., N_r, F_in]; without the latter (None) there is no (1 + eps) X.
            edge_index: an EdgeSample, int64 [2, E] with sources first, or a sparse matrix whose rows receive;
                the values of a matrix are weights.
            edge_weight: [E], only with an edge list; default ones. A tuple here is the `size`, which
                PyTorch Geometric has in third place.
            size: (N_s, N_r), needed only for a pair without receivers.

        Returns:
            What `nn` makes of [..., N_r, F_in].

        Raises:
            InputError: features, edges or weights of the wrong form.
        """
        weight, size = split_size(edge_weight, size)
        out: torch.Tensor = self.nn(sum_with_self(self, x, edge_index, weight, size))
        return out


def sum_with_self(layer: Any, x: Nodes, edges: Edges, edge_weight: torch.Tensor | None, size: Size) -> torch.Tensor:
    """(1 + eps) x + A x of a GIN layer, ours or PyTorch Geometric's."""
    ends = both_ends(x, size, layer.flow, edges)
    sample, _ = matrix(ends, edges, edge_weight, layer.flow)
    if isinstance(x, torch.Tensor) and x.dim() == 2:
        return gin_propagate(x, sample, layer.eps)
    out = neighbour_sum(ends.senders, sample, ends.num_receivers)
    return out if ends.receivers is None else out + (1 + layer.eps) * ends.receivers


class GINEConv(_GINBase):
    """nn((1 + eps) x_i + sum_j w_ij relu(x_j + e_ij)): GIN with edge features e and edge weights w.

    Arguments, state-dict keys (``eps``, ``nn.*``, ``lin.*``), initialisation and, without weights, results are
    those of ``torch_geometric.nn.GINEConv``.

    Args:
        nn: maps [N, F_in] to [N, F_out]; its parameters are drawn anew, as PyTorch Geometric does.
        eps: initial value.
        train_eps: make eps a parameter instead of a buffer.
        edge_dim: width of the edge features, which a linear map then brings to F_in; None where they have it.
        aggr, flow, node_dim, decomposed_layers, aggr_kwargs: by name, see :class:`GCNConv`.

    Gradients:
        Parameters, eps, `x`, edge features and edge weights. Absent candidates of a sample get none: they
        have no features.

    Raises:
        InputError: `edge_dim` with an `nn` that does not tell its input width.

    Source: Hu et al., arXiv 1905.12265.
    """

    def __init__(
        self,
        nn: torch_nn.Module,
        eps: float = 0.0,
        train_eps: bool = False,
        edge_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(nn, eps, train_eps, **kwargs)
        self.lin = None if edge_dim is None else make_linear(edge_dim, first_width(nn), bias=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.lin is not None:
            self.lin.reset_parameters()

    def forward(
        self,
        x: Nodes,
        edge_index: Edges,
        edge_attr: torch.Tensor | None = None,
        size: Size = None,
        edge_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One layer.

        Args:
            x, edge_index, size, edge_weight: see :meth:`GINConv.forward`.
            edge_attr: [E, edge_dim or F_in], in the order of the edge list or of the entries of an EdgeSample;
                left out where a sparse matrix holds features.

        Returns:
            What `nn` makes of [..., N_r, F_in].

        Raises:
            InputError: features, edges or weights of the wrong form, or no edge features.
        """
        out: torch.Tensor = self.nn(sum_of_rectified(self, x, edge_index, edge_attr, size, edge_weight))
        return out


def sum_of_rectified(
    layer: Any,
    x: Nodes,
    edges: Edges,
    edge_attr: torch.Tensor | None,
    size: Size,
    edge_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """(1 + eps) x_i + sum_j w_ij relu(x_j + e_ij) of a GINE layer, ours or PyTorch Geometric's."""
    ends = both_ends(x, size, layer.flow, edges)
    entries = entries_of(ends, edges, edge_attr, edge_weight, layer.flow)
    attr = entries.attr
    # Values of a SparseTensor are edge features to PyTorch Geometric, also with one number per edge.
    if attr is None and entries.weight is not None and not isinstance(edges, EdgeSample) and edge_weight is None:
        attr, entries = entries.weight[:, None], entries._replace(weight=None)
    if attr is None:
        raise InputError("edge_attr: expected edge features [E, F], got None")
    if layer.lin is not None:
        attr = layer.lin(attr)
    else:
        # The wording of PyTorch Geometric's own error is part of it.
        wanted = f"width {ends.senders.shape[-1]} (node and edge feature dimensionalities do not match; set edge_dim)"
        check(attr.shape[-1] == ends.senders.shape[-1], "edge_attr", wanted, attr)
    messages = (gather(ends.senders, ends, entries) + attr).relu()
    out = reduce_messages(messages, ends, entries, "sum")
    return out if ends.receivers is None else out + (1 + layer.eps) * ends.receivers
