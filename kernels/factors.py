"""Edges from factorised logits z_i . z_j + b: the draw, and the gradients of z and b.

A tile of logits lives in registers from the matrix product to the bits. Its rows lie 8 apart: rows i and
i + 8 begin on the same lane of the random stream, since triangle(i + 8) - triangle(i) = 8 i + 28, and a tile
whose columns are shifted by that lane uses all four words of every Philox call.

Counting and filling are those of ``compact.py`` over padded bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from acgkd_fast.edges import factorised
from acgkd_fast.edges.estimators import Estimator

from .backward import twin_entry
from .draw import join_lanes, pack_bits
from .edges import Bits, Compaction, count_words
from .launch import cdiv, check_contiguous, num_programs, on_device, warps
from .layout import find_program, first_word, graph_id, last_not_above, padded_row, triangle
from .philox import ABSENT, EDGE, lane_word, load_key, philox_words, uniform
from .relaxation import SPARSE, absent_chance, is_drawn, noise_fraction, soft_slope, value_slope

# Rows and columns of a tile; rows and channels of a backward block.
HIGH = 32
LOW = 64
CHANNELS = 16
ENTRIES = 32
WIDTH = 32
# 256 MiB: what 2 * 10^9 pairs need.
WINDOW_WORDS = 2**26
_SIZES = ["num_graphs", "num_nodes", "width", "window_first", "window_words", "length", "row_depth", "graph_depth",
          "estimator", "noise"]  # fmt: skip


@triton.jit
def pack_tile(kept, HIGH: tl.constexpr, LOW: tl.constexpr):
    return pack_bits(tl.reshape(kept.to(tl.uint32), [HIGH, LOW // 32, 32]))


@triton.jit(do_not_specialize=_SIZES)
def draw_factor_bits_kernel(
    z,
    bias,
    table,
    rng,
    temperature,
    bits,
    num_graphs,
    width,
    window_first,
    window_words,
    estimator,
    noise,
    absent_rate,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Bits of one tile, as far as the window holds them. Grid: `factor_grid`.

    For sparse straight-through a second plane says which pairs, drawn or absent, are in the sample.
    """
    graph, number = find_program(table, num_graphs, tl.program_id(0), 2, 4 + LOW + 8 * HIGH, HIGH * LOW, 9)
    node_first = tl.load(table + graph)
    n = (tl.load(table + graph + 1) - node_first).to(tl.int32)
    number = number.to(tl.int32)
    blocks = (n + 8 * HIGH - 1) // (8 * HIGH)
    high_first = (number // 8 % blocks) * 8 * HIGH + number % 8
    low_first = (number // 8 // blocks) * LOW
    lane = triangle(high_first) & 3
    high = high_first + 8 * tl.arange(0, HIGH)
    low = low_first - lane + tl.arange(0, LOW)
    if low_first - lane >= tl.minimum(high_first + 8 * (HIGH - 1), n - 1):
        return
    word_low = low_first // 32 + tl.arange(0, LOW // 32)
    first = first_word(table, num_graphs, graph, 0, True) - window_first
    place = first + (padded_row(high.to(tl.int64)) >> 5)[:, None] + word_low[None, :]
    used = (32 * word_low[None, :] < (high + lane)[:, None]) & (high < n)[:, None]
    used = used & (place >= 0) & (place < window_words)
    if tl.max(used.to(tl.int32)) == 0:
        return

    theta = tl.zeros([HIGH, LOW], tl.float32)
    for channel_first in range(0, width, CHANNELS):
        channel = channel_first + tl.arange(0, CHANNELS)
        inside = channel < width
        row_place = (node_first + high)[:, None] * width + channel[None, :]
        rows = tl.load(z + row_place, mask=(high < n)[:, None] & inside[None, :], other=0.0)
        column_place = (node_first + low)[None, :] * width + channel[:, None]
        low_valid = (low >= 0) & (low < n)
        columns = tl.load(z + column_place, mask=low_valid[None, :] & inside[:, None], other=0.0)
        theta = tl.dot(rows, columns, theta, input_precision="ieee")
    theta += tl.load(bias + graph).to(tl.float32)

    key_0, key_1, step = load_key(rng)
    identity = graph_id(table, num_graphs, graph)
    quad = ((triangle(high.to(tl.int64)) + low_first) >> 2).to(tl.uint32)
    quad = quad[:, None] + tl.arange(0, LOW // 4).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = philox_words(quad, identity, step, EDGE, key_0, key_1)
    over, under = noise_fraction(join_lanes(w0, w1, w2, w3), noise, False)
    valid = (low >= 0)[None, :] & (low[None, :] < high[:, None])
    drawn = is_drawn(theta, over, under)
    tl.store(bits + place, pack_tile(drawn & valid, HIGH, LOW), mask=used)
    if estimator == SPARSE:
        w0, w1, w2, w3 = philox_words(quad, identity, step, ABSENT, key_0, key_1)
        tau = tl.load(temperature).to(tl.float32)
        chance = absent_chance(soft_slope(theta, over, under, tau), absent_rate)
        sampled = uniform(join_lanes(w0, w1, w2, w3)) < chance
        tl.store(bits + window_words + place, pack_tile((drawn | sampled) & valid, HIGH, LOW), mask=used)


@triton.jit
def entry_node_pair(rowptr, col, table, entry, stored, num_graphs, num_nodes, row_depth, graph_depth):
    """(row, column, graph) of entries."""
    zero = tl.zeros(entry.shape, tl.int32)
    row = last_not_above(rowptr, zero, zero + num_nodes, row_depth, entry)
    column = tl.load(col + entry, mask=stored, other=0)
    return row, column, last_not_above(table, zero, zero + num_graphs, graph_depth, row)


@triton.jit(do_not_specialize=_SIZES)
def factor_pair_gradient_kernel(
    grad_value,
    rowptr,
    col,
    pair,
    z,
    bias,
    table,
    rng,
    temperature,
    grad_theta,
    num_graphs,
    num_nodes,
    width,
    length,
    row_depth,
    graph_depth,
    estimator,
    noise,
    absent_rate,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradient of each entry's logit, both directions of the pair together. Grid: cdiv(length, ENTRIES)."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    stored = entry < tl.minimum(tl.load(rowptr + num_nodes), length)
    entry = tl.where(stored, entry, 0)
    row, column, graph = entry_node_pair(
        rowptr, col, table, entry, stored, num_graphs, num_nodes, row_depth, graph_depth
    )
    theta = tl.load(bias + graph).to(tl.float32)
    for channel_first in range(0, width, WIDTH):
        channel = channel_first + tl.arange(0, WIDTH)
        inside = stored[:, None] & (channel < width)[None, :]
        one = tl.load(z + row.to(tl.int64)[:, None] * width + channel[None, :], mask=inside, other=0.0)
        other = tl.load(z + column.to(tl.int64)[:, None] * width + channel[None, :], mask=inside, other=0.0)
        theta += tl.sum(one.to(tl.float32) * other.to(tl.float32), axis=1)
    twin = twin_entry(rowptr, col, row, column, stored)
    grad = tl.load(grad_value + entry, mask=stored, other=0.0).to(tl.float32)
    grad += tl.load(grad_value + twin, mask=stored, other=0.0).to(tl.float32)
    local = tl.load(pair + entry, mask=stored, other=0) - tl.load(table + num_graphs + 1 + graph)
    identity = tl.load(table + 2 * (num_graphs + 1) + graph).to(tl.uint32)
    key_0, key_1, step = load_key(rng)
    over, under = noise_fraction(lane_word(local, identity, step, EDGE, key_0, key_1), noise, False)
    tau = tl.load(temperature).to(tl.float32)
    slope = value_slope(theta, over, under, tau, estimator, 0.0, 1.0, absent_rate)
    tl.store(grad_theta + entry, slope * grad, mask=stored)


@triton.jit(do_not_specialize=_SIZES)
def factor_node_gradient_kernel(grad_theta, rowptr, col, z, grad_z, width, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    """grad_z of one row: its entries' gradients times the other ends' factors. Grid: (nodes, cdiv(width, WIDTH))."""
    row = tl.program_id(0)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = channel < width
    first = tl.load(rowptr + row)
    last = tl.load(rowptr + row + 1)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        stored = entry < last
        weight = tl.load(grad_theta + entry, mask=stored, other=0.0)
        column = tl.load(col + entry, mask=stored, other=0).to(tl.int64)
        mask = stored[:, None] & inside[None, :]
        factor = tl.load(z + column[:, None] * width + channel[None, :], mask=mask, other=0.0)
        total += tl.sum(weight[:, None] * factor.to(tl.float32), axis=0)
    tl.store(grad_z + row.to(tl.int64) * width + channel, total, mask=inside)


@triton.jit
def factor_bias_gradient_kernel(grad_theta, rowptr, table, grad_bias, ENTRIES: tl.constexpr):
    """grad_bias of one graph: half the sum over its entries, which hold every pair twice. Grid: graphs."""
    graph = tl.program_id(0)
    first = tl.load(rowptr + tl.load(table + graph))
    last = tl.load(rowptr + tl.load(table + graph + 1))
    total = tl.zeros([ENTRIES], tl.float32)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        total += tl.load(grad_theta + entry, mask=entry < last, other=0.0)
    tl.store(grad_bias + graph, 0.5 * tl.sum(total, axis=0))


def sample_factor_edges(
    z: torch.Tensor,
    bias: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    temperature: torch.Tensor,
    estimator: int,
    noise: int,
    absent_rate: float,
    num_pairs: int,
    capacity: int,
) -> tuple[torch.Tensor, ...]:
    """Bits for at most WINDOW_WORDS words exist at a time; a larger batch is drawn twice, window by window."""
    if z.dtype == torch.float64:
        return factorised.sample_factor_edges(
            z, bias, table, rng, temperature, estimator, noise, absent_rate, num_pairs, capacity
        )
    check_contiguous("sample_factor_edges", z=z, bias=bias, table=table, rng=rng)
    (nodes, width), graphs = z.shape, table.shape[1] - 1
    if graphs == 0:
        return Compaction.empty(z, capacity)
    planes = 2 if estimator == Estimator.SPARSE_STRAIGHT_THROUGH else 1
    total = count_words(num_pairs, nodes, graphs, 0, padded=True)
    length = min(total, WINDOW_WORDS // planes)
    words = torch.empty(planes, length, dtype=torch.int32, device=z.device)
    windows = [Bits(words, first, padded=True) for first in range(0, total, length)]
    grid = (num_programs(2, 4 + LOW + 8 * HIGH, HIGH * LOW, 9, pairs=num_pairs, nodes=nodes, graphs=graphs),)

    def draw(bits: Bits) -> None:
        draw_factor_bits_kernel[grid](
            z, bias, table, rng, temperature, bits.words, graphs, width, bits.window_first, length, estimator, noise,
            absent_rate, HIGH=HIGH, LOW=LOW, CHANNELS=CHANNELS, num_warps=warps(4, 2), num_stages=1,
        )  # fmt: skip

    with on_device(z):
        rows = Compaction(table, 0, nodes, num_pairs, z.device)
        for bits in windows:
            draw(bits)
            rows.count(bits)
        rows.place(z.dtype, capacity)
        for bits in windows:
            if len(windows) > 1:
                draw(bits)
            sample = rows.fill(bits, z, rng, temperature, estimator, noise, 0.0, 1.0)
    return sample


def sample_factor_edges_backward(
    grad_value: torch.Tensor,
    rowptr: torch.Tensor,
    col: torch.Tensor,
    pair: torch.Tensor,
    z: torch.Tensor,
    bias: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    temperature: torch.Tensor,
    estimator: int,
    noise: int,
    absent_rate: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    if z.dtype == torch.float64:
        return factorised.sample_factor_edges_backward(
            grad_value, rowptr, col, pair, z, bias, table, rng, temperature, estimator, noise, absent_rate
        )
    structure = {"rowptr": rowptr, "col": col, "pair": pair}
    check_contiguous(
        "sample_factor_edges_backward", grad_value=grad_value, **structure, z=z, bias=bias, table=table, rng=rng
    )
    (nodes, width), graphs, entries = z.shape, table.shape[1] - 1, col.shape[0]
    grad_z, grad_bias = torch.empty_like(z), torch.empty_like(bias)
    if graphs == 0:
        return grad_z, grad_bias
    grad_theta = torch.empty(entries, dtype=torch.float32, device=z.device)
    with on_device(z):
        if entries:
            factor_pair_gradient_kernel[(cdiv(entries, ENTRIES),)](
                grad_value, rowptr, col, pair, z, bias, table, rng, temperature, grad_theta, graphs, nodes, width,
                entries, nodes.bit_length(), graphs.bit_length(), estimator, noise, absent_rate,
                ENTRIES=ENTRIES, WIDTH=WIDTH, num_warps=4,
            )  # fmt: skip
        if width:
            factor_node_gradient_kernel[(nodes, cdiv(width, WIDTH))](
                grad_theta, rowptr, col, z, grad_z, width, ENTRIES=ENTRIES, WIDTH=WIDTH, num_warps=1
            )
        factor_bias_gradient_kernel[(graphs,)](
            grad_theta, rowptr, table, grad_bias, ENTRIES=1024, num_warps=4
        )  # fmt: skip
    return grad_z, grad_bias
