"""What DosCond and KiDD share: their temperature schedule."""

from __future__ import annotations

FINAL_TEMPERATURE = 0.01
ANNEALING_STEPS = 200


def annealed(start: float, position: int) -> float:
    """start * (0.01 / start)^(position / 200), never below 0.01."""
    return max(start * (FINAL_TEMPERATURE / start) ** (position / ANNEALING_STEPS), FINAL_TEMPERATURE)
