"""Gradients of every candidate pair from node factors, tile by tile.

For message passing ``out = P A Q x`` the gradient of edge value (row, column) is
``<left_row, right_column> + node_term_row``. A tile of 32 x 32 node pairs is two small matrix products (both
directions of a pair), to which the slope of the relaxation is applied at once if asked: then no float per
candidate exists but the result.

Noise is drawn per pair here rather than per four: a tile's rows start at any lane, and the products cost
several times more. Products of float32 are done in float32, never in tf32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import num_programs
from .layout import find_program, graph_id, triangle
from .philox import EDGE, lane_word, load_key
from .relaxation import is_drawn, noise_fraction, soft_slope

TILE = 32
CHANNELS = 16
_SIZES = ["num_graphs", "width", "directed", "noise"]


def tile_grid(num_pairs: int, num_nodes: int, num_graphs: int, kind: int) -> tuple[int, int]:
    """Grid of `candidate_kernel`.

    A complete graph has ceil(n / TILE)^2 tiles, half of them empty; a budget one has, beside every block of
    starts, the ceil((band + TILE - 1) / TILE) blocks that its ends may lie in.
    """
    directed = kind >> 1 & 1
    if kind & 1:
        share = (2 >> directed, 1 + 5 * TILE, 2 * TILE * TILE, 2)
    else:
        share = (2 >> directed, 1 + 2 * TILE, TILE * TILE, 1)
    return num_programs(*share, pairs=num_pairs, nodes=num_nodes, graphs=num_graphs), 1 + directed


@triton.jit
def load_rows(values, node, valid, channel, width):
    """[TILE, K] block of a [N, width] matrix."""
    place = node.to(tl.int64)[:, None] * width + channel[None, :]
    return tl.load(values + place, mask=valid[:, None] & (channel < width)[None, :], other=0.0)


@triton.jit
def tile_nodes(n, band, number, BUDGET: tl.constexpr, TILE: tl.constexpr):
    """The two node blocks of a tile: [TILE] numbers inside the graph, unwrapped, and how many tiles there are.

    Complete: first = the larger node, second = the smaller. Budget: first = a pair's start, second = its end.
    """
    blocks = (n + TILE - 1) // TILE
    inside = tl.arange(0, TILE)
    if BUDGET:
        per_block = (band + 2 * TILE - 2) // TILE
        block = number // per_block
        first = block * TILE + inside
        second = block * TILE + 1 + (number % per_block) * TILE + inside
        tiles = blocks * per_block
    else:
        first = (number // blocks) * TILE + inside
        second = (number % blocks) * TILE + inside
        tiles = blocks * blocks
    return first, second, tiles


# The three may be parts of one tensor, which begin anywhere.
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["left", "right", "node_term"])
def candidate_kernel(
    left,
    right,
    node_term,
    logits,
    table,
    rng,
    temperature,
    out,
    num_graphs,
    width,
    directed,
    noise,
    BUDGET: tl.constexpr,
    SLOPE: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tile of one graph and, if directed, one direction (axis 1 of the grid).

    With SLOPE: times the slope where the pair was not drawn, else 0.
    """
    if BUDGET:
        graph, number = find_program(
            table, num_graphs, tl.program_id(0), 2 >> directed, 1 + 5 * TILE, 2 * TILE * TILE, 2
        )
    else:
        graph, number = find_program(table, num_graphs, tl.program_id(0), 2 >> directed, 1 + 2 * TILE, TILE * TILE, 1)
    node_first = tl.load(table + graph)
    n = (tl.load(table + graph + 1) - node_first).to(tl.int32)
    band = tl.load(table + 3 * (num_graphs + 1) + graph).to(tl.int32)
    first, second, tiles = tile_nodes(n, band, number.to(tl.int32), BUDGET, TILE)
    if number >= tiles:
        return
    if BUDGET:
        distance = second[None, :] - first[:, None]
        second = tl.where(second >= n, second - n, second)
        half = (2 * distance != n) | (2 * first < n)[:, None]
        wanted = (distance >= 1) & (distance <= band) & half & (first < n)[:, None]
        pair = (distance - 1).to(tl.int64) * n + first[:, None]
    else:
        if tl.min(second) >= tl.max(first):
            return
        wanted = (second[None, :] < first[:, None]) & (first < n)[:, None]
        pair = triangle(first.to(tl.int64))[:, None] + second[None, :]

    grad = tl.zeros([TILE, TILE], tl.float32)
    direction = tl.program_id(1)
    chunks = (width + CHANNELS - 1) // CHANNELS
    # One product for a directed pair, the sum of both directions' for an undirected one.
    for chunk in range(0, chunks * (2 - directed)):
        turned = (direction + chunk // chunks) % 2 == 1
        channel = (chunk % chunks) * CHANNELS + tl.arange(0, CHANNELS)
        rows = load_rows(tl.where(turned, right, left), node_first + first, first < n, channel, width)
        columns = load_rows(tl.where(turned, left, right), node_first + second, second < n, channel, width)
        grad = tl.dot(rows, tl.trans(columns), grad, input_precision="ieee")
    if (directed == 0) | (direction == 0):
        term = tl.load(node_term + node_first + first, mask=first < n, other=0.0)
        grad += term.to(tl.float32)[:, None]
    if (directed == 0) | (direction == 1):
        term = tl.load(node_term + node_first + second, mask=second < n, other=0.0)
        grad += term.to(tl.float32)[None, :]

    if directed != 0:
        # An odd number means row > column; the first node is the row unless turned.
        first_larger = (first[:, None] > second[None, :]).to(tl.int32)
        pair = 2 * pair + (first_larger ^ direction)
    pair_first = tl.load(table + num_graphs + 1 + graph)
    if SLOPE:
        key_0, key_1, step = load_key(rng)
        tau = tl.load(temperature).to(tl.float32)
        identity = graph_id(table, num_graphs, graph)
        theta = tl.load(logits + pair_first + pair, mask=wanted, other=0.0).to(tl.float32)
        over, under = noise_fraction(lane_word(pair, identity, step, EDGE, key_0, key_1), noise, False)
        grad = tl.where(is_drawn(theta, over, under), 0.0, grad * (soft_slope(theta, over, under, tau) / tau))
    tl.store(out + pair_first + pair, grad, mask=wanted)
