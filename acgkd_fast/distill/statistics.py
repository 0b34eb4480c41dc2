"""Batch statistics at the teacher's BatchNorm layers, the data-free witness of "in distribution".

Two distances from a batch's statistics to the running ones: ``running_stats_norm`` (GFKD's R_bn,
unsquared norms, which the last layer's variance dominates) and ``gaussian_divergence`` (K, one
weight per layer and channel, no units).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import nn
from typing_extensions import Self

from ..errors import InputError, check
from ..nn.norm import BatchNormReLU
from ..normalize import column_moments
from ..propagate import readout

Statistics = tuple[torch.Tensor, torch.Tensor]


def warn_without_batch_norm(consequence: str, *, stacklevel: int) -> None:
    """Tell the user what K's absence means.

    Args:
        consequence: what happens instead, after "so".
        stacklevel: as of ``warnings.warn`` in the function that calls this one.
    """
    warnings.warn(
        f"teacher: no BatchNorm layer with running statistics, so {consequence}", RuntimeWarning, stacklevel + 1
    )


class _Probe:
    """Watches every BatchNorm1d of a module while its context is open; closing it leaves no trace.

    Attributes:
        running: (mean, variance) of the layer behind each thing collected.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = [
            layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None
        ]
        self._undo: list[Callable[[], None]] = []
        self.running: list[Statistics] = []

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def __enter__(self) -> Self:
        if self._undo:
            raise RuntimeError(f"{type(self).__name__}: already open; its hooks would collect everything twice")
        self._undo = [self._watch(layer) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def reset(self) -> None:
        """Forget what was collected, between forward passes."""
        self.running = []

    def _watch(self, layer: nn.BatchNorm1d) -> Callable[[], None]:
        raise NotImplementedError

    def _collect_running(self, layer: nn.BatchNorm1d) -> None:
        assert layer.running_mean is not None and layer.running_var is not None
        self.running.append((layer.running_mean, layer.running_var))


class BatchNormProbe(_Probe):
    """Collect the inputs of every BatchNorm1d of a module.

    >>> with BatchNormProbe(teacher.module) as probe:
    ...     logits = teacher(batch)

    Attributes:
        inputs: one [rows, C] tensor per BatchNorm call, in call order, with their autograd history;
            ``reset()`` empties it between forward passes.
        running: (mean, variance) of the layer behind each entry of `inputs`.

    Hooks are removed when the context closes, also after an error.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.inputs: list[torch.Tensor] = []

    def reset(self) -> None:
        super().reset()
        self.inputs = []

    def _watch(self, layer: nn.BatchNorm1d) -> Callable[[], None]:
        def collect(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.inputs.append(args[0])
            self._collect_running(layer)

        return layer.register_forward_pre_hook(collect).remove


class MomentsProbe(_Probe):
    """Collect the batch statistics at every BatchNorm1d of a module, fused into layers that can.

    >>> with MomentsProbe(teacher.module) as probe:
    ...     logits = teacher(batch)
    >>> loss = running_stats_norm(probe.moments, probe.running)

    Attributes:
        moments: (mean, biased variance) over all rows of the batch, [C] each, per BatchNorm call in
            call order, with their autograd history.
        running: (mean, variance) of the layer behind each entry of `moments`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.moments: list[Statistics] = []

    def reset(self) -> None:
        super().reset()
        self.moments = []

    def _watch(self, layer: nn.BatchNorm1d) -> Callable[[], None]:
        def collect(mean: torch.Tensor, variance: torch.Tensor) -> None:
            self.moments.append((mean, variance))
            self._collect_running(layer)

        if isinstance(layer, BatchNormReLU):
            if layer.observer is not None:
                raise RuntimeError("MomentsProbe: another probe is open on the same module")
            layer.observer = collect

            def undo() -> None:
                layer.observer = None

            return undo
        return layer.register_forward_pre_hook(lambda _, args: collect(*column_moments(args[0]))).remove


def graph_moment_sums(inputs: list[torch.Tensor], ptr: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """Sums of x and x^2 over each graph's own rows, all layers side by side.

    Moments of any pool of graphs are sums of these, so that a graph can be exchanged without visiting the
    others.

    Args:
        inputs: what a :class:`BatchNormProbe` collected: [rows, C_l] with one row per node or per graph.
        ptr: int64 [B + 1], node offsets.
        num_nodes: ptr[-1], known to the caller without a device read.

    Returns:
        float64 [B, 2, C], C the sum of all C_l in the order of the layers; summed in the dtype of the layer.

    Raises:
        InputError: a layer saw neither one row per node nor one per graph.
    """
    graphs = ptr.numel() - 1
    if not inputs:
        return torch.zeros(graphs, 2, 0, dtype=torch.float64, device=ptr.device)
    if all(features.dim() == 2 and features.shape[0] == num_nodes for features in inputs):
        features = torch.cat(inputs, 1)
        return torch.stack([readout(features, ptr), readout(features.square(), ptr)], 1).double()
    parts = []
    for features in inputs:
        if features.dim() != 2 or features.shape[0] not in (num_nodes, graphs):
            raise InputError(
                f"teacher: expected BatchNorm inputs with one row per node ({num_nodes}) or per graph ({graphs}), "
                f"got shape {tuple(features.shape)}"
            )
        both = torch.stack([features, features.square()], 1)
        if features.shape[0] != graphs:
            both = readout(both.flatten(1), ptr).view(graphs, *both.shape[1:])
        parts.append(both.double())
    return torch.cat(parts, 2)


@dataclass(frozen=True)
class RunningGaussians:
    """Running statistics of all layers side by side, float64 [C], for K and its gradient in closed form.

    Agrees with :func:`gaussian_divergence`, to be called once per search step rather than once per batch.

    Attributes:
        mean: running means.
        target: running variances, raised by `floor`.
        floor: 0.001 * mean(running variance of the layer) + 1e-6.
    """

    mean: torch.Tensor
    target: torch.Tensor
    floor: torch.Tensor

    @classmethod
    def of(cls, running: Sequence[Statistics]) -> RunningGaussians:
        mean = torch.cat([m.double() for m, _ in running])
        floor = torch.cat([(1e-3 * v.double().mean() + 1e-6).expand(v.shape) for _, v in running])
        return cls(mean, torch.cat([v.double() for _, v in running]) + floor, floor)

    def divergence(self, moments: torch.Tensor) -> torch.Tensor:
        """K of first and second moments [..., 2, C]; returns [...]."""
        first, second = moments.unbind(-2)
        ratio = ((second - first.square()).clamp(min=0.0) + self.floor) / self.target
        terms = ratio - 1.0 - ratio.log() + (first - self.mean).square() / self.target
        return 0.5 * terms.mean(-1)

    def gradient(self, moments: torch.Tensor) -> torch.Tensor:
        """dK / d moments, [2, C].

        dK/dq = (1 - t / (v + f)) / (2 t C) and dK/dm = (m - n) / (t C) - 2 m dK/dq, with q the second moment,
        v = q - m^2, n the running mean, t and f target and floor; 0 in q where rounding made v negative.
        """
        first, second = moments.unbind(-2)
        variance = second - first.square()
        slope = 0.5 / self.target - 0.5 / (variance.clamp(min=0.0) + self.floor)
        slope = torch.where(variance >= 0.0, slope, 0.0)
        return torch.stack([(first - self.mean) / self.target - 2.0 * first * slope, slope]) / first.numel()


def _check_layers(running: Sequence[Statistics]) -> None:
    check(len(running) > 0, "running", "at least one BatchNorm layer with running statistics", running)


def running_stats_norm(moments: Sequence[Statistics], running: Sequence[Statistics]) -> torch.Tensor:
    """R_bn = sum over layers of ||mean - running mean||_2 + ||var - running var||_2.

    Biased variance over all rows of the batch, unsquared norms, as in GFKD (arXiv 2105.07519) and
    DeepInversion.

    Args:
        moments: (mean, biased variance) of each layer, [C] each, such as ``MomentsProbe.moments``.
        running: the running ones.

    Returns:
        Scalar; differentiable.

    Raises:
        InputError: no layers, as with a teacher without BatchNorm.
    """
    _check_layers(running)
    found = [statistic for pair in moments for statistic in pair]
    wanted = [statistic for pair in running for statistic in pair]
    check(len(found) == len(wanted), "moments", f"as many layers as in running, {len(running)}", len(moments))
    if len({statistic.shape for statistic in (*found, *wanted)}) == 1:
        # On small batches the step's time is the number of its operators.
        return torch.linalg.vector_norm(torch.stack(found) - torch.stack(wanted), dim=1).sum()
    norms = [torch.linalg.vector_norm(have - want) for have, want in zip(found, wanted, strict=True)]
    return torch.stack(norms).sum()


def gaussian_divergence(moments: Sequence[Statistics], running: Sequence[Statistics]) -> torch.Tensor:
    """K = mean over layers and channels of (v / w - 1 - ln(v / w) + (m - n)^2 / w) / 2.

    m, v are the batch's mean and variance, n, w the running ones; both variances are raised by
    0.001 * mean(running variance) + 1e-6, so that a constant channel cannot give infinity.

    Args:
        moments, running: as in :func:`running_stats_norm`.

    Returns:
        Scalar; the divergence of two Gaussians per channel, 0 where the statistics agree.

    Raises:
        InputError: no layers, as with a teacher without BatchNorm.
    """
    _check_layers(running)
    terms = []
    for (mean, variance), (running_mean, running_variance) in zip(moments, running, strict=True):
        floor = 1e-3 * running_variance.mean() + 1e-6
        target = running_variance + floor
        ratio = (variance + floor) / target
        terms.append(0.5 * (ratio - 1.0 - ratio.log() + (mean - running_mean).square() / target))
    return torch.cat(terms).mean()
