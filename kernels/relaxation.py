"""Binary Concrete formulas inside Triton kernels; the same in the draw, the fill and the backward.

Noise comes as exp(-L) = over / under, which decides an edge with neither a logarithm nor a division:
theta + L > 0 is exp(theta) under > over. Every kernel decides by this one comparison, so that a pair is drawn
in backward if it was in forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from acgkd_fast.edges.estimators import Estimator, Noise

from .philox import scaled_uniform

RELAXED = tl.constexpr(int(Estimator.RELAXED))
HARD_CONCRETE = tl.constexpr(int(Estimator.HARD_CONCRETE))
SPARSE = tl.constexpr(int(Estimator.SPARSE_STRAIGHT_THROUGH))
MIRRORED = tl.constexpr(int(Estimator.ARM_MIRRORED))
LOGISTIC = tl.constexpr(int(Noise.LOGISTIC))


@triton.jit
def noise_fraction(word, noise, mirrored):
    """(over, under): 2^24 (1 - u, u) for logistic noise, (-log(u), 1) for Gumbel; with 1 - u for u if `mirrored`."""
    under = scaled_uniform(word)
    over = 16777216.0 - under
    if mirrored:
        over, under = under, over
    if noise != LOGISTIC:
        over = -tl.log(under * 5.9604644775390625e-08)
        under = tl.full(over.shape, 1.0, tl.float32)
    return over, under


@triton.jit
def is_drawn(theta, over, under):
    """Whether theta + L > 0."""
    return tl.exp(theta) * under > over


@triton.jit
def soft_argument(theta, over, under, temperature):
    """(theta + L) / temperature."""
    return (theta - tl.log(over / under)) / temperature


@triton.jit
def soft_value(theta, over, under, temperature):
    """s = sigmoid((theta + L) / temperature)."""
    return tl.sigmoid(soft_argument(theta, over, under, temperature))


@triton.jit
def soft_slope(theta, over, under, temperature):
    """s (1 - s), without the cancellation in 1 - s."""
    tail = tl.exp(-tl.abs(soft_argument(theta, over, under, temperature)))
    return tail / ((1.0 + tail) * (1.0 + tail))


@triton.jit
def absent_chance(slope, absent_rate):
    """Chance that an absent pair joins a sparse straight-through sample, from its s (1 - s)."""
    return tl.minimum(absent_rate * 4.0 * slope, 1.0)


@triton.jit
def stretch(soft, gamma, zeta):
    return soft * (zeta - gamma) + gamma


@triton.jit
def value_slope(theta, over, under, temperature, estimator, gamma, zeta, absent_rate):
    """d value / d theta of pairs in the sample, as `estimator` defines it."""
    plain = soft_slope(theta, over, under, temperature)
    slope = plain / temperature
    if estimator == HARD_CONCRETE:
        stretched = stretch(soft_value(theta, over, under, temperature), gamma, zeta)
        inside = (stretched > 0.0) & (stretched < 1.0)
        slope = tl.where(inside, slope * (zeta - gamma), 0.0)
    elif estimator == SPARSE:
        chance = absent_chance(plain, absent_rate)
        weighted = tl.where(chance > 0.0, slope / chance, 0.0)
        slope = tl.where(is_drawn(theta, over, under), slope, weighted)
    return slope
