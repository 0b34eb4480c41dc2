"""Settings of the student's training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from ..errors import InputError, check, check_choice, is_integer, is_number
from ..nn.projected import PROJECTORS, ProjectedClassifier
from ..teachers import Teacher
from .curriculum import CurriculumSettings
from .objectives import FEATURE_LEVELS
from .projector import head_can_be_copied
from .temperature import AdversarySettings


@dataclass(frozen=True)
class StudentSettings:
    """Settings of the student's training.

    The loss of a graph is kl_weight * temperature^2 KL + mse_weight * MSE of the logits + feature_weight *
    :func:`~.objectives.feature_distance`, with logits in the unit that `margin` sets.

    Attributes:
        epochs, lr, weight_decay, batch_size: Adam with linear decay to 0; the last epoch stands. The defaults
            are those at which students agree with their teacher on the pool itself (docs/student.md).
        clip_norm: longest gradient of a step; 0 does not clip. Gradients are tens to hundreds long at first, and
            Adam's second moments remember that when they have become short.
        recalibrate: after the last epoch, BatchNorm statistics from one pass over that epoch's graphs in place of the
            running averages over mini-batches.
        dropout: on the logits of a student given by name. GFKD has 0.5 there, which only keeps the
            student from matching the teacher's logits.
        margin: the loss sees logits in the unit in which the teacher's median margin over the pool (where that is a
            function of the epoch, over the first) is this, so that one temperature suits teachers whose margins are
            4 and teachers whose margins are 80 (:func:`logit_unit`). 0: the logits as they are. A student given by
            name learns in that unit and its classifier is scaled at the end; a module, or a student that reuses the
            teacher's classifier, learns in the teacher's unit from the start, which takes longer. Either way the
            finished student answers in the teacher's unit.
        temperature: of the softened logits.
        kl_weight, mse_weight, feature_weight: factors of the three terms, 0 leaves one out. `feature_weight` None: 1
            where the classifier is reused, else 0.
        feature_level: "node" or "graph"; the feature term needs `reuse_classifier`.
        reuse_classifier: raise the student to the teacher's width and let the teacher's frozen classifier answer. None:
            wherever that can be (:meth:`decided`).
        projector: how it is raised: "gat", "linear", or "none" for a student that is as wide as the teacher.
        projector_heads, projector_layers, projector_relu: of "gat", see :class:`~acgkd_fast.nn.projected.Projector`.
        curriculum: easy graphs first.
        adversary: a temperature that learns against the student.
        redraw: draw the learned pseudo-graphs anew every epoch (only after the learning stage).
    """

    epochs: int = 80
    lr: float = 0.02
    weight_decay: float = 0.0
    batch_size: int = 16
    clip_norm: float = 1.0
    recalibrate: bool = True
    dropout: float = 0.0
    margin: float = 2.0
    temperature: float = 2.0
    kl_weight: float = 1.0
    mse_weight: float = 0.0
    feature_weight: float | None = None
    feature_level: str = "node"
    reuse_classifier: bool | None = None
    projector: str = "gat"
    projector_heads: int = 1
    projector_layers: int = 1
    projector_relu: bool = True
    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)
    adversary: AdversarySettings = field(default_factory=AdversarySettings)
    redraw: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "projector_heads", "projector_layers"):
            value = getattr(self, name)
            check(is_integer(value) and value >= 1, name, "a whole number, at least 1", value)
        for name in ("lr", "temperature"):
            value = getattr(self, name)
            check(is_number(value) and 0 < value < float("inf"), name, "a number above 0", value)
        weights = ("kl_weight", "mse_weight", "feature_weight")
        for name in ("weight_decay", "clip_norm", "margin", *weights):
            value = getattr(self, name)
            left_open = name == "feature_weight" and value is None
            check(left_open or (is_number(value) and 0 <= value < float("inf")), name, "a number of 0 or more", value)
        reuse = self.reuse_classifier
        check(reuse is None or isinstance(reuse, bool), "reuse_classifier", "None, True or False", reuse)
        total = tuple(getattr(self, name) for name in weights)
        by_features = self.feature_weight is None and reuse is not False
        some = by_features or sum(weight or 0.0 for weight in total) > 0
        check(some, ", ".join(weights), "one of them above 0", total)
        check_choice("feature_level", self.feature_level, FEATURE_LEVELS)
        check_choice("projector", self.projector, PROJECTORS)
        check(isinstance(self.curriculum, CurriculumSettings), "curriculum", "its settings", self.curriculum)
        check(isinstance(self.adversary, AdversarySettings), "adversary", "its settings", self.adversary)
        if self.feature_weight and reuse is False:
            raise InputError("feature_weight: expected 0 without reuse_classifier, whose projector it compares by")
        if self.adversary.mode != "fixed":
            check(self.kl_weight > 0, "kl_weight", "a number above 0 beside an adversary", self.kl_weight)
            low, high = self.adversary.low, self.adversary.high
            inside = low < self.temperature < high
            check(inside, "temperature", f"a start between adversary.low and .high, {low} and {high}", self.temperature)

    def decided(self, teacher: Teacher, student: str | nn.Module = "gcn3-32") -> StudentSettings:
        """These settings with `reuse_classifier` and `feature_weight` decided where they are None.

        The classifier is reused by a student given by name, or by a ProjectedClassifier, whose teacher is a
        GraphClassifier, of which a student can hold a copy. Another module's classifier stays in that module, so its
        student reuses it only where that is asked for.

        Raises:
            InputError: a feature weight above 0 where the classifier cannot be reused.
        """
        reuse = self.reuse_classifier
        if reuse is None:
            reuse = isinstance(student, str | ProjectedClassifier) and head_can_be_copied(teacher)
        weight = self.feature_weight
        if weight is None:
            weight = 1.0 if reuse else 0.0
        return replace(self, reuse_classifier=reuse, feature_weight=weight)
