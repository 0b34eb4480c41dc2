"""The edge operators on CUDA tensors: what ``acgkd_fast/edges/ops.py`` declares, by Triton kernels.

Forward takes four kernels: draw, count, scan, fill (``draw.py``, ``compact.py``). With a capacity nothing
waits for the host; without one, the number of edges is read back once, between scan and fill.
float64 logits serve gradient checks only and take the plain-torch operators.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acgkd_fast.edges import reference
from acgkd_fast.edges.estimators import Estimator
from acgkd_fast.errors import check

from . import backward, candidates, compact, draw
from .launch import LARGEST_INT32, cdiv, check_contiguous, num_programs, on_device

PAIR_BLOCK = 1024
DRAW_STRIPS = 4
ENTRY_BLOCK = 128
SCAN_BLOCK = 1024


def needs_int64(num_pairs: int, num_nodes: int) -> bool:
    """Whether pair numbers or the bits of padded rows (up to 34 unused ones each) leave int32."""
    return num_pairs + 34 * num_nodes > LARGEST_INT32


@dataclass(frozen=True)
class Bits:
    """One bit per candidate pair: a window of 32-bit words of the whole batch.

    Attributes:
        words: int32 [planes, window words]. Directed layouts have a plane for each direction. Padded bits may
            have two planes: which pairs were drawn, and which are in the sample.
        window_first: the first word that the window holds.
        padded: rows begin new words, as the factor kernel writes them.
    """

    words: torch.Tensor
    window_first: int = 0
    padded: bool = False

    @property
    def sample(self) -> torch.Tensor:
        return self.words[-1] if self.padded else self.words


def pair_grid(num_pairs: int, num_graphs: int, strips: int = 1) -> tuple[int]:
    return (num_programs(1, 0, strips * PAIR_BLOCK, 1, pairs=num_pairs, nodes=0, graphs=num_graphs),)


def count_words(num_pairs: int, num_nodes: int, num_graphs: int, kind: int, *, padded: bool = False) -> int:
    """Words of one plane of bits; mirrors ``layout.first_word``."""
    undirected = num_pairs >> (kind >> 1 & 1)
    return (undirected + (34 * num_nodes if padded else 0)) // 32 + num_graphs


def sample_edges(
    logits: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    temperature: torch.Tensor,
    kind: int,
    estimator: int,
    noise: int,
    gamma: float,
    zeta: float,
    absent_rate: float,
    num_nodes: int,
    capacity: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if logits.dtype == torch.float64:
        return reference.sample_edges(
            logits, table, rng, temperature, kind, estimator, noise, gamma, zeta, absent_rate, num_nodes, capacity
        )
    check_contiguous("sample_edges", logits=logits, table=table, rng=rng)
    graphs, pairs = table.shape[1] - 1, logits.shape[0]
    if graphs == 0:
        return Compaction.empty(logits, capacity)
    with on_device(logits):
        directed = bool(kind & 2)
        words = count_words(pairs, num_nodes, graphs, kind)
        bits = Bits(torch.empty(2 if directed else 1, words, dtype=torch.int32, device=logits.device))
        draw.draw_bits_kernel[pair_grid(pairs, graphs, DRAW_STRIPS)](
            logits, table, rng, temperature, bits.words, graphs, words, estimator, noise, gamma, zeta, absent_rate,
            DIRECTED=directed, BLOCK=PAIR_BLOCK, STRIPS=DRAW_STRIPS, num_warps=4,
        )  # fmt: skip
        rows = Compaction(table, kind, num_nodes, pairs, logits.device)
        rows.count(bits)
        rows.place(logits.dtype, capacity)
        return rows.fill(bits, logits, rng, temperature, estimator, noise, gamma, zeta)


class Compaction:
    """Count, scan and fill over the bits of a batch, window by window where there are several."""

    def __init__(self, table: torch.Tensor, kind: int, num_nodes: int, num_pairs: int, device: torch.device) -> None:
        self.table, self.kind, self.num_nodes = table, kind, num_nodes
        self.graphs = table.shape[1] - 1
        self.variant = {"BUDGET": bool(kind & 1), "WIDE": needs_int64(num_pairs, num_nodes)}
        self.programs = num_programs(0, 1, 32, 1, pairs=0, nodes=num_nodes, graphs=self.graphs)
        self.counts = torch.empty(num_nodes, dtype=torch.int32, device=device)
        self.sums = torch.empty(self.programs, dtype=torch.int32, device=device)
        self.bases = torch.empty(self.programs, dtype=torch.int64, device=device)
        self.needed = torch.empty(1, dtype=torch.int64, device=device)
        self.rowptr = torch.empty(num_nodes + 1, dtype=torch.int32, device=device)

    @staticmethod
    def empty(like: torch.Tensor, capacity: int) -> tuple[torch.Tensor, ...]:
        """The sample of a batch without graphs."""
        length, device = max(capacity, 0), like.device
        return (
            torch.zeros(length, dtype=like.dtype, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(length, dtype=torch.int32, device=device),
            torch.full((length,), -1, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def count(self, bits: Bits) -> None:
        compact.count_kernel[(self.programs,)](
            self.table, bits.sample, self.counts, self.sums, self.graphs, self.kind >> 1 & 1, bits.words.shape[1],
            bits.window_first, bits.words.shape[1], PADDED=bits.padded, num_warps=4, **self.variant,
        )  # fmt: skip

    def place(self, dtype: torch.dtype, capacity: int) -> None:
        """Find every row's place and make the buffers; without a capacity the host waits for the count."""
        compact.scan_kernel[(1,)](
            self.sums, self.bases, self.needed, self.programs, BLOCK=SCAN_BLOCK, num_warps=4
        )  # fmt: skip
        if capacity < 0:
            capacity = int(self.needed.item())
            check(
                capacity <= LARGEST_INT32, "logits", "a sample of at most 2^31-1 edges, the range of rowptr", capacity
            )
            self.pad_programs = 0
        else:
            self.pad_programs = cdiv(capacity, compact.PAD.value)
        self.capacity, device = capacity, self.needed.device
        self.value = torch.empty(capacity, dtype=dtype, device=device)
        self.col = torch.empty(capacity, dtype=torch.int32, device=device)
        self.pair = torch.empty(capacity, dtype=torch.int64, device=device)

    def fill(
        self,
        bits: Bits,
        logits: torch.Tensor,
        rng: torch.Tensor,
        temperature: torch.Tensor,
        estimator: int,
        noise: int,
        gamma: float,
        zeta: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`logits` are not read with padded bits, which carry the values in their planes."""
        compact.fill_kernel[(self.programs + self.pad_programs,)](
            self.table, bits.sample, bits.words, logits, rng, temperature, self.counts, self.bases, self.needed,
            self.rowptr, self.col, self.pair, self.value, self.graphs, self.num_nodes, self.kind >> 1 & 1,
            bits.words.shape[1], bits.window_first, bits.words.shape[1], self.capacity, self.programs, estimator,
            noise, gamma, zeta, PADDED=bits.padded, num_warps=4, **self.variant,
        )  # fmt: skip
        return self.value, self.rowptr, self.col, self.pair, self.needed


def sample_edges_backward(
    grad_value: torch.Tensor,
    rowptr: torch.Tensor,
    col: torch.Tensor,
    pair: torch.Tensor,
    logits: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    temperature: torch.Tensor,
    kind: int,
    estimator: int,
    noise: int,
    gamma: float,
    zeta: float,
    absent_rate: float,
) -> torch.Tensor:
    if logits.dtype == torch.float64:
        return reference.sample_edges_backward(
            grad_value, rowptr, col, pair, logits, table, rng, temperature, kind, estimator, noise, gamma, zeta,
            absent_rate,
        )  # fmt: skip
    structure = {"rowptr": rowptr, "col": col, "pair": pair}
    check_contiguous("sample_edges_backward", grad_value=grad_value, **structure, logits=logits, table=table, rng=rng)
    grad_logits = torch.zeros_like(logits)
    entries, nodes, graphs = col.shape[0], rowptr.shape[0] - 1, table.shape[1] - 1
    if entries == 0 or graphs == 0 or estimator in (Estimator.ARM, Estimator.ARM_MIRRORED):
        return grad_logits
    with on_device(logits):
        backward.entry_gradient_kernel[(cdiv(entries, ENTRY_BLOCK),)](
            grad_value, rowptr, col, pair, logits, table, rng, temperature, grad_logits, graphs, nodes, entries,
            kind >> 1 & 1, nodes.bit_length(), graphs.bit_length(), estimator, noise, gamma, zeta, absent_rate,
            BLOCK=ENTRY_BLOCK, num_warps=4,
        )  # fmt: skip
    return grad_logits


# Zeros stored once: nothing to compute.
candidate_port = reference.candidate_port
node_port = reference.node_port


def candidate_port_backward(
    grad_port: torch.Tensor,
    logits: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    temperature: torch.Tensor,
    kind: int,
    noise: int,
) -> torch.Tensor:
    if logits.dtype == torch.float64:
        return reference.candidate_port_backward(grad_port, logits, table, rng, temperature, kind, noise)
    check_contiguous("candidate_port_backward", grad_port=grad_port, logits=logits, table=table, rng=rng)
    grad_logits = torch.empty_like(logits)
    graphs, pairs = table.shape[1] - 1, logits.shape[0]
    if pairs:
        with on_device(logits):
            draw.absent_gradient_kernel[pair_grid(pairs, graphs)](
                grad_port, logits, table, rng, temperature, grad_logits, graphs, noise, BLOCK=PAIR_BLOCK, num_warps=4
            )
    return grad_logits


def candidate_gradient(
    left: torch.Tensor, right: torch.Tensor, node_term: torch.Tensor, table: torch.Tensor, kind: int, num_pairs: int
) -> torch.Tensor:
    if left.dtype == torch.float64:
        return reference.candidate_gradient(left, right, node_term, table, kind, num_pairs)
    grad = left.new_empty(num_pairs)
    _candidates(left, right, node_term, None, table, None, None, grad, kind, 0)
    return grad


def candidate_backward(
    left: torch.Tensor,
    right: torch.Tensor,
    node_term: torch.Tensor,
    logits: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    temperature: torch.Tensor,
    kind: int,
    noise: int,
) -> torch.Tensor:
    if torch.float64 in (left.dtype, logits.dtype):
        return reference.candidate_backward(left, right, node_term, logits, table, rng, temperature, kind, noise)
    grad_logits = torch.empty_like(logits)
    _candidates(left, right, node_term, logits, table, rng, temperature, grad_logits, kind, noise)
    return grad_logits


def _candidates(
    left: torch.Tensor,
    right: torch.Tensor,
    node_term: torch.Tensor,
    logits: torch.Tensor | None,
    table: torch.Tensor,
    rng: torch.Tensor | None,
    temperature: torch.Tensor | None,
    out: torch.Tensor,
    kind: int,
    noise: int,
) -> None:
    factors = {"left": left, "right": right, "node_term": node_term}
    check_contiguous("candidate gradients", **factors, logits=logits, table=table, rng=rng)
    (nodes, width), pairs, graphs = left.shape, out.shape[0], table.shape[1] - 1
    if not pairs:
        return
    with on_device(left):
        candidates.candidate_kernel[candidates.tile_grid(pairs, nodes, graphs, kind)](
            left, right, node_term, logits, table, rng, temperature, out, graphs, width,
            kind >> 1 & 1, noise, BUDGET=bool(kind & 1), SLOPE=logits is not None, TILE=candidates.TILE,
            CHANNELS=candidates.CHANNELS, num_warps=4, num_stages=2,
        )  # fmt: skip


def pair_uniforms(table: torch.Tensor, rng: torch.Tensor, kind: int, stream: int, num_pairs: int) -> torch.Tensor:
    check_contiguous("pair_uniforms", table=table, rng=rng)
    out = torch.empty(num_pairs, dtype=torch.float32, device=table.device)
    if num_pairs:
        with on_device(table):
            graphs = table.shape[1] - 1
            draw.pair_uniforms_kernel[pair_grid(num_pairs, graphs)](
                table, rng, out, graphs, stream, BLOCK=PAIR_BLOCK, num_warps=4
            )
    return out
