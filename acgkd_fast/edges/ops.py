"""Operators of the edge sampler: schemas, fakes and gradients.

Gradients are attached to the operators themselves (``_library.differentiate``) rather than by an
``autograd.Function`` at the call: a raw operator call cannot lose its gradient and torch.compile sees no break.
"""

from __future__ import annotations

from typing import Any

import torch

from .._library import define, differentiate
from . import reference

_LAYOUT = "Tensor logits, Tensor table, Tensor rng, Tensor temperature, int kind"
_ESTIMATOR = "int estimator, int noise, float gamma, float zeta, float absent_rate"


def _sample_edges_fake(logits: torch.Tensor, table: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    num_nodes, capacity = args[-2:]
    edges = capacity if capacity >= 0 else torch.library.get_ctx().new_dynamic_size()
    return (
        logits.new_empty(edges),
        table.new_empty(num_nodes + 1, dtype=torch.int32),
        table.new_empty(edges, dtype=torch.int32),
        table.new_empty(edges),
        table.new_empty(1),
    )


def _sparse_fake(grad_value: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    return args[2].new_empty(entries), grad_value.new_empty(entries)


SAMPLE_EDGES = define(
    f"sample_edges({_LAYOUT}, {_ESTIMATOR}, SymInt num_nodes, int capacity)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.sample_edges,
    _sample_edges_fake,
)
SAMPLE_EDGES_BACKWARD = define(
    f"sample_edges_backward(Tensor grad_value, Tensor rowptr, Tensor col, Tensor pair, {_LAYOUT}, {_ESTIMATOR})"
    " -> Tensor",
    reference.sample_edges_backward,
    lambda grad_value, rowptr, col, pair, logits, *_: torch.empty_like(logits),
)
SAMPLE_EDGES_BACKWARD_SPARSE = define(
    f"sample_edges_backward_sparse(Tensor grad_value, Tensor rowptr, Tensor col, Tensor pair, {_LAYOUT}, {_ESTIMATOR})"
    " -> (Tensor, Tensor)",
    reference.sample_edges_backward_sparse,
    _sparse_fake,
)
CANDIDATE_PORT = define(
    f"candidate_port({_LAYOUT}, int noise) -> Tensor",
    reference.candidate_port,
    lambda logits, *_: logits.new_empty(1).expand(logits.shape),
)
CANDIDATE_PORT_BACKWARD = define(
    f"candidate_port_backward(Tensor grad_port, {_LAYOUT}, int noise) -> Tensor",
    reference.candidate_port_backward,
    lambda grad_port, logits, *_: torch.empty_like(logits),
)
CANDIDATE_GRADIENT = define(
    "candidate_gradient(Tensor left, Tensor right, Tensor node_term, Tensor table, int kind, SymInt num_pairs)"
    " -> Tensor",
    reference.candidate_gradient,
    lambda left, right, node_term, table, kind, num_pairs: left.new_empty(num_pairs),
)
CANDIDATE_BACKWARD = define(
    f"candidate_backward(Tensor left, Tensor right, Tensor node_term, {_LAYOUT}, int noise) -> Tensor",
    reference.candidate_backward,
    lambda left, right, node_term, logits, *_: torch.empty_like(logits),
)
NODE_PORT = define(
    f"node_port({_LAYOUT}, int noise, Tensor x) -> Tensor",
    reference.node_port,
    lambda logits, table, rng, temperature, kind, noise, x: x.new_empty(1).expand(1, 2 * x.numel() + x.shape[0]),
)
PAIR_UNIFORMS = define(
    "pair_uniforms(Tensor table, Tensor rng, int kind, int stream, SymInt num_pairs) -> Tensor",
    reference.pair_uniforms,
    lambda table, rng, kind, stream, num_pairs: table.new_empty(num_pairs, dtype=torch.float32),
)


def _sample_edges_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, table, rng, temperature, *settings, _num_nodes, _capacity = inputs
    _value, rowptr, col, pair, needed = output
    ctx.mark_non_differentiable(rowptr, col, pair, needed)
    ctx.save_for_backward(rowptr, col, pair, logits, table, rng, temperature)
    ctx.settings = settings


def _sample_edges_backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_value = grads[0].contiguous()
    grad_logits = torch.ops.acgkd_fast.sample_edges_backward(grad_value, *ctx.saved_tensors, *ctx.settings)
    return (grad_logits, *[None] * (len(ctx.settings) + 5))


def _candidate_port_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, kind, noise = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (kind, noise)


def _candidate_port_backward(ctx: Any, grad_port: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_logits = torch.ops.acgkd_fast.candidate_port_backward(
        grad_port.contiguous(), *ctx.saved_tensors, *ctx.settings
    )
    return (grad_logits, None, None, None, None, None)


def _node_port_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, kind, noise, x = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings, ctx.shape = (kind, noise), x.shape


def _node_port_backward(ctx: Any, grad_port: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    nodes, width = ctx.shape
    left, right, node_term = grad_port.contiguous().view(-1).split([nodes * width, nodes * width, nodes])
    grad_logits = torch.ops.acgkd_fast.candidate_backward(
        left.view(ctx.shape), right.view(ctx.shape), node_term, *ctx.saved_tensors, *ctx.settings
    )
    return (grad_logits, None, None, None, None, None, None)


differentiate(NODE_PORT, _node_port_backward, _node_port_setup)
differentiate(SAMPLE_EDGES, _sample_edges_backward, _sample_edges_setup)
differentiate(CANDIDATE_PORT, _candidate_port_backward, _candidate_port_setup)
