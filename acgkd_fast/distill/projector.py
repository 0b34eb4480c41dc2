"""Reuse of a teacher's classifier: what a teacher must expose, students built around it, and their sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calling import without_weights
from ..errors import InputError
from ..graphs import EdgeSample, GraphBatch
from ..nn.models import GraphClassifier, build_model, parse_arch
from ..nn.projected import LinearHead, ProjectedClassifier, Projector
from ..teachers import Teacher

_CURE = (
    "give it node_features(x, edge_index) -> [N, width] and classify(h, batch) -> [B, classes], where "
    "classify(node_features(...), ...) is its answer, or set student.reuse_classifier to false"
)


@dataclass(frozen=True)
class TeacherParts:
    """A teacher taken apart at its node features.

    Attributes:
        embed: graphs -> node features [N, width], without gradients.
        head: (node features [N, width], node offsets int64 [B + 1]) -> logits [B, num_classes]; frozen.
        width: of the node features.
        head_parameters: numbers in the head.
    """

    embed: Callable[[GraphBatch], torch.Tensor]
    head: nn.Module
    width: int
    head_parameters: int


def head_can_be_copied(teacher: Teacher) -> bool:
    """Whether a student can hold the teacher's head itself: that of a GraphClassifier without an adapter."""
    return isinstance(teacher.module, GraphClassifier) and not teacher.has_adapter


def teacher_parts(teacher: Teacher) -> TeacherParts:
    """Take a teacher apart.

    A GraphClassifier gives a copy of its readout and linear classifier. Any other module must have two
    methods, found by their parameter names: ``node_features(x, edges)`` with an EdgeSample, or
    ``node_features(x, edge_index)`` with an optional ``edge_weight`` or ``edge_attr``, gives [N, width]; and
    ``classify(h, ptr)`` or ``classify(h, batch)`` gives [B, classes].

    Raises:
        InputError: a module without these methods, methods that fail on two small graphs, or whose
            composition is not the teacher's answer there.
    """
    module = teacher.module
    if head_can_be_copied(teacher):
        assert isinstance(module, GraphClassifier)
        head = LinearHead(module.width, module.num_classes, module.readout)
        head.classifier.load_state_dict(module.classifier.state_dict())
        size = sum(parameter.numel() for parameter in head.parameters())
        features = _without_gradients(lambda graphs: module.node_features(graphs.x, graphs.edges))
        return TeacherParts(features, head.to(module.classifier.weight.device), module.width, size)
    embed, classify = _methods(teacher)
    graphs = _two_graphs(teacher)
    foreign = ForeignHead(module, classify)
    try:
        h = embed(graphs)
        answer = foreign(h, graphs.ptr)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"teacher: expected node_features and classify of {type(module).__name__} to run on two small graphs, "
            f"got {reason}; {_CURE}"
        ) from error
    whole = teacher(graphs)
    if h.dim() != 2 or len(h) != graphs.num_nodes or answer.shape != whole.shape:
        raise InputError(
            f"teacher: expected node features [{graphs.num_nodes}, width] and logits {tuple(whole.shape)}, got "
            f"{tuple(h.shape)} and {tuple(answer.shape)}; {_CURE}"
        )
    if not torch.allclose(answer, whole, rtol=1e-4, atol=1e-5):
        raise InputError(
            f"teacher: expected classify(node_features(graphs)) to be the answer of {type(module).__name__}, got "
            f"logits that differ by {float((answer - whole).abs().max()):.2g}; {_CURE}"
        )
    return TeacherParts(embed, foreign, h.shape[1], _touched(module, foreign, h, graphs.ptr))


class ForeignHead(nn.Module):
    """The ``classify`` method of somebody's module, which stays outside of this one's parameters and state."""

    def __init__(self, module: nn.Module, classify: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        # In a tuple, so that the whole teacher does not count as a part of the student.
        self.owner = (module,)
        self._classify = classify

    def forward(self, h: torch.Tensor, ptr: torch.Tensor) -> torch.Tensor:
        return self._classify(h, ptr)


def _methods(teacher: Teacher) -> tuple[Callable[[GraphBatch], torch.Tensor], Callable[..., torch.Tensor]]:
    module: Any = teacher.module
    features, classify = (_parameters(module, name) for name in ("node_features", "classify"))
    takes_edges = features[:2] == ["x", "edges"]
    known = (takes_edges or features[:2] == ["x", "edge_index"]) and classify[1:2] in (["ptr"], ["batch"])
    if not known:
        got = f"node_features({', '.join(features)}), classify({', '.join(classify)})"
        raise InputError(
            f"teacher: expected {type(module).__name__} to expose node features and head, got {got}; {_CURE}"
        )
    weight = next((name for name in ("edge_weight", "edge_attr") if name in features), None)

    def embed(graphs: GraphBatch) -> torch.Tensor:
        if not teacher.accepts_edge_weight:
            graphs = without_weights(graphs)
        if takes_edges:
            out: torch.Tensor = module.node_features(graphs.x, graphs.edges)
            return out
        edge_index, value = graphs.to_edge_index()
        out = module.node_features(graphs.x, edge_index, **({} if weight is None else {weight: value}))
        return out

    def head(h: torch.Tensor, ptr: torch.Tensor) -> torch.Tensor:
        graph = torch.arange(ptr.numel() - 1, device=ptr.device).repeat_interleave(ptr[1:] - ptr[:-1])
        out: torch.Tensor = module.classify(h, ptr if classify[1] == "ptr" else graph)
        return out

    return _without_gradients(embed), head


def _parameters(module: nn.Module, name: str) -> list[str]:
    method = getattr(module, name, None)
    return list(inspect.signature(method).parameters) if callable(method) else []


def _without_gradients(embed: Callable[[GraphBatch], torch.Tensor]) -> Callable[[GraphBatch], torch.Tensor]:
    @torch.no_grad()
    def run(graphs: GraphBatch) -> torch.Tensor:
        return embed(graphs)

    return run


def _two_graphs(teacher: Teacher) -> GraphBatch:
    """A path of four nodes and a triangle, with features that differ from node to node."""
    like = next((p for p in teacher.module.parameters() if p.is_floating_point()), torch.zeros(0))
    ends = torch.tensor([[0, 1, 2, 4, 5, 6], [1, 2, 3, 5, 6, 4]], device=like.device)
    edges = EdgeSample.from_edge_index(torch.cat([ends, ends.flip(0)], 1), torch.tensor([0, 4, 7], device=like.device))
    nodes = torch.arange(7, device=like.device)
    x = torch.eye(teacher.num_features, dtype=like.dtype, device=like.device)[nodes % teacher.num_features]
    return GraphBatch(x, edges.with_value(edges.value.to(like.dtype), symmetric=True))


def _touched(module: nn.Module, head: nn.Module, h: torch.Tensor, ptr: torch.Tensor) -> int:
    """How many numbers of the module its head uses: those that get a gradient from it."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            answer = head(h, ptr).sum()
            if not answer.requires_grad:
                return 0
            gradients = torch.autograd.grad(answer, parameters, allow_unused=True)
    finally:
        module.requires_grad_(False)
    return sum(p.numel() for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None)


def projected_student(
    teacher: Teacher,
    arch: str,
    seed: int,
    *,
    projector: str = "gat",
    heads: int = 1,
    layers: int = 1,
    relu: bool = True,
    dropout: float = 0.0,
    parts: TeacherParts | None = None,
) -> ProjectedClassifier:
    """A student of the lineage in front of the teacher's classifier, initialised from `seed` alone.

    Args:
        teacher: see :func:`teacher_parts`, whose result may be given as `parts`.
        arch: of the student's blocks.
        projector, heads, layers, relu: see :class:`Projector`.
        dropout: on the logits.

    Raises:
        InputError: as :func:`teacher_parts` and :class:`Projector`.
    """
    parts = parts or teacher_parts(teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = Projector(projector, parse_arch(arch)[2], parts.width, heads=heads, layers=layers, relu=relu)
        return ProjectedClassifier(
            arch,
            teacher.num_features,
            teacher.num_classes,
            projector=middle,
            head=parts.head,
            head_width=parts.width,
            dropout=dropout,
        )


def parameter_counts(teacher: Teacher, student: nn.Module) -> dict[str, int]:
    """How many numbers each part has: ``teacher``, ``student`` (all that is needed to run it), and of the latter
    ``trained``, ``projector`` and ``reused_classifier``."""
    counts = {"teacher": _count(teacher.module), "student": _count(student), "projector": 0, "reused_classifier": 0}
    if isinstance(student, ProjectedClassifier):
        foreign = isinstance(student.head, ForeignHead)
        reused = teacher_parts(teacher).head_parameters if foreign else _count(student.head)
        counts["student"] += reused if foreign else 0
        counts["projector"], counts["reused_classifier"] = _count(student.projector), reused
    return {**counts, "trained": counts["student"] - counts["reused_classifier"]}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def equal_size_arch(arch: str, num_features: int, num_classes: int, parameters: int) -> str:
    """The architecture of the same kind and depth, as wide as makes its size come closest to `parameters`."""
    name = arch[: arch.rindex("-")]

    def size(width: int) -> int:
        with torch.device("meta"):
            return _count(build_model(f"{name}-{width}", num_features, num_classes))

    high = 1
    while size(high) < parameters:
        high *= 2
    low = max(high // 2, 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < parameters else (low, middle)
    return f"{name}-{min((low, high), key=lambda width: abs(size(width) - parameters))}"
