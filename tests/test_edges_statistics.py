"""Laws of the draw: chi-square on edge frequencies, Kolmogorov-Smirnov on values, independence, unbiasedness.

Seeds are fixed, so an outcome never changes by itself. Each p-value must exceed 10^-4, and each rests on
enough draws that a bias of one per cent in a probability fails it.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import kernels, normal  # noqa: F401

import acgkd_fast as af

pytestmark = pytest.mark.usefixtures("kernels")

P_VALUE = 1e-4
NOISES = ("logistic", "gumbel")


def chi_square_p(statistic: float, degrees: int) -> float:
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def kolmogorov_p(sample: torch.Tensor, cdf: torch.Tensor) -> float:
    """Asymptotic p-value of the largest gap between the sample's distribution and `cdf`, its law at the sample."""
    n = sample.numel()
    law = cdf[torch.argsort(sample)]
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    gap = float(torch.maximum(steps[1:] - law, law - steps[:-1]).max()) * math.sqrt(n)
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * gap) ** 2) for k in range(1, 101))


def edge_probability(logits: torch.Tensor, noise: str) -> torch.Tensor:
    return torch.sigmoid(logits) if noise == "logistic" else -torch.expm1(-logits.exp())


def drawn(layout: af.PairLayout, logits: torch.Tensor, **options) -> torch.Tensor:
    """Which candidates a hard sample holds, bool [P]."""
    sample = af.sample_edges(logits, layout, estimator="straight_through", **options)
    found = torch.zeros(layout.num_pairs, dtype=torch.bool)
    found[sample.pair] = True
    return found


def uniform(layout: af.PairLayout, seed: int = 3, step: int = 0, stream: int = 0) -> torch.Tensor:
    rng = torch.tensor([seed, step])
    u = torch.ops.acgkd_fast.pair_uniforms(layout.table, rng, layout.kind, stream, layout.num_pairs)
    return u.double()


def independence_p(first: torch.Tensor, second: torch.Tensor, cells: int = 8) -> float:
    """Chi-square of the joint distribution of two uniforms on a grid of cells."""
    place = (first * cells).long() * cells + (second * cells).long()
    counts = torch.bincount(place, minlength=cells**2).double()
    expected = first.numel() / cells**2
    return chi_square_p(float(((counts - expected) ** 2 / expected).sum()), cells**2 - 1)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("directed", [False, True])
def test_edge_frequencies(noise, directed):
    """Per logit value over many draws: (observed - expected)^2 / variance summed over 12 values."""
    layout = af.PairLayout.complete([48], directed=directed)
    # Beyond, an edge of Gumbel noise is certain in float64.
    values = torch.linspace(-5.0, 4.0 if noise == "logistic" else 1.5, 12, dtype=torch.float64)
    group = torch.arange(layout.num_pairs) % len(values)
    logits = values[group]
    counts, draws = torch.zeros(len(values), dtype=torch.float64), 200
    for step in range(draws):
        counts += torch.bincount(group[drawn(layout, logits, seed=11, step=step, noise=noise)], minlength=len(values))
    trials = draws * torch.bincount(group).double()
    probability = edge_probability(values, noise)
    statistic = float(((counts - trials * probability) ** 2 / (trials * probability * (1 - probability))).sum())
    assert chi_square_p(statistic, len(values)) > P_VALUE


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_relaxed_values(noise, temperature):
    """s <= x is theta + L <= temperature * logit(x), whose law is the noise's."""
    layout = af.PairLayout.complete([300])
    theta = 0.4
    logits = torch.full((layout.num_pairs,), theta, dtype=torch.float64)
    sample = af.sample_edges(logits, layout, seed=5, temperature=temperature, estimator="relaxed", noise=noise)
    one_per_pair = torch.zeros(layout.num_pairs, dtype=torch.float64)
    one_per_pair[sample.pair] = sample.value
    noise_value = temperature * torch.logit(one_per_pair) - theta
    law = torch.sigmoid(noise_value) if noise == "logistic" else torch.exp(-torch.exp(-noise_value))
    assert kolmogorov_p(one_per_pair, law) > P_VALUE


def test_hard_concrete_mass_at_both_ends():
    """P(value = 0) and P(value = 1) of Louizos et al., eq. 12: the stretched ends."""
    layout = af.PairLayout.complete([400])
    theta, temperature, gamma, zeta = 0.3, 2 / 3, -0.1, 1.1
    logits = torch.full((layout.num_pairs,), theta, dtype=torch.float64)
    sample = af.sample_edges(
        logits, layout, seed=8, temperature=temperature, estimator="hard_concrete", gamma=gamma, zeta=zeta
    )
    zero = 1 / (1 + math.exp(theta - temperature * math.log(-gamma / zeta)))
    one = 1 - 1 / (1 + math.exp(theta - temperature * math.log((1 - gamma) / (zeta - 1))))
    ones = float((sample.value == 1).sum()) / 2
    zeros = layout.num_pairs - sample.num_edges / 2
    expected = layout.num_pairs * torch.tensor([zero, one, 1 - zero - one], dtype=torch.float64)
    counts = torch.tensor([zeros, ones, layout.num_pairs - zeros - ones], dtype=torch.float64)
    assert chi_square_p(float(((counts - expected) ** 2 / expected).sum()), 2) > P_VALUE


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5])
def test_neighbours_in_the_stream_are_independent(lag):
    """Lags below 4 share a Philox call."""
    u = uniform(af.PairLayout.complete([700]))
    assert independence_p(u[:-lag], u[lag:]) > P_VALUE


def test_neighbours_in_the_adjacency_are_independent():
    """Pairs (i, j) and (i, j + 1), both directions of a directed pair, and three sides of a triangle."""
    layout = af.PairLayout.complete([500])
    u = uniform(layout)
    node = torch.arange(499)
    high = node[1:, None].expand(-1, 499)
    low = node[None, :].expand(498, -1)
    inside = low < high
    high, low = high[inside], low[inside]
    here, above = layout.pair_index(high, low), layout.pair_index(high + 1, low)
    assert independence_p(u[here], u[above]) > P_VALUE
    both = uniform(af.PairLayout.complete([400], directed=True))
    assert independence_p(both[::2], both[1::2]) > P_VALUE
    third = layout.pair_index(high + 1, high)
    parity = ((u[here] > 0.5) ^ (u[above] > 0.5) ^ (u[third] > 0.5)).double()
    assert abs(float(parity.mean()) - 0.5) < 4 * 0.5 / math.sqrt(parity.numel())


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"seed": 3 + 2**32}, {"step": 1}, {"step": 2**31}, {"stream": 1}], ids=lambda o: str(o)
)
def test_other_addresses_are_independent(other):
    layout = af.PairLayout.complete([600])
    assert independence_p(uniform(layout), uniform(layout, **other)) > P_VALUE


def test_other_graphs_are_independent():
    layouts = [af.PairLayout.complete([600], graph_ids=[g]) for g in (0, 1, 2**31)]
    u = [uniform(layout) for layout in layouts]
    assert independence_p(u[0], u[1]) > P_VALUE and independence_p(u[0], u[2]) > P_VALUE


@pytest.mark.parametrize("noise", NOISES)
def test_absent_pairs_join_at_the_stated_rate(noise):
    """The sum over absent pairs of (joined - chance), in units of its own standard deviation."""
    layout = af.PairLayout.complete([600])
    logits = normal(layout.num_pairs, 4) - 1.0
    temperature, rate = 0.8, 0.5
    shared = {"seed": 21, "temperature": temperature, "noise": noise}
    sample = af.sample_edges(logits, layout, estimator="sparse_straight_through", absent_rate=rate, **shared)
    joined = torch.zeros(layout.num_pairs, dtype=torch.double)
    joined[sample.pair] = 1.0
    absent = ~drawn(layout, logits, **shared)
    u = uniform(layout, seed=21)
    noise_value = torch.logit(u) if noise == "logistic" else -torch.log(-torch.log(u))
    soft = torch.sigmoid((logits + noise_value) / temperature)
    chance = (4 * rate * soft * (1 - soft)).clamp(max=1.0)
    assert joined[~absent].eq(1).all() and 0.1 < float(joined[absent].mean()) < 0.9
    residual = (joined - chance)[absent].sum() / (chance * (1 - chance))[absent].sum().sqrt()
    assert abs(float(residual)) < 4


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_sparse_gradient_is_unbiased_for_the_all_candidate_one(noise, rate):
    """Over copies of one graph the difference of the two has mean zero for every pair.

    The squared standard scores of the pairs add up to a chi-square.
    """
    copies, n = 4000, 7
    layout = af.PairLayout.complete([n] * copies)
    pairs = layout.num_pairs // copies
    base, x = normal(pairs, 1).repeat(copies), normal((n, 3), 2).repeat(copies, 1)
    gradients = []
    for estimator in ("straight_through", "sparse_straight_through"):
        logits = base.clone().requires_grad_()
        edges = af.sample_edges(
            logits, layout, seed=9, temperature=0.7, estimator=estimator, noise=noise, absent_rate=rate
        )
        # Linear in the edge values, so that both estimators face the same gradient of each candidate.
        (af.gin_propagate(x, edges) * x.flip(1)).sum().backward()
        gradients.append(logits.grad.view(copies, pairs))
    difference = gradients[1] - gradients[0]
    assert difference.any(0).all()
    scores = difference.mean(0) / (difference.std(0) / math.sqrt(copies))
    assert chi_square_p(float(scores.square().sum()), pairs) > P_VALUE
