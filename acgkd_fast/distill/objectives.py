"""Terms of the loss that teaches pseudo-graphs, and of the loss that teaches the student."""

from __future__ import annotations

import torch

from ..errors import check_choice
from ..normalize import mean_entropy
from ..propagate import readout
from .statistics import MomentsProbe, gaussian_divergence, running_stats_norm

BN_TERMS = ("norm", "divergence")
FEATURE_LEVELS = ("node", "graph")


def batch_norm_term(probe: MomentsProbe, kind: str = "norm") -> torch.Tensor:
    """Distance of the statistics that `probe` collected from the running ones.

    Args:
        probe: after one forward pass of the teacher.
        kind: "norm" for GFKD's R_bn, "divergence" for K; see :mod:`.statistics`.

    Returns:
        Scalar; differentiable. Zero for a teacher without BatchNorm.
    """
    check_choice("kind", kind, BN_TERMS)
    if not probe.moments:
        return torch.zeros(())
    distance = running_stats_norm if kind == "norm" else gaussian_divergence
    return distance(probe.moments, probe.running)


def one_hot_entropy(soft_features: torch.Tensor) -> torch.Tensor:
    """H(X) = mean over nodes of -sum_k X_k log X_k, in nats; 0 for one-hot rows (GFKD's one-hot term)."""
    return mean_entropy(soft_features)


def degree_term(expected_degree: torch.Tensor, target: float) -> torch.Tensor:
    """Mean over graphs of (ln of expected over target degree)^2: symmetric in too dense and too sparse."""
    return (expected_degree.clamp(min=1e-6) / target).log().square().mean()


def distillation_divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: torch.Tensor | float = 2.0
) -> torch.Tensor:
    """temperature^2 * KL(teacher || student) of softened logits, per graph (Hinton et al., arXiv 1503.02531).

    Args:
        student, teacher: logits [B, C]; gradients reach `student` and, if it asks, `teacher`.
        temperature: above 0; a number, or [B, 1], which gets gradients too.

    Returns:
        [B], in nats times temperature^2.
    """
    soft_student = torch.log_softmax(student / temperature, -1)
    soft_teacher = torch.log_softmax(teacher / temperature, -1)
    divergence = torch.nn.functional.kl_div(soft_student, soft_teacher, reduction="none", log_target=True)
    return (temperature**2 * divergence).sum(-1)


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """Batch mean of :func:`distillation_divergence`."""
    return distillation_divergence(student, teacher, temperature).mean()


def feature_distance(student: torch.Tensor, teacher: torch.Tensor, ptr: torch.Tensor, level: str) -> torch.Tensor:
    """Mean squared difference of node features, per graph.

    Args:
        student, teacher: [N, D]; gradients reach `student` and, if it asks, `teacher`.
        ptr: int64 [B + 1], node offsets.
        level: "node" compares node by node and averages over a graph's nodes and channels; "graph" compares the
            means over a graph's nodes, so that large graphs do not count more.

    Returns:
        [B], in squared units of the features; a graph without nodes gives 0.
    """
    check_choice("feature_level", level, FEATURE_LEVELS)
    difference = student - teacher
    if level == "node":
        return readout(difference.square(), ptr, "mean").mean(-1)
    return readout(difference, ptr, "mean").square().mean(-1)
