"""The study of edge gradients measures what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import acgkd_fast as af
from acgkd_fast.nn.models import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import study_estimators as study


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(study, "SAMPLES", 256)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("gcn3-8", 4, 2).eval()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.running_mean.normal_(0.0, 0.3)
                layer.running_var.uniform_(0.5, 1.5)
    return study.Problem(af.as_teacher(model), 0.3, label=1, seed=3)


def expected_loss(problem, theta):
    bits = (torch.arange(2**study.PAIRS)[:, None] >> torch.arange(study.PAIRS)) & 1
    certain = torch.where(bits == 1, 1e4, -1e4).float().reshape(-1)
    with torch.no_grad():
        losses = problem.losses(af.sample_edges(certain, problem.layout(2**study.PAIRS), seed=0)).double()
    p = theta.double().sigmoid()
    return (torch.where(bits == 1, p, 1 - p).prod(1) * losses).sum()


def test_the_exact_gradient_is_the_slope_of_the_expected_loss(problem):
    exact, step = problem.exact(), 1e-4
    for pair in range(study.PAIRS):
        shift = torch.zeros(study.PAIRS, dtype=torch.float64).index_fill_(0, torch.tensor([pair]), step)
        up, down = (expected_loss(problem, problem.theta + sign * shift) for sign in (1, -1))
        torch.testing.assert_close(exact[pair], (up - down) / (2 * step), rtol=1e-4, atol=1e-6)


def test_weights_on_all_candidates_give_the_losses_of_the_drawn_graphs(problem):
    """Fixed degrees change the slope, not the loss."""
    draws, slope = problem.slopes()
    assert set(draws.unique().tolist()) == {0.0, 1.0} and slope.abs().sum() > 0
    edges = af.sample_edges(problem.theta.repeat(256), problem.layout(256), seed=problem.seed)
    torch.testing.assert_close(study._with_fixed_degrees(problem, edges), problem.losses(edges).sum())
    fixed = problem.slopes(fixed_degrees=True)
    assert torch.equal(fixed[0], draws) and not torch.allclose(fixed[1], slope)


def test_isolated_ends_are_those_without_other_partners(problem):
    draws, _ = problem.slopes()
    row, col = af.PairLayout.complete([study.NODES]).pair_nodes()
    found = problem.isolated(draws)
    for draw, flags in zip(draws[:40].tolist(), found[:40].tolist(), strict=True):
        for pair, flag in enumerate(flags):
            others = [set((int(row[k]), int(col[k]))) for k, there in enumerate(draw) if there and k != pair]
            ends = (int(row[pair]), int(col[pair]))
            assert flag == any(all(end not in other for other in others) for end in ends)


def test_arm_is_unbiased_and_sparse_straight_through_agrees_with_the_dense_one(problem, monkeypatch):
    monkeypatch.setattr(study, "SAMPLES", 20_000)
    exact = problem.exact()
    arm = study.measure(study.ESTIMATES["ARM"](problem), exact)
    assert arm["cosine"] > 0.97 and arm["bias"] < 6 * arm["deviation"] / 20_000**0.5
    dense, sparse = (problem.sampled(name, 1.0) for name in ("straight_through", "sparse_straight_through"))
    error = sparse.std(0) / 20_000**0.5
    assert ((sparse.mean(0) - dense.mean(0)).abs() < 6 * error + 1e-6).all()
