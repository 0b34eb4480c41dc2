"""Sampled edges: values, structure and capacity against plain loops; statistics; bad input.

Gradients are in test_edge_gradients.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import LAYOUT_KINDS, entries, enumerate_pairs, kernels, layouts, make_layout, normal, uniform  # noqa: F401
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import acgkd_fast as af
from acgkd_fast.edges import ESTIMATORS

pytestmark = pytest.mark.usefixtures("kernels")

EDGE, ABSENT = 0, 1
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# ARM's identity holds for logistic noise only.
CASES = [(e, n) for e in ESTIMATORS for n in ("logistic", "gumbel") if (e, n) != ("arm", "gumbel")]
SIZES = [1, 5, 2, 6]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def brute(layout, logits, *, seed, step=0, temperature=1.0, estimator, noise="logistic", mirrored=False,
          gamma=-0.1, zeta=1.1, absent_rate=None):  # fmt: skip
    """{(row, col): (pair, value)} in Python floats, and how near any pair came to a decision's edge."""
    expected, margin = {}, math.inf
    for pair, (_, row, col) in enumerate(enumerate_pairs(layout)):
        u = uniform(layout, pair, seed, step, EDGE)
        u = 1 - u if mirrored else u
        noise_value = math.log(u / (1 - u)) if noise == "logistic" else -math.log(-math.log(u))
        perturbed = logits[pair] + noise_value
        soft = sigmoid(perturbed / temperature)
        margin = min(margin, abs(perturbed))
        if estimator == "relaxed":
            value, stored = soft, True
        elif estimator == "hard_concrete":
            stretched = soft * (zeta - gamma) + gamma
            margin = min(margin, abs(stretched))
            value = min(1.0, max(0.0, stretched))
            stored = value > 0
        else:
            value = float(perturbed > 0)
            stored = perturbed > 0
            if estimator == "sparse_straight_through" and not stored:
                chance = min(1.0, 4 * absent_rate * soft * (1 - soft))
                v = uniform(layout, pair, seed, step, ABSENT)
                margin = min(margin, abs(v - chance))
                stored = v < chance
        if stored:
            expected[row, col] = (pair, value)
            if not layout.directed:
                expected[col, row] = (pair, value)
    return expected, margin


def check_against_brute(sample, expected, *, tolerance):
    found = {(row, col): (int(sample.pair[e]), float(sample.value[e])) for row, col, e in entries(sample)}
    assert {place: pair for place, (pair, _) in found.items()} == {place: pair for place, (pair, _) in expected.items()}
    for place, (_, value) in found.items():
        assert value == pytest.approx(expected[place][1], rel=tolerance, abs=tolerance), place


def check_canonical(sample, layout):
    rowptr = sample.rowptr.tolist()
    assert sample.rowptr.dtype == sample.col.dtype == torch.int32 and sample.pair.dtype == torch.int64
    assert rowptr[0] == 0 and len(rowptr) == layout.num_nodes + 1
    assert torch.equal(sample.ptr, layout.node_ptr) and sample.layout is layout
    count = rowptr[-1]
    stored = entries(sample)
    assert [e for _, _, e in stored] == list(range(count)) and count == sample.num_edges
    # Ascending places mean ascending rows, and columns ascending without repeats inside each row.
    places = [(row, col) for row, col, _ in stored]
    assert places == sorted(set(places))
    row, col = layout.pair_nodes(sample.pair[:count])
    ends = list(zip(row.tolist(), col.tolist(), strict=True))
    if layout.directed:
        assert ends == places and not sample.symmetric
    else:
        assert ends == [tuple(sorted(place)) for place in places] and sample.symmetric
        content = {(r, c): (int(sample.pair[e]), float(sample.value[e])) for r, c, e in stored}
        assert content == {(c, r): kept for (r, c), kept in content.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize(("estimator", "noise"), CASES)
def test_against_plain_loops(estimator, noise, kind, dtype):
    layout = make_layout(kind, SIZES, graph_ids=[4, 0, 2**32 - 1, 9])
    logits = (2 * normal(layout.num_pairs, 3)).to(dtype)
    options = {"seed": -77, "step": 2**32 - 1, "temperature": 0.7, "noise": noise, "absent_rate": 0.25}
    sample = af.sample_edges(logits, layout, estimator=estimator, **options)
    assert sample.value.dtype == dtype and sample.needed is None
    check_canonical(sample, layout)
    expected, margin = brute(layout, logits.double().tolist(), estimator=estimator, **options)
    assert margin > 1e-5, "choose another seed: rounding could decide a pair"
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    check_against_brute(sample, expected, tolerance=tolerance)
    if estimator == "arm":
        mirrored, _ = brute(layout, logits.double().tolist(), estimator=estimator, mirrored=True, **options)
        check_canonical(sample.antithetic, layout)
        check_against_brute(sample.antithetic, mirrored, tolerance=tolerance)
    else:
        assert sample.antithetic is None


@settings(max_examples=80, deadline=None)
@given(
    layouts(max_graphs=3, max_size=7),
    st.integers(-(2**63), 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.floats(0.05, 5.0),
    st.sampled_from(CASES),
    st.floats(0.01, 3.0),
)
def test_ragged_shapes_against_plain_loops(layout, seed, step, temperature, case, absent_rate):
    estimator, noise = case
    logits = 2 * normal(layout.num_pairs, seed % 2**32)
    options = {"seed": seed, "step": step, "temperature": temperature, "noise": noise, "absent_rate": absent_rate}
    expected, margin = brute(layout, logits.tolist(), estimator=estimator, **options)
    assume(margin > 1e-9)
    sample = af.sample_edges(logits, layout, estimator=estimator, **options)
    check_canonical(sample, layout)
    check_against_brute(sample, expected, tolerance=1e-9)


def test_hard_concrete_stretch_is_used():
    layout = make_layout("complete", [7])
    logits = normal(21, 1)
    options = {"seed": 4, "estimator": "hard_concrete", "gamma": -0.5, "zeta": 2.0}
    expected, margin = brute(layout, logits.tolist(), **options)
    assert margin > 1e-9 and {0.0, 1.0} < {0.0, *(value for _, value in expected.values())}
    check_against_brute(af.sample_edges(logits, layout, **options), expected, tolerance=1e-12)


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("rowptr", "col", "pair", "value"))


@pytest.mark.parametrize(("estimator", "noise"), CASES)
def test_equal_input_gives_equal_bits_also_from_device_scalars(estimator, noise):
    layout = make_layout("complete", [9, 17])
    logits = normal(layout.num_pairs, 0, torch.float32)
    seed = 2**64 - 5
    first = af.sample_edges(logits, layout, seed=seed, step=6, temperature=0.5, estimator=estimator, noise=noise)
    again = af.sample_edges(logits, layout, seed=seed, step=6, temperature=0.5, estimator=estimator, noise=noise)
    scalars = {"seed": torch.tensor([seed - 2**64]), "step": torch.tensor(6), "temperature": torch.tensor(0.5)}
    on_device = af.sample_edges(logits, layout, estimator=estimator, noise=noise, **scalars)
    mixed = af.sample_edges(logits, layout, estimator=estimator, noise=noise, **{**scalars, "seed": seed})
    assert same(first, again) and same(first, on_device) and same(first, mixed)


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_graph_is_drawn_alike_in_any_batch(kind, estimator):
    layout = make_layout(kind, [4, 9, 1, 6])
    logits = normal(layout.num_pairs, 5)
    parts = logits.split(layout.pairs_per_graph)
    order = [3, 1]
    alone = layout.select(order)
    whole = af.sample_edges(logits, layout, seed=8, estimator=estimator)
    picked = af.sample_edges(torch.cat([parts[g] for g in order]), alone, seed=8, estimator=estimator)
    expected = af.GraphBatch(torch.zeros(20, 1), whole).select(order).edges
    assert torch.equal(picked.rowptr, expected.rowptr) and torch.equal(picked.col, expected.col)
    # Vectorised libm and its scalar tail may differ in the last bit.
    torch.testing.assert_close(picked.value, expected.value, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("directed", [False, True])
def test_strided_logits(directed):
    layout = af.PairLayout.complete([6], directed=directed)
    wide = normal((layout.num_pairs, 2), 2)
    expected = af.sample_edges(wide[:, 1].clone(), layout, seed=1, estimator="relaxed")
    assert same(af.sample_edges(wide[:, 1], layout, seed=1, estimator="relaxed"), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("extra", [0, 1, 37])
def test_capacity_that_fits(estimator, extra):
    layout = make_layout("complete", SIZES)
    logits = normal(layout.num_pairs, 4)
    exact = af.sample_edges(logits, layout, seed=3, estimator=estimator)
    count = exact.num_edges
    padded = af.sample_edges(logits, layout, seed=3, estimator=estimator, capacity=count + extra)
    assert padded.col.shape == padded.pair.shape == padded.value.shape == (count + extra,)
    assert padded.needed.tolist() == [count] and padded.num_edges == count and not padded.overflowed()
    for name, rest in (("col", 0), ("pair", -1), ("value", 0.0)):
        buffer = getattr(padded, name)
        assert torch.equal(buffer[:count], getattr(exact, name))
        assert buffer[count:].tolist() == [rest] * extra
    assert torch.equal(padded.rowptr, exact.rowptr)
    if estimator == "arm":
        assert padded.antithetic.value.shape == (count + extra,)


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("short", [1, 10**9])
def test_overflow_gives_an_empty_sample_and_says_so(kind, short):
    layout = make_layout(kind, SIZES)
    logits = normal(layout.num_pairs, 4).requires_grad_()
    count = af.sample_edges(logits, layout, seed=3, estimator="relaxed").num_edges
    capacity = max(0, count - short)
    sample = af.sample_edges(logits, layout, seed=3, estimator="relaxed", capacity=capacity)
    assert sample.overflowed() and sample.needed.tolist() == [count] and sample.num_edges == 0
    assert sample.rowptr.tolist() == [0] * (layout.num_nodes + 1)
    assert sample.col.tolist() == [0] * capacity and sample.value.tolist() == [0.0] * capacity
    assert sample.pair.tolist() == [-1] * capacity
    sample.value.sum().backward()
    assert logits.grad.tolist() == [0.0] * layout.num_pairs


@pytest.mark.parametrize("capacity", [None, 0, 5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sizes", [[], [1], [1, 1, 1]])
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_no_pairs_at_all(kind, sizes, estimator, capacity):
    layout = make_layout(kind, sizes)
    logits = torch.zeros(0, requires_grad=True)
    sample = af.sample_edges(logits, layout, seed=0, estimator=estimator, capacity=capacity)
    assert sample.rowptr.tolist() == [0] * (len(sizes) + 1) and sample.num_edges == 0
    assert sample.value.shape == (capacity or 0,) and not sample.overflowed()
    sample.value.sum().backward()
    assert logits.grad.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.2e-38, 0.1, 1.0, 3.4e38])
@pytest.mark.parametrize(("estimator", "noise"), CASES)
def test_extreme_logits_give_no_nan(estimator, noise, temperature, dtype):
    layout = make_layout("complete", [5])
    extremes = [1e4, -1e4, math.inf, -math.inf, 0.0, 88.0, -88.0, 3e38, -3e38, 1e-45]
    logits = torch.tensor(extremes, dtype=dtype, requires_grad=True)
    sample = af.sample_edges(logits, layout, seed=1, estimator=estimator, noise=noise, temperature=temperature)
    assert sample.value.isfinite().all() and sample.value.min() >= 0 and sample.value.max() <= 1
    if temperature <= 1:
        weight = {int(p): float(v) for p, v in zip(sample.pair, sample.value.detach(), strict=True)}
        assert [weight.get(p, 0.0) for p in range(4)] == [1, 0, 1, 0]
    total = sample.value.sum()
    if sample.port is not None:
        total = total + sample.port.sum()
    total.backward()
    assert logits.grad.isfinite().all()


def test_port_is_stored_once_and_only_where_gradients_want_it():
    layout = make_layout("complete", [50])
    logits = normal(layout.num_pairs, 0, torch.float32)
    assert af.sample_edges(logits, layout, seed=0).port is None
    logits.requires_grad_()
    port = af.sample_edges(logits, layout, seed=0).port
    assert port.shape == (layout.num_pairs,) and port.untyped_storage().nbytes() == 4 and not port.any()
    assert all(af.sample_edges(logits, layout, seed=0, estimator=e).port is None
               for e in ESTIMATORS if e != "straight_through")  # fmt: skip


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
@pytest.mark.parametrize("theta", [-4.0, -1.0, 0.0, 0.5, 1.5])
def test_edge_frequency(theta, noise):
    """Chi-square over 20 batches of 1000 one-pair graphs."""
    layout = af.PairLayout.complete([2] * 1000)
    logits = torch.full((1000,), theta)
    counts = torch.tensor([
        af.sample_edges(logits, layout, seed=11, step=step, noise=noise).num_edges // 2 for step in range(20)
    ]).double()  # fmt: skip
    chance = sigmoid(theta) if noise == "logistic" else 1 - math.exp(-math.exp(theta))
    chi_square = ((counts - 1000 * chance) ** 2 / (1000 * chance * (1 - chance))).sum()
    # 0.1 % and 99.9 % points for 20 degrees of freedom: too even is wrong as well.
    assert 5.92 < chi_square < 45.3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_relaxed_values_follow_the_binary_concrete_law(temperature):
    """Kolmogorov-Smirnov: P(s <= x) = sigmoid(temperature logit(x) - theta)."""
    layout = af.PairLayout.complete([160])
    theta = 0.7
    logits = torch.full((layout.num_pairs,), theta, dtype=torch.float64)
    s = af.sample_edges(logits, layout, seed=2, estimator="relaxed", temperature=temperature)
    drawn = torch.zeros(layout.num_pairs, dtype=torch.float64).scatter_(0, s.pair, s.value).sort()[0]
    law = torch.sigmoid(temperature * torch.logit(drawn) - theta)
    steps = torch.arange(len(law) + 1) / len(law)
    distance = torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max()
    assert float(distance) * math.sqrt(len(law)) < 1.95


def test_neighbours_in_the_stream_are_uncorrelated():
    layout = af.PairLayout.complete([150, 150])
    per_graph = [layout.uniforms(seed=6, step=step).double().split(layout.pairs_per_graph) for step in (0, 1)]
    first = per_graph[0][0] - 0.5
    bound = 4 / math.sqrt(len(first)) / 12
    for other in (first.roll(1), first.roll(2), first.roll(4), per_graph[0][1] - 0.5, per_graph[1][0] - 0.5):
        assert abs(float((first * other).mean())) < bound


BAD = [
    ({"temperature": 0}, "temperature: expected a finite number above 0"),
    ({"temperature": -1.0}, "temperature: expected a finite number above 0"),
    ({"temperature": math.nan}, "temperature: expected a finite number above 0"),
    ({"temperature": math.inf}, "temperature: expected a finite number above 0"),
    ({"temperature": 1e-300}, "temperature: expected a finite number above 0"),
    ({"temperature": "1"}, "temperature: expected a finite number above 0"),
    ({"temperature": torch.ones(2)}, "temperature: expected a number or a tensor with one element"),
    ({"estimator": "gumbel_softmax"}, "estimator: expected one of relaxed, hard_concrete, straight_through"),
    ({"estimator": "arm_mirrored"}, "estimator: expected one of relaxed"),
    ({"noise": "normal"}, "noise: expected one of logistic, gumbel, got 'normal'"),
    ({"estimator": "arm", "noise": "gumbel"}, "noise: expected 'logistic' with estimator 'arm'"),
    ({"gamma": 0.0}, "gamma, zeta: expected finite gamma < 0 and zeta > 1"),
    ({"zeta": 1.0}, "gamma, zeta: expected finite gamma < 0 and zeta > 1"),
    ({"gamma": math.nan}, "gamma, zeta: expected"),
    ({"zeta": math.inf}, "gamma, zeta: expected"),
    ({"zeta": "2"}, "gamma, zeta: expected"),
    ({"absent_rate": 0.0}, "absent_rate: expected a number above 0"),
    ({"absent_rate": math.nan}, "absent_rate: expected a number above 0"),
    ({"capacity": -1}, r"capacity: expected None or a number of edges in 0..2\^31-1, got -1"),
    ({"capacity": 2**31}, "capacity: expected None or a number of edges"),
    ({"capacity": 2.5}, "capacity: expected None or a number of edges"),
    ({"seed": 1.5}, "seed: expected an integer"),
    ({"seed": 2**64}, "seed: expected an integer"),
    ({"seed": torch.tensor([1, 2])}, "seed: expected an integer or an int64 tensor with one element"),
    ({"seed": torch.tensor(1.0)}, "seed: expected an integer or an int64 tensor with one element"),
    ({"step": -1}, "step: expected an integer in 0..4294967295, got -1"),
    ({"step": 2**32}, "step: expected an integer in 0..4294967295"),
    ({"logits": torch.zeros(9)}, r"logits: expected a tensor of shape \(10\), got float32 tensor of shape \(9,\)"),
    ({"logits": torch.zeros(10, 1)}, r"logits: expected a tensor of shape \(10\)"),
    ({"logits": torch.zeros(10, dtype=torch.float16)}, "logits: expected dtype float32 or float64 or bfloat16"),
    ({"logits": [0.0] * 10}, "logits: expected a torch.Tensor"),
    ({"logits": torch.zeros(10, device="meta")}, "logits: expected a tensor on cpu"),
    ({"layout": [5]}, "layout: expected a PairLayout"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments_are_named(change, text):
    options = {"logits": torch.zeros(10), "layout": af.PairLayout.complete([5]), "seed": 0, **change}
    logits, layout = options.pop("logits"), options.pop("layout")
    with pytest.raises(af.InputError, match=f"^{text}") as caught:
        af.sample_edges(logits, layout, **options)
    assert "\n" not in str(caught.value)


def test_relaxed_sample_too_long_for_its_row_offsets_is_refused():
    """Checked from the layout alone: on the meta device nothing is allocated."""
    layout = af.PairLayout.complete([46342], device="meta")
    logits = torch.empty(layout.num_pairs, device="meta")
    with pytest.raises(af.InputError, match=r"^layout: expected at most 2\^31-1 edges for estimator 'relaxed'"):
        af.sample_edges(logits, layout, seed=0, estimator="relaxed")
