"""Backward of edge sampling: from the gradients of the stored values to those of the logits.

Work is proportional to the entries. An undirected pair is stored twice; the entry below the diagonal owns
it, finds its twin by bisection in the twin's row, and writes the pair's gradient alone: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import last_not_above
from .philox import EDGE, lane_word, load_key
from .relaxation import noise_fraction, value_slope

_SIZES = ["num_graphs", "num_nodes", "length", "directed", "row_depth", "graph_depth", "estimator", "noise"]


@triton.jit
def twin_entry(rowptr, col, row, column, wanted):
    """Position of entry (column, row) for entries (row, column) of a symmetric structure."""
    low = tl.load(rowptr + column, mask=wanted, other=0)
    high = tl.load(rowptr + column + 1, mask=wanted, other=1)
    while tl.max(high - low) > 1:
        middle = low + ((high - low) >> 1)
        fits = tl.load(col + middle, mask=wanted, other=0) <= row
        low = tl.where(fits, middle, low)
        high = tl.where(fits | (high - low <= 1), high, middle)
    return low


@triton.jit(do_not_specialize=_SIZES)
def entry_gradient_kernel(
    grad_value,
    rowptr,
    col,
    pair,
    logits,
    table,
    rng,
    temperature,
    out,
    num_graphs,
    num_nodes,
    length,
    directed,
    row_depth,
    graph_depth,
    estimator,
    noise,
    gamma,
    zeta,
    absent_rate,
    BLOCK: tl.constexpr,
):
    """Slope times gradient of the pairs in the sample; the others keep what `out` holds. Grid: cdiv(length, BLOCK)."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stored = entry < tl.minimum(tl.load(rowptr + num_nodes), length)
    entry = tl.where(stored, entry, 0)
    zero = tl.zeros([BLOCK], tl.int32)
    row = last_not_above(rowptr, zero, zero + num_nodes, row_depth, entry)
    column = tl.load(col + entry, mask=stored, other=0)
    owner = stored & (row > column)
    if directed != 0:
        owner = stored
    grad = tl.load(grad_value + entry, mask=owner, other=0.0).to(tl.float32)
    if directed == 0:
        twin = twin_entry(rowptr, col, row, column, owner)
        grad += tl.load(grad_value + twin, mask=owner, other=0.0).to(tl.float32)

    graph = last_not_above(table, zero, zero + num_graphs, graph_depth, row)
    number = tl.load(pair + entry, mask=owner, other=0)
    local = number - tl.load(table + num_graphs + 1 + graph)
    identity = tl.load(table + 2 * (num_graphs + 1) + graph).to(tl.uint32)
    key_0, key_1, step = load_key(rng)
    over, under = noise_fraction(lane_word(local, identity, step, EDGE, key_0, key_1), noise, False)
    theta = tl.load(logits + number, mask=owner, other=0.0).to(tl.float32)
    tau = tl.load(temperature).to(tl.float32)
    slope = value_slope(theta, over, under, tau, estimator, gamma, zeta, absent_rate)
    tl.store(out + number, slope * grad, mask=owner)
