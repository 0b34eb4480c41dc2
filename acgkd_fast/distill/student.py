"""Teach a student on pseudo-graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from ..graphs import GraphBatch
from ..nn.models import GraphClassifier, build_model
from ..nn.projected import Classifier, ProjectedClassifier
from ..teachers import Teacher, as_teacher, call_convention
from ..training import Progress, fit, recalibrate_batch_norm
from .curriculum import easiest, pace, share_at, structural_difficulty
from .objectives import distillation_divergence, feature_distance
from .projector import TeacherParts, projected_student, teacher_parts
from .student_settings import StudentSettings as StudentSettings
from .temperature import AdversarialTemperature

Pool = GraphBatch | Callable[[int], GraphBatch]


def distill_student(
    teacher: Teacher | nn.Module,
    pool: Pool,
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
        pool: the graphs, or a function of the epoch that draws them. Their labels are used by a curriculum
            alone, which takes the teacher's answers where there are none.
        student: an architecture by name, initialised from `seed`, or a module trained in place, from where it is.
            With ``reuse_classifier`` a module must be a :class:`~acgkd_fast.nn.projected.ProjectedClassifier`.
        settings: see :class:`StudentSettings`.
        seed: initialisation, order of the mini-batches, dropout.
        progress: called after every epoch with its number and ``loss``, in the unit of `settings.margin`; with a
            curriculum also ``share``, of the graphs visited, and with an adversary ``temperature``, the mean.
        checkpoint: see :func:`acgkd_fast.training.fit`; one of other settings is refused.

    Returns:
        The student in eval mode.

    Raises:
        DataError: a checkpoint of another training.
        InputError: settings out of range, a module whose call convention is unknown, or with
            ``reuse_classifier`` a teacher that does not expose its parts (:func:`~.projector.teacher_parts`).
    """
    frozen = as_teacher(teacher)
    settings = (settings or StudentSettings()).decided(frozen, student)
    parts = teacher_parts(frozen) if settings.reuse_classifier else None
    model = new_student(frozen, student, seed, settings, parts) if isinstance(student, str) else student
    if parts is not None and not isinstance(model, ProjectedClassifier):
        raise InputError(
            f"student: expected an architecture by name or a ProjectedClassifier with reuse_classifier, got "
            f"{type(model).__name__}"
        )
    lesson = _Lesson(frozen, parts, model, settings, seed, pool, fresh=isinstance(student, str))
    fit(
        model,
        pool,
        lesson.loss,
        epochs=settings.epochs,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        batch_size=settings.batch_size,
        clip_norm=settings.clip_norm,
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
        stamp=asdict(settings),
        companion=lesson.adversary,
        begin_epoch=lesson.begin_epoch,
        measure=lesson.measure,
    )
    if settings.recalibrate:
        last = pool(settings.epochs - 1) if callable(pool) else pool
        recalibrate_batch_norm(model, last, call_convention(model))
    lesson.restore_unit()
    return model


def new_student(
    teacher: Teacher,
    arch: str,
    seed: int,
    settings: StudentSettings | None = None,
    parts: TeacherParts | None = None,
) -> Classifier:
    """A student of the lineage, initialised from `seed` alone; the settings say whether it reuses the classifier."""
    settings = (settings or StudentSettings()).decided(teacher, arch)
    if settings.reuse_classifier:
        return projected_student(
            teacher,
            arch,
            seed,
            projector=settings.projector,
            heads=settings.projector_heads,
            layers=settings.projector_layers,
            relu=settings.projector_relu,
            dropout=settings.dropout,
            parts=parts,
        )
    return plain_student(teacher, arch, seed, dropout=settings.dropout)


def plain_student(teacher: Teacher, arch: str, seed: int, *, dropout: float = 0.0) -> GraphClassifier:
    """A student of the lineage with its own classifier, initialised from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(arch, teacher.num_features, teacher.num_classes, dropout=dropout)


def teacher_logits(teacher: Teacher, graphs: GraphBatch, batch_size: int = 512) -> torch.Tensor:
    """The teacher's logits on every graph, [B, C], without gradients."""
    return _in_parts(teacher, graphs, batch_size)


def logit_unit(logits: torch.Tensor, margin: float) -> float:
    """The factor between logits as they are and logits whose median margin is `margin`.

    Logits of teachers that sum over nodes can be tens of times larger than others'. At a fixed temperature those
    soft targets are hard ones, and a few graphs with extreme logits decide what the student learns.

    Args:
        logits: the teacher's on a pool, [B, C].
        margin: 0 for the logits as they are.

    Returns:
        Over `margin`: the median over graphs of (largest - second largest logit), or a tenth of its 90 % quantile if
        that is more, since a median near 0 would blow the other graphs up. 1 with a margin of 0, no graphs, one class,
        or where the quotient is not a number above 0.
    """
    if margin == 0 or logits.shape[0] == 0 or logits.shape[1] < 2:
        return 1.0
    best = logits.double().topk(2, dim=1).values
    median, high = (best[:, 0] - best[:, 1]).quantile(best.new_tensor([0.5, 0.9])).tolist()
    unit = max(median, 0.1 * high) / margin
    return unit if 0.0 < unit < float("inf") else 1.0


@torch.no_grad()
def pool_agreement(
    teacher: Teacher, student: nn.Module, pool: GraphBatch, *, settings: StudentSettings | None = None
) -> dict[str, float]:
    """How well a student learned its pool, without any data: what tells a collapsed student from a good one.

    Args:
        teacher, student: the student in eval mode, answering in the teacher's unit.
        pool: the graphs it learned from, or that were perturbed for it.
        settings: it learned by; temperature and margin count. Default: the default ones.

    Returns:
        ``agreement``, the share of graphs on which student and teacher name the same class, and ``divergence``, the
        mean temperature^2 KL in nats, of logits in the unit of the settings' margin.
    """
    settings = settings or StudentSettings()
    theirs = teacher_logits(teacher, pool)
    ours = _in_parts(call_convention(student), pool)
    unit = logit_unit(theirs, settings.margin)
    return {
        "agreement": float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
        "divergence": float(distillation_divergence(ours / unit, theirs / unit, settings.temperature).mean()),
    }


@torch.no_grad()
def _in_parts(call: Callable[[GraphBatch], torch.Tensor], graphs: GraphBatch, batch_size: int = 512) -> torch.Tensor:
    positions = torch.arange(graphs.num_graphs).split(batch_size)
    return torch.cat([call(graphs.select(part)) for part in positions])


class _Lesson:
    """What the epoch loop asks for: the graphs of an epoch, the loss of a mini-batch, figures to report.

    Nothing here is carried from epoch to epoch, so that a resumed training needs no state beyond the
    modules': the teacher's answers are the same for equal graphs, and a self-paced curriculum looks at the student
    as it is.
    """

    def __init__(
        self,
        teacher: Teacher,
        parts: TeacherParts | None,
        model: nn.Module,
        settings: StudentSettings,
        seed: int,
        pool: Pool,
        *,
        fresh: bool,
    ) -> None:
        self.adversary: AdversarialTemperature | None = None
        if settings.adversary.mode != "fixed":
            opponent = AdversarialTemperature(settings.adversary, settings.temperature, teacher.num_classes, seed)
            # Before the optimizer sees its parameters, so that a restored state finds them on their device.
            self.adversary = opponent.to(next(model.parameters(), torch.empty(0)).device)
        self._teacher, self._parts, self._model, self._settings = teacher, parts, model, settings
        self._call = call_convention(model)
        self._seen: GraphBatch | None = None
        self._targets = torch.empty(0)
        self._features: tuple[torch.Tensor, ...] = ()
        self._pool = pool
        # Growing from a fresh start to logits of 80 takes most of a short training, so a student whose start and
        # classifier are ours learns in the unit of the loss and is scaled afterwards.
        self._scaled_afterwards = fresh and isinstance(model, GraphClassifier)
        self._weights: torch.Tensor | None = None
        self._epoch = 0
        self._temperatures: list[torch.Tensor] = []
        self._figures: dict[str, float] = {}

    @cached_property
    def unit(self) -> float:
        """Of the loss: one for the whole training, also where every epoch has graphs of its own."""
        if self._settings.margin == 0:
            return 1.0
        first = self._pool(0) if callable(self._pool) else self._pool
        return logit_unit(teacher_logits(self._teacher, first), self._settings.margin)

    def _in_unit(self, answer: torch.Tensor) -> torch.Tensor:
        """The student's answer as the loss sees it."""
        return answer if self._scaled_afterwards else answer / self.unit

    @torch.no_grad()
    def restore_unit(self) -> None:
        """Bring a student that learned in the unit of the loss to the teacher's."""
        if self._scaled_afterwards:
            assert isinstance(self._model, GraphClassifier)
            for parameter in self._model.classifier.parameters():
                parameter.mul_(self.unit)

    def begin_epoch(self, epoch: int, graphs: GraphBatch) -> torch.Tensor | None:
        """Positions to visit, None for all."""
        self._epoch, self._figures = epoch, {}
        self._temperatures = []
        if graphs is not self._seen:
            self._seen = graphs
            self._ask_teacher(graphs)
        curriculum = self._settings.curriculum
        if curriculum.difficulty == "none":
            return None
        share = share_at(curriculum, epoch, self._settings.epochs)
        labels = self._targets.argmax(1) if graphs.y is None else graphs.y
        if curriculum.difficulty == "disagreement":
            visited, self._weights = pace(self._disagreement(graphs), labels, share, curriculum.weights)
        else:
            visited = easiest(self._difficulty(graphs, labels), labels, share)
        positions = visited.nonzero().squeeze(1)
        self._figures["share"] = positions.numel() / graphs.num_graphs
        return positions

    @torch.no_grad()
    def _ask_teacher(self, graphs: GraphBatch) -> None:
        """All of the epoch's answers at once, and node features where the student learns them: one pass of the teacher
        over large parts takes a fraction of one pass per mini-batch."""
        if self._parts is None or not self._settings.feature_weight:
            self._targets = teacher_logits(self._teacher, graphs) / self.unit
            return
        features = _in_parts(self._parts.embed, graphs)
        self._features = features.split(graphs.sizes.tolist())
        self._targets = self._parts.head(features, graphs.ptr) / self.unit

    def _difficulty(self, graphs: GraphBatch, labels: torch.Tensor) -> torch.Tensor:
        kind = self._settings.curriculum.difficulty
        if kind == "teacher_loss":
            return nn.functional.cross_entropy(self._targets, labels, reduction="none")
        return structural_difficulty(graphs, kind)

    def _disagreement(self, graphs: GraphBatch) -> torch.Tensor:
        self._model.eval()
        answers = self._in_unit(_in_parts(self._call, graphs))
        self._model.train()
        return distillation_divergence(answers, self._targets, self._settings.temperature)

    def loss(self, graphs: GraphBatch, positions: torch.Tensor) -> torch.Tensor:
        """Mean over the mini-batch of the graphs' losses times their weights."""
        settings, target = self._settings, self._targets[positions]
        losses = target.new_zeros(graphs.num_graphs)
        if isinstance(self._model, ProjectedClassifier):
            h = self._model.node_features(graphs.x, graphs.edges)
            answer = self._model.classify(h, graphs.ptr)
            if settings.feature_weight:
                theirs = torch.cat([self._features[i] for i in positions.tolist()])
                distance = feature_distance(h, theirs, graphs.ptr, settings.feature_level)
                losses = losses + settings.feature_weight * distance
        else:
            answer = self._call(graphs)
        answer = self._in_unit(answer)
        if settings.kl_weight > 0:
            temperature = self._temperature(answer, target)
            losses = losses + settings.kl_weight * distillation_divergence(answer, target, temperature)
        if settings.mse_weight > 0:
            losses = losses + settings.mse_weight * (answer - target).square().mean(-1)
        if self._weights is not None:
            losses = losses * self._weights[positions]
        return losses.mean()

    def _temperature(self, answer: torch.Tensor, target: torch.Tensor) -> torch.Tensor | float:
        if self.adversary is None:
            return self._settings.temperature
        temperature: torch.Tensor = self.adversary(answer, target, self._epoch)
        self._temperatures.append(temperature.detach().flatten())
        return temperature

    def measure(self) -> dict[str, float]:
        """Figures of the epoch beside its loss."""
        if self._temperatures:
            self._figures["temperature"] = float(torch.cat(self._temperatures).mean())
        return self._figures
