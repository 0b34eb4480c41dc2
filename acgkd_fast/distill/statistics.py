"""Batch statistics at the teacher's BatchNorm layers, the data-free witness of "in distribution".

Two distances from a batch's statistics to the running ones: ``running_stats_norm`` (GFKD's R_bn,
unsquared norms, which the last layer's variance dominates) and ``gaussian_divergence`` (K, one
weight per layer and channel, no units).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import check


@dataclass(frozen=True)
class Moments:
    """First and second raw moment of one layer's inputs, [C] each (or [B, C] per graph)."""

    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Moments:
        return cls(features.mean(0), features.square().mean(0))

    @property
    def variance(self) -> torch.Tensor:
        """Biased variance; rounding cannot make it negative."""
        return (self.second - self.first.square()).clamp(min=0.0)


class BatchNormProbe:
    """Collect the inputs of every BatchNorm1d of a module while the context is open.

    >>> with BatchNormProbe(teacher.module) as probe:
    ...     logits = teacher(batch)
    >>> loss = running_stats_norm(probe.inputs, probe.running)

    Attributes:
        inputs: one [rows, C] tensor per BatchNorm call, in call order, with their autograd history;
            ``reset()`` empties it between forward passes.
        running: (mean, variance) of the layer behind each entry of `inputs`.

    Hooks are removed when the context closes, also after an error.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = [
            layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None
        ]
        self._handles: list[Any] = []
        self.inputs: list[torch.Tensor] = []
        self.running: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def __enter__(self) -> BatchNormProbe:
        if self._handles:
            raise RuntimeError("BatchNormProbe: already open; its hooks would collect everything twice")
        self._handles = [layer.register_forward_pre_hook(self._collect) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def reset(self) -> None:
        self.inputs, self.running = [], []

    def _collect(self, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None and layer.running_var is not None
        self.inputs.append(args[0])
        self.running.append((layer.running_mean, layer.running_var))


def _check_layers(running: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    check(len(running) > 0, "running", "at least one BatchNorm layer with running statistics", running)


def running_stats_norm(inputs: list[torch.Tensor], running: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """R_bn = sum over layers of ||mean - running mean||_2 + ||var - running var||_2.

    Biased variance over all rows of the batch, unsquared norms, as in GFKD (arXiv 2105.07519) and
    DeepInversion. Scalar; differentiable.

    Raises:
        InputError: no layers.
    """
    _check_layers(running)
    terms = []
    for features, (mean, variance) in zip(inputs, running, strict=True):
        spread, centre = torch.var_mean(features, dim=0, correction=0)
        terms.append(torch.linalg.vector_norm(centre - mean) + torch.linalg.vector_norm(spread - variance))
    return torch.stack(terms).sum()


def gaussian_divergence(moments: list[Moments], running: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """K = mean over layers and channels of (v / w - 1 - ln(v / w) + (m - n)^2 / w) / 2.

    m, v are the batch's mean and variance, n, w the running ones; both variances are raised by
    0.001 * mean(running variance) + 1e-6, so that a constant channel cannot give infinity.

    Returns:
        Scalar; the divergence of two Gaussians per channel, 0 where the statistics agree.

    Raises:
        InputError: no layers.
    """
    _check_layers(running)
    terms = []
    for moment, (mean, variance) in zip(moments, running, strict=True):
        floor = 1e-3 * variance.mean() + 1e-6
        target = variance + floor
        ratio = (moment.variance + floor) / target
        terms.append(0.5 * (ratio - 1.0 - ratio.log() + (moment.first - mean).square() / target))
    return torch.cat(terms).mean()
