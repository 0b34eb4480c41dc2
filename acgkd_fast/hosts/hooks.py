"""BatchNorm statistics as the hook objects of data-free code bases, registered only inside a ``with``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from torch import nn
from typing_extensions import Self

from ..distill.statistics import MomentsProbe, Statistics
from ..errors import InputError, check


class BatchNormHook:
    """One BatchNorm1d layer: ``r_feature``, ``remove()`` and, as GFKD and DeepInversion call it, ``close()``.

    Attributes:
        module: the layer.
        mmt_rate: weight of the running mean of earlier batches' statistics (Fast-Datafree), 0 for none.
        mmt: (mean, variance) of earlier batches, or None before :meth:`update_mmt`.
    """

    def __init__(self, owner: BatchNormHooks, module: nn.BatchNorm1d, mmt_rate: float) -> None:
        self._owner = owner
        self.module = module
        self.mmt_rate = mmt_rate
        self.mmt: Statistics | None = None

    @property
    def r_feature(self) -> torch.Tensor:
        """||running variance - variance||_2 + ||running mean - mean||_2 of the last forward pass, differentiable.

        Biased variance over all rows; with `mmt` the batch's part counts 1 - mmt_rate.
        """
        assert self.module.running_mean is not None and self.module.running_var is not None
        mean, variance = self._owner.moments_of(self.module)
        if self.mmt is not None:
            rate = self.mmt_rate
            mean, variance = (
                (1.0 - rate) * now + rate * before for now, before in zip((mean, variance), self.mmt, strict=True)
            )
        distance = torch.linalg.vector_norm
        return distance(self.module.running_var - variance) + distance(self.module.running_mean - mean)

    def update_mmt(self) -> None:
        """Take the last batch into `mmt`."""
        mean, variance = (moment.detach() for moment in self._owner.moments_of(self.module))
        if self.mmt is not None:
            rate = self.mmt_rate
            mean, variance = (
                rate * before + (1.0 - rate) * now for now, before in zip((mean, variance), self.mmt, strict=True)
            )
        self.mmt = mean, variance

    def remove(self) -> None:
        """End the observation of all layers; harmless a second time."""
        self._owner.remove()

    close = remove


class BatchNormHooks:
    """The hooks of every BatchNorm1d of a module; a sequence of :class:`BatchNormHook`.

    >>> with BatchNormHooks(teacher) as hooks:
    ...     logits = teacher(batch)
    ...     loss = sum(hook.r_feature for hook in hooks)

    Nothing is registered outside the ``with``, and what a forward pass left behind is forgotten with it. Statistics of
    layers of this package come out of their own fused pass.

    Args:
        module: the teacher.
        mmt_rate: see :class:`BatchNormHook`.
    """

    def __init__(self, module: nn.Module, mmt_rate: float = 0.0) -> None:
        check(0.0 <= mmt_rate < 1.0, "mmt_rate", "a number in [0, 1)", mmt_rate)
        self._module = module
        self._probe = MomentsProbe(module)
        self._undo: Callable[[], None] | None = None
        self._hooks = [
            BatchNormHook(self, layer, mmt_rate)
            for layer in module.modules()
            if isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None
        ]

    def __len__(self) -> int:
        return len(self._hooks)

    def __iter__(self) -> Iterator[BatchNormHook]:
        return iter(self._hooks)

    def __getitem__(self, position: int) -> BatchNormHook:
        return self._hooks[position]

    def __enter__(self) -> Self:
        self._probe.__enter__()
        # Each forward pass stands alone, so that a long loop inside one `with` holds one pass and not all.
        self._undo = self._module.register_forward_pre_hook(lambda *_: self._probe.reset()).remove
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """What the end of the ``with`` does; harmless a second time."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._probe.__exit__(None, None, None)
        self._probe.reset()

    def loss(self) -> torch.Tensor:
        """Sum of all ``r_feature``, GFKD's R_bn; 0 for a module without BatchNorm."""
        return torch.stack([hook.r_feature for hook in self._hooks]).sum() if self._hooks else torch.zeros(())

    def moments_of(self, layer: nn.BatchNorm1d) -> Statistics:
        """(mean, biased variance) of the last batch that a layer saw.

        Raises:
            InputError: it saw none since the ``with``.
        """
        for (running_mean, _), moments in zip(
            reversed(self._probe.running), reversed(self._probe.moments), strict=True
        ):
            if running_mean is layer.running_mean:
                return moments
        raise InputError("r_feature: expected a forward pass inside the hooks' with statement, got none")
