"""Adam on sparse and dense gradients against torch.optim.Adam, saved and resumed by either, and its operator."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import LAYOUT_KINDS, OPCHECKED, kernels, make_layout, normal, opcheck  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import acgkd_fast as af
from acgkd_fast.errors import InputError
from acgkd_fast.optim import Adam

pytestmark = pytest.mark.usefixtures("kernels")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}


def gradients(size, steps, dtype, share=0.2):
    """Dense gradients that are zero at most places."""
    for t in range(steps):
        chosen = torch.rand(size, generator=torch.Generator().manual_seed(t)) < share
        yield torch.where(chosen, normal(size, t, dtype), torch.zeros(size, dtype=dtype))


def run(make, start, dtype, *, sparse, steps=12, **options):
    param = start.clone().requires_grad_()
    optimizer = make([param], lr=0.05, **options)
    for grad in gradients(len(start), steps, dtype):
        param.grad = grad.to_sparse() if sparse else grad
        optimizer.step()
    return param.detach(), optimizer


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
# On both sides of the kernel's blocks of 1024 values.
@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 1025, 40_000])
def test_same_steps_as_torch(size, dtype, sparse):
    start = normal(size, 99, dtype)
    found, ours = run(Adam, start, dtype, sparse=sparse)
    wanted, theirs = run(torch.optim.Adam, start.double(), torch.float64, sparse=False)
    assert (found.double() - wanted).abs().max() <= TOLERANCE[dtype] * max(1.0, wanted.abs().max())
    for name in ("exp_avg", "exp_avg_sq"):
        have, want = (next(iter(o.state.values()))[name].double() for o in (ours, theirs))
        assert (have - want).abs().max() <= TOLERANCE[dtype] * max(1.0, want.abs().max())
    again, _ = run(Adam, start, dtype, sparse=sparse)
    assert torch.equal(found, again)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(0, 3000),
    beta1=st.sampled_from([0.0, 0.9]),
    beta2=st.sampled_from([0.0, 0.99]),
    share=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_sparse_and_dense_gradients_give_the_same_bits(size, beta1, beta2, share):
    results = []
    for sparse in (False, True):
        param = normal(size, 1, torch.float32).requires_grad_()
        optimizer = Adam([param], lr=0.1, betas=(beta1, beta2))
        for grad in gradients(size, 4, torch.float32, share):
            param.grad = grad.to_sparse() if sparse else grad
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_gradients_that_are_not_coalesced():
    param = torch.zeros(6, requires_grad=True)
    other = torch.zeros(6, requires_grad=True)
    param.grad = torch.sparse_coo_tensor([[4, 1, 4]], [1.0, 2.0, 3.0], (6,), check_invariants=True)
    other.grad = param.grad.to_dense()
    Adam([param]).step()
    torch.optim.Adam([other]).step()
    torch.testing.assert_close(param, other)


@pytest.mark.parametrize(("first", "then"), [(Adam, torch.optim.Adam), (torch.optim.Adam, Adam), (Adam, Adam)])
def test_state_moves_between_the_two(first, then):
    start, dtype = normal(50, 3, torch.float32), torch.float32
    whole, _ = run(torch.optim.Adam, start, dtype, sparse=False, steps=8)
    param = start.clone().requires_grad_()
    optimizer = first([param], lr=0.05)
    for t, grad in enumerate(gradients(50, 8, dtype)):
        if t == 4:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = then([param], lr=0.3)
            optimizer.load_state_dict(saved)
        param.grad = grad
        optimizer.step()
    torch.testing.assert_close(param.detach(), whole)


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("estimator", ["sparse_straight_through", "hard_concrete", "straight_through"])
def test_edges_learn_alike_with_either_gradient(kind, estimator):
    layout = make_layout(kind, [1, 12, 7, 9])
    learned = []
    for sparse, make in ((False, torch.optim.Adam), (True, Adam)):
        logits = normal(layout.num_pairs, 1).requires_grad_()
        optimizer = make([logits], lr=0.1)
        for step in range(5):
            edges = af.sample_edges(logits, layout, seed=3, step=step, estimator=estimator, sparse_grad=sparse)
            x = normal((layout.num_nodes, 3), 2).requires_grad_()
            (grad,) = torch.autograd.grad(af.gcn_propagate(x, edges).square().sum(), logits)
            # All-candidate straight-through adds the dense gradient of the absent ones.
            assert grad.is_sparse == (sparse and estimator != "straight_through")
            logits.grad = grad
            optimizer.step()
        learned.append(logits.detach())
    torch.testing.assert_close(*learned)


def test_closures_and_parameters_without_gradient():
    param, idle = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Adam([{"params": [param], "lr": 0.5}, {"params": [idle]}])

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert torch.equal(idle, torch.ones(2)) and torch.allclose(param, torch.full((3,), 0.5))


def test_bad_input():
    param = torch.zeros(3, requires_grad=True)
    with pytest.raises(InputError, match="lr: expected a number above 0"):
        Adam([param], lr=0.0)
    with pytest.raises(InputError, match="betas: expected"):
        Adam([param], betas=(0.9, 1.0))
    matrix = torch.zeros(2, 2, requires_grad=True)
    matrix.grad = torch.eye(2).to_sparse()
    with pytest.raises(InputError, match="params: expected one dimension"):
        Adam([matrix]).step()
    half = torch.zeros(3, dtype=torch.float16, requires_grad=True)
    half.grad = torch.zeros(3, dtype=torch.float16)
    with pytest.raises(InputError, match="params: expected contiguous"):
        Adam([half]).step()
    layout = af.PairLayout.complete([3])
    with pytest.raises(InputError, match="sparse_grad: expected False"):
        af.sample_edges(
            af.FactorLogits(torch.zeros(3, 2), torch.zeros(())), layout, seed=0,
            estimator="sparse_straight_through", sparse_grad=True,
        )  # fmt: skip


def test_opcheck():
    state = [normal(5, seed) for seed in (1, 2)] + [normal(5, 3).square()]
    rates = (0.1, 0.9, 0.99, 1e-8, 3)
    opcheck("adam_step_", [(*state, None, normal(5, 4), *rates), (*state, torch.tensor([0, 3]), normal(2, 4), *rates)])


OPCHECKED |= {"adam_step_"}
