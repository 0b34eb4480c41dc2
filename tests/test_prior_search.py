"""The density and shape of start graphs, found by K alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from search_helpers import PlainTeacher

import acgkd_fast as af
from acgkd_fast.distill.prior_search import FoundPrior, Trial, find_prior
from acgkd_fast.distill.witness import pool_witness
from acgkd_fast.errors import InputError
from acgkd_fast.nn.models import build_model

# What is stated is not looked for: of these, the density alone.
PLAIN = {"hub_share": 0.0, "degree_growth": 0.0, "ego_networks": False}
PRIOR = af.GraphPrior(14, 20, feature_kind="one-hot", **PLAIN)


def calibrated(arch: str, mean_degree: float, prior: af.GraphPrior = PRIOR, *, draw=af.random_pool) -> af.Teacher:
    """A random teacher whose running statistics are those of random graphs of a mean degree."""
    torch.manual_seed(0)
    teacher = build_model(arch, 7 if prior.feature_kind == "one-hot" else 16, 2)
    graphs = draw(af.as_teacher(teacher), replace(prior, mean_degree=mean_degree), 200, seed=5)
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
    found = find_prior(calibrated("gin3-32", degree), PRIOR, num_graphs=32, steps=60)
    assert 0.6 * degree < found.prior.mean_degree < 1.7 * degree
    degrees, ks = [trial.mean_degree for trial in found.tried], [trial.k for trial in found.tried]
    assert degrees == sorted(degrees) and degrees[0] == 2.05 and degrees[-1] <= 0.8 * 16
    assert ks[degrees.index(round(found.prior.mean_degree, 2))] <= 2.0 * min(ks)


def test_the_sparsest_of_those_that_came_near():
    found = find_prior(calibrated("gcn3-32", 3.0), PRIOR, num_graphs=32, steps=400)
    best = min(found.tried, key=lambda trial: trial.k)
    near = [trial.mean_degree for trial in found.tried if trial.k <= 2.0 * best.k]
    assert best.k < 0.05 and len(near) > 1 and best.mean_degree != near[0]
    assert round(found.prior.mean_degree, 2) == near[0]
    assert [round(degree, 2) for degree in found.alike] == near
    # A prior may state them all.
    mixed = af.start_graphs(calibrated("gcn3-32", 3.0), replace(PRIOR, mean_degree=(2.05, 6.0)), 40, seed=1)
    degrees = mixed.edges.rowptr.long()[mixed.ptr].diff() / mixed.sizes
    assert degrees[::2].mean() < 2.3 and degrees[1::2].mean() > 5.0


def test_the_least_k_where_nothing_came_near():
    found = find_prior(calibrated("gin3-32", 9.5), PRIOR, num_graphs=32, steps=1)
    best = min(found.tried, key=lambda trial: trial.k)
    assert best.k > 0.05 and round(found.prior.mean_degree, 2) == best.mean_degree
    assert any(trial.mean_degree < best.mean_degree and trial.k < 2.0 * best.k for trial in found.tried)


def test_gives_up_on_graphs_that_are_hopelessly_dense():
    tried = find_prior(calibrated("gin3-32", 2.2), PRIOR, num_graphs=32, steps=60).tried
    ks = [trial.k for trial in tried]
    assert all(k <= 10.0 * min(ks[: i + 1]) for i, k in enumerate(ks[:-1]))


@pytest.mark.parametrize("arch", ["gcn3-32", "gin3-32"])
@pytest.mark.parametrize(("name", "degree"), [("plain", 4.02), ("hubs", 2.87), ("egos", 7.88)])
def test_start_graphs_whose_features_are_degrees_tell_density_and_shape(arch, name, degree):
    """Without a search, also for a teacher whose normalisation hides degrees."""
    unknown = af.GraphPrior(14, 20, size_spread=None, feature_kind="degree")
    drawn = replace(unknown, **SHAPES[name])
    teacher = calibrated(arch, degree, drawn, draw=af.start_graphs)
    found = find_prior(teacher, unknown, num_graphs=32, steps=1)
    assert found.prior.mean_degree == pytest.approx(degree, rel=0.01)
    assert {field: getattr(found.prior, field) for field in SHAPES[name]} == SHAPES[name]
    assert found.alike == ()
    # Those of least K were drawn again.
    once, often = ([trial for trial in found.tried if trial.draws == draws] for draws in (1, 8))
    assert once + often == list(found.tried) and len(often) == 6
    assert {replace(trial, draws=1, k=0.0) for trial in often} == {
        replace(trial, k=0.0) for trial in sorted(once, key=lambda trial: trial.k)[:6]
    }
    best = min(often, key=lambda trial: trial.k)
    assert round(found.prior.mean_degree, 2) == best.mean_degree
    drawn_again = [af.start_graphs(teacher, found.prior, 400, seed=seed) for seed in range(8)]
    ks = torch.tensor([pool_witness(teacher, graphs)["k"] for graphs in drawn_again])
    assert float(ks.log().mean().exp()) == pytest.approx(best.k)
    first = next(trial for trial in once if replace(trial, k=0.0) == replace(best, draws=1, k=0.0))
    assert float(ks[0]) == pytest.approx(first.k)
    assert find_prior(teacher, unknown, num_graphs=32, tried=found.tried[:3]) == found
    assert find_prior(teacher, unknown, num_graphs=32, tried=found.tried[:-1]) == found


@pytest.mark.parametrize(("ratio", "plainer"), [(1.2, True), (1.3, False)])
def test_a_plainer_shape_is_taken_where_its_k_is_hardly_more(ratio, plainer):
    prior = af.GraphPrior(14, 20, mean_degree=5.0, size_spread=0.0, degree_growth=0.0, feature_kind="degree")
    found = find_prior(calibrated("gin3-32", 5.0, prior), prior, num_graphs=8)
    kinds = [trial for trial in found.tried if trial.draws == 1]
    hubs = {trial.hub_share for trial in kinds}
    assert hubs == {0.0, 0.5}
    earlier = [
        replace(trial, draws=draws, k=ratio if trial == kinds[0] else 1.0) for draws in (1, 8) for trial in kinds
    ]
    taken = find_prior(calibrated("gin3-32", 5.0, prior), prior, num_graphs=8, tried=earlier).prior
    assert (taken.hub_share, taken.ego_networks) == ((0.0, False) if plainer else (0.5, False))


def test_dense_start_graphs_are_fewer(monkeypatch):
    asked = []

    def spy(teacher, prior, count, *, seed):
        asked.append((prior.expected_degree, count))
        return af.start_graphs(teacher, prior, min(count, 2), seed=seed)

    monkeypatch.setattr("acgkd_fast.distill.prior_search.start_graphs", spy)
    monkeypatch.setattr("acgkd_fast.distill.prior_search._START_EDGES", 2**12)
    prior = af.GraphPrior(60, 68, feature_kind="degree", **PLAIN)
    find_prior(calibrated("gcn3-32", 5.0, replace(prior, mean_degree=5.0)), prior)
    assert asked[0] == (2.05, 31) and min(count for _, count in asked) == 8
    assert all(count == max(int(2**12 / (64 * degree)), 8) for degree, count in asked)


def test_a_stated_density_is_kept_where_features_are_degrees():
    unknown = af.GraphPrior(14, 20, mean_degree=5.0, feature_kind="degree")
    teacher = calibrated("gin3-32", 5.0, replace(unknown, **SHAPES["egos"]), draw=af.start_graphs)
    found = find_prior(teacher, replace(unknown, size_spread=None), num_graphs=8)
    assert {trial.mean_degree for trial in found.tried} == {5.0} and found.prior.mean_degree == 5.0
    assert found.prior.ego_networks


def test_hubs_and_ego_networks_leave_no_room_for_each_other():
    teacher, unknown = calibrated("gin3-32", 3.0), af.GraphPrior.around(17, feature_kind="one-hot", mean_degree=3.0)
    hubs = find_prior(teacher, replace(unknown, hub_share=0.25), num_graphs=8, steps=5)
    assert {(trial.hub_share, trial.ego_networks) for trial in hubs.tried} == {(0.25, False)}
    egos = find_prior(teacher, replace(unknown, ego_networks=True), num_graphs=8, steps=5)
    assert {(trial.hub_share, trial.ego_networks) for trial in egos.tried} == {(0.0, True)}
    assert len(set(egos.tried)) == len(egos.tried) == 3
    plain = find_prior(teacher, replace(unknown, hub_share=0.0), num_graphs=8, steps=5)
    assert {trial.ego_networks for trial in plain.tried} == {False, True}


def test_a_stated_density_and_a_teacher_without_batch_norm_end_the_search():
    stated = replace(PRIOR, mean_degree=5.0)
    teacher = calibrated("gin3-32", 8.0)
    assert find_prior(teacher, stated) == FoundPrior(stated)
    with pytest.warns(RuntimeWarning, match="no BatchNorm layer .* mean degree of 2.05 is assumed"):
        unknown = af.GraphPrior.around(17, feature_kind="one-hot")
        assert find_prior(PlainTeacher(), unknown).prior == replace(unknown, mean_degree=2.05, size_spread=0.0, **PLAIN)


SHAPES = {
    "plain": {"hub_share": 0.0, "size_spread": 0.0, "degree_growth": 0.0, "ego_networks": False},
    "hubs": {"hub_share": 0.5, "size_spread": 0.0, "degree_growth": 0.0, "ego_networks": False},
    "egos": {"hub_share": 0.0, "size_spread": 0.5, "degree_growth": 1.0, "ego_networks": True},
}


@pytest.mark.parametrize(("name", "degree"), [("plain", 2.05), ("hubs", 2.05), ("egos", 6.0)])
def test_finds_the_shape_that_the_statistics_come_from(name, degree):
    unknown = af.GraphPrior.around(30, mean_degree=degree, feature_kind="one-hot")
    teacher = calibrated("gin3-32", degree, replace(unknown, **SHAPES[name]), draw=af.start_graphs)
    found = find_prior(teacher, unknown, num_graphs=32, steps=400)
    assert [trial.mean_degree for trial in found.tried] == [degree] * 4
    # Spreads of a half and of one may be as near.
    assert found.prior.hub_share == SHAPES[name]["hub_share"]
    assert (found.prior.size_spread > 0.0) == (found.prior.degree_growth > 0.0) == (name == "egos")
    ks = [trial.k for trial in found.tried]
    chosen = next(trial.k for trial in found.tried if trial.k <= 2.0 * min(ks))
    assert found.prior.ego_networks == (name == "egos")
    kind = (found.prior.hub_share, found.prior.size_spread, found.prior.degree_growth, chosen)
    assert kind in [(trial.hub_share, trial.size_spread, trial.degree_growth, trial.k) for trial in found.tried]


def test_what_is_stated_stays():
    prior = af.GraphPrior(14, 20, mean_degree=3.0, hub_share=0.25, feature_kind="one-hot")
    found = find_prior(calibrated("gin3-32", 2.2), prior, num_graphs=8, steps=5)
    assert {(trial.mean_degree, trial.hub_share, trial.size_spread) for trial in found.tried} == {(3.0, 0.25, 0.0)}
    assert sorted(trial.degree_growth for trial in found.tried) == [0.0, 1.0]
    assert (found.prior.mean_degree, found.prior.hub_share, found.prior.size_spread) == (3.0, 0.25, 0.0)


@pytest.mark.parametrize("kind", ["one-hot", "degree"])
def test_several_stated_degrees_stay(kind):
    prior = af.GraphPrior(14, 20, mean_degree=(2.05, 4.0), feature_kind=kind)
    teacher = calibrated("gin3-32", 3.0, replace(PRIOR, feature_kind=kind))
    found = find_prior(teacher, prior, num_graphs=8, steps=5)
    assert found.prior.mean_degree == (2.05, 4.0) and found.alike == ()
    assert len({replace(trial, draws=1, k=0.0) for trial in found.tried}) == 3
    assert find_prior(teacher, found.prior) == FoundPrior(found.prior)


def test_shapes_are_compared_at_the_density_found():
    found = find_prior(calibrated("gin3-32", 8.0), af.GraphPrior.around(17, feature_kind="one-hot"), steps=60)
    last = found.tried[-1]
    assert [trial.mean_degree for trial in found.tried[-3:]] == [round(found.prior.mean_degree, 2)] * 3
    assert (last.hub_share, last.size_spread, last.degree_growth) == (0.0, 1.0, 1.0)
    # The plain shape at that density is one of the first trials and is not run again.
    assert sum(trial == found.tried[0] for trial in found.tried) == 1
    plain = [trial for trial in found.tried if not (trial.hub_share or trial.size_spread)]
    assert len(plain) == len(found.tried) - 3


def test_goes_on_from_the_trials_of_an_earlier_call():
    teacher, said = calibrated("gcn3-32", 4.0), []
    prior = af.GraphPrior.around(17, feature_kind="one-hot")
    whole = find_prior(teacher, prior, num_graphs=8, steps=10, progress=lambda *given: said.append(given))
    assert [Trial(**values) for _, _, values in said] == list(whole.tried)
    assert [step for step, _, _ in said] == list(range(1, len(whole.tried) + 1))
    assert all(step <= total for step, total, _ in said)
    for done in (2, len(whole.tried) - 1):
        again: list = []
        first = whole.tried[:done]
        found = find_prior(
            teacher, prior, num_graphs=8, steps=10, tried=first, progress=lambda *g, to=again: to.append(g)
        )
        assert found == whole and again == said[done:]


def test_repeats_and_leaves_the_teacher_alone():
    teacher = calibrated("gcn3-32", 4.0)
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    first = find_prior(teacher, PRIOR, num_graphs=8, steps=10, seed=3)
    assert find_prior(teacher, PRIOR, num_graphs=8, steps=10, seed=3) == first
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())


def test_trials_of_other_arguments_are_refused():
    teacher = calibrated("gcn3-32", 4.0)
    first = find_prior(teacher, PRIOR, num_graphs=8, steps=10).tried[0]
    with pytest.raises(InputError, match="tried: expected trial 1 of an earlier call with the same arguments"):
        find_prior(teacher, PRIOR, num_graphs=8, steps=10, tried=[replace(first, mean_degree=9.9)])


def test_a_trial_without_a_finite_k_is_passed_over():
    teacher, nan = calibrated("gcn3-32", 4.0), float("nan")
    whole = find_prior(teacher, PRIOR, num_graphs=8, steps=10)
    others = whole.tried[1:]
    found = find_prior(teacher, PRIOR, num_graphs=8, steps=10, tried=[replace(whole.tried[0], k=nan), *others])
    assert round(found.prior.mean_degree, 2) == min(others, key=lambda trial: trial.k).mean_degree or found.alike
    assert round(found.prior.mean_degree, 2) != whole.tried[0].mean_degree
    with pytest.raises(InputError, match="teacher: expected statistics and weights that give a finite K"):
        find_prior(teacher, PRIOR, num_graphs=8, steps=10, tried=[replace(trial, k=nan) for trial in whole.tried])


@pytest.mark.parametrize("name", ["num_graphs", "steps"])
def test_bad_numbers_are_refused(name):
    with pytest.raises(InputError, match=f"{name}: expected at least 1, got 0"):
        find_prior(calibrated("gcn3-32", 2.2), PRIOR, **{name: 0})
