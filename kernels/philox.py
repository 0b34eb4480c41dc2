"""The package's random stream inside Triton kernels: Philox4x32-10 over explicit 32-bit counter words.

``tl.rand`` is not used: how it spreads a 64-bit offset over the counter changed between releases, and it
throws three of the four output words away. Same words as ``acgkd_fast.philox``, bit for bit.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import triton
import triton.language as tl

from acgkd_fast import philox as stream

ROUNDS = tl.constexpr(stream.ROUNDS)
MULTIPLIER_0 = tl.constexpr(stream.MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(stream.MULTIPLIERS[1])
KEY_STEP_0 = tl.constexpr(stream.KEY_STEPS[0])
KEY_STEP_1 = tl.constexpr(stream.KEY_STEPS[1])
EDGE = tl.constexpr(int(stream.Stream.EDGE))
ABSENT = tl.constexpr(int(stream.Stream.ABSENT))


@triton.jit
def load_key(rng):
    """Key words and step word (uint32) of ``rng`` = (seed, step), int64 [2]."""
    seed = tl.load(rng)
    step = tl.load(rng + 1)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32), step.to(tl.uint32)


@triton.jit
def philox_words(quad, graph_id, step, stream_tag, key_0, key_1):
    """The four output words of each counter (quad, graph_id, step, stream_tag); uint32, shape of `quad`."""
    c0 = quad
    c1 = graph_id
    c2 = step
    c3 = tl.cast(stream_tag, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        # One wide multiplication each, where tl.umulhi and a product would be two.
        wide_0 = c0.to(tl.uint64) * MULTIPLIER_0
        wide_1 = c2.to(tl.uint64) * MULTIPLIER_1
        c0 = (wide_1 >> 32).to(tl.uint32) ^ c1 ^ key_0
        c1 = wide_1.to(tl.uint32)
        c2 = (wide_0 >> 32).to(tl.uint32) ^ c3 ^ key_1
        c3 = wide_0.to(tl.uint32)
        key_0 = key_0 + KEY_STEP_0
        key_1 = key_1 + KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def lane_word(pair, graph_id, step, stream_tag, key_0, key_1):
    """The word of single pairs, numbered inside their graph, where their neighbours are not wanted too."""
    w0, w1, w2, w3 = philox_words((pair >> 2).to(tl.uint32), graph_id, step, stream_tag, key_0, key_1)
    lane = (pair & 3).to(tl.int32)
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def scaled_uniform(word):
    """2^24 u, an odd integer below 2^24 as float32, for u = ((word >> 9) + 1/2) 2^-23."""
    return ((word >> 8) | 1).to(tl.float32)


@triton.jit
def uniform(word):
    """u, exact in float32, never 0 and never 1."""
    return scaled_uniform(word) * 5.9604644775390625e-08
