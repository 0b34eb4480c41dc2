"""Teach a student on pseudo-graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import check, check_choice
from ..graphs import GraphBatch
from ..nn.models import GraphClassifier, build_model
from ..teachers import Teacher, as_teacher, call_convention
from ..training import Progress, fit
from .objectives import distillation_loss

LOSSES = ("kl", "mse")


@dataclass(frozen=True)
class StudentSettings:
    """Settings of the student's training.

    Attributes:
        epochs, lr, weight_decay, batch_size: Adam with linear decay to 0; the last epoch stands. The defaults
            are those at which students agree with their teacher on the pool itself (docs/results.md).
        dropout: on the logits of a student given by name. GFKD has 0.5 there, which only keeps the
            student from matching the teacher's logits.
        temperature: of the softened logits under "kl".
        loss: "kl" (temperature^2 KL) or "mse" on logits.
        redraw: draw the learned pseudo-graphs anew every epoch (only after the learning stage).
    """

    epochs: int = 80
    lr: float = 0.02
    weight_decay: float = 0.0
    batch_size: int = 16
    dropout: float = 0.0
    temperature: float = 2.0
    loss: str = "kl"
    redraw: bool = False

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        check(self.lr > 0, "lr", "a number above 0", self.lr)
        check(self.temperature > 0, "temperature", "a number above 0", self.temperature)
        check_choice("loss", self.loss, LOSSES)


def distill_student(
    teacher: Teacher | nn.Module,
    pool: GraphBatch | Callable[[int], GraphBatch],
    student: str | nn.Module = "gcn3-32",
    settings: StudentSettings | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Train a student to give the teacher's answers on a pool of graphs.

    Args:
        teacher: a Teacher or any module that `as_teacher` accepts; stays frozen.
        pool: the graphs (their labels are not used), or a function of the epoch that draws them.
        student: an architecture by name, initialised from `seed`, or a module trained in place.
        settings: see :class:`StudentSettings`.
        seed: initialisation, order of the mini-batches, dropout.
        progress, checkpoint: see :func:`acgkd_fast.training.fit`.

    Returns:
        The student in eval mode.

    Raises:
        InputError: settings out of range, or a module whose call convention is unknown.
    """
    settings = settings or StudentSettings()
    frozen = as_teacher(teacher)
    model = new_student(frozen, student, seed, dropout=settings.dropout) if isinstance(student, str) else student
    call = call_convention(model)
    targets = None if callable(pool) else teacher_logits(frozen, pool)

    def loss(graphs: GraphBatch, positions: torch.Tensor) -> torch.Tensor:
        target = _answers(frozen, graphs) if targets is None else targets[positions]
        answer = call(graphs)
        if settings.loss == "mse":
            return torch.nn.functional.mse_loss(answer, target)
        return distillation_loss(answer, target, settings.temperature)

    fit(
        model,
        pool,
        loss,
        epochs=settings.epochs,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        batch_size=settings.batch_size,
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
    )
    return model


def new_student(teacher: Teacher, arch: str, seed: int, *, dropout: float = 0.0) -> GraphClassifier:
    """A student of the lineage with the teacher's widths, initialised from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(arch, teacher.num_features, teacher.num_classes, dropout=dropout)


def teacher_logits(teacher: Teacher, graphs: GraphBatch, batch_size: int = 512) -> torch.Tensor:
    """The teacher's logits on every graph, [B, C], without gradients."""
    positions = torch.arange(graphs.num_graphs).split(batch_size)
    return torch.cat([_answers(teacher, graphs.select(part)) for part in positions])


@torch.no_grad()
def _answers(teacher: Teacher, graphs: GraphBatch) -> torch.Tensor:
    return teacher(graphs)
