"""Pacing, difficulty, class balance and self-paced weights against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from acgkd_fast.distill.curriculum import (
    CurriculumSettings,
    easiest,
    pace,
    self_paced_weights,
    share_at,
    structural_difficulty,
)
from acgkd_fast.errors import InputError
from acgkd_fast.graphs import EdgeSample, GraphBatch


@pytest.mark.parametrize(
    ("pacing", "expected"),
    [
        ("linear", [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]),
        ("root", [math.sqrt(0.04 + 0.96 * t / 4) for t in range(5)] + [1.0]),
        # Two stages: half of the way up after half of the time.
        ("step", [0.2, 0.2, 0.6, 0.6, 1.0, 1.0]),
    ],
)
def test_pacing(pacing, expected):
    settings = CurriculumSettings("edges", pacing=pacing, start_share=0.2, full_at=0.4, stages=2)
    assert [share_at(settings, epoch, 10) for epoch in range(6)] == pytest.approx(expected)
    assert share_at(settings, 9, 10) == 1.0


@given(
    st.sampled_from(["linear", "root", "step"]),
    st.floats(0.01, 1.0),
    st.floats(0.01, 1.0),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_the_share_grows_from_the_start_to_all(pacing, start, full_at, stages, epochs):
    settings = CurriculumSettings("edges", pacing=pacing, start_share=start, full_at=full_at, stages=stages)
    shares = [share_at(settings, epoch, epochs) for epoch in range(epochs + 1)]
    assert shares[0] == pytest.approx(start) and shares[-1] == 1.0
    assert all(0 < before <= after + 1e-12 for before, after in itertools.pairwise(shares))


def test_structural_difficulty():
    edge_index = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])
    graphs = GraphBatch(torch.zeros(7, 1), EdgeSample.from_edge_index(edge_index, torch.tensor([0, 3, 7])))
    assert structural_difficulty(graphs, "nodes").tolist() == [3, 4]
    assert structural_difficulty(graphs, "edges").tolist() == [4, 2]
    assert structural_difficulty(graphs, "degree").tolist() == pytest.approx([4 / 3, 1 / 2])
    with pytest.raises(InputError, match="difficulty"):
        structural_difficulty(graphs, "teacher_loss")


def test_the_easiest_of_each_class():
    difficulty = torch.tensor([5.0, 1.0, 3.0, 3.0, 9.0, 2.0])
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    assert easiest(difficulty, labels, 0.5).tolist() == [False, True, True, False, False, True]
    assert easiest(difficulty, labels, 0.25).tolist() == [False, True, False, False, False, True]
    assert easiest(difficulty, labels, 1.0).all()
    # 0.1 * 30 is 3.0000000000000004.
    assert easiest(torch.arange(30.0), torch.zeros(30, dtype=torch.int64), 0.1).sum() == 3


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 4), st.floats(0.01, 1.0))
def test_every_class_keeps_its_share(seed, count, classes, share):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    difficulty = torch.rand(count, generator=generator)
    chosen = easiest(difficulty, labels, share)
    for label in labels.unique():
        mine = labels == label
        assert chosen[mine].sum() == math.ceil(round(share * int(mine.sum()), 9))
        if not chosen[mine].all():
            assert difficulty[mine & chosen].max() <= difficulty[mine & ~chosen].min()


def test_self_paced_weights():
    divergence = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    assert self_paced_weights(divergence, 1.0, "hard").tolist() == [1, 1, 0, 0]
    assert self_paced_weights(divergence, 1.0, "soft").tolist() == [1, 0.5, 0, 0]
    expected = [(1 + math.exp(-1)) / (1 + math.exp(x - 1)) for x in divergence.tolist()]
    assert self_paced_weights(divergence, 1.0, "log").tolist() == pytest.approx(expected)
    assert expected[0] == 1.0
    for kind in ("hard", "soft", "log"):
        assert self_paced_weights(divergence, math.inf, kind).tolist() == [1, 1, 1, 1]


def test_a_stage_takes_its_age_from_the_share_and_keeps_classes_balanced():
    divergence = torch.tensor([0.1, 0.2, 0.4, 0.8, 10.0, 30.0, 20.0, 40.0], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    visited, weights = pace(divergence, labels, 0.5, "hard")
    assert visited.tolist() == [True, True, False, False, True, False, True, False]
    assert weights.tolist() == [1, 1, 0, 0, 1, 0, 1, 0]
    # The age is 0.4 in class 0 and 30 in class 1.
    visited, weights = pace(divergence, labels, 0.5, "soft")
    raw = [1 - 0.1 / 0.4, 1 - 0.2 / 0.4, 1 - 10 / 30, 1 - 20 / 30]
    expected = [
        2 * raw[0] / sum(raw[:2]),
        2 * raw[1] / sum(raw[:2]),
        2 * raw[2] / sum(raw[2:]),
        2 * raw[3] / sum(raw[2:]),
    ]
    assert weights[visited].tolist() == pytest.approx(expected)
    visited, weights = pace(divergence, labels, 0.5, "log")
    assert visited.all() and (weights > 0).all()
    assert weights[:4].mean() == pytest.approx(1.0) and weights[4:].mean() == pytest.approx(1.0)
    for kind in ("hard", "soft", "log"):
        visited, weights = pace(divergence, labels, 1.0, kind)
        assert visited.all() and torch.equal(weights, torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["hard", "soft", "log"])
def test_equal_divergences_count_alike(kind):
    visited, weights = pace(torch.zeros(6), torch.zeros(6, dtype=torch.int64), 0.5, kind)
    assert (weights[visited] == 1).all() and visited.sum() == (6 if kind == "log" else 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"difficulty": "hard"}, "difficulty: expected one of"),
        ({"pacing": "cubic"}, "pacing: expected one of"),
        ({"weights": "none"}, "weights: expected one of"),
        ({"start_share": 1.5}, "start_share: expected a number in"),
        ({"full_at": 0.0}, "full_at: expected a number in"),
        ({"full_at": "half"}, "full_at: expected a number in"),
        ({"stages": 0}, "stages: expected a whole number"),
        ({"stages": 1.5}, "stages: expected a whole number"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        CurriculumSettings(**options)
