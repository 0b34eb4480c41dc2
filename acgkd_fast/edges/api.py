"""Public edge sampling: checks, then one operator call."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import torch

from ..errors import InputError, check, check_choice, check_tensor, is_integer, is_number
from ..graphs import EdgeSample
from ..layout import PairLayout
from ..philox import check_word
from . import ops
from .estimators import ESTIMATORS, FACTOR_ESTIMATORS, NOISES, Estimator, Noise
from .factorised import FactorLogits

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_LARGEST_INT32 = 2**31 - 1
# Below float32's normal range theta / temperature turns into 0 / 0, above it into inf / inf.
_TEMPERATURES = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)

assert ops.SAMPLE_EDGES  # importing the module declares the operators


def stream_key(seed: int | torch.Tensor, step: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """(seed, step) as int64 [2] on the device; tensors are taken without a host read."""
    words = [_word("seed", seed, -(2**63), 2**64), _word("step", step, 0, 2**32)]
    if device.type == "cpu" and isinstance(words[0], int) and isinstance(words[1], int):
        return torch.tensor(words, dtype=torch.int64)

    def on_device(word: int | torch.Tensor) -> torch.Tensor:
        if isinstance(word, torch.Tensor):
            return word.to(device=device, dtype=torch.int64).reshape(())
        # A copy from the host would wait for the device and could not be captured; a fill does neither.
        return torch.full((), word, dtype=torch.int64, device=device)

    return torch.stack([on_device(word) for word in words])


def _word(name: str, value: int | torch.Tensor, low: int, high: int) -> int | torch.Tensor:
    """A checked int as the signed 64-bit value with the same pattern; a tensor as it is."""
    if isinstance(value, torch.Tensor):
        whole = value.numel() == 1 and not value.is_floating_point() and value.dtype != torch.bool
        check(whole, name, "an integer or an int64 tensor with one element", value)
        return value
    check_word(name, value, low, high)
    return int(value) - 2**64 if value >= 2**63 else int(value)


def _temperature(temperature: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(temperature, torch.Tensor):
        check(temperature.numel() == 1, "temperature", "a number or a tensor with one element", temperature)
        return temperature.to(device=device, dtype=torch.float64).reshape(1)
    fits = is_number(temperature) and _TEMPERATURES[0] <= temperature <= _TEMPERATURES[1]
    check(fits, "temperature", "a finite number above 0 in the range of float32", temperature)
    return torch.full((1,), float(temperature), dtype=torch.float64, device=device)


def sample_edges(
    logits: torch.Tensor | FactorLogits,
    layout: PairLayout,
    *,
    seed: int | torch.Tensor,
    step: int | torch.Tensor = 0,
    temperature: float | torch.Tensor = 1.0,
    estimator: str = "straight_through",
    noise: str = "logistic",
    capacity: int | None = None,
    gamma: float = -0.1,
    zeta: float = 1.1,
    absent_rate: float = 0.1,
    sparse_grad: bool = False,
) -> EdgeSample:
    """Draw Binary Concrete edges for a batch of graphs and return them sparse.

    With theta the logit, L the noise of the pair and s = sigmoid((theta + L) / temperature):

    ======================== =============================== ========================================
    estimator                forward value                   gradient reaches
    ======================== =============================== ========================================
    relaxed                  s on every candidate            every candidate, exactly
    hard_concrete            s (zeta - gamma) + gamma,       edges strictly between 0 and 1
                             clamped to [0, 1], zeros gone
    straight_through         1 where theta + L > 0           drawn edges through `value`, absent
                                                             candidates through `port`, with slope
                                                             s (1 - s) / temperature
    sparse_straight_through  same                            drawn edges, and absent pairs sampled with
                                                             chance q = min(1, 4 absent_rate s (1 - s)),
                                                             stored with value 0 and slope divided by q:
                                                             unbiased for straight_through
    arm                      same; `antithetic` holds the    none here: see :func:`arm_gradient`
                             mirrored draw
    ======================== =============================== ========================================

    Args:
        logits: theta = log alpha of each candidate pair, [P = layout.num_pairs]; float32, float64
            or bfloat16 (arithmetic in float32). Under logistic noise P(edge) = sigmoid(theta);
            under Gumbel noise it is 1 - exp(-exp(theta)). Or :class:`FactorLogits` with a complete
            undirected layout: z_i . z_j + b, never stored, drawn as if it were; with estimator
            "sparse_straight_through", or "straight_through", whose gradient then reaches drawn
            edges only (an absent candidate would need a float per pair).
        layout: which pairs the logits belong to.
        seed: 64-bit key of the random stream; an int, or an int64 tensor with one element.
        step: counter word that separates draws, 0..2^32-1; an int or a tensor like `seed`.
        temperature: above 0; smaller is closer to hard. A tensor is taken unchecked, so that a
            captured CUDA graph can anneal it.
        estimator: see the table.
        noise: "logistic" (textbook Binary Concrete) or "gumbel" (one Gumbel, as secondary sources
            print ACGKD's formula).
        capacity: length of the edge buffers. The count then stays on the device, and a sample that
            does not fit comes back empty with ``overflowed()`` true. Default: exact length.
        gamma, zeta: stretch of hard_concrete, gamma < 0 and zeta > 1.
        absent_rate: scale of the sampling chance of sparse_straight_through, above 0. At the default
            about as many absent pairs as drawn edges are stored at the density of small molecules.
        sparse_grad: let the gradient through ``value`` arrive at `logits` as a sparse tensor with an entry per stored
            pair, which saves writing and reading P zeros; :class:`acgkd_fast.optim.Adam` takes it. Logits [P] only.

    Returns:
        EdgeSample in canonical CSR over all N nodes: ``rowptr`` int32 [N + 1], ``col`` int32 [E]
        ascending in each row, ``pair`` int64 [E], ``value`` [E] with the dtype of the logits.
        Undirected layouts store both directions. Equal input gives equal bits.

    Gradients:
        `logits` (of factorised ones z and the bias) only, as in the table.

    Raises:
        InputError: an argument outside its range, naming it.

    Sources: Maddison et al., arXiv 1611.00712 (Binary Concrete); Louizos et al., arXiv 1712.01312
    (hard concrete); Yin and Zhou, arXiv 1807.11143 (ARM); ACGKD, arXiv 2504.00540.
    """
    check(isinstance(layout, PairLayout), "layout", "a PairLayout", layout)
    if not isinstance(logits, FactorLogits):
        check_tensor("logits", logits, shape=(layout.num_pairs,), dtypes=_DTYPES, device=layout.device)
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("noise", noise, NOISES)
    stretched = is_number(gamma) and is_number(zeta) and -inf < gamma < 0.0 and 1.0 < zeta < inf
    check(stretched, "gamma, zeta", "finite gamma < 0 and zeta > 1", (gamma, zeta))
    check(is_number(absent_rate) and absent_rate > 0.0, "absent_rate", "a number above 0", absent_rate)
    fits = capacity is None or (is_integer(capacity) and 0 <= capacity <= _LARGEST_INT32)
    check(fits, "capacity", "None or a number of edges in 0..2^31-1", capacity)
    if estimator == "relaxed":
        entries = layout.num_pairs * (1 if layout.directed else 2)
        check(entries <= _LARGEST_INT32, "layout", "at most 2^31-1 edges for estimator 'relaxed'", entries)
    if estimator == "arm" and noise != "logistic":
        raise InputError("noise: expected 'logistic' with estimator 'arm', whose identity needs it, got 'gumbel'")

    check(
        not sparse_grad or isinstance(logits, torch.Tensor), "sparse_grad", "False with factorised logits", sparse_grad
    )

    code, noise_code = Estimator[estimator.upper()], Noise[noise.upper()]
    rng, tau = stream_key(seed, step, layout.device), _temperature(temperature, layout.device)
    if isinstance(logits, FactorLogits):
        return _draw_factors(logits, rng, tau, estimator, noise_code, absent_rate, layout, capacity)
    logits = logits.contiguous()
    shared = (logits, layout.table, rng, tau, layout.kind)
    draw = _draw_sparse_grad if sparse_grad and logits.requires_grad else _draw
    sample = draw(shared, code, noise_code, (gamma, zeta, absent_rate), layout, capacity)
    if code == Estimator.STRAIGHT_THROUGH and logits.requires_grad:
        port = torch.ops.acgkd_fast.candidate_port(*shared, noise_code)
        sample = replace(sample, port=port, draw=(*shared, int(noise_code)))
    if code == Estimator.ARM:
        mirrored = _draw(shared, Estimator.ARM_MIRRORED, noise_code, (gamma, zeta, absent_rate), layout, capacity)
        sample = replace(sample, antithetic=mirrored, rng=rng)
    return sample


def _draw(
    shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int],
    estimator: Estimator,
    noise: Noise,
    stretch: tuple[float, float, float],
    layout: PairLayout,
    capacity: int | None,
) -> EdgeSample:
    drawn = torch.ops.acgkd_fast.sample_edges(
        *shared, int(estimator), int(noise), *stretch, layout.num_nodes, -1 if capacity is None else capacity
    )
    return _as_sample(drawn, layout, capacity)


class _SparseGradient(torch.autograd.Function):
    """The drawn values as a function of the logits whose gradient is a sparse tensor."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, value: torch.Tensor, *context: Any) -> torch.Tensor:
        ctx.save_for_backward(logits, *context[:-1])
        ctx.settings = context[-1]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, rowptr, col, pair, *rest = ctx.saved_tensors
        kind = ctx.settings[0]
        index, grad = torch.ops.acgkd_fast.sample_edges_backward_sparse(
            grads[0].contiguous(), rowptr, col, pair, logits, *rest, *ctx.settings
        )
        # Rows of complete undirected graphs hold their pairs in the order of the pairs.
        sparse = torch.sparse_coo_tensor(
            index[None], grad, logits.shape, is_coalesced=kind == 0, check_invariants=False
        )
        return (sparse, *[None] * (len(ctx.saved_tensors) + 1))


def _draw_sparse_grad(
    shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int],
    estimator: Estimator,
    noise: Noise,
    stretch: tuple[float, float, float],
    layout: PairLayout,
    capacity: int | None,
) -> EdgeSample:
    with torch.no_grad():
        sample = _draw(shared, estimator, noise, stretch, layout, capacity)
    logits, table, rng, temperature, kind = shared
    settings = (kind, int(estimator), int(noise), *stretch)
    value = _SparseGradient.apply(  # type: ignore[no-untyped-call]
        logits, sample.value, sample.rowptr, sample.col, sample.pair, table, rng, temperature, settings
    )
    return replace(sample, value=value)


def _draw_factors(
    logits: FactorLogits,
    rng: torch.Tensor,
    temperature: torch.Tensor,
    estimator: str,
    noise: Noise,
    absent_rate: float,
    layout: PairLayout,
    capacity: int | None,
) -> EdgeSample:
    check_choice("estimator", estimator, FACTOR_ESTIMATORS)
    complete = layout.is_complete and not layout.directed
    check(complete, "layout", "a complete undirected PairLayout for factorised logits", layout)
    check_tensor("z", logits.z, shape=(layout.num_nodes, None), device=layout.device)
    drawn = torch.ops.acgkd_fast.sample_factor_edges(
        logits.z.contiguous(), logits.graph_bias(layout), layout.table, rng, temperature,
        int(Estimator[estimator.upper()]), int(noise), absent_rate, layout.num_pairs,
        -1 if capacity is None else capacity,
    )  # fmt: skip
    return _as_sample(drawn, layout, capacity)


def _as_sample(drawn: tuple[torch.Tensor, ...], layout: PairLayout, capacity: int | None) -> EdgeSample:
    value, rowptr, col, pair, needed = drawn
    return EdgeSample(
        rowptr=rowptr,
        col=col,
        value=value,
        ptr=layout.node_ptr,
        symmetric=not layout.directed,
        pair=pair,
        layout=layout,
        needed=None if capacity is None else needed,
    )


def arm_gradient(sample: EdgeSample, loss: torch.Tensor, loss_antithetic: torch.Tensor) -> torch.Tensor:
    """Gradient of the logits by augment-REINFORCE-merge, (l(A1) - l(A2)) * (u - 1/2).

    Args:
        sample: what ``sample_edges(..., estimator="arm")`` returned.
        loss: loss of each graph under the first draw, [B].
        loss_antithetic: loss of each graph under ``sample.antithetic``, [B].

    Returns:
        [P], unbiased for the gradient of the expected loss.

    Raises:
        InputError: `sample` is no ARM pair, or a loss is not [B].

    Source: Yin and Zhou, arXiv 1807.11143; used by GFKD, arXiv 2105.07519.
    """
    if sample.antithetic is None or sample.layout is None or sample.rng is None:
        raise InputError("sample: expected a draw of estimator 'arm', got one without its antithetic twin")
    layout = sample.layout
    for name, tensor in (("loss", loss), ("loss_antithetic", loss_antithetic)):
        check_tensor(name, tensor, shape=(layout.num_graphs,), device=layout.device)
    u: torch.Tensor = torch.ops.acgkd_fast.pair_uniforms(layout.table, sample.rng, layout.kind, 0, layout.num_pairs)
    counts = layout.pair_ptr[1:] - layout.pair_ptr[:-1]
    difference = (loss - loss_antithetic).detach()
    return difference.repeat_interleave(counts, output_size=layout.num_pairs) * (u - 0.5)
