"""Integer codes that the edge operators take, and the slopes that the estimators share."""

from __future__ import annotations

from enum import IntEnum


class Estimator(IntEnum):
    """How a forward value is formed and where its gradient goes; see `sample_edges`."""

    RELAXED = 0
    HARD_CONCRETE = 1
    STRAIGHT_THROUGH = 2
    SPARSE_STRAIGHT_THROUGH = 3
    ARM = 4
    # Second draw of the ARM pair: the same uniforms mirrored about one half.
    ARM_MIRRORED = 5


class Noise(IntEnum):
    """Noise added to theta = log alpha."""

    LOGISTIC = 0
    GUMBEL = 1


ESTIMATORS = ("relaxed", "hard_concrete", "straight_through", "sparse_straight_through", "arm")
NOISES = ("logistic", "gumbel")
# Those whose work is proportional to the edges, which is what factorised logits are for.
FACTOR_ESTIMATORS = ("straight_through", "sparse_straight_through")
