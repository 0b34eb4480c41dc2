"""Gradients of sampled edges against each estimator's written formula.

The formula needs the exact derivative of the loss with respect to every candidate's adjacency
entry; dense autograd on dense layers supplies it.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import LAYOUT_KINDS, dense, dense_gcn, dense_gin, kernels, make_layout, normal  # noqa: F401
from torch.autograd import gradcheck

import acgkd_fast as af
from acgkd_fast.edges import ESTIMATORS

pytestmark = pytest.mark.usefixtures("kernels")

NOISES = ("logistic", "gumbel")
DIFFERENTIABLE = tuple(e for e in ESTIMATORS if e != "arm")
SIZES = [1, 6, 2, 5]
NODES, WIDTH = sum(SIZES), 3
DRAW = {"seed": 12, "step": 4, "temperature": 0.8}
ABSENT_RATE = 0.6

# name: layers as (kind, argument), each followed by a tanh of a fixed linear map.
STACKS = {
    "gcn": [("gcn", True)],
    "gcn without self loops": [("gcn", False), ("gcn", False)],
    "gin": [("gin", 0.0)],
    "three gin": [("gin", 0.3), ("gin", -0.2), ("gin", 0.0)],
    "gcn, gin, gcn": [("gcn", True), ("gin", 0.1), ("gcn", False)],
}


def run_stack(layers, x, gcn, gin):
    """A loss with curvature in every layer; `gcn` and `gin` are ours or the dense ones."""
    for depth, (kind, argument) in enumerate(layers):
        x = gcn(x, argument) if kind == "gcn" else gin(x, argument)
        x = torch.tanh(x @ normal((WIDTH, WIDTH), 100 + depth, x.dtype))
    return (x * normal(x.shape, 99, x.dtype)).sum()


def fused_loss(layers, edges, x):
    return run_stack(
        layers, x, lambda h, loops: af.gcn_propagate(h, edges, loops), lambda h, eps: af.gin_propagate(h, edges, eps)
    )


def dense_loss(layers, adjacency, x):
    return run_stack(
        layers, x, lambda h, loops: dense_gcn(adjacency, h, loops), lambda h, eps: dense_gin(adjacency, h, eps)
    )


def candidate_derivative(layers, edges, x):
    """d loss / d (value of each candidate), [P], drawn or not, by dense autograd."""
    adjacency = dense(edges).detach().requires_grad_()
    (entry,) = torch.autograd.grad(dense_loss(layers, adjacency, x), adjacency)
    row, col = edges.layout.pair_nodes()
    return entry[row, col] if edges.layout.directed else entry[row, col] + entry[col, row]


def noise_of(layout, noise):
    u = layout.uniforms(seed=DRAW["seed"], step=DRAW["step"], dtype=torch.float64)
    return torch.logit(u) if noise == "logistic" else -torch.log(-torch.log(u))


def expected_slope(layout, logits, noise, estimator):
    """d value / d theta of each candidate in float64, as the docstring of sample_edges has it."""
    perturbed = logits.detach().double() + noise_of(layout, noise)
    soft = torch.sigmoid(perturbed / DRAW["temperature"])
    slope = soft * (1 - soft) / DRAW["temperature"]
    if estimator == "hard_concrete":
        stretched = 1.2 * soft - 0.1
        return 1.2 * slope * ((stretched > 0) & (stretched < 1))
    if estimator == "sparse_straight_through":
        chance = (4 * ABSENT_RATE * soft * (1 - soft)).clamp(max=1)
        v = layout.uniforms(seed=DRAW["seed"], step=DRAW["step"], stream=af.philox.Stream.ABSENT, dtype=torch.float64)
        return slope * torch.where(perturbed > 0, 1.0, (v < chance) / chance)
    return slope * (estimator != "arm")


def draw(layout, logits, estimator, noise="logistic", **options):
    return af.sample_edges(
        logits, layout, estimator=estimator, noise=noise, absent_rate=ABSENT_RATE, **{**DRAW, **options}
    )


def logits_for(layout, dtype=torch.float64):
    return (1.5 * normal(layout.num_pairs, 21)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("estimator", DIFFERENTIABLE)
def test_gradient_through_value(estimator, noise, kind, dtype):
    layout = make_layout(kind, SIZES)
    logits = logits_for(layout, dtype)
    sample = draw(layout, logits, estimator, noise)
    upstream = normal(sample.value.shape, 5, dtype)
    sample.value.backward(upstream)
    summed = torch.zeros(layout.num_pairs, dtype=torch.float64).index_add_(0, sample.pair, upstream.double())
    expected = expected_slope(layout, logits, noise, estimator) * summed
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(logits.grad.double(), expected, rtol=tolerance, atol=tolerance)
    assert logits.grad.dtype == dtype and logits.grad.any()


def test_arm_values_have_no_gradient():
    layout = make_layout("complete", SIZES)
    logits = logits_for(layout)
    sample = draw(layout, logits, "arm")
    (sample.value.sum() + sample.antithetic.value.sum()).backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("estimator", ["relaxed", "hard_concrete"])
def test_gradcheck(estimator, noise, kind):
    layout = make_layout(kind, [1, 5, 3])
    logits = logits_for(layout)
    x = normal((9, WIDTH), 3).requires_grad_()

    def loss(theta, features):
        return fused_loss(STACKS["gcn, gin, gcn"], draw(layout, theta, estimator, noise), features)

    assert gradcheck(loss, (logits, x))


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("stack", STACKS)
def test_straight_through_reaches_every_candidate(stack, kind):
    layout = make_layout(kind, SIZES)
    logits, x = logits_for(layout), normal((NODES, WIDTH), 1)
    sample = draw(layout, logits, "straight_through")
    fused_loss(STACKS[stack], sample, x).backward()
    derivative = candidate_derivative(STACKS[stack], sample, x)
    expected = expected_slope(layout, logits, "logistic", "straight_through") * derivative
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-13)
    absent = torch.ones(layout.num_pairs, dtype=torch.bool).index_fill_(0, sample.pair, False)
    assert logits.grad[absent].any() and logits.grad[~absent].any()


@pytest.mark.parametrize("stack", STACKS)
def test_straight_through_with_gumbel_noise_and_capacity(stack):
    layout = make_layout("budget", SIZES, xi=0.6)
    logits, x = logits_for(layout), normal((NODES, WIDTH), 1)
    sample = draw(layout, logits, "straight_through", "gumbel", capacity=2 * layout.num_pairs + 3)
    fused_loss(STACKS[stack], sample, x).backward()
    expected = expected_slope(layout, logits, "gumbel", "straight_through")
    expected = expected * candidate_derivative(STACKS[stack], sample, x)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("logit_dtype", "dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.float64, torch.float32, 1e-4),
        (torch.float32, torch.float64, 1e-5),
        (torch.bfloat16, torch.bfloat16, 0.1),
    ],
)
def test_straight_through_in_other_dtypes(logit_dtype, dtype, tolerance):
    layout = make_layout("complete", SIZES)
    logits, x = logits_for(layout, logit_dtype), normal((NODES, WIDTH), 1, dtype)
    sample = draw(layout, logits, "straight_through")
    fused_loss(STACKS["gcn, gin, gcn"], sample, x).backward()
    exact = draw(layout, logits.detach().double(), "straight_through")
    derivative = candidate_derivative(STACKS["gcn, gin, gcn"], exact, x.double())
    expected = expected_slope(layout, logits, "logistic", "straight_through") * derivative
    assert logits.grad.dtype == logit_dtype
    error = (logits.grad.double() - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("stack", STACKS)
def test_sparse_straight_through_reaches_sampled_candidates(stack, kind):
    layout = make_layout(kind, SIZES)
    logits, x = logits_for(layout), normal((NODES, WIDTH), 1)
    sample = draw(layout, logits, "sparse_straight_through")
    assert (sample.value == 0).any() and (sample.value == 1).any() and sample.num_edges < 2 * layout.num_pairs
    fused_loss(STACKS[stack], sample, x).backward()
    derivative = candidate_derivative(STACKS[stack], sample, x)
    expected = expected_slope(layout, logits, "logistic", "sparse_straight_through") * derivative
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-13)
    # Absent entries of value 0 leave the forward pass as it is.
    torch.testing.assert_close(
        fused_loss(STACKS[stack], sample, x), fused_loss(STACKS[stack], draw(layout, logits, "straight_through"), x)
    )


def test_sparse_straight_through_is_unbiased_for_straight_through():
    """The sampled slopes of the absent pairs add up to all of their slopes, within 4 deviations."""
    layout = make_layout("complete", [250])
    logits = (normal(layout.num_pairs, 2) - 1.5).requires_grad_()
    sample = draw(layout, logits, "sparse_straight_through")
    sample.value.sum().backward()
    absent = logits.detach() + noise_of(layout, "logistic") < 0
    slope = 2 * expected_slope(layout, logits, "logistic", "straight_through")[absent]
    chance = (4 * ABSENT_RATE * DRAW["temperature"] * slope / 2).clamp(max=1)
    deviation = (slope.square() * (1 - chance) / chance).sum().sqrt()
    assert 0 < deviation < 0.05 * slope.sum()
    assert abs(logits.grad[absent].sum() - slope.sum()) < 4 * deviation


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_code_that_ignores_the_port_gets_drawn_edges_only(kind):
    layout = make_layout(kind, SIZES)
    logits, x = logits_for(layout), normal((NODES, WIDTH), 1)
    sample = draw(layout, logits, "straight_through")
    dense_loss(STACKS["gcn, gin, gcn"], dense(sample), x).backward()
    drawn = torch.zeros(layout.num_pairs, dtype=torch.float64).index_fill_(0, sample.pair, 1.0)
    derivative = candidate_derivative(STACKS["gcn, gin, gcn"], sample, x)
    expected = drawn * expected_slope(layout, logits, "logistic", "straight_through") * derivative
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("estimator", DIFFERENTIABLE)
def test_spare_capacity_changes_no_gradient_and_equal_input_gives_equal_bits(estimator, kind):
    layout = make_layout(kind, SIZES)
    gradients = []
    for capacity in (None, None, 2 * layout.num_pairs + 11):
        logits, x = logits_for(layout), normal((NODES, WIDTH), 1).requires_grad_()
        fused_loss(STACKS["gcn, gin, gcn"], draw(layout, logits, estimator, capacity=capacity), x).backward()
        gradients.append((logits.grad, x.grad))
    for first, other in itertools.pairwise(gradients):
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_arm_gradient_formula(kind):
    layout = make_layout(kind, SIZES)
    sample = draw(layout, logits_for(layout), "arm")
    loss, mirrored = normal(len(SIZES), 1).requires_grad_(), normal(len(SIZES), 2)
    u = layout.uniforms(seed=DRAW["seed"], step=DRAW["step"])
    graph = layout.graph_of_pair(torch.arange(layout.num_pairs))
    gradient = af.arm_gradient(sample, loss, mirrored)
    assert not gradient.requires_grad
    torch.testing.assert_close(gradient, (loss - mirrored).detach()[graph] * (u - 0.5))


def test_arm_gradient_is_unbiased():
    """20,000 copies of one triangle; the expectation by summing over its eight graphs."""
    copies, theta = 20_000, torch.tensor([0.4, -0.7, 1.1], dtype=torch.float64, requires_grad=True)

    def loss(present):
        return (present * torch.tensor([1.0, 2.0, -1.0])).sum(-1).square() + 3 * present.prod(-1)

    graphs = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    chance = torch.where(graphs > 0, torch.sigmoid(theta), torch.sigmoid(-theta)).prod(-1)
    (exact,) = torch.autograd.grad((chance * loss(graphs)).sum(), theta)

    layout = af.PairLayout.complete([3] * copies)
    sample = af.sample_edges(theta.detach().repeat(copies), layout, seed=7, estimator="arm")
    both = [torch.zeros(layout.num_pairs).index_fill_(0, s.pair, 1.0) for s in (sample, sample.antithetic)]
    estimates = af.arm_gradient(sample, *(loss(drawn.view(copies, 3)) for drawn in both)).view(copies, 3)
    deviation = estimates.std(0) / copies**0.5
    assert ((estimates.mean(0) - exact).abs() < 4 * deviation).all() and (deviation < 0.1 * exact.abs()).all()


def test_arm_gradient_names_bad_arguments():
    layout = make_layout("complete", SIZES)
    logits, loss = logits_for(layout), torch.zeros(len(SIZES))
    with pytest.raises(af.InputError, match=r"^sample: expected a draw of estimator 'arm'"):
        af.arm_gradient(draw(layout, logits, "straight_through"), loss, loss)
    with pytest.raises(af.InputError, match=r"^loss: expected a tensor of shape \(4\)"):
        af.arm_gradient(draw(layout, logits, "arm"), loss.sum(), loss)
    with pytest.raises(af.InputError, match=r"^loss_antithetic: expected a tensor of shape \(4\)"):
        af.arm_gradient(draw(layout, logits, "arm"), loss, loss[:2])


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("estimator", DIFFERENTIABLE)
def test_every_learnable_input_moves(estimator, kind):
    layout = make_layout(kind, [4, 5])
    logits, x = logits_for(layout), normal((9, WIDTH), 1).requires_grad_()
    eps = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sample = draw(layout, logits, estimator)
    sample.value.retain_grad()
    hidden = torch.tanh(af.gcn_propagate(x, sample))
    out = af.readout(af.gin_propagate(hidden, sample, eps), sample.ptr, "mean")
    (out * normal(out.shape, 8)).sum().backward()
    assert (x.grad != 0).all() and (eps.grad != 0).all() and (sample.value.grad != 0).all()
    slope = expected_slope(layout, logits, "logistic", estimator)
    assert torch.equal(logits.grad != 0, slope != 0)
    if estimator in ("relaxed", "straight_through"):
        assert (logits.grad != 0).all()


def test_descent_on_logits_lowers_the_expected_loss():
    layout = make_layout("complete", [6, 5, 7])
    x = normal((18, WIDTH), 1)
    logits = torch.zeros(layout.num_pairs, dtype=torch.float64, requires_grad=True)
    target = af.readout(af.gin_propagate(x, af.sample_edges(logits.detach() - 1, layout, seed=99)), layout.node_ptr)

    def loss(seed, step):
        edges = af.sample_edges(logits, layout, seed=seed, step=step, estimator="relaxed")
        return (af.readout(af.gin_propagate(x, edges), layout.node_ptr) - target).square().mean()

    def expected_loss():
        with torch.no_grad():
            return float(torch.stack([loss(1, step) for step in range(40)]).mean())

    before = expected_loss()
    optimizer = torch.optim.SGD([logits], lr=0.2)
    for step in range(40):
        optimizer.zero_grad()
        loss(2, step).backward()
        optimizer.step()
    assert expected_loss() < 0.5 * before


def test_second_derivatives_are_refused():
    """Not zeros with a warning, which is what torch does with an operator that has no gradient."""
    layout = make_layout("complete", SIZES)
    logits, x = logits_for(layout), normal((NODES, WIDTH), 1)
    loss = fused_loss(STACKS["gcn"], draw(layout, logits, "relaxed"), x)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(loss, logits, create_graph=True)
