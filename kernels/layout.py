"""Which program works on which graph, and the closed-form pair maps, inside Triton kernels.

Grids are fixed on the host, which must not wait for the sizes of the graphs. A batch of B graphs with N
nodes and P pairs in all gets at least as many programs as it needs: graph g owns the programs from

    first(g) = (a * pairs before g + b * nodes before g) // d + c * g

on, a closed form of two table columns. Since floor(x + y) - floor(x) >= floor(y), graph g gets at least
floor(its share of (a pairs + b nodes) / d) + c programs; a, b, c and d are chosen so that this covers its
work. Spare programs find nothing to do and leave.

`table` is int64 [4, B + 1]: node offsets, pair offsets, graph ids, band widths (see ``acgkd_fast.layout``).
"""

from __future__ import annotations

import triton
import triton.language as tl

WORD = tl.constexpr(32)
# Rows of the adjacency that one program compacts: the bits of one word.
ROWS = tl.constexpr(32)


@triton.jit
def first_program(table, num_graphs, graph, a, b, d, c):
    share = a * tl.load(table + num_graphs + 1 + graph) + b * tl.load(table + graph)
    return share // d + c * graph


@triton.jit
def find_program(table, num_graphs, program, a, b, d, c):
    """The graph that owns a program, and the program's number inside it."""
    low = program * 0
    high = low + num_graphs
    while high - low > 1:
        middle = (low + high) // 2
        mine = first_program(table, num_graphs, middle, a, b, d, c) <= program
        low = tl.where(mine, middle, low)
        high = tl.where(mine, high, middle)
    return low, program - first_program(table, num_graphs, low, a, b, d, c)


@triton.jit
def last_not_above(sorted_values, low, high, depth, wanted):
    """For each wanted value the last index in low..high-1 whose entry does not exceed it.

    `low` and `high` (blocks) bracket the answer, 2^depth at least their distance.
    """
    for _ in range(depth):
        # Unlike (low + high) / 2 within int32 for any two positions.
        middle = low + ((high - low) >> 1)
        fits = tl.load(sorted_values + middle) <= wanted
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    return low


@triton.jit
def graph_id(table, num_graphs, graph):
    return tl.load(table + 2 * (num_graphs + 1) + graph).to(tl.uint32)


@triton.jit
def triangle(n):
    """n (n - 1) / 2 by halving the even factor, which keeps int32 up to n = 65536."""
    return (n >> 1) * ((n - 1) | 1)


@triton.jit
def padded_row(high):
    """First bit of row `high` where every row starts a new word, behind triangle(high) % 4 unused bits.

    The row takes (high + 34) // 32 words, enough for its bits and the unused ones.
    """
    last = high + 33
    a = last >> 5
    words = 16 * a * (a - 1) + a * ((last & 31) + 1) - 2
    return words * 32 + (triangle(high) & 3)


@triton.jit
def row_start(high, PADDED: tl.constexpr):
    """Bit of pair (high, 0) in its graph's part of the bits: one behind the other, or row by row."""
    if PADDED:
        start = padded_row(high)
    else:
        start = triangle(high)
    return start


@triton.jit
def first_word(table, num_graphs, graph, directed, PADDED: tl.constexpr):
    """Word at which a graph's bits begin. `directed` is 0 or 1; the undirected pairs count."""
    pairs = tl.load(table + num_graphs + 1 + graph) >> directed
    if PADDED:
        pairs += 34 * tl.load(table + graph)
    return (pairs >> 5) + graph


@triton.jit
def low_bits(count):
    """The word whose `count` lowest bits are set; none for count <= 0, all for count >= 32."""
    shift = (32 - tl.minimum(tl.maximum(count, 1), 32)).to(tl.uint32)
    return tl.where(count <= 0, 0, tl.full(shift.shape, 0xFFFFFFFF, tl.uint32) >> shift)


@triton.jit
def count_bits(word):
    """Set bits of each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def lowest_bit(word):
    """Position of the lowest set bit: the exponent of that power of two, exact in float32."""
    power = word ^ (word & (word - 1))
    return (power.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
