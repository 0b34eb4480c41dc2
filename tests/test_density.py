"""The density found by short searches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from search_helpers import PlainTeacher

import acgkd_fast as af
from acgkd_fast.distill.density import Density, find_density
from acgkd_fast.errors import InputError
from acgkd_fast.nn.models import build_model

PRIOR = af.GraphPrior(14, 20, feature_kind="one-hot")


def calibrated(arch: str, mean_degree: float, prior: af.GraphPrior = PRIOR) -> af.Teacher:
    """A random teacher whose running statistics are those of random graphs of a mean degree."""
    torch.manual_seed(0)
    teacher = build_model(arch, 7 if prior is PRIOR else 16, 2)
    graphs = af.random_pool(af.as_teacher(teacher), replace(prior, mean_degree=mean_degree), 200, seed=5)
    for layer in teacher.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.reset_running_stats()
            layer.momentum = None
    teacher.train()
    with torch.no_grad():
        teacher(graphs.x, graphs.edges)
    return af.as_teacher(teacher.eval())


@pytest.mark.parametrize("degree", [2.2, 8.0])
def test_finds_the_density_that_the_statistics_come_from(degree):
    found = find_density(calibrated("gin3-32", degree), PRIOR, num_graphs=32, steps=60)
    assert 0.6 * degree < found.mean_degree < 1.7 * degree
    degrees, ks = zip(*found.tried, strict=True)
    assert list(degrees) == sorted(degrees) and degrees[0] == 2.05 and degrees[-1] <= 0.8 * 16
    assert ks[degrees.index(found.mean_degree)] <= 2.0 * min(ks)


def test_the_sparsest_of_those_that_came_near():
    found = find_density(calibrated("gcn3-32", 3.0), PRIOR, num_graphs=32, steps=400)
    least = min(k for _, k in found.tried)
    near = [degree for degree, k in found.tried if k <= 2.0 * least]
    assert least < 0.05 and len(near) > 1 and min(found.tried, key=lambda trial: trial[1])[0] != near[0]
    assert found.mean_degree == near[0]


def test_the_least_k_where_nothing_came_near():
    found = find_density(calibrated("gin3-32", 12.0), PRIOR, num_graphs=32, steps=1)
    best, least = min(found.tried, key=lambda trial: trial[1])
    assert least > 0.05 and found.mean_degree == best
    assert any(degree < best and k < 2.0 * least for degree, k in found.tried)


def test_gives_up_on_graphs_that_are_hopelessly_dense():
    tried = find_density(calibrated("gin3-32", 2.2), PRIOR, num_graphs=32, steps=60).tried
    ks = [k for _, k in tried]
    assert all(k <= 10.0 * min(ks[: i + 1]) for i, k in enumerate(ks[:-1]))


@pytest.mark.parametrize("degree", [5.0, 7.0])
def test_labels_that_are_degrees_tell_the_density(degree):
    prior = replace(PRIOR, feature_kind="degree")
    found = find_density(calibrated("gcn3-32", degree, prior), prior, num_graphs=32, steps=150)
    assert found.label_degree is not None and abs(found.label_degree - degree) <= 1.0
    least = min(k for _, k in found.tried)
    by_k = next(mean for mean, k in found.tried if k <= 2.0 * least)
    assert found.mean_degree == max(by_k, found.label_degree)


def test_labels_decide_where_k_finds_trees(monkeypatch):
    prior = replace(PRIOR, feature_kind="degree")
    monkeypatch.setattr("acgkd_fast.distill.density._HOPELESS", 0.0)
    found = find_density(calibrated("gcn3-32", 7.0, prior), prior, num_graphs=32, steps=300)
    assert len(found.tried) == 1
    assert found.mean_degree == found.label_degree and abs(found.label_degree - 7.0) <= 1.0


def test_labels_ask_for_no_more_than_graphs_can_hold(monkeypatch):
    small = af.GraphPrior(5, 7, feature_kind="degree")
    monkeypatch.setattr("acgkd_fast.distill.density._HOPELESS", 0.0)
    found = find_density(calibrated("gcn3-32", 9.0, replace(PRIOR, feature_kind="degree")), small, steps=600)
    assert found.label_degree is not None and found.label_degree > 4.0
    assert found.mean_degree == 0.8 * 5


def test_labels_are_not_asked_where_the_search_has_not_come_near():
    prior = replace(PRIOR, feature_kind="degree")
    found = find_density(calibrated("gcn3-32", 7.0, prior), prior, num_graphs=32, steps=1)
    assert found.label_degree is None
    assert found.mean_degree == min(found.tried, key=lambda trial: trial[1])[0]


def test_a_stated_density_and_a_teacher_without_batch_norm_end_the_search():
    stated = replace(PRIOR, mean_degree=5.0)
    teacher = calibrated("gin3-32", 8.0)
    assert find_density(teacher, stated) == Density(5.0, ())
    with pytest.warns(RuntimeWarning, match="no BatchNorm layer .* mean degree of 2.05 is assumed"):
        assert find_density(PlainTeacher(), PRIOR) == Density(2.05, ())


def test_goes_on_from_the_trials_of_an_earlier_call():
    teacher, said = calibrated("gcn3-32", 4.0), []
    whole = find_density(teacher, PRIOR, num_graphs=8, steps=10, progress=lambda *given: said.append(given))
    assert [(values["tried"], values["k"]) for _, _, values in said] == list(whole.tried)
    assert [step for step, _, _ in said] == list(range(1, len(whole.tried) + 1))
    assert all(step <= total for step, total, _ in said)
    again: list = []
    first = whole.tried[:2]
    assert (
        find_density(teacher, PRIOR, num_graphs=8, steps=10, tried=first, progress=lambda *g: again.append(g)) == whole
    )
    assert again == said[2:]


def test_repeats_and_leaves_the_teacher_alone():
    teacher = calibrated("gcn3-32", 4.0)
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    first = find_density(teacher, PRIOR, num_graphs=8, steps=10, seed=3)
    assert find_density(teacher, PRIOR, num_graphs=8, steps=10, seed=3) == first
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())


@pytest.mark.parametrize("name", ["num_graphs", "steps"])
def test_bad_numbers_are_refused(name):
    with pytest.raises(InputError, match=f"{name}: expected at least 1, got 0"):
        find_density(calibrated("gcn3-32", 2.2), PRIOR, **{name: 0})
