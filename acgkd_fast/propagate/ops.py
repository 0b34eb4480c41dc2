"""Operators of message passing and readout: schemas, fakes and gradients.

See ``edges/ops.py`` for how gradients are attached.
"""

from __future__ import annotations

from typing import Any

import torch

from .._library import define, differentiate
from ..edges import ops as edge_ops
from ..edges.reference import compute_dtype
from . import attention_reference, reference

_MATRIX = "Tensor rowptr, Tensor col, Tensor? t_rowptr, Tensor? t_col, Tensor? t_edge"

# CANDIDATE_GRADIENT must be declared before a backward here can call it.
assert edge_ops.CANDIDATE_GRADIENT


def _wide_like(source: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(source, dtype=compute_dtype(source.dtype))


def _degree_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype))


GCN_PROPAGATE = define(
    f"gcn_propagate(Tensor x, Tensor value, Tensor? port, Tensor? table, {_MATRIX}, bool add_self_loops, int kind)"
    " -> (Tensor, Tensor)",
    reference.gcn_propagate,
    lambda x, *_: (torch.empty_like(x), _degree_like(x)),
)
GCN_PROPAGATE_BACKWARD = define(
    f"gcn_propagate_backward(Tensor grad_out, Tensor x, Tensor out, Tensor value, Tensor scale, {_MATRIX},"
    " bool add_self_loops) -> (Tensor, Tensor, Tensor)",
    reference.gcn_propagate_backward,
    lambda grad_out, x, out, value, *_: (torch.empty_like(x), torch.empty_like(value), _degree_like(x)),
)
GIN_PROPAGATE = define(
    f"gin_propagate(Tensor x, Tensor value, Tensor eps, Tensor? port, Tensor? table, {_MATRIX}, int kind) -> Tensor",
    reference.gin_propagate,
    lambda x, *_: torch.empty_like(x),
)
GIN_PROPAGATE_BACKWARD = define(
    f"gin_propagate_backward(Tensor grad_out, Tensor x, Tensor value, Tensor eps, {_MATRIX})"
    " -> (Tensor, Tensor, Tensor)",
    reference.gin_propagate_backward,
    lambda grad_out, x, value, eps, *_: (torch.empty_like(x), torch.empty_like(value), torch.empty_like(eps)),
)

GAT_PROPAGATE = define(
    f"gat_propagate(Tensor sent, Tensor source, Tensor target, Tensor value, {_MATRIX}, float negative_slope,"
    " bool add_self_loops) -> (Tensor, Tensor, Tensor)",
    attention_reference.gat_propagate,
    lambda sent, source, *_: (torch.empty_like(sent), *(_wide_like(source) for _ in range(2))),
)
GAT_PROPAGATE_BACKWARD = define(
    "gat_propagate_backward(Tensor grad_out, Tensor sent, Tensor source, Tensor target, Tensor value, Tensor out,"
    f" Tensor highest, Tensor total, {_MATRIX}, float negative_slope, bool add_self_loops)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    attention_reference.gat_propagate_backward,
    lambda grad_out, *operands_and_rest: tuple(torch.empty_like(operand) for operand in operands_and_rest[:4]),
)


def _readout_fake(x: torch.Tensor, ptr: torch.Tensor, mode: int) -> tuple[torch.Tensor, torch.Tensor]:
    graphs, width = ptr.shape[0] - 1, x.shape[1]
    return (
        x.new_empty(graphs, width),
        ptr.new_empty(graphs if mode == reference.MAX else 0, width, dtype=torch.int32),
    )


READOUT = define("readout(Tensor x, Tensor ptr, int mode) -> (Tensor, Tensor)", reference.readout, _readout_fake)
READOUT_BACKWARD = define(
    "readout_backward(Tensor grad_out, Tensor argmax, Tensor ptr, int mode, SymInt num_nodes) -> Tensor",
    reference.readout_backward,
    lambda grad_out, argmax, ptr, mode, num_nodes: grad_out.new_empty(num_nodes, grad_out.shape[1]),
)


def _port_gradient(
    shape: torch.Size,
    left: torch.Tensor,
    right: torch.Tensor,
    node_term: torch.Tensor,
    table: torch.Tensor | None,
    kind: int,
) -> torch.Tensor:
    """What a port gets: the gradient of each candidate [P], or, a node port, the factors that it is made of."""
    if len(shape) == 2:
        return torch.cat([left.reshape(-1), right.reshape(-1), node_term])[None]
    grad: torch.Tensor = torch.ops.acgkd_fast.candidate_gradient(left, right, node_term, table, kind, shape[0])
    return grad


def _gcn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, value, port, table, *matrix, add_self_loops, kind = inputs
    out, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.save_for_backward(x, out, value, scale, table, *matrix)
    ctx.port_shape = None if port is None else port.shape
    ctx.settings = (add_self_loops, kind)


def _gcn_backward(ctx: Any, grad_out: torch.Tensor, _grad_scale: Any) -> tuple[torch.Tensor | None, ...]:
    x, out, value, scale, table, *matrix = ctx.saved_tensors
    add_self_loops, kind = ctx.settings
    grad_out = grad_out.contiguous()
    grad_x, grad_value, grad_degree = torch.ops.acgkd_fast.gcn_propagate_backward(
        grad_out, x, out, value, scale, *matrix, add_self_loops
    )
    grad_port = None
    if ctx.needs_input_grad[2]:
        left = (scale[:, None] * grad_out).to(x.dtype)
        right = (scale[:, None] * x).to(x.dtype)
        grad_port = _port_gradient(ctx.port_shape, left, right, grad_degree.to(x.dtype), table, kind)
    return (grad_x, grad_value, grad_port, *[None] * (len(matrix) + 3))


def _gin_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, value, eps, port, table, *matrix, kind = inputs
    ctx.save_for_backward(x, value, eps, table, *matrix)
    ctx.port_shape = None if port is None else port.shape
    ctx.kind = kind


def _gin_backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, value, eps, table, *matrix = ctx.saved_tensors
    grad_out = grad_out.contiguous()
    grad_x, grad_value, grad_eps = torch.ops.acgkd_fast.gin_propagate_backward(grad_out, x, value, eps, *matrix)
    grad_port = None
    if ctx.needs_input_grad[3]:
        node_term = x.new_zeros(x.shape[0])
        grad_port = _port_gradient(ctx.port_shape, grad_out, x, node_term, table, ctx.kind)
    return (grad_x, grad_value, grad_eps, grad_port, *[None] * (len(matrix) + 2))


def _gat_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    *operands, negative_slope, add_self_loops = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*operands[:4], *output, *operands[4:])
    ctx.settings = (negative_slope, add_self_loops)


def _gat_backward(ctx: Any, grad_out: torch.Tensor, *_grads_of_sums: Any) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.acgkd_fast.gat_propagate_backward(grad_out.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return (*grads, *[None] * 7)


def _readout_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, ptr, mode = inputs
    argmax = output[1]
    ctx.mark_non_differentiable(argmax)
    ctx.save_for_backward(argmax, ptr)
    ctx.settings = (mode, x.shape[0])


def _readout_backward(ctx: Any, grad_out: torch.Tensor, _grad_argmax: Any) -> tuple[torch.Tensor | None, ...]:
    grad_x = torch.ops.acgkd_fast.readout_backward(grad_out.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return grad_x, None, None


differentiate(GCN_PROPAGATE, _gcn_backward, _gcn_setup)
differentiate(GIN_PROPAGATE, _gin_backward, _gin_setup)
differentiate(GAT_PROPAGATE, _gat_backward, _gat_setup)
differentiate(READOUT, _readout_backward, _readout_setup)
