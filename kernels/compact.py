"""Passes 2 to 4 of edge sampling: from one bit per candidate pair to canonical CSR, without atomics.

A program owns 32 rows of one graph. It walks over their candidate columns in ascending order, 256 *slots*
at a time, and gathers a word per row for every 32 slots. Count adds the words up, scan places the programs
one behind the other, fill takes the bits of the words from low to high. Edges therefore leave sorted, and
every output entry has one owner.

Slots of a row, in the order of their columns:

- complete: slot t is column t. Columns below the row lie in the row's own bits; those above are found in
  the bits of the column's row, 32 rows to a word, and are transposed.
- budget: 4 * band slots, a quarter each for partners ahead beyond the ring's end, behind, ahead, and behind
  before the ring's start. All are stored by distance, 32 rows to a word, and are transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import (
    ROWS,
    count_bits,
    find_program,
    first_word,
    graph_id,
    low_bits,
    lowest_bit,
    padded_row,
    row_start,
    triangle,
)
from .philox import EDGE, lane_word, load_key
from .relaxation import HARD_CONCRETE, RELAXED, SPARSE, is_drawn, noise_fraction, soft_value, stretch

SLOTS = tl.constexpr(256)
GROUPS = tl.constexpr(256 // 32)
PAD = tl.constexpr(1024)
_SIZES = ["num_graphs", "directed", "plane_words", "window_first", "window_words", "num_nodes", "capacity",
          "length", "row_programs", "first_window", "estimator", "noise"]  # fmt: skip


@triton.jit
def load_string(bits, word, shift, wanted, begin, end):
    """32 bits from bit 32 * word + shift on, zeros outside the words begin..end-1."""
    inside = wanted & (word >= begin) & (word < end)
    low = tl.load(bits + word, mask=inside, other=0).to(tl.uint32, bitcast=True)
    inside = wanted & (shift > 0) & (word + 1 >= begin) & (word + 1 < end)
    high = tl.load(bits + word + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
    shift = shift.to(tl.uint32)
    # Two shifts, because one by 32 is undefined.
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def transpose_bits(words):
    """[32 slots, W] words over 32 rows -> [W, 32 rows] words over 32 slots."""
    row = tl.arange(0, 32).to(tl.uint32)
    slot = tl.arange(0, 32).to(tl.uint32)
    single = ((words[:, :, None] >> row[None, None, :]) & 1) << slot[:, None, None]
    return tl.sum(single, axis=0)


@triton.jit
def complete_words(bits, plane_words, begin, end, n, row_first, slot_first, WIDE: tl.constexpr, PADDED: tl.constexpr):
    """[W, 32 rows]: which of the columns from slot_first on each row of a complete graph holds."""
    Index: tl.constexpr = tl.int64 if WIDE else tl.int32
    group = tl.arange(0, GROUPS)
    row = row_first + tl.arange(0, ROWS)
    words = tl.zeros([GROUPS, ROWS], tl.uint32)
    if slot_first < row_first + ROWS:
        bit = row_start(row.to(Index), PADDED) + slot_first
        below = row[None, :] - (slot_first + 32 * group)[:, None]
        wanted = (below > 0) & (row < n)[None, :]
        word = (bit >> 5)[None, :] + group[:, None]
        shift = tl.broadcast_to((bit & 31)[None, :], [GROUPS, ROWS])
        string = load_string(bits + plane_words, word, shift, wanted, begin, end)
        words = string & low_bits(tl.where(wanted, below, 0))
    if slot_first + SLOTS > row_first:
        column = slot_first + tl.arange(0, 32)[:, None] + 32 * group[None, :]
        bit = row_start(column.to(Index), PADDED) + row_first
        wanted = (column > row_first) & (column < n)
        string = load_string(bits, bit >> 5, bit & 31, wanted, begin, end)
        words = words | transpose_bits(string & low_bits(tl.where(wanted, column - row_first, 0)))
    return words


@triton.jit
def budget_slot(slot, band):
    """(distance, ahead, wrapped) of a slot; slots from 4 * band on repeat the last quarter's rule."""
    quarter = tl.minimum(slot // tl.maximum(band, 1), 3)
    ahead = quarter % 2 == 0
    wrapped = (quarter == 0) | (quarter == 3)
    distance = tl.where(ahead, slot - quarter * band + 1, (quarter + 1) * band - slot)
    return distance, ahead, wrapped


@triton.jit
def budget_words(bits, plane_words, begin, end, n, band, row_first, slot_first, WIDE: tl.constexpr):
    """[W, 32 rows]: which of the slots from slot_first on each row of a budget layout holds."""
    Index: tl.constexpr = tl.int64 if WIDE else tl.int32
    slot = slot_first + tl.arange(0, 32)[:, None] + 32 * tl.arange(0, GROUPS)[None, :]
    distance, ahead, wrapped = budget_slot(slot, band)
    # The pair's start is the row itself where the partner is ahead, else the partner.
    back = tl.where(ahead, 0, tl.where(wrapped, distance - n, distance))
    # Rows of the block that have such a partner: first..last-1.
    border = tl.where(ahead, n - distance, distance) - row_first
    first = tl.where(ahead == wrapped, border, 0)
    last = tl.where(ahead == wrapped, n - row_first, tl.minimum(border, n - row_first))
    # At half the ring both directions name one pair, which its lower node starts.
    wanted = (slot < 4 * band) & ~(wrapped & (2 * distance == n))
    bit = (distance - 1).to(Index) * n + (row_first - back)
    # Columns below the row fill the first two quarters.
    plane = tl.where(slot < 2 * band, plane_words, 0)
    string = load_string(bits + plane, bit >> 5, bit & 31, wanted, begin, end)
    before = low_bits(tl.minimum(first, last))
    return transpose_bits(tl.where(wanted, string & (low_bits(last) ^ before), 0))


@triton.jit
def row_words(
    bits,
    plane_words,
    begin,
    end,
    n,
    band,
    row_first,
    slot_first,
    BUDGET: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The words of 32 rows and SLOTS slots; columns below the row come from the plane `plane_words` further on."""
    if BUDGET:
        words = budget_words(bits, plane_words, begin, end, n, band, row_first, slot_first, WIDE)
    else:
        words = complete_words(bits, plane_words, begin, end, n, row_first, slot_first, WIDE, PADDED)
    return words


@triton.jit
def slot_pair(row, slot, n, band, directed, BUDGET: tl.constexpr, WIDE: tl.constexpr):
    """Column and pair number, inside the graph, of a row's slot."""
    Index: tl.constexpr = tl.int64 if WIDE else tl.int32
    if BUDGET:
        distance, ahead, wrapped = budget_slot(slot, band)
        turn = tl.where(wrapped, n, 0)
        column = tl.where(ahead, row + distance - turn, row - distance + turn)
        pair = (distance - 1).to(Index) * n + tl.where(ahead, row, column)
    else:
        column = slot
        pair = triangle(tl.maximum(row, column).to(Index)) + tl.minimum(row, column)
    pair = (pair << directed) + tl.where(row > column, directed, 0)
    return column, pair


@triton.jit
def bit_range(table, num_graphs, graph, directed, window_first, window_words, WIDE: tl.constexpr, PADDED: tl.constexpr):
    """(offset, begin, end): a graph's word 0 in the buffer, and its words that the buffer holds.

    The buffer is a window: words window_first.. of all graphs' words.
    """
    Index: tl.constexpr = tl.int64 if WIDE else tl.int32
    mine = first_word(table, num_graphs, graph, directed, PADDED)
    if PADDED:
        n = tl.load(table + graph + 1) - tl.load(table + graph)
        words = padded_row(n) >> 5
    else:
        pairs = table + num_graphs + 1 + graph
        words = (((tl.load(pairs + 1) - tl.load(pairs)) >> directed) + 31) >> 5
    begin = tl.maximum(window_first - mine, 0)
    end = tl.minimum(window_first + window_words - mine, words)
    return mine - window_first, begin.to(Index), end.to(Index)


@triton.jit(do_not_specialize=_SIZES)
def count_kernel(
    table,
    bits,
    counts,
    sums,
    num_graphs,
    directed,
    plane_words,
    window_first,
    window_words,
    BUDGET: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Entries of each row, and of each program's 32 rows. Grid: find_program with 0, 1, ROWS, 1.

    Padded bits come in windows, and `counts` adds up over the windows.
    """
    program = tl.program_id(0)
    graph, number = find_program(table, num_graphs, program, 0, 1, ROWS, 1)
    node_first = tl.load(table + graph)
    n = (tl.load(table + graph + 1) - node_first).to(tl.int32)
    row_first = number.to(tl.int32) * ROWS
    total = tl.zeros([ROWS], tl.int32)
    if row_first < n:
        band = tl.load(table + 3 * (num_graphs + 1) + graph).to(tl.int32)
        offset, begin, end = bit_range(table, num_graphs, graph, directed, window_first, window_words, WIDE, PADDED)
        mine = bits + offset
        below = directed * plane_words
        slots = 4 * band if BUDGET else n
        for slot_first in range(0, slots, SLOTS):
            words = row_words(mine, below, begin, end, n, band, row_first, slot_first, BUDGET, WIDE, PADDED)
            total += tl.sum(count_bits(words), axis=0)
        row = row_first + tl.arange(0, ROWS)
        if PADDED:
            if window_first > 0:
                total += tl.load(counts + node_first + row, mask=row < n, other=0)
        tl.store(counts + node_first + row, total, mask=row < n)
    tl.store(sums + program, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=_SIZES)
def scan_kernel(sums, bases, needed, length, BLOCK: tl.constexpr):
    """Exclusive prefix sums of int32 `sums` [length] as int64, and their total. One program."""
    total = tl.zeros((), tl.int64)
    for first in range(0, length, BLOCK):
        place = first + tl.arange(0, BLOCK)
        block = tl.load(sums + place, mask=place < length, other=0).to(tl.int64)
        tl.store(bases + place, total + tl.cumsum(block, axis=0) - block, mask=place < length)
        total += tl.sum(block, axis=0)
    tl.store(needed, total)


@triton.jit
def pad_entries(col, pair, value, count, capacity, block):
    """Unused capacity holds col 0, pair -1 and value 0."""
    place = count + block.to(tl.int64) * PAD + tl.arange(0, PAD)
    unused = place < capacity
    tl.store(col + place, tl.zeros([PAD], tl.int32), mask=unused)
    tl.store(pair + place, tl.full([PAD], -1, tl.int64), mask=unused)
    tl.store(value + place, tl.zeros([PAD], tl.float32), mask=unused)


@triton.jit
def entry_value(logits, pair, first_pair, wanted, identity, key_0, key_1, step, estimator, noise, tau, gamma, zeta):
    """Forward value of entries whose value is not always 1; noise is drawn again for those only."""
    value = tl.full(wanted.shape, 1.0, tl.float32)
    if (estimator == RELAXED) | (estimator == HARD_CONCRETE) | (estimator == SPARSE):
        theta = tl.load(logits + first_pair + pair, mask=wanted, other=0.0).to(tl.float32)
        over, under = noise_fraction(lane_word(pair, identity, step, EDGE, key_0, key_1), noise, False)
        if estimator == SPARSE:
            value = is_drawn(theta, over, under).to(tl.float32)
        else:
            value = soft_value(theta, over, under, tau)
            if estimator == HARD_CONCRETE:
                value = tl.minimum(tl.maximum(stretch(value, gamma, zeta), 0.0), 1.0)
    return value


@triton.jit
def drawn_value(bits, row, column, wanted, WIDE: tl.constexpr):
    """1 where the pair's own bit is set, else 0."""
    Index: tl.constexpr = tl.int64 if WIDE else tl.int32
    bit = padded_row(tl.maximum(row, column).to(Index)) + tl.minimum(row, column)
    word = tl.load(bits + (bit >> 5), mask=wanted, other=0)
    return ((word >> (bit & 31).to(tl.int32)) & 1).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def fill_kernel(
    table,
    bits,
    drawn_bits,
    logits,
    rng,
    temperature,
    counts,
    bases,
    needed,
    rowptr,
    col,
    pair,
    value,
    num_graphs,
    num_nodes,
    directed,
    plane_words,
    window_first,
    window_words,
    capacity,
    row_programs,
    estimator,
    noise,
    gamma,
    zeta,
    BUDGET: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Write rowptr and the entries. Grid: the programs of `count_kernel`, then cdiv(capacity, PAD) that pad.

    A sample that does not fit leaves nothing but padding and rowptr = 0. With padded bits `counts` becomes
    each row's cursor once the first window has written rowptr, and `drawn_bits` tell the entries of value 1
    from those of value 0.
    """
    program = tl.program_id(0)
    total = tl.load(needed)
    fits = total <= capacity
    if program >= row_programs:
        pad_entries(col, pair, value, tl.where(fits, total, 0), capacity, program - row_programs)
        return
    graph, number = find_program(table, num_graphs, program, 0, 1, ROWS, 1)
    node_first = tl.load(table + graph)
    n = (tl.load(table + graph + 1) - node_first).to(tl.int32)
    row_first = number.to(tl.int32) * ROWS
    if program == 0:
        tl.store(rowptr + num_nodes, tl.where(fits, total, 0).to(tl.int32))
    if row_first >= n:
        return
    row = row_first + tl.arange(0, ROWS)
    in_graph = row < n
    cursor = tl.load(counts + node_first + row, mask=in_graph, other=0)
    if window_first == 0:
        cursor = tl.load(bases + program).to(tl.int32) + tl.cumsum(cursor, axis=0) - cursor
        tl.store(rowptr + node_first + row, tl.where(fits, cursor, 0), mask=in_graph)
    if total > capacity:
        return

    band = tl.load(table + 3 * (num_graphs + 1) + graph).to(tl.int32)
    first_pair = tl.load(table + num_graphs + 1 + graph)
    identity = graph_id(table, num_graphs, graph)
    key_0, key_1, step = load_key(rng)
    tau = tl.load(temperature).to(tl.float32)
    offset, begin, end = bit_range(table, num_graphs, graph, directed, window_first, window_words, WIDE, PADDED)
    mine = bits + offset
    below = directed * plane_words
    slots = 4 * band if BUDGET else n
    for slot_first in range(0, slots, SLOTS):
        words = row_words(mine, below, begin, end, n, band, row_first, slot_first, BUDGET, WIDE, PADDED)
        amount = count_bits(words)
        place = cursor[None, :] + tl.cumsum(amount, axis=0) - amount
        cursor += tl.sum(amount, axis=0)
        for _ in range(tl.max(amount)):
            left = words != 0
            bit = lowest_bit(words)
            slot = slot_first + 32 * tl.arange(0, GROUPS)[:, None] + bit
            column, local = slot_pair(row[None, :], slot, n, band, directed, BUDGET, WIDE)
            if PADDED:
                weight = drawn_value(drawn_bits + offset, row[None, :], column, left, WIDE)
            else:
                weight = entry_value(
                    logits, local, first_pair, left, identity, key_0, key_1, step, estimator, noise, tau, gamma, zeta
                )
            tl.store(col + place, (node_first + column).to(tl.int32), mask=left)
            tl.store(pair + place, first_pair + local, mask=left)
            tl.store(value + place, weight, mask=left)
            place += 1
            words = words & (words - 1)
    if PADDED:
        tl.store(counts + node_first + row, cursor, mask=in_graph)
