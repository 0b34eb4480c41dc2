"""Pass 1 of edge sampling: one bit per candidate pair. Also the passes over pairs that need no structure.

One thread handles four pairs of one Philox call, so logits are read once, in order, and all four words are
used. The bits cost 1/32 of the traffic of the logits; drawing the noise again in the later passes instead
would read the logits again in an order that suits rows, not memory.

A directed layout numbers (i, j) and (j, i) next to each other. Their bits go to two planes, so that the
later passes find undirected bit strings either way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import find_program, first_word, graph_id
from .philox import ABSENT, EDGE, load_key, philox_words, uniform
from .relaxation import (
    HARD_CONCRETE,
    MIRRORED,
    RELAXED,
    SPARSE,
    absent_chance,
    is_drawn,
    noise_fraction,
    soft_slope,
    soft_value,
    stretch,
)

_SIZES = ["num_graphs", "estimator", "noise", "plane_words", "directed", "stream"]


@triton.jit
def pairs_left(table, num_graphs, graph, start, BLOCK: tl.constexpr):
    """Pairs of a graph from `start` on, at most BLOCK; int32, because every pair is compared with it."""
    pairs = tl.load(table + num_graphs + 2 + graph) - tl.load(table + num_graphs + 1 + graph)
    return tl.minimum(pairs - start, BLOCK).to(tl.int32)


@triton.jit
def load_run(values, first, start, left, BLOCK: tl.constexpr):
    """`values` of BLOCK pairs from first + start on as float32, zeros behind the `left` ones."""
    offsets = tl.arange(0, BLOCK)
    # Only aligned, unmasked loads become 16-byte ones; the compiler sees the alignment in the product.
    if (first % 4 == 0) & (left >= BLOCK):
        loaded = tl.load(values + (first // 4) * 4 + start + offsets)
    else:
        loaded = tl.load(values + first + start + offsets, mask=offsets < left, other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def join_lanes(lane_0, lane_1, lane_2, lane_3):
    """Four blocks [..., Q] of one Philox lane each as [..., 4 Q] in the order of the pairs."""
    joined = tl.join(tl.join(lane_0, lane_2), tl.join(lane_1, lane_3))
    return tl.reshape(joined, lane_0.shape[:-1] + [4 * lane_0.shape[-1]])


@triton.jit
def is_kept(theta, word, absent_word, estimator, noise, temperature, gamma, zeta, absent_rate):
    """Whether a pair belongs to the sample, as 0 or 1."""
    over, under = noise_fraction(word, noise, estimator == MIRRORED)
    kept = is_drawn(theta, over, under)
    if estimator == HARD_CONCRETE:
        kept = stretch(soft_value(theta, over, under, temperature), gamma, zeta) > 0.0
    elif estimator == SPARSE:
        kept = kept | (uniform(absent_word) < absent_chance(soft_slope(theta, over, under, temperature), absent_rate))
    elif estimator == RELAXED:
        kept = kept | (over > 0.0)
    return kept.to(tl.uint32)


@triton.jit
def pack_bits(kept):
    """[..., 32] zeros and ones as words."""
    shifted = kept << tl.arange(0, 32).to(tl.uint32)
    return tl.sum(shifted, axis=-1).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=_SIZES)
def draw_bits_kernel(
    logits,
    table,
    rng,
    temperature,
    bits,
    num_graphs,
    plane_words,
    estimator,
    noise,
    gamma,
    zeta,
    absent_rate,
    DIRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIPS: tl.constexpr,
):
    """Bits of STRIPS * BLOCK pairs of one graph. Grid: first_program with a, b, d, c = 1, 0, STRIPS * BLOCK, 1."""
    graph, number = find_program(table, num_graphs, tl.program_id(0), 1, 0, STRIPS * BLOCK, 1)
    first = tl.load(table + num_graphs + 1 + graph)
    key_0, key_1, step = load_key(rng)
    identity = graph_id(table, num_graphs, graph)
    tau = tl.load(temperature).to(tl.float32)
    mine = bits + first_word(table, num_graphs, graph, 1 if DIRECTED else 0, False)
    begin = number.to(tl.int64) * (STRIPS * BLOCK)
    # One program for several strips: finding the graph costs as much as drawing a strip's pairs.
    for strip in range(tl.cdiv(pairs_left(table, num_graphs, graph, begin, STRIPS * BLOCK), BLOCK)):
        start = begin + strip * BLOCK
        left = pairs_left(table, num_graphs, graph, start, BLOCK)
        theta = load_run(logits, first, start, left, BLOCK)
        counter = (start >> 2).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
        w0, w1, w2, w3 = philox_words(counter, identity, step, EDGE, key_0, key_1)
        word = join_lanes(w0, w1, w2, w3)
        absent_word = word
        if estimator == SPARSE:
            w0, w1, w2, w3 = philox_words(counter, identity, step, ABSENT, key_0, key_1)
            absent_word = join_lanes(w0, w1, w2, w3)
        # Bits behind the last pair say nothing; readers mask by columns and rows.
        kept = is_kept(theta, word, absent_word, estimator, noise, tau, gamma, zeta, absent_rate)
        if DIRECTED:
            words = tl.arange(0, BLOCK // 64)
            forth, back = tl.split(tl.reshape(kept, [BLOCK // 64, 32, 2]))
            out = mine + (start >> 6) + words
            tl.store(out, pack_bits(forth), mask=words * 64 < left)
            tl.store(out + plane_words, pack_bits(back), mask=words * 64 < left)
        else:
            words = tl.arange(0, BLOCK // 32)
            out = mine + (start >> 5) + words
            tl.store(out, pack_bits(tl.reshape(kept, [BLOCK // 32, 32])), mask=words * 32 < left)


@triton.jit(do_not_specialize=_SIZES)
def absent_gradient_kernel(gradient, logits, table, rng, temperature, out, num_graphs, noise, BLOCK: tl.constexpr):
    """Slope times gradient of the pairs that were not drawn, else 0. Grid as in `draw_bits_kernel`."""
    graph, number = find_program(table, num_graphs, tl.program_id(0), 1, 0, BLOCK, 1)
    first = tl.load(table + num_graphs + 1 + graph)
    start = number.to(tl.int64) * BLOCK
    left = pairs_left(table, num_graphs, graph, start, BLOCK)
    if left <= 0:
        return
    theta = load_run(logits, first, start, left, BLOCK)
    grad = load_run(gradient, first, start, left, BLOCK)

    key_0, key_1, step = load_key(rng)
    counter = (start >> 2).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    identity = graph_id(table, num_graphs, graph)
    w0, w1, w2, w3 = philox_words(counter, identity, step, EDGE, key_0, key_1)
    over, under = noise_fraction(join_lanes(w0, w1, w2, w3), noise, False)
    tau = tl.load(temperature).to(tl.float32)
    slope = soft_slope(theta, over, under, tau) / tau
    offsets = tl.arange(0, BLOCK)
    result = tl.where(is_drawn(theta, over, under), 0.0, slope * grad)
    tl.store(out + first + start + offsets, result, mask=offsets < left)


@triton.jit(do_not_specialize=_SIZES)
def pair_uniforms_kernel(table, rng, out, num_graphs, stream, BLOCK: tl.constexpr):
    """The uniform of every pair. Grid as in `draw_bits_kernel`."""
    graph, number = find_program(table, num_graphs, tl.program_id(0), 1, 0, BLOCK, 1)
    first = tl.load(table + num_graphs + 1 + graph)
    start = number.to(tl.int64) * BLOCK
    left = pairs_left(table, num_graphs, graph, start, BLOCK)
    if left <= 0:
        return
    key_0, key_1, step = load_key(rng)
    counter = (start >> 2).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    identity = graph_id(table, num_graphs, graph)
    w0, w1, w2, w3 = philox_words(counter, identity, step, stream, key_0, key_1)
    offsets = tl.arange(0, BLOCK)
    tl.store(out + first + start + offsets, uniform(join_lanes(w0, w1, w2, w3)), mask=offsets < left)
