"""Binary Concrete edges in plain torch: the oracle that every kernel is tested against.

Written for clarity: it stores the noise of every pair and sorts the edges. It imports no
optimised code. Signatures are those of the operators in ``ops.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import check
from ..layout import PairLayout
from ..philox import Stream
from .estimators import Estimator, Noise


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is float64 for float64 logits and float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def perturbed_logits(
    logits: torch.Tensor, layout: PairLayout, rng: torch.Tensor, noise: int, *, mirrored: bool = False
) -> torch.Tensor:
    """theta + L for every pair, L = log u - log(1 - u) (logistic) or -log(-log u) (Gumbel)."""
    u = layout.uniforms(seed=rng[0], step=rng[1], stream=Stream.EDGE, dtype=compute_dtype(logits.dtype))
    if mirrored:
        u = 1.0 - u
    noise_value = u.log() - (-u).log1p() if noise == Noise.LOGISTIC else -(-u.log()).log()
    return logits.to(u.dtype) + noise_value


def absent_probability(soft: torch.Tensor, absent_rate: float) -> torch.Tensor:
    """Chance that an absent pair joins the sample: proportional to its slope, 4 s (1 - s) <= 1."""
    return (absent_rate * 4.0 * soft * (1.0 - soft)).clamp(max=1.0)


def _absent_sampled(soft: torch.Tensor, layout: PairLayout, rng: torch.Tensor, absent_rate: float) -> torch.Tensor:
    v = layout.uniforms(seed=rng[0], step=rng[1], stream=Stream.ABSENT, dtype=soft.dtype)
    return v < absent_probability(soft, absent_rate)


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
    """Draw every pair, drop what has value zero, sort into CSR."""
    layout = PairLayout.from_table(table, kind)
    perturbed = perturbed_logits(logits, layout, rng, noise, mirrored=estimator == Estimator.ARM_MIRRORED)
    soft = torch.sigmoid(perturbed / temperature.to(perturbed.dtype))
    if estimator == Estimator.RELAXED:
        value, keep = soft, torch.ones_like(soft, dtype=torch.bool)
    elif estimator == Estimator.HARD_CONCRETE:
        value = (soft * (zeta - gamma) + gamma).clamp(0.0, 1.0)
        keep = value > 0
    else:
        keep = perturbed > 0
        value = keep.to(soft.dtype)
        if estimator == Estimator.SPARSE_STRAIGHT_THROUGH:
            keep = keep | _absent_sampled(soft, layout, rng, absent_rate)

    pair = keep.nonzero().squeeze(-1)
    return compact(pair, value[pair].to(logits.dtype), layout, capacity)


def compact(
    pair: torch.Tensor, value: torch.Tensor, layout: PairLayout, capacity: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort kept pairs and their values into CSR, undirected ones in both directions."""
    row, col = layout.pair_nodes(pair)
    if not layout.directed:
        row, col, pair, value = torch.cat([row, col]), torch.cat([col, row]), pair.repeat(2), value.repeat(2)
    order = torch.argsort(row * layout.num_nodes + col)
    row, col, pair, value = row[order], col[order], pair[order], value[order]
    counts = torch.bincount(row, minlength=layout.num_nodes)
    rowptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    check(pair.numel() < 2**31, "logits", "a sample of at most 2^31-1 edges, the range of rowptr", pair.numel())
    needed = torch.tensor([pair.numel()], dtype=torch.int64, device=pair.device)
    if capacity >= 0:
        rowptr, col, pair, value = _fit(rowptr, col, pair, value, capacity)
    return value, rowptr, col.int(), pair, needed


def _fit(
    rowptr: torch.Tensor, col: torch.Tensor, pair: torch.Tensor, values: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad to a fixed length; an overflowing sample becomes an empty one, which `needed` betrays."""
    count = pair.numel()
    if count > capacity:
        rowptr, col, pair, values, count = torch.zeros_like(rowptr), col[:0], pair[:0], values[:0], 0
    padding = (0, capacity - count)
    pad = torch.nn.functional.pad
    return rowptr, pad(col, padding), pad(pair, padding, value=-1), pad(values, padding)


def pair_slope(
    perturbed: torch.Tensor,
    temperature: torch.Tensor,
    layout: PairLayout,
    rng: torch.Tensor,
    estimator: int,
    gamma: float,
    zeta: float,
    absent_rate: float,
) -> torch.Tensor:
    """d value / d theta of each pair, as the estimator defines it, [P].

    ``s (1 - s) / temperature``; times ``zeta - gamma`` strictly inside (0, 1) for hard concrete;
    over the sampling chance on the absent pairs of sparse straight-through.
    """
    tau = temperature.to(perturbed.dtype)
    soft = torch.sigmoid(perturbed / tau)
    slope = soft * (1.0 - soft) / tau
    if estimator == Estimator.HARD_CONCRETE:
        stretched = soft * (zeta - gamma) + gamma
        slope = torch.where((stretched > 0) & (stretched < 1), slope * (zeta - gamma), 0.0)
    elif estimator == Estimator.SPARSE_STRAIGHT_THROUGH:
        chance = absent_probability(soft, absent_rate)
        slope = torch.where(perturbed > 0, slope, torch.where(chance > 0, slope / chance, 0.0))
    elif estimator in (Estimator.ARM, Estimator.ARM_MIRRORED):
        slope = torch.zeros_like(slope)
    return slope


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
    """Gradient of the logits from the gradient of the emitted values, [P]."""
    layout = PairLayout.from_table(table, kind)
    perturbed = perturbed_logits(logits, layout, rng, noise)
    slope = pair_slope(perturbed, temperature, layout, rng, estimator, gamma, zeta, absent_rate)
    emitted = pair >= 0
    summed = torch.zeros_like(perturbed).index_add_(0, pair[emitted], grad_value[emitted].to(perturbed.dtype))
    return (slope * summed).to(logits.dtype)


def sample_edges_backward_sparse(
    grad_value: torch.Tensor, rowptr: torch.Tensor, col: torch.Tensor, pair: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same gradient at the stored pairs alone: their numbers, in the order of the rows, and its values there."""
    kind, estimator = args[4], args[5]
    dense = sample_edges_backward(grad_value, rowptr, col, pair, *args)
    row = torch.searchsorted(rowptr[1:], torch.arange(len(col), dtype=torch.int32, device=col.device), right=True)
    directed = PairLayout.from_table(args[1], kind).directed
    speaks = (pair >= 0) & ((row >= col) | directed)
    index = pair[speaks & (estimator not in (Estimator.ARM, Estimator.ARM_MIRRORED))]
    return index, dense[index]


def candidate_port(
    logits: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    temperature: torch.Tensor,
    kind: int,
    noise: int,
) -> torch.Tensor:
    """A zero for every pair, stored once: consumers send it the gradients of absent pairs."""
    return logits.new_zeros(1).expand(logits.shape)


def candidate_port_backward(
    grad_port: torch.Tensor,
    logits: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    temperature: torch.Tensor,
    kind: int,
    noise: int,
) -> torch.Tensor:
    """Slope times gradient where the pair was not drawn; drawn pairs get theirs through `value`."""
    layout = PairLayout.from_table(table, kind)
    perturbed = perturbed_logits(logits, layout, rng, noise)
    slope = pair_slope(perturbed, temperature, layout, rng, Estimator.STRAIGHT_THROUGH, 0.0, 1.0, 0.0)
    return torch.where(perturbed > 0, 0.0, slope * grad_port.to(slope.dtype)).to(logits.dtype)


def candidate_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    node_term: torch.Tensor,
    table: torch.Tensor,
    kind: int,
    num_pairs: int,
) -> torch.Tensor:
    """Gradient of each candidate's edge value, [P].

    For message passing ``out = P A Q x``: ``left`` = the scaled output gradient, ``right`` = the
    scaled input, ``node_term`` = the gradient of the row's degree. Directed pair (r, c):
    ``<left_r, right_c> + node_term_r``; an undirected pair adds the same with r and c exchanged.
    """
    layout = PairLayout.from_table(table, kind)
    row, col = layout.pair_nodes()
    storage, wide = left.dtype, compute_dtype(left.dtype)
    left, right, node_term = left.to(wide), right.to(wide), node_term.to(wide)
    grad = (left[row] * right[col]).sum(-1) + node_term[row]
    if not layout.directed:
        grad = grad + (left[col] * right[row]).sum(-1) + node_term[col]
    return grad.to(storage)


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
    """Candidate gradient times slope where the pair was not drawn, [P]: the two functions above in one."""
    grad = candidate_gradient(left, right, node_term, table, kind, logits.shape[0])
    return candidate_port_backward(grad, logits, table, rng, temperature, kind, noise)


def node_port(
    logits: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    temperature: torch.Tensor,
    kind: int,
    noise: int,
    x: torch.Tensor,
) -> torch.Tensor:
    """A zero for every entry of `candidate_gradient`'s left, right and node_term, [1, N (2 F + 1)], stored once.

    A port for one layer with features x [N, F]: its consumer sends it these factors, one behind the other,
    in place of a gradient per candidate.
    """
    return x.new_zeros(1).expand(1, 2 * x.numel() + x.shape[0])


def pair_uniforms(table: torch.Tensor, rng: torch.Tensor, kind: int, stream: int, num_pairs: int) -> torch.Tensor:
    """The uniform of every candidate pair, float32 [P]."""
    return PairLayout.from_table(table, kind).uniforms(seed=rng[0], step=rng[1], stream=Stream(stream))
