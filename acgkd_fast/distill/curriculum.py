"""Curriculum: which pseudo-graphs a student sees in which epoch, easy ones first, and with what weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import check, check_choice, is_integer, is_number
from ..graphs import GraphBatch

DIFFICULTIES = ("none", "teacher_loss", "disagreement", "edges", "nodes", "degree")
PACINGS = ("linear", "root", "step")
WEIGHTS = ("hard", "soft", "log")


@dataclass(frozen=True)
class CurriculumSettings:
    """From easy to hard. What ACGKD itself uses is not known beyond "progressively"; the choices are this package's.

    Attributes:
        difficulty: what makes a graph hard. "none": no curriculum. "teacher_loss": the teacher's cross-entropy
            on the graph's label. "disagreement": the student's current divergence from the teacher,
            measured anew before every epoch (self-paced). "edges", "nodes", "degree" (mean): structure.
        pacing: how the share of graphs grows: "linear", "root" (square root, arXiv 1903.09848) or "step".
        start_share: the easiest share that the first epoch sees, in (0, 1].
        full_at: share of the epochs after which all graphs take part, in (0, 1].
        stages: steps of "step", at least 1.
        weights: of "disagreement" (CuDFKD, arXiv 2208.13648): "hard", "soft" or "log", see :func:`self_paced_weights`.
            The other difficulties weigh all visited graphs alike.
    """

    difficulty: str = "none"
    pacing: str = "linear"
    start_share: float = 0.25
    full_at: float = 0.5
    stages: int = 4
    weights: str = "hard"

    def __post_init__(self) -> None:
        check_choice("difficulty", self.difficulty, DIFFICULTIES)
        check_choice("pacing", self.pacing, PACINGS)
        check_choice("weights", self.weights, WEIGHTS)
        for name in ("start_share", "full_at"):
            value = getattr(self, name)
            check(is_number(value) and 0.0 < value <= 1.0, name, "a number in (0, 1]", value)
        check(is_integer(self.stages) and self.stages >= 1, "stages", "a whole number, at least 1", self.stages)


def share_at(settings: CurriculumSettings, epoch: int, epochs: int) -> float:
    """Share of the graphs that epoch 0, 1, ... of `epochs` sees, in (0, 1].

    With t = epoch / (full_at epochs), at most 1, and s the start: s + (1 - s) t for "linear",
    sqrt(s^2 + (1 - s^2) t) for "root", s + (1 - s) floor(stages t) / stages for "step".
    """
    t = min(epoch / (settings.full_at * epochs), 1.0)
    start = settings.start_share
    if settings.pacing == "root":
        return min(math.sqrt(start**2 + (1.0 - start**2) * t), 1.0)
    if settings.pacing == "step":
        t = math.floor(settings.stages * t) / settings.stages
    return min(start + (1.0 - start) * t, 1.0)


def structural_difficulty(graphs: GraphBatch, kind: str) -> torch.Tensor:
    """float64 [B]: stored "edges" (an undirected one is two), "nodes", or mean "degree" of each graph."""
    check_choice("difficulty", kind, ("edges", "nodes", "degree"))
    sizes = graphs.sizes.double()
    if kind == "nodes":
        return sizes
    offsets = graphs.edges.rowptr.long()[graphs.ptr]
    edges = (offsets[1:] - offsets[:-1]).double()
    return edges if kind == "edges" else edges / sizes.clamp(min=1.0)


def easiest(difficulty: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
    """bool [B]: the easiest share of each class, rounded up; equal difficulties go by position.

    Args:
        difficulty: [B], higher is harder.
        labels: int64 [B]; every class keeps its part, as "easy" would otherwise often mean one class.
        share: in (0, 1].
    """
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1)
        # A product such as 0.1 * 30 must not round up to 4 for its last bit.
        count = math.ceil(round(share * len(members), 9))
        order = difficulty[members].argsort(stable=True)
        chosen[members[order[:count]]] = True
    return chosen


def self_paced_weights(divergence: torch.Tensor, age: torch.Tensor | float, kind: str) -> torch.Tensor:
    """CuDFKD's weights v of graphs with divergence l at age L: 0 and above, 1 at l = 0.

    "hard": 1 where l < L, else 0. "soft": max(1 - l / L, 0). "log": (1 + exp(-L)) / (1 + exp(l - L)). All are 1 at
    infinite L.

    Args:
        divergence: [B], 0 and above.
        age: above 0, a number or [B].
    """
    check_choice("weights", kind, WEIGHTS)
    age = torch.as_tensor(age, dtype=divergence.dtype, device=divergence.device)
    if kind == "hard":
        return (divergence < age).to(divergence.dtype)
    if kind == "soft":
        return (1.0 - divergence / age).clamp(min=0.0)
    return (1.0 + (-age).exp()) * torch.sigmoid(age - divergence)


def pace(divergence: torch.Tensor, labels: torch.Tensor, share: float, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-paced stage: (bool [B] graphs to visit, [B] weights of mean 1 over the visited graphs of each class).

    The age L of a class is the divergence of its first graph beyond the easiest share, infinite when all take
    part: so the share paces, and not the unit of the divergence. "log" visits every graph. Where all
    weights of a class vanish (equal divergences), its visited graphs count alike.
    """
    visited = easiest(divergence, labels, share)
    weights = torch.zeros_like(divergence)
    for label in labels.unique().tolist():
        members = labels == label
        beyond = divergence[members & ~visited]
        age = float(beyond.min()) if beyond.numel() else math.inf
        if kind == "log":
            visited = visited | members
        mine = members & visited
        paced = self_paced_weights(divergence[mine], age, kind) if age > 0 else torch.zeros_like(divergence[mine])
        total = float(paced.sum())
        weights[mine] = paced * (len(paced) / total) if total > 0 else 1.0
    return visited, weights
