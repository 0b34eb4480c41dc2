"""Edges of padded graphs [B, n, n]: the draws of `sample_edges`, as differentiable matrices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import InputError, check, check_choice, check_tensor
from ..layout import PairLayout
from ..philox import Stream
from . import ops
from .api import _temperature, stream_key
from .estimators import NOISES
from .reference import compute_dtype

DENSE_ESTIMATORS = ("relaxed", "hard_concrete", "straight_through")
DENSE_NOISES = (*NOISES, "none")
SYMMETRIES = ("average", "noise", "none")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

assert ops.SAMPLE_EDGES  # importing the module declares the operators


def sample_dense_edges(
    logits: torch.Tensor,
    *,
    seed: int | torch.Tensor | None = None,
    step: int | torch.Tensor = 0,
    temperature: float | torch.Tensor = 1.0,
    estimator: str = "straight_through",
    noise: str = "logistic",
    symmetric: str = "average",
    self_loops: bool = False,
    mask: torch.Tensor | None = None,
    graph_ids: Sequence[int] | None = None,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> torch.Tensor:
    """Binary Concrete adjacency matrices of B padded graphs.

    With theta the logit, L the noise and s = sigmoid((theta + L) / temperature), the value is s ("relaxed"),
    s stretched to (gamma, zeta) and clamped ("hard_concrete"), or 1 where theta + L > 0, with the slope of s
    ("straight_through").

    Args:
        logits: theta [B, n, n]; float32, float64 or bfloat16 (arithmetic in float32).
        seed, step, temperature: as in :func:`sample_edges`; `seed` may be missing where `noise` is "none".
        estimator: see above.
        noise: "logistic", "gumbel" or "none", which cuts at theta = 0.
        symmetric: "average" for undirected graphs (logits are averaged with their transpose, both directions
            share their noise); "noise" where only the noise is shared; "none" for directed graphs.
        self_loops: draw the diagonal too, else it is zero.
        mask: bool [B, n], which nodes are there; edges of the others are zero. Default: all.
        graph_ids: identity of each graph in the random stream; default 0..B-1.
        gamma, zeta: stretch of "hard_concrete".

    Returns:
        [B, n, n], dtype of the logits. Without self-loops the edges are those that :func:`sample_edges` draws from the
        same logits for ``PairLayout.complete(sizes, directed=symmetric == "none")``, whatever the padding (up to
        rounding at the threshold). With self-loops the stream is numbered as for graphs of n + 1 nodes.

    Gradients:
        Every logit that counts, by the slope of s, as often as wanted; a clamped entry of "hard_concrete" gets none.

    Raises:
        InputError: an argument outside its range, naming it.

    Source: Maddison et al., arXiv 1611.00712.
    """
    check_tensor("logits", logits, shape=(None, None, None), dtypes=_DTYPES)
    graphs, nodes, width = logits.shape
    check(nodes == width, "logits", "square matrices [B, n, n]", logits)
    check_choice("estimator", estimator, DENSE_ESTIMATORS)
    check_choice("noise", noise, DENSE_NOISES)
    check_choice("symmetric", symmetric, SYMMETRIES)
    check(gamma < 0.0 and zeta > 1.0, "gamma, zeta", "gamma < 0 and zeta > 1", (gamma, zeta))
    if mask is not None:
        check_tensor("mask", mask, shape=(graphs, nodes), dtypes=(torch.bool,), device=logits.device)
    theta = logits.to(compute_dtype(logits.dtype))
    # In place from the first result on: a matrix is read and written often enough as it is.
    if symmetric == "average":
        theta = torch.add(theta, theta.mT).mul_(0.5)
    if noise != "none":
        if seed is None:
            raise InputError(f"seed: expected an integer with noise {noise!r}, got None")
        rng = stream_key(seed, step, logits.device)
        ids = None if graph_ids is None else tuple(graph_ids)
        drawn = _noise_matrix(graphs, nodes, rng, noise, symmetric == "none", self_loops, ids, theta.dtype)
        theta = theta.add_(drawn) if symmetric == "average" else theta + drawn
    elif not self_loops:
        theta = theta.masked_fill(torch.eye(nodes, dtype=torch.bool, device=theta.device), -torch.inf)
    value = (theta / _temperature(temperature, logits.device).to(theta.dtype)).sigmoid_()
    if estimator == "straight_through":
        value = harden(value, theta > 0.0)
    elif estimator == "hard_concrete":
        value = (value * (zeta - gamma) + gamma).clamp(0.0, 1.0)
    if mask is not None:
        value = value.masked_fill(~(mask[:, :, None] & mask[:, None, :]), 0.0)
    return value.to(logits.dtype)


class _Harden(torch.autograd.Function):
    """0 or 1 forward, the gradient handed through; hard + soft - soft.detach() would round away from 1."""

    @staticmethod
    def forward(ctx: Any, soft: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        return drawn.to(soft.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def harden(soft: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """1.0 where `drawn`, else 0.0; the gradient goes to `soft` unchanged (straight through)."""
    hard: torch.Tensor = _Harden.apply(soft, drawn)  # type: ignore[no-untyped-call]
    return hard


def _noise_matrix(
    graphs: int,
    nodes: int,
    rng: torch.Tensor,
    noise: str,
    directed: bool,
    self_loops: bool,
    graph_ids: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """L of every entry, [B, n, n]; -inf on the diagonal of graphs without self-loops, which draws nothing there."""
    u = _pair_uniforms(graphs, nodes, rng, directed, self_loops, graph_ids).to(dtype)
    # 1 - u is exact, so that the logit is as accurate as log u - log1p(-u), at a tenth of its time on a CPU.
    drawn = -(-u.log()).log() if noise == "gumbel" else torch.logit(u)
    return _spread(drawn, graphs, nodes, directed, self_loops, -torch.inf)


def dense_uniforms(
    graphs: int,
    nodes: int,
    rng: torch.Tensor,
    *,
    directed: bool,
    self_loops: bool = False,
    graph_ids: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The uniform of every entry, float32 [B, n, n], from the stream of `sample_edges`.

    Entry (row, col) and, undirected, its mirror image hold the uniform of that candidate pair. The diagonal holds
    1/2 where there are no self-loops.
    """
    u = _pair_uniforms(graphs, nodes, rng, directed, self_loops, graph_ids)
    return _spread(u, graphs, nodes, directed, self_loops, 0.5)


def _pair_uniforms(
    graphs: int,
    nodes: int,
    rng: torch.Tensor,
    directed: bool,
    self_loops: bool,
    graph_ids: tuple[int, ...] | None,
) -> torch.Tensor:
    if graphs == 0 or nodes + self_loops < 2:
        return torch.empty(0, device=rng.device)
    layout = _layout(graphs, nodes + self_loops, directed, graph_ids, rng.device)
    drawn: torch.Tensor = torch.ops.acgkd_fast.pair_uniforms(
        layout.table, rng, layout.kind, int(Stream.EDGE), layout.num_pairs
    )
    return drawn


def _spread(
    pairs: torch.Tensor, graphs: int, nodes: int, directed: bool, self_loops: bool, diagonal: float
) -> torch.Tensor:
    """Numbers of all pairs as matrices [B, n, n]; `diagonal` where no self-loops are drawn."""
    shape = (graphs, nodes, nodes)
    if pairs.numel() == 0:
        return pairs.new_full(shape, diagonal)
    position = _positions(nodes, directed, self_loops, pairs.device)
    matrix = pairs.view(graphs, -1).index_select(1, position).view(shape)
    if not self_loops:
        matrix.diagonal(dim1=1, dim2=2).fill_(diagonal)
    return matrix


@functools.lru_cache(maxsize=8)
def _layout(
    graphs: int, nodes: int, directed: bool, graph_ids: tuple[int, ...] | None, device: torch.device
) -> PairLayout:
    return PairLayout.complete([nodes] * graphs, directed=directed, graph_ids=graph_ids, device=device)


@functools.lru_cache(maxsize=8)
def _positions(nodes: int, directed: bool, self_loops: bool, device: torch.device) -> torch.Tensor:
    """int64 [n * n]: the pair number of each entry of a matrix; 0 on a diagonal that is not drawn.

    With self-loops entry (i, j >= i) is the pair {i, j + 1} of a graph with one node more.
    """
    node = torch.arange(nodes, device=device)
    row, col = node[:, None].expand(nodes, nodes), node.expand(nodes, nodes)
    low, high = torch.minimum(row, col), torch.maximum(row, col) + int(self_loops)
    pair = high * (high - 1) // 2 + low
    if directed:
        pair = 2 * pair + (row > col).long()
    if not self_loops:
        pair = pair.masked_fill(row == col, 0)
    return pair.flatten()
