"""Terms of the loss that teaches pseudo-graphs, and of the loss that teaches the student."""

from __future__ import annotations

import torch

from ..errors import check_choice
from .statistics import MomentsProbe, gaussian_divergence, running_stats_norm

BN_TERMS = ("norm", "divergence")


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
    return torch.special.entr(soft_features).sum(-1).mean()


def degree_term(expected_degree: torch.Tensor, target: float) -> torch.Tensor:
    """Mean over graphs of (ln of expected over target degree)^2: symmetric in too dense and too sparse."""
    return (expected_degree.clamp(min=1e-6) / target).log().square().mean()


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """temperature^2 * KL(teacher || student) of softened logits, batch mean (Hinton et al., arXiv 1503.02531).

    Args:
        student, teacher: logits [B, C]; gradients reach `student` and, if it asks, `teacher`.
        temperature: above 0.
    """
    soft_student = torch.log_softmax(student / temperature, -1)
    soft_teacher = torch.log_softmax(teacher / temperature, -1)
    divergence = torch.nn.functional.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence
