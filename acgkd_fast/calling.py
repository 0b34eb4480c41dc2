"""How to run a classifier of unknown make on a GraphBatch: parameter names first, then two small graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .errors import InputError, check
from .graph_view import dgl_graph
from .graphs import EdgeSample, GraphBatch

Call = Callable[[GraphBatch], torch.Tensor]

_ADAPTER = "call=lambda module, graphs: module(graphs.x, graphs.to_edge_index()[0], graphs.batch())"

# Names that people give to one and the same argument.
_NAMES = {
    "x": ("x", "features", "feat", "feats", "node_features", "node_feats", "h", "inputs"),
    "edge_index": ("edge_index", "edge_idx"),
    "batch": ("batch", "batch_index", "batch_idx", "batch_vector", "batch_vec"),
    "weight": ("edge_weight", "edge_weights", "edge_attr"),
    "count": ("num_graphs", "batch_size"),
    "ptr": ("ptr",),
    "graph": ("graph", "g", "bg", "batched_graph", "dgl_graph"),
    "adjacency": ("adj", "adjacency", "adj_matrix", "adjs"),
    "mask": ("mask", "node_mask"),
}


def call_convention(module: nn.Module) -> Call:
    """How to run a module on a GraphBatch, from the parameter names of its ``forward``.

    See `module` of :func:`as_teacher` for the forms. Edge weights go where ``forward`` has a
    parameter for them; a form without one gets graphs whose values are all 1.

    Raises:
        InputError: none of these forms.
    """
    form = _form(module)
    if form is None:
        raise InputError(
            "teacher: expected forward(x, edge_index, batch) with an optional edge_weight, forward(data), "
            f"forward(graph, x) or forward(x, adj, mask), got {_signature(module)}; give an adapter such as {_ADAPTER}"
        )
    call, _ = form
    return call


def sample_convention(module: nn.Module) -> Call | None:
    """How to run a module with an EdgeSample in the place of ``edge_index``; None where it has no such place."""
    form = _form(module)
    return None if form is None else form[1]


def _form(module: nn.Module) -> tuple[Call, Call | None] | None:
    parameters = inspect.signature(module.forward).parameters
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, p in parameters.items() if p.kind not in starred]
    required = {name for name in names if parameters[name].default is inspect.Parameter.empty}
    known = {role: next((n for n in own if n in names), None) for role, own in _NAMES.items()}

    def takes(*roles: str, also: tuple[str, ...] = ()) -> bool:
        names = [known[role] for role in (*roles, *also)]
        return all(known[role] for role in roles) and required <= set(names)

    def run(**values: Any) -> torch.Tensor:
        given = {name: value for role, value in values.items() if (name := known[role]) is not None}
        before = [name for name in names if parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY]
        logits: torch.Tensor = module(*[given.pop(name) for name in before if name in given], **given)
        return logits

    # Optional counts are left alone: where they are no graphs but something else, the default is right.
    counted = [role for role in ("count", "ptr") if known[role] in required]

    def counts(graphs: GraphBatch) -> dict[str, Any]:
        return {role: graphs.num_graphs if role == "count" else graphs.ptr for role in counted}

    def listed(graphs: GraphBatch) -> torch.Tensor:
        if known["weight"] is None:
            graphs = without_weights(graphs)
        edge_index, weight = graphs.to_edge_index()
        return run(x=graphs.x, edge_index=edge_index, batch=graphs.batch(), weight=weight, **counts(graphs))

    def sampled(graphs: GraphBatch) -> torch.Tensor:
        needed = {"weight": None} if known["weight"] in required else {}
        return run(x=graphs.x, edge_index=graphs.edges, batch=graphs.batch(), **needed, **counts(graphs))

    def padded(graphs: GraphBatch) -> torch.Tensor:
        x, adjacency, mask = graphs.to_dense()
        return run(x=x, adjacency=adjacency, mask=mask)

    def viewed(graphs: GraphBatch) -> torch.Tensor:
        return run(graph=dgl_graph(graphs), x=graphs.x, weight=graphs.to_edge_index()[1])

    if names[:2] == ["x", "edges"]:
        return (lambda graphs: module(graphs.x, graphs.edges)), None
    if takes("x", "edge_index", "batch", also=("weight", "count", "ptr")):
        return listed, sampled
    if takes("x", "adjacency", "mask"):
        return padded, None
    if takes("graph", "x", also=("weight",)):
        return viewed, None
    if len(required) == 1 and known["edge_index"] is None and "x" not in names:
        return (
            lambda graphs: module(_pyg_batch(graphs, *graphs.to_edge_index())),
            lambda graphs: module(_pyg_batch(graphs, graphs.edges, None)),
        )
    return None


def _signature(module: nn.Module) -> str:
    return f"forward({', '.join(inspect.signature(module.forward).parameters)}) of {type(module).__name__}"


def _pyg_batch(graphs: GraphBatch, edges: Any, weight: torch.Tensor | None) -> Any:
    """A PyG Batch without the per-graph slices, which models do not read and which cost a loop to build."""
    from torch_geometric.data.batch import Batch

    make: Any = Batch
    return make(
        x=graphs.x, edge_index=edges, edge_weight=weight, edge_attr=weight, batch=graphs.batch(), ptr=graphs.ptr
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
            # A norm's width is a hidden one, whichever norm and whoever wrote it.
            if isinstance(width, int) and width > 0 and "Norm" not in type(layer).__name__:
                return width
    raise InputError(f"num_features: expected the width of the node features of {type(module).__name__}, got none")


def _two_graphs(module: nn.Module, width: int) -> GraphBatch:
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(0))
    sources = torch.tensor([0, 1, 2, 3, 4, 1, 6, 7, 8, 9, 6])
    targets = torch.tensor([1, 2, 3, 4, 5, 3, 7, 8, 9, 10, 9])
    edge_index = torch.stack([torch.cat([sources, targets]), torch.cat([targets, sources])]).to(like.device)
    edges = EdgeSample.from_edge_index(edge_index, torch.tensor([0, 6, 11], device=like.device))
    x = torch.eye(width, dtype=like.dtype, device=like.device)[torch.arange(11, device=like.device) % width]
    return GraphBatch(x, edges.with_value(edges.value.to(like.dtype), symmetric=True))


@torch.no_grad()
def mixes_graphs(module: nn.Module, call: Call, width: int, logits: torch.Tensor) -> bool:
    """Whether a graph's logits depend on which other graphs are in the batch.

    Norms over nodes do so where they are not told the graph of each node, or keep no statistics for eval mode.

    Args:
        logits: what :func:`probe` returned.
    """
    # Three rather than one: a norm over graphs has nothing to compare a single one with.
    beside = call(_two_graphs(module, width).select(torch.tensor([0, 1, 0])))
    return not torch.allclose(beside[:2], logits, rtol=1e-3, atol=1e-4)


def probe(module: nn.Module, call: Call, width: int) -> tuple[torch.Tensor, bool]:
    """(logits [2, C] of two small graphs, whether edge weights change them)."""
    module.eval()
    graphs = _two_graphs(module, width)
    edges = graphs.edges
    try:
        with torch.no_grad():
            plain = call(graphs)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"teacher: expected {type(module).__name__} to run on two small graphs with {width} features, got "
            f"{reason}; pass num_features, or for {_signature(module)} an adapter such as {_ADAPTER}"
        ) from error
    check_logits(plain, 2)
    uneven = torch.linspace(0.2, 0.9, edges.num_edges, dtype=edges.value.dtype, device=edges.value.device)
    try:
        with torch.no_grad():
            weighted = call(GraphBatch(graphs.x, edges.with_value(uneven)))
    except InputError:
        return plain, False
    return plain, not torch.allclose(plain, weighted, rtol=1e-4, atol=1e-6)
