"""Binary Concrete formulas inside Triton kernels; the same in the draw, the fill and the backward.

With ``odds = exp(-L)`` the noise needs no logarithm to decide an edge: theta + L > 0 is exp(theta) > odds.
Every kernel decides by this one comparison, so that a pair is drawn in backward if it was in forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from acgkd_fast.edges.estimators import Estimator, Noise

from .philox import uniform

RELAXED = tl.constexpr(int(Estimator.RELAXED))
HARD_CONCRETE = tl.constexpr(int(Estimator.HARD_CONCRETE))
SPARSE = tl.constexpr(int(Estimator.SPARSE_STRAIGHT_THROUGH))
MIRRORED = tl.constexpr(int(Estimator.ARM_MIRRORED))
LOGISTIC = tl.constexpr(int(Noise.LOGISTIC))


@triton.jit
def noise_odds(word, noise, mirrored):
    """exp(-L): (1 - u) / u for logistic noise, -log(u) for Gumbel noise; 1 - u in place of u if `mirrored`."""
    u = uniform(word)
    # 1 - u is exact on the stream's grid.
    u = tl.where(mirrored, 1.0 - u, u)
    if noise == LOGISTIC:
        odds = (1.0 - u) / u
    else:
        odds = -tl.log(u)
    return odds


@triton.jit
def is_drawn(theta, odds):
    """Whether theta + L > 0."""
    return tl.exp(theta) > odds


@triton.jit
def soft_value(theta, odds, temperature):
    """s = sigmoid((theta + L) / temperature)."""
    return tl.sigmoid((theta - tl.log(odds)) / temperature)


@triton.jit
def soft_slope(theta, odds, temperature):
    """s (1 - s), without the cancellation in 1 - s."""
    tail = tl.exp(-tl.abs((theta - tl.log(odds)) / temperature))
    return tail / ((1.0 + tail) * (1.0 + tail))


@triton.jit
def absent_chance(slope, absent_rate):
    """Chance that an absent pair joins a sparse straight-through sample, from its s (1 - s)."""
    return tl.minimum(absent_rate * 4.0 * slope, 1.0)


@triton.jit
def stretch(soft, gamma, zeta):
    return soft * (zeta - gamma) + gamma


@triton.jit
def value_slope(theta, odds, temperature, estimator, gamma, zeta, absent_rate):
    """d value / d theta of pairs in the sample, as `estimator` defines it."""
    plain = soft_slope(theta, odds, temperature)
    slope = plain / temperature
    if estimator == HARD_CONCRETE:
        stretched = stretch(soft_value(theta, odds, temperature), gamma, zeta)
        inside = (stretched > 0.0) & (stretched < 1.0)
        slope = tl.where(inside, slope * (zeta - gamma), 0.0)
    elif estimator == SPARSE:
        chance = absent_chance(plain, absent_rate)
        weighted = tl.where(chance > 0.0, slope / chance, 0.0)
        slope = tl.where(is_drawn(theta, odds), slope, weighted)
    return slope
