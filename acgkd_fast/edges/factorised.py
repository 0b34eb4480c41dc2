"""Edges whose logits z_i . z_j + b are never stored: schemas, gradients and the plain-torch kernels.

Pairs are numbered and drawn as in ``PairLayout.complete``, so a sample equals the one that ``sample_edges``
draws from the materialised logits. The plain-torch kernels work on blocks of a fixed number of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .._library import define, differentiate
from ..errors import check, check_tensor
from ..layout import PairLayout
from ..philox import Stream, uniform_from_words, words_torch
from . import reference
from .estimators import Estimator, Noise

# Pairs that a plain-torch block holds at a time; a few int64 temporaries of this length exist.
BLOCK_PAIRS = 2**20


@dataclass(frozen=True, eq=False)
class FactorLogits:
    """Logits theta_ij = z_i . z_j + b of a complete undirected layout.

    Attributes:
        z: node factors [N, K]; float32, float64 or bfloat16 (products and sums in float32). May require grad.
        bias: [B], one per graph, or one element for all; dtype of `z`. May require grad.

    Raises:
        InputError: wrong shapes, dtypes or devices.
    """

    z: torch.Tensor
    bias: torch.Tensor

    def __post_init__(self) -> None:
        dtypes = (torch.float32, torch.float64, torch.bfloat16)
        check_tensor("z", self.z, shape=(None, None), dtypes=dtypes)
        check_tensor("bias", self.bias, dtypes=(self.z.dtype,), device=self.z.device)
        check(self.bias.dim() <= 1, "bias", "one number per graph, or one for all", self.bias)

    def graph_bias(self, layout: PairLayout) -> torch.Tensor:
        """The bias of every graph, [B]."""
        count = layout.num_graphs
        check(self.bias.numel() in (1, count), "bias", f"1 or {count} numbers, one per graph", self.bias)
        return self.bias.reshape(-1).expand(count).contiguous()

    def to_dense(self, layout: PairLayout) -> torch.Tensor:
        """The logits themselves, [P], for small graphs and tests."""
        row, col = layout.pair_nodes()
        bias = self.graph_bias(layout)[layout.graph_of_pair(torch.arange(layout.num_pairs, device=row.device))]
        return (self.z[row] * self.z[col]).sum(-1) + bias


def pair_block_uniforms(
    rng: torch.Tensor, graph_id: torch.Tensor, first: int, count: int, stream: Stream, dtype: torch.dtype
) -> torch.Tensor:
    """Uniforms of pairs first .. first + count - 1 of one graph."""
    quad = torch.arange(first // 4, (first + count + 3) // 4, device=rng.device)
    tag = quad.new_full((), int(stream))
    counter = torch.stack([quad, *(word.expand_as(quad) for word in (graph_id, rng[1] & 0xFFFFFFFF, tag))], dim=-1)
    words = words_torch(counter, rng[0]).flatten()
    return uniform_from_words(words[first % 4 : first % 4 + count], dtype)


def _noise(u: torch.Tensor, noise: int) -> torch.Tensor:
    return u.log() - (-u).log1p() if noise == Noise.LOGISTIC else -(-u.log()).log()


def _row_blocks(n: int) -> Iterator[tuple[int, int]]:
    """Ranges of larger nodes whose pairs with all smaller nodes make up a block."""
    low = 1
    while low < n:
        high = low + 1
        while high < n and (high + 1 - low) * high <= BLOCK_PAIRS:
            high += 1
        yield low, high
        low = high


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw block by block of larger nodes, keep the edges only, sort into CSR."""
    layout = PairLayout.from_table(table, 0)
    wide = reference.compute_dtype(z.dtype)
    tau = temperature.to(wide)
    pairs, values = [table.new_empty(0)], [z.new_empty(0)]
    for graph, n in enumerate(layout.sizes):
        node = int(layout.node_ptr[graph])
        factors = z[node : node + n].to(wide)
        for first, last in _row_blocks(n):
            theta = factors[first:last] @ factors[: last - 1].T + bias[graph].to(wide)
            high = torch.arange(first, last, device=z.device)
            low = torch.arange(last - 1, device=z.device)
            # Row by row below the diagonal: the order of the pair numbers.
            below = low < high[:, None]
            start, stop = first * (first - 1) // 2, last * (last - 1) // 2
            u = pair_block_uniforms(rng, table[2, graph], start, stop - start, Stream.EDGE, wide)
            perturbed = theta[below] + _noise(u, noise)
            drawn = keep = perturbed > 0
            if estimator == Estimator.SPARSE_STRAIGHT_THROUGH:
                chance = reference.absent_probability(torch.sigmoid(perturbed / tau), absent_rate)
                v = pair_block_uniforms(rng, table[2, graph], start, stop - start, Stream.ABSENT, wide)
                keep = drawn | (v < chance)
            local = keep.nonzero().squeeze(-1)
            pairs.append(local + start + layout.pair_ptr[graph])
            values.append(drawn[local].to(z.dtype))
    return reference.compact(torch.cat(pairs), torch.cat(values), layout, capacity)


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
    """Gradients of z [N, K] and of the bias [B]; time and memory proportional to the entries."""
    layout = PairLayout.from_table(table, 0)
    wide = reference.compute_dtype(z.dtype)
    counts = (rowptr[1:] - rowptr[:-1]).long()
    row = torch.arange(counts.numel(), device=z.device).repeat_interleave(counts)
    size = row.numel()
    col, pair = col[:size].long(), pair[:size]
    factors = z.to(wide)
    graph = layout.graph_of_pair(pair)
    theta = (factors[row] * factors[col]).sum(-1) + bias.to(wide)[graph]
    local = pair - layout.pair_ptr[graph]
    counter = torch.stack(
        [local // 4, table[2][graph], (rng[1] & 0xFFFFFFFF).expand_as(local), torch.full_like(local, int(Stream.EDGE))],
        dim=-1,
    )
    word = words_torch(counter, rng[0]).gather(-1, (local % 4).unsqueeze(-1)).squeeze(-1)
    perturbed = theta + _noise(uniform_from_words(word, wide), noise)
    slope = reference.pair_slope(perturbed, temperature, layout, rng, estimator, 0.0, 1.0, absent_rate)
    # An entry holds one direction's share; its product reaches both ends, so the sum over entries is the pair's.
    grad_theta = slope * grad_value[:size].to(wide)
    grad_z = torch.zeros_like(factors)
    grad_z.index_add_(0, row, grad_theta[:, None] * factors[col])
    grad_z.index_add_(0, col, grad_theta[:, None] * factors[row])
    grad_bias = torch.zeros_like(bias, dtype=wide).index_add_(0, graph, grad_theta)
    return grad_z.to(z.dtype), grad_bias.to(bias.dtype)


def _fake(z: torch.Tensor, bias: torch.Tensor, table: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    capacity = args[-1]
    edges = capacity if capacity >= 0 else torch.library.get_ctx().new_dynamic_size()
    return (
        z.new_empty(edges),
        table.new_empty(z.shape[0] + 1, dtype=torch.int32),
        table.new_empty(edges, dtype=torch.int32),
        table.new_empty(edges),
        table.new_empty(1),
    )


_FACTORS = "Tensor z, Tensor bias, Tensor table, Tensor rng, Tensor temperature, int estimator, int noise"
SAMPLE_FACTOR_EDGES = define(
    f"sample_factor_edges({_FACTORS}, float absent_rate, SymInt num_pairs, int capacity)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    sample_factor_edges,
    _fake,
)
SAMPLE_FACTOR_EDGES_BACKWARD = define(
    f"sample_factor_edges_backward(Tensor grad_value, Tensor rowptr, Tensor col, Tensor pair, {_FACTORS},"
    " float absent_rate) -> (Tensor, Tensor)",
    sample_factor_edges_backward,
    lambda grad_value, rowptr, col, pair, z, bias, *_: (torch.empty_like(z), torch.empty_like(bias)),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    z, bias, table, rng, temperature, *settings, _num_pairs, _capacity = inputs
    _value, rowptr, col, pair, needed = output
    ctx.mark_non_differentiable(rowptr, col, pair, needed)
    ctx.save_for_backward(rowptr, col, pair, z, bias, table, rng, temperature)
    ctx.settings = settings


def _backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_z, grad_bias = torch.ops.acgkd_fast.sample_factor_edges_backward(
        grads[0].contiguous(), *ctx.saved_tensors, *ctx.settings
    )
    return (grad_z, grad_bias, *[None] * (len(ctx.settings) + 5))


differentiate(SAMPLE_FACTOR_EDGES, _backward, _setup)
