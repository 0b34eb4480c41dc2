"""Dense edge sampling: the ragged sampler's draws in matrices, gradients to every logit."""

from __future__ import annotations

import pytest
import torch
from helpers import KERNELS, kernels, normal, uniform  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import acgkd_fast as af
from acgkd_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("kernels")


def by_hand(logits, mask, *, seed, step, temperature, noise, symmetric, self_loops, graph_ids=None):
    """(theta + L, s) entry by entry in Python floats, from the stream as the package promises it."""
    graphs, n, _ = logits.shape
    layout = af.PairLayout.complete([n + self_loops] * graphs, directed=symmetric == "none", graph_ids=graph_ids)
    perturbed, soft = torch.zeros(logits.shape, dtype=torch.float64), torch.zeros(logits.shape, dtype=torch.float64)
    for g in range(graphs):
        for i in range(n):
            for j in range(n):
                if not (mask[g, i] and mask[g, j]) or (i == j and not self_loops):
                    perturbed[g, i, j] = -torch.inf
                    continue
                theta = float(logits[g, i, j])
                if symmetric == "average":
                    theta = (theta + float(logits[g, j, i])) / 2
                low, high = min(i, j), max(i, j) + self_loops
                row, col = (low, high) if i <= j or symmetric != "none" else (high, low)
                first = g * (n + self_loops)
                pair = int(layout.pair_index(torch.tensor(first + row), torch.tensor(first + col)))
                u = torch.tensor(uniform(layout, pair, seed, step, 0), dtype=torch.float64)
                noise_value = {"logistic": (u / (1 - u)).log(), "gumbel": -(-u.log()).log(), "none": u * 0}[noise]
                perturbed[g, i, j] = theta + noise_value
                soft[g, i, j] = torch.sigmoid(perturbed[g, i, j] / temperature)
    return perturbed, soft


@pytest.mark.parametrize("symmetric", ["average", "noise", "none"])
@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize("noise", ["logistic", "gumbel", "none"])
def test_values_are_those_of_the_formula(symmetric, self_loops, noise):
    logits = normal((2, 5, 5), 0)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    options = dict(seed=7, step=3, temperature=0.4, noise=noise, symmetric=symmetric, self_loops=self_loops)
    perturbed, soft = by_hand(logits, mask, graph_ids=[9, 4], **options)
    options |= dict(mask=mask, graph_ids=[9, 4])
    relaxed = af.sample_dense_edges(logits, estimator="relaxed", **options)
    torch.testing.assert_close(relaxed, soft, rtol=1e-9, atol=1e-9)
    hard = af.sample_dense_edges(logits, **options)
    assert torch.equal(hard, (perturbed > 0).double())
    stretched = af.sample_dense_edges(logits, estimator="hard_concrete", gamma=-0.3, zeta=1.2, **options)
    inside = torch.where(perturbed > -torch.inf, (soft * 1.5 - 0.3).clamp(0, 1), 0.0)
    torch.testing.assert_close(stretched, inside, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_the_ragged_sampler_draws_the_same_edges(sizes, directed, step):
    layout = af.PairLayout.complete(sizes, directed=directed)
    n = max(sizes) + 2
    matrix = normal((len(sizes), n, n), step % 1000, torch.float32)
    if not directed:
        matrix = (matrix + matrix.mT) / 2
    row, col = layout.pair_nodes()
    graph = layout.graph_of_pair(torch.arange(layout.num_pairs))
    first = layout.node_ptr[graph]
    sample = af.sample_edges(matrix[graph, row - first, col - first], layout, seed=11, step=step)
    wanted, mask = sample.to_dense()
    padded = torch.zeros(len(sizes), n, dtype=torch.bool)
    padded[:, : mask.shape[1]] = mask
    symmetric = "none" if directed else "average"
    drawn = af.sample_dense_edges(matrix, seed=11, step=step, symmetric=symmetric, mask=padded)
    assert torch.equal(drawn[:, : mask.shape[1], : mask.shape[1]], wanted)
    assert not drawn[:, mask.shape[1] :].any()


@pytest.mark.parametrize("symmetric", ["average", "noise", "none"])
def test_relaxed_gradients_are_the_true_ones(symmetric):
    logits = normal((2, 4, 4), 1).requires_grad_()

    def sample(theta):
        return af.sample_dense_edges(
            theta, seed=1, temperature=0.7, estimator="relaxed", symmetric=symmetric, self_loops=True
        )

    assert torch.autograd.gradcheck(sample, logits)
    assert torch.autograd.gradgradcheck(sample, logits)


def test_straight_through_gives_every_logit_its_slope():
    logits, weight = normal((3, 6, 6), 2).requires_grad_(), normal((3, 6, 6), 3)
    options = dict(seed=5, temperature=0.5)
    hard = af.sample_dense_edges(logits, **options)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    (through,) = torch.autograd.grad((hard * weight).sum(), logits)
    (relaxed,) = torch.autograd.grad(
        (af.sample_dense_edges(logits, estimator="relaxed", **options) * weight).sum(), logits
    )
    torch.testing.assert_close(through, relaxed)
    off_diagonal = ~torch.eye(6, dtype=torch.bool).expand(3, 6, 6)
    assert (through[off_diagonal] != 0).all() and not through[~off_diagonal].any()
    assert torch.equal(through, through.mT)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    logits = normal((4, 7, 7), 4, torch.float32)
    first = af.sample_dense_edges(logits, seed=3, step=1, estimator="relaxed")
    assert torch.equal(
        first, af.sample_dense_edges(logits, seed=torch.tensor(3), step=torch.tensor([1]), estimator="relaxed")
    )
    assert not torch.equal(first, af.sample_dense_edges(logits, seed=3, step=2, estimator="relaxed"))
    part = af.sample_dense_edges(logits[2:], seed=3, step=1, estimator="relaxed", graph_ids=[2, 3])
    assert torch.equal(part, first[2:])


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0), (2, 1, 1)])
@pytest.mark.parametrize("self_loops", [False, True])
def test_nothing_to_draw(shape, self_loops):
    logits = torch.zeros(shape, requires_grad=True)
    drawn = af.sample_dense_edges(logits, seed=0, self_loops=self_loops)
    drawn.sum().backward()
    assert drawn.shape == shape and (self_loops or not drawn.any())


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[[0.0, 1e30], [1e30, 0.0]], [[0.0, -1e30], [-1e30, 0.0]]], requires_grad=True)
    for estimator in ("relaxed", "straight_through", "hard_concrete"):
        drawn = af.sample_dense_edges(logits, seed=0, temperature=1e-3, estimator=estimator)
        assert drawn[0, 0, 1] == 1 and drawn[1, 0, 1] == 0
        (grad,) = torch.autograd.grad(drawn.sum(), logits)
        assert grad.isfinite().all()


def test_narrow_logits_are_sampled_in_float32():
    logits = normal((2, 5, 5), 5).to(torch.bfloat16)
    drawn = af.sample_dense_edges(logits, seed=2)
    assert drawn.dtype == torch.bfloat16
    assert torch.equal(drawn.float(), af.sample_dense_edges(logits.float(), seed=2))


def test_edge_frequencies_follow_the_logits():
    theta = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    logits = theta.repeat(400)[:, None, None].expand(2000, 5, 5)
    drawn = af.sample_dense_edges(logits, seed=0)
    off = ~torch.eye(5, dtype=torch.bool)
    share = drawn[:, off].mean(1).view(400, 5).mean(0)
    # 4000 independent pairs each: four standard deviations.
    spread = 4.0 * (torch.sigmoid(theta) * torch.sigmoid(-theta) / 4000).sqrt()
    assert ((share - torch.sigmoid(theta)).abs() < spread).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "logits: expected square"),
        ({"logits": torch.zeros(2, 3)}, "logits: expected a tensor of shape"),
        ({"logits": torch.zeros(2, 3, 3, dtype=torch.int64)}, "logits: expected dtype"),
        ({"estimator": "arm"}, "estimator: expected one of relaxed"),
        ({"noise": "normal"}, "noise: expected one of logistic"),
        ({"symmetric": True}, "symmetric: expected one of average"),
        ({"seed": None}, "seed: expected an integer with noise 'logistic'"),
        ({"temperature": 0.0}, "temperature: expected"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask: expected"),
        ({"graph_ids": [1, 1]}, "graph_ids: expected distinct"),
        ({"gamma": 0.1}, "gamma, zeta: expected"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"logits": torch.zeros(2, 3, 3), "seed": 0} | change
    with pytest.raises(InputError, match=message):
        af.sample_dense_edges(arguments.pop("logits"), **arguments)


@pytest.mark.gpu
def test_cuda_draws_the_same_matrices():
    logits = normal((5, 9, 9), 6, torch.float32).requires_grad_()
    for options in ({}, {"symmetric": "none"}, {"self_loops": True, "estimator": "relaxed"}, {"noise": "gumbel"}):
        drawn = {}
        for device in ("cpu", "cuda"):
            value = af.sample_dense_edges(logits.to(device), seed=1, step=2, temperature=0.7, **options)
            (grad,) = torch.autograd.grad(value.square().sum() + value.sum(), logits)
            drawn[device] = value.detach().cpu(), grad
        for found, wanted in zip(drawn["cuda"], drawn["cpu"], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
