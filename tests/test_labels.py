"""Labels dealt by the teacher's own ranking, alone and inside the search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from search_helpers import SIZES, make_graphs, make_teacher

import acgkd_fast as af
from acgkd_fast._library import backend
from acgkd_fast.distill import native_refiner
from acgkd_fast.distill.labels import deal_labels
from acgkd_fast.distill.refine import Refiner, RefineSettings
from acgkd_fast.files import load_state, save_state


@given(st.integers(0, 30), st.integers(2, 4), st.integers(0, 100))
def test_every_class_gets_its_number_and_the_clearest_graphs(graphs, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(graphs, classes, generator=generator)
    counts = torch.randint(classes, (graphs,), generator=generator).bincount(minlength=classes)
    y = deal_labels(logits, counts)
    assert torch.equal(y.bincount(minlength=classes), counts)
    if classes == 2 and 0 < counts[1] < graphs:
        margin = logits[:, 1] - logits[:, 0]
        assert margin[y == 1].min() >= margin[y == 0].max()


def test_a_teachers_own_answers_stand_where_the_counts_allow():
    logits = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 1.0], [1.0, 0.0, 1.5], [0.2, 0.1, 0.0]])
    assert deal_labels(logits, torch.tensor([2, 1, 1])).tolist() == [0, 1, 2, 0]
    # The weakest case gives way.
    assert deal_labels(logits, torch.tensor([1, 2, 1])).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("counts", [[1, 1], [2, 2, 0], [4]])
def test_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(af.InputError, match="counts"):
        deal_labels(torch.zeros(3, 2), torch.tensor(counts))


@pytest.fixture(params=["native", "generic"])
def engine(request, monkeypatch):
    if request.param == "generic":
        monkeypatch.setattr(native_refiner, "why_unsupported", lambda *_: "of the test")
    elif backend("search_steps", "cpu") != "native":
        pytest.skip("the extension is not built")
    return request.param


@pytest.mark.filterwarnings("ignore:k. expected at most 0.05")
@pytest.mark.parametrize("interval", [1, 7])
def test_the_search_deals_labels_once_after_its_share_of_the_steps(engine, interval):
    if engine == "generic" and interval > 1:
        pytest.skip("intervals are native")
    teacher, graphs = make_teacher(), make_graphs(sizes=SIZES * 4)
    settings = RefineSettings(steps=60, unlabelled=0.5, share=0.5, interval=interval)
    refiner = Refiner(teacher, graphs, settings, seed=2)
    refiner.advance(20)
    assert torch.equal(refiner.graphs().y, graphs.y)
    # K alone: the energy has no cross-entropy in it.
    assert refiner.metrics()["energy"] == pytest.approx(3.0 * refiner.metrics()["k"], rel=1e-9)
    while not refiner.finished:
        refiner.advance(9)
    result = refiner.result()
    dealt = result.graphs.y
    assert torch.equal(dealt.bincount(), graphs.y.bincount()) and not torch.equal(dealt, graphs.y)
    energy = result.energy
    assert energy.shape == (61,)
    turn = -(-30 // interval) * interval
    assert energy[:turn].diff().max() <= 1e-12 and energy[turn:].diff().max() <= 1e-12
    metrics = refiner.metrics()
    excess = metrics["energy"] - 3.0 * metrics["k"]
    assert excess > 0.0


@pytest.mark.filterwarnings("ignore:k. expected at most 0.05")
def test_dealt_labels_are_those_of_the_teachers_ranking(engine):
    teacher, graphs = make_teacher(), make_graphs(sizes=SIZES * 4)
    alone = Refiner(teacher, graphs, RefineSettings(steps=30, w_ce=0.0, share=0.5), seed=2)
    alone.advance(30)
    with torch.no_grad():
        wanted = deal_labels(teacher(alone.graphs()), graphs.y.bincount())
    refiner = Refiner(teacher, graphs, RefineSettings(steps=60, unlabelled=0.5, share=0.5), seed=2)
    refiner.advance(30)
    assert torch.equal(refiner.graphs().y, wanted)
    assert torch.equal(refiner.graphs().edges.col, alone.graphs().edges.col)


@pytest.mark.filterwarnings("ignore:k. expected at most 0.05")
@pytest.mark.parametrize("stop", [10, 30, 40])
def test_a_resumed_search_ends_with_the_same_bits(engine, stop, tmp_path):
    def fresh():
        settings = RefineSettings(steps=60, unlabelled=0.5, share=0.5)
        return Refiner(make_teacher(), make_graphs(sizes=SIZES * 2), settings, seed=2)

    whole, first, second = fresh(), fresh(), fresh()
    whole.advance(60)
    first.advance(stop)
    save_state(tmp_path / "state", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "state"))
    second.advance(60 - stop)
    one, two = whole.result(), second.result()
    assert torch.equal(one.energy, two.energy) and torch.equal(one.graphs.y, two.graphs.y)
    assert torch.equal(one.graphs.x, two.graphs.x) and torch.equal(one.graphs.edges.col, two.graphs.edges.col)


@pytest.mark.filterwarnings("ignore:teacher. no BatchNorm")
def test_without_batch_norm_labels_stay():
    graphs = make_graphs()
    refiner = Refiner(make_teacher("plain"), graphs, RefineSettings(steps=20, unlabelled=0.5), seed=0)
    refiner.advance(20)
    assert torch.equal(refiner.result().graphs.y, graphs.y) and refiner.accepted > 0


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(af.InputError, match="unlabelled: expected a share"):
        RefineSettings(unlabelled=share)
