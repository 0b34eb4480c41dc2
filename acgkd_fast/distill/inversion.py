"""Learn: pseudo-graphs by gradient through Binary Concrete edges.

One step draws edges, runs the frozen teacher, adds the terms

    CE(T(A, X), y) + c_bn R_bn + c_oh H(X) + c_degree (ln degree / target)^2

and lets Adam move logits and features together. GFKD (arXiv 2105.07519) takes two separate steps and
forward passes only for the structure; the path through the edges is ACGKD's idea (arXiv 2504.00540).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..edges.api import arm_gradient
from ..edges.estimators import ESTIMATORS
from ..errors import InputError, check, check_choice
from ..graphs import EdgeSample, GraphBatch
from ..optim import Adam
from ..pseudo_graphs import PseudoGraphs
from ..teachers import Teacher, as_teacher
from .captured import stepper
from .objectives import BN_TERMS, batch_norm_term, degree_term, one_hot_entropy
from .statistics import MomentsProbe, warn_without_batch_norm

# A gradient of so many floats leaves the cache, and its memory goes back to the system in every step.
_MANY_PAIRS = 1 << 20

Progress = Callable[[int, dict[str, float]], None]
ExtraLoss = Callable[[GraphBatch, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LearnSettings:
    """Settings of the learning stage.

    Attributes:
        steps: optimiser steps.
        lr_structure, lr_features: Adam's step sizes; both fall tenfold every `lr_decay_steps`.
        estimator: any of `sample_edges`; "arm" moves the structure by forward passes alone.
        temperature, final_temperature: Binary Concrete temperature, geometric from first to last.
        c_bn, bn_term: weight and kind of the BatchNorm term.
        c_oh: weight of the one-hot entropy.
        c_degree, target_degree: weight (0 leaves the term out) and target of the expected degree; None is
            the one that the pseudo-graphs set out with.
    """

    steps: int = 400
    lr_structure: float = 0.1
    lr_features: float = 0.01
    lr_decay_steps: int = 700
    estimator: str = "sparse_straight_through"
    temperature: float = 1.0
    final_temperature: float = 1.0
    c_bn: float = 0.1
    bn_term: str = "norm"
    c_oh: float = 0.01
    c_degree: float = 1.0
    target_degree: float | None = None

    def __post_init__(self) -> None:
        check(self.steps >= 0, "steps", "0 or more", self.steps)
        for name in ("lr_structure", "lr_features"):
            check(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))
        check_choice("estimator", self.estimator, ESTIMATORS)
        for name in ("temperature", "final_temperature"):
            check(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))
        check_choice("bn_term", self.bn_term, BN_TERMS)
        target = self.target_degree
        check(target is None or target > 0, "target_degree", "None or a number above 0", target)

    def temperature_at(self, step: int) -> float:
        share = step / max(self.steps - 1, 1)
        return float(self.temperature * (self.final_temperature / self.temperature) ** share)

    def rates_at(self, step: int) -> list[float]:
        """Adam's step sizes of structure and features, as the nearest float32, which is what a device keeps."""
        decay = 0.1 ** (step // self.lr_decay_steps)
        return torch.tensor([self.lr_structure * decay, self.lr_features * decay], dtype=torch.float32).tolist()


class Learner:
    """The learning stage as an object that can be stepped, saved and resumed.

    Args:
        teacher: a Teacher or any module that `as_teacher` accepts.
        pseudo_graphs: what is learned, in place.
        settings: see :class:`LearnSettings`.
        seed: key of the edge noise; step t uses counter word t.
        extra_loss: of (graphs, the teacher's logits), [B]; counts like the cross-entropy, beside it.

    Raises:
        InputError: widths or labels that do not fit the teacher, or a teacher that takes no edge weights
            with an estimator that needs a gradient through the edges.

    Warns:
        RuntimeWarning: the teacher has no BatchNorm though `c_bn` asks for its term.
    """

    def __init__(
        self,
        teacher: Teacher | torch.nn.Module,
        pseudo_graphs: PseudoGraphs,
        settings: LearnSettings,
        *,
        seed: int = 0,
        extra_loss: ExtraLoss | None = None,
    ) -> None:
        self.teacher = as_teacher(teacher)
        self.pseudo_graphs = pseudo_graphs
        self.settings = settings
        self.seed = seed
        self.extra_loss = extra_loss
        target = settings.target_degree
        self._target_degree = float(pseudo_graphs.expected_degree().detach().mean()) if target is None else target
        self.step = 0
        width, classes = pseudo_graphs.features.shape[1], self.teacher.num_classes
        wanted = self.teacher.num_features
        check(width == wanted, "features", f"width {wanted} (the teacher's)", width)
        labels = pseudo_graphs.y
        known = labels.numel() == 0 or 0 <= int(labels.min()) <= int(labels.max()) < classes
        check(known, "y", f"labels in 0..{classes - 1}", labels.tolist())
        if settings.estimator != "arm" and not self.teacher.accepts_edge_weight:
            raise InputError(
                "teacher: expected a module that takes edge weights (learning needs a gradient through the edges), got "
                f"{type(self.teacher.module).__name__}; use refinement, which needs none, or estimator 'arm'"
            )
        if settings.c_bn > 0 and not self.teacher.batch_norms:
            warn_without_batch_norm("the BatchNorm term is left out and cross-entropy leads alone", stacklevel=3)
        groups: list[dict[str, Any]] = [{"params": [pseudo_graphs.logits], "lr": settings.lr_structure}]
        if isinstance(pseudo_graphs.features, torch.nn.Parameter):
            groups.append({"params": [pseudo_graphs.features], "lr": settings.lr_features})
        self.optimizer = Adam(groups) if self._sparse_grad() else torch.optim.Adam(groups, fused=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that another process needs to go on from here, bit for bit."""
        return {
            "step": self.step,
            "target_degree": self._target_degree,
            "pseudo_graphs": self.pseudo_graphs.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pseudo_graphs.load_state_dict(state["pseudo_graphs"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._target_degree = float(state["target_degree"])
        self.step = int(state["step"])

    def advance(self) -> dict[str, torch.Tensor]:
        """One optimiser step; returns the detached terms of its loss as tensors.

        The plain step: its draw reads the number of edges from the device. See :mod:`.captured` for one that
        does not.
        """
        for group, rate in zip(self.optimizer.param_groups, self.settings.rates_at(self.step), strict=False):
            group["lr"] = rate
        if self.settings.estimator == "arm":
            terms = self._structure_by_arm()
        else:
            terms, _ = self.backward(
                seed=self.seed, step=self.step, temperature=self.settings.temperature_at(self.step)
            )
        self.optimizer.step()
        self.step += 1
        return terms

    def backward(
        self,
        *,
        seed: int | torch.Tensor,
        step: int | torch.Tensor,
        temperature: float | torch.Tensor,
        capacity: int | None = None,
    ) -> tuple[dict[str, torch.Tensor], EdgeSample]:
        """Draw, run the teacher and leave the gradients in ``.grad``, without a move of the parameters.

        Args:
            seed, step, temperature, capacity: of the draw, see `sample_edges`.

        Returns:
            The detached terms of the loss, and the drawn edges.
        """
        self.optimizer.zero_grad(set_to_none=True)
        graphs = self.pseudo_graphs(
            seed=seed,
            step=step,
            temperature=temperature,
            estimator=self.settings.estimator,
            capacity=capacity,
            # How many places a sparse gradient has is not known without a look at the device.
            sparse_grad=capacity is None and self._sparse_grad(),
        )
        per_graph, bn = self._teacher_losses(graphs)
        terms = {"cross_entropy": per_graph.mean(), "batch_norm": bn, **self._regularisers(graphs.x)}
        loss = terms["cross_entropy"] + self._weighted(terms)
        # Not loss.backward(): its accumulation nodes remember the stream that they first ran on, which is not
        # the one that a graph is captured on.
        learned = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned, allow_unused=True), strict=True):
            parameter.grad = gradient
        return {name: term.detach() for name, term in {**terms, "loss": loss}.items()}, graphs.edges

    def _sparse_grad(self) -> bool:
        """Whether zeros for all candidates would cost more than the places of those that were drawn."""
        logits, estimator = self.pseudo_graphs.logits, self.settings.estimator
        sparse = estimator in ("sparse_straight_through", "hard_concrete") and not self._limits_degree()
        return sparse and logits.is_cpu and logits.numel() >= _MANY_PAIRS

    def _limits_degree(self) -> bool:
        return self.settings.c_degree > 0

    def _structure_by_arm(self) -> dict[str, torch.Tensor]:
        """GFKD's step: features by gradient on the first draw, structure by the ARM pair."""
        pseudo = self.pseudo_graphs
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            sample = pseudo.sample(seed=self.seed, step=self.step, estimator="arm")
        assert sample.antithetic is not None
        x = pseudo.soft_features()
        per_graph, bn = self._teacher_losses(GraphBatch(x, sample, pseudo.y))
        terms = {"cross_entropy": per_graph.mean(), "batch_norm": bn, **self._regularisers(x)}
        loss = terms["cross_entropy"] + self._weighted(terms)
        loss.backward()
        with torch.no_grad():
            other, other_bn = self._teacher_losses(GraphBatch(x, sample.antithetic, pseudo.y))
            c_bn = self.settings.c_bn
            gradient = arm_gradient(sample, per_graph + c_bn * bn, other + c_bn * other_bn) / pseudo.layout.num_graphs
            # The degree term's own gradient is already there.
            pseudo.logits.grad = gradient if pseudo.logits.grad is None else pseudo.logits.grad + gradient
        return {name: term.detach() for name, term in {**terms, "loss": loss}.items()}

    def _teacher_losses(self, graphs: GraphBatch) -> tuple[torch.Tensor, torch.Tensor]:
        with MomentsProbe(self.teacher.module) as probe:
            logits = self.teacher(graphs)
        per_graph = torch.nn.functional.cross_entropy(logits, self.pseudo_graphs.y, reduction="none")
        if self.extra_loss is not None:
            per_graph = per_graph + self.extra_loss(graphs, logits)
        if not probe.moments:
            return per_graph, logits.new_zeros(())
        return per_graph, batch_norm_term(probe, self.settings.bn_term)

    def _regularisers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = {}
        if self.pseudo_graphs.feature_kind in ("one-hot", "degree") and self.settings.c_oh > 0:
            terms["entropy"] = one_hot_entropy(x)
        if self._limits_degree():
            terms["degree"] = degree_term(self.pseudo_graphs.expected_degree(), self._target_degree)
        return terms

    def _weighted(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = {"batch_norm": self.settings.c_bn, "entropy": self.settings.c_oh, "degree": self.settings.c_degree}
        return torch.stack([weights[name] * term for name, term in terms.items() if name in weights]).sum()


def learn(
    teacher: Teacher | torch.nn.Module,
    pseudo_graphs: PseudoGraphs,
    settings: LearnSettings | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    report_every: int = 10,
    capture: bool | None = None,
) -> PseudoGraphs:
    """Learn pseudo-graphs that the teacher finds convincing, in place.

    Args:
        teacher: a Teacher or any module that `as_teacher` accepts; stays frozen.
        pseudo_graphs: the start, changed in place and returned.
        settings: see :class:`LearnSettings`.
        seed: key of the edge noise.
        progress: called with (step, loss terms) every `report_every` steps and after the last.
        report_every: how often; every report reads the device.
        capture: run steps that never wait for the host, on CUDA as one graph; default on CUDA, with a notice
            where the step cannot be captured. The result is the same; see docs/step.md for one exception.

    Raises:
        InputError: see :class:`Learner`; or `capture` is True and the step cannot be captured.

    A low loss is not the goal: read K of the hardened graphs, and compare students with those
    taught by random graphs.
    """
    check(report_every >= 1, "report_every", "at least 1", report_every)
    learner = Learner(teacher, pseudo_graphs, settings or LearnSettings(), seed=seed)
    total = learner.settings.steps
    advance = stepper(learner, capture) if total > 0 else None
    while advance is not None and learner.step < total:
        terms = advance(min(report_every - learner.step % report_every, total - learner.step))
        if progress is not None:
            progress(learner.step, {name: float(term) for name, term in terms.items()})
    return pseudo_graphs
