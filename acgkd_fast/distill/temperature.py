"""Adversarial temperature: it learns, by reversed gradients, to make the student's task harder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import check, check_choice, is_integer, is_number

MODES = ("fixed", "global", "graph")
RAMPS = ("cosine", "linear")
_HIDDEN = 32


@dataclass(frozen=True)
class AdversarySettings:
    """The softmax temperature as an opponent, after CTKD (arXiv 2211.16231); whether ACGKD's is this one is not known.

    Attributes:
        mode: "fixed" (off), "global" (one number), or "graph" (a small network's answer to the teacher's and the
            student's logits of each graph).
        low, high: bounds; the temperature is low + (high - low) sigmoid(theta). CTKD has 1 and 21. It starts at the
            student's ``temperature``, which must lie between.
        strength: factor of the reversed gradient when the ramp is over.
        ramp_epochs: epochs over which the factor grows from 0; CTKD has 10.
        ramp: "cosine" or "linear".
    """

    mode: str = "fixed"
    low: float = 1.0
    high: float = 21.0
    strength: float = 1.0
    ramp_epochs: int = 10
    ramp: str = "cosine"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("ramp", self.ramp, RAMPS)
        numbers = all(is_number(value) and math.isfinite(value) for value in (self.low, self.high))
        check(numbers and 0.0 < self.low < self.high, "low, high", "0 < low < high", (self.low, self.high))
        fits = is_number(self.strength) and math.isfinite(self.strength) and self.strength >= 0
        check(fits, "strength", "a number of 0 or more", self.strength)
        whole = is_integer(self.ramp_epochs) and self.ramp_epochs >= 0
        check(whole, "ramp_epochs", "a whole number, 0 or more", self.ramp_epochs)


def reversal_strength(settings: AdversarySettings, epoch: int) -> float:
    """Factor of the reversed gradient in epoch 0, 1, ...: strength * (1 - cos(pi t)) / 2 or strength * t,
    with t = epoch / ramp_epochs, at most 1."""
    t = min(epoch / settings.ramp_epochs, 1.0) if settings.ramp_epochs else 1.0
    return settings.strength * (t if settings.ramp == "linear" else 0.5 * (1.0 - math.cos(math.pi * t)))


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse_gradient(x: torch.Tensor, strength: float) -> torch.Tensor:
    """`x` itself; its gradient comes back times -strength, so that a descent step climbs."""
    out: torch.Tensor = _Reversal.apply(x, strength)  # type: ignore[no-untyped-call]
    return out


class AdversarialTemperature(nn.Module):
    """The learnable temperature.

    Args:
        settings: mode "global" or "graph", bounds, ramp.
        start: temperature before any step; "graph" starts near it.
        num_classes: width of the logits.
        seed: initialisation of the network of "graph".

    Raises:
        InputError: mode "fixed", or a start outside the bounds.
    """

    def __init__(self, settings: AdversarySettings, start: float, num_classes: int, seed: int) -> None:
        super().__init__()
        check_choice("mode", settings.mode, MODES[1:])
        inside = settings.low < start < settings.high
        check(inside, "temperature", f"a start between adversary.low and .high, {settings.low}-{settings.high}", start)
        self.settings = settings
        share = (start - settings.low) / (settings.high - settings.low)
        self.theta = nn.Parameter(torch.tensor(math.log(share / (1.0 - share))))
        self.network: nn.Module | None = None
        if settings.mode == "graph":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.network = nn.Sequential(
                    nn.Linear(2 * num_classes, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1, bias=False)
                )

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, epoch: int) -> torch.Tensor:
        """Temperature of each graph, [B, 1], within the bounds.

        Args:
            student, teacher: logits [B, C]; get no gradient from here.
            epoch: 0, 1, ..., for the ramp.

        Gradients:
            Reversed, to the parameters alone.
        """
        theta = self.theta.expand(len(student), 1)
        if self.network is not None:
            # The inverse hyperbolic sine keeps sign and order, and logits of any size within some units.
            seen = torch.cat([student, teacher], 1).detach().asinh()
            theta = theta + self.network(seen)
        bounds = self.settings
        temperature = bounds.low + (bounds.high - bounds.low) * torch.sigmoid(theta)
        return reverse_gradient(temperature, reversal_strength(bounds, epoch))
