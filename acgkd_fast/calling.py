"""How to run a classifier of unknown make on a GraphBatch: parameter names first, then two small graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .errors import InputError, check
from .graphs import EdgeSample, GraphBatch

Call = Callable[[GraphBatch], torch.Tensor]

_ADAPTER = "call=lambda module, graphs: module(graphs.x, graphs.to_edge_index()[0], graphs.batch())"


def call_convention(module: nn.Module) -> Call:
    """How to run a module on a GraphBatch, from the parameter names of its ``forward``.

    See `module` of :func:`as_teacher` for the forms. Edge weights go where ``forward`` has a
    parameter for them; a form without one gets graphs whose values are all 1.

    Raises:
        InputError: none of these forms.
    """
    parameters = inspect.signature(module.forward).parameters
    names = list(parameters)
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind not in starred]
    if names[:2] == ["x", "edges"]:
        return lambda graphs: module(graphs.x, graphs.edges)
    if names[:2] == ["x", "edge_index"] and "batch" in names:
        weight = next((name for name in ("edge_weight", "edge_attr") if name in names), None)
        if set(required) <= {"x", "edge_index", "batch", weight}:
            return lambda graphs: _call_by_name(module, graphs, weight)
    if len(required) == 1 and not {"x", "edge_index"} & set(names):
        return lambda graphs: module(_pyg_batch(graphs))
    raise InputError(
        "teacher: expected forward(x, edge_index, batch) with an optional edge_weight, or forward(data), got "
        f"forward({', '.join(names)}) of {type(module).__name__}; give an adapter such as {_ADAPTER}"
    )


def _call_by_name(module: nn.Module, graphs: GraphBatch, weight_name: str | None) -> torch.Tensor:
    if weight_name is None:
        graphs = without_weights(graphs)
    edge_index, weight = graphs.to_edge_index()
    weights = {} if weight_name is None else {weight_name: weight}
    logits: torch.Tensor = module(x=graphs.x, edge_index=edge_index, batch=graphs.batch(), **weights)
    return logits


def _pyg_batch(graphs: GraphBatch) -> Any:
    """A PyG Batch without the per-graph slices, which models do not read and which cost a loop to build."""
    from torch_geometric.data.batch import Batch

    make: Any = Batch
    edge_index, weight = graphs.to_edge_index()
    return make(
        x=graphs.x, edge_index=edge_index, edge_weight=weight, edge_attr=weight, batch=graphs.batch(), ptr=graphs.ptr
    )


def without_weights(graphs: GraphBatch) -> GraphBatch:
    """The same graphs for a module that takes no weights. Reads the device."""
    edges = graphs.edges
    value = edges.value[: edges.num_edges].detach()
    if bool((value == 1).all()):
        return graphs
    check(
        bool(((value == 1) | (value == 0)).all()),
        "graphs",
        "edge values 0 or 1, as the teacher takes no weights",
        value,
    )
    return GraphBatch(graphs.x, edges.drop_zeros(), graphs.y)


def check_logits(logits: Any, num_graphs: int) -> None:
    fits = isinstance(logits, torch.Tensor) and logits.dim() == 2 and logits.shape[0] == num_graphs
    if not fits:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError(
            f"teacher: expected logits [{num_graphs}, classes], got {got}; give an adapter such as {_ADAPTER}[0]"
        )


def input_width(module: nn.Module) -> int:
    for layer in module.modules():
        for name in ("num_features", "in_channels", "in_features"):
            width = getattr(layer, name, None)
            # A BatchNorm's num_features is a hidden width.
            if isinstance(width, int) and width > 0 and not isinstance(layer, nn.BatchNorm1d):
                return width
    raise InputError(f"num_features: expected the width of the node features of {type(module).__name__}, got none")


def probe(module: nn.Module, call: Call, width: int) -> tuple[int, bool]:
    """(number of logits, whether edge weights change them), from two small graphs."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(0))
    sources = torch.tensor([0, 1, 2, 3, 4, 1, 6, 7, 8, 9, 6])
    targets = torch.tensor([1, 2, 3, 4, 5, 3, 7, 8, 9, 10, 9])
    edge_index = torch.stack([torch.cat([sources, targets]), torch.cat([targets, sources])]).to(like.device)
    ptr = torch.tensor([0, 6, 11], device=like.device)
    edges = EdgeSample.from_edge_index(edge_index, ptr)
    x = torch.eye(width, dtype=like.dtype, device=like.device)[torch.arange(11, device=like.device) % width]
    uneven = torch.linspace(0.2, 0.9, edges.num_edges, dtype=like.dtype, device=like.device)
    module.eval()
    try:
        with torch.no_grad():
            plain = call(GraphBatch(x, edges.with_value(torch.ones_like(uneven), symmetric=True)))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"teacher: expected {type(module).__name__} to run on two small graphs with {width} features, got "
            f"{reason}; pass num_features, or an adapter such as {_ADAPTER}"
        ) from error
    check_logits(plain, 2)
    try:
        with torch.no_grad():
            weighted = call(GraphBatch(x, edges.with_value(uneven)))
    except InputError:
        return plain.shape[1], False
    return plain.shape[1], not torch.allclose(plain, weighted, rtol=1e-4, atol=1e-6)
