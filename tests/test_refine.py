"""The search: cached scores against fresh ones, energy that never rises, exact resume, bad input."""

from __future__ import annotations

import pytest
import torch
from helpers import dense
from search_helpers import SIZES, WIDTH, assert_simple, edge_sets, make_graphs, make_teacher

from acgkd_fast import EdgeSample, GraphBatch, InputError, PairLayout
from acgkd_fast._library import backend
from acgkd_fast.distill import native_refiner
from acgkd_fast.distill.edge_lists import EdgeLists
from acgkd_fast.distill.refine import Refiner, RefineSettings, refine
from acgkd_fast.distill.statistics import BatchNormProbe, gaussian_divergence, graph_moment_sums
from acgkd_fast.files import load_state, save_state
from acgkd_fast.normalize import column_moments
from acgkd_fast.teachers import as_teacher


@pytest.fixture(autouse=True, params=["native", "generic"])
def engine(request, monkeypatch):
    """Every test runs on both engines, where the native one was built."""
    if request.param == "generic":
        monkeypatch.setattr(native_refiner, "why_unsupported", lambda *_: "of the test")
    elif backend("search_steps", "cpu") != "native":
        pytest.skip("the extension is not built")
    return request.param


# Most tests end long before K is low.
pytestmark = pytest.mark.filterwarnings("ignore:k. expected at most 0.05")


@pytest.mark.parametrize("kind", ["gcn3-8", "gin3-8", "graph-norm"])
def test_cached_scores_equal_a_forward_pass_from_scratch(kind):
    teacher, graphs = make_teacher(kind), make_graphs()
    refiner = Refiner(teacher, graphs, RefineSettings(steps=150, rewire=0.5, share=0.5, connected=False), seed=3)
    refiner.advance(150)
    assert refiner.accepted > 20
    metrics, now = refiner.metrics(), refiner.graphs()
    assert_simple(now.edges, SIZES)
    assert (now.x.sum(1) == 1).all() and ((now.x == 0) | (now.x == 1)).all()

    with torch.no_grad(), BatchNormProbe(teacher.module) as probe:
        logits = teacher(now)
    k = float(gaussian_divergence([column_moments(features) for features in probe.inputs], probe.running))
    loss = torch.nn.functional.cross_entropy(logits, graphs.y, reduction="none")
    energy = 3.0 * k + float((loss - 0.1).clamp(min=0).mean())
    assert metrics["k"] == pytest.approx(k, rel=1e-5, abs=1e-7)
    assert metrics["cross_entropy"] == pytest.approx(float(loss.mean()), rel=1e-5, abs=1e-7)
    assert metrics["energy"] == pytest.approx(energy, rel=1e-5, abs=1e-7)
    assert metrics["agreement"] == float((logits.argmax(1) == graphs.y).double().mean())
    fresh = graph_moment_sums(probe.inputs, now.ptr, now.num_nodes)
    torch.testing.assert_close(refiner._scores.sums, fresh, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(refiner._total, refiner._scores.sums.sum(0), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(refiner._scores.loss, loss.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [1e-9, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["gcn3-8", "graph-norm"])
def test_greedy_energy_never_rises(kind, share):
    result = refine(make_graphs(sizes=SIZES * 5), make_teacher(kind), steps=120, share=share, rewire=0.6, seed=1)
    assert result.energy.shape == (121,) and result.energy.dtype == torch.float64
    assert result.energy.diff().max() <= 1e-12
    assert result.energy[-1] < result.energy[0]


def test_graphs_stay_connected_unless_told():
    graphs = make_graphs(sizes=SIZES * 5)
    start = EdgeLists.from_edges(graphs.edges)
    sizes = graphs.sizes
    whole = start.connected(sizes)
    assert whole.sum() > 5
    for options, kept in (({}, True), ({"connected": False}, False)):
        found = refine(graphs, make_teacher(), steps=200, share=1.0, rewire=0.6, seed=1, **options).graphs
        assert bool(EdgeLists.from_edges(found.edges).connected(sizes)[whole].all()) == kept


def test_a_joint_step_that_overshoots_is_halved():
    refiner = Refiner(make_teacher(), make_graphs(sizes=(6,) * 16), RefineSettings(share=1.0))
    energy, total = refiner._energy, refiner._total
    unit = torch.eye(total.numel()).double().view(-1, *total.shape)
    slope = energy.first_order(total, unit, torch.zeros(total.numel()))
    downhill = -(slope / slope.norm()).view_as(total)
    here = energy.value(total, refiner._excess)
    step = next(s for s in torch.logspace(3, -6, 200) if energy.value(total + 3 * s * downhill, refiner._excess) < here)
    assert energy.value(total + 16 * step * downhill, refiner._excess) > here

    # The first graphs promise most; all sixteen, and eight of them or four, may be too many.
    change = (step * (1.0 + torch.arange(16).flip(0) * 1e-3))[:, None, None] * downhill
    delta = energy.first_order(total, change, torch.zeros(16))
    assert (delta < 0).all()
    keep = refiner._settle(torch.ones(16, dtype=torch.bool), delta, change, torch.zeros(16))
    count = int(keep.sum())
    assert count in (1, 2, 4, 8) and keep[:count].all()
    assert refiner._trace[-1] < refiner._trace[-2]
    torch.testing.assert_close(refiner._total, total + change[:count].sum(0))
    too_many = energy.value(total + change[: 2 * count].sum(0), refiner._excess)
    assert too_many > here


def test_refinement_lowers_k_and_cross_entropy():
    graphs = make_graphs(sizes=[8, 12] * 8, seed=4)
    teacher = make_teacher()
    before = Refiner(teacher, graphs, RefineSettings()).metrics()
    seen = []
    result = refine(graphs, teacher, steps=400, seed=2, progress=lambda step, values: seen.append((step, values)))
    assert result.k < 0.25 * before["k"] and result.cross_entropy < before["cross_entropy"]
    assert result.steps == 400 and 0 < result.accepted <= 400 * 5
    assert [step for step, _ in seen] == list(range(50, 401, 50))
    assert seen[-1][1]["k"] == pytest.approx(result.k, rel=1e-5)
    assert seen[-1][1]["agreement"] == result.agreement
    assert torch.equal(result.graphs.y, graphs.y) and torch.equal(result.graphs.ptr, graphs.ptr)
    assert_simple(result.graphs.edges, [8, 12] * 8)
    again = make_graphs(sizes=[8, 12] * 8, seed=4)
    assert torch.equal(graphs.x, again.x) and torch.equal(graphs.edges.col, again.edges.col), "the input was changed"


def same(first: GraphBatch, second: GraphBatch) -> bool:
    parts = [(g.x, g.edges.rowptr, g.edges.col) for g in (first, second)]
    return all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


def test_equal_seeds_give_equal_graphs():
    teacher, graphs = make_teacher(), make_graphs()
    first, second, other = (refine(graphs, teacher, steps=60, seed=seed).graphs for seed in (5, 5, 6))
    assert same(first, second) and not same(first, other)


def test_a_search_in_another_batch_order_proposes_the_same():
    order = [3, 0, 7, 5, 1, 6, 2, 4]
    graphs, ids = make_graphs(), [10 * g for g in range(8)]
    # Features of one-hot rows and w_ce alone, no K: graphs do not influence one another, so the results agree too.
    options = {"steps": 40, "lam_k": 0.0, "share": 0.5, "rewire": 0.6, "cap": 0.0, "seed": 3}
    first = refine(graphs, make_teacher(), graph_ids=ids, **options)
    second = refine(graphs.select(order), make_teacher(), graph_ids=[ids[g] for g in order], **options)
    assert first.accepted > 5
    assert same(first.graphs.select(order), second.graphs)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_saved_and_resumed_search_is_the_same_search(tmp_path, temperature):
    teacher, graphs = make_teacher(), make_graphs()
    settings_ = RefineSettings(steps=90, temperature=temperature, rewire=0.5, share=0.6)
    straight = Refiner(teacher, graphs, settings_, seed=4)
    straight.advance(1000)

    interrupted = Refiner(teacher, graphs, settings_, seed=4)
    interrupted.advance(37)
    save_state(tmp_path / "state.safetensors", interrupted.state_dict())
    kept = interrupted.state_dict()
    interrupted.advance(20)
    resumed = Refiner(teacher, graphs, settings_, seed=4)
    for state in (load_state(tmp_path / "state.safetensors"), kept):
        resumed.load_state_dict(state)
        resumed.advance(1000)
        assert resumed.step == 90 and resumed.finished and resumed.accepted == straight.accepted
        first, second = resumed.result(), straight.result()
        assert same(first.graphs, second.graphs) and torch.equal(first.energy, second.energy)
    with pytest.raises(InputError, match="state: expected a search over as many graphs"):
        Refiner(teacher, make_graphs(sizes=(4, 4)), settings_).load_state_dict(kept)


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (7,), (2, 2), (1, 5, 3)])
@pytest.mark.parametrize("degree", [0.0, 2.0, 100.0])
def test_degenerate_graphs(sizes, degree):
    graphs = make_graphs(sizes=sizes, degree=degree, seed=1)
    result = refine(graphs, make_teacher(), steps=60, rewire=0.4, share=1.0)
    assert_simple(result.graphs.edges, sizes)
    assert result.energy.isfinite().all() and result.energy.diff().max() <= 1e-12


@pytest.mark.parametrize("kind", ["one-hot", "degree", "constant", "continuous"])
def test_only_labels_are_changed(kind):
    free = kind in ("one-hot", "degree")
    graphs = make_graphs(kind=kind)
    for named in (kind, None):
        result = refine(graphs, make_teacher(), steps=60, feature_kind=named)
        assert torch.equal(result.graphs.x, graphs.x) != free
        assert not torch.equal(result.graphs.edges.col, graphs.edges.col)
    if free:
        assert torch.equal(refine(graphs, make_teacher(), steps=60, relabel=0.0).graphs.x, graphs.x)


def test_pure_rewiring_keeps_the_number_of_edges():
    graphs = make_graphs()
    result = refine(graphs, make_teacher(), steps=200, rewire=1.0, share=1.0)
    counts = [EdgeLists.from_edges(g.edges).counts.tolist() for g in (graphs, result.graphs)]
    assert counts[0] == counts[1] and result.accepted > 50


def test_learned_logits_steer_new_edges():
    graphs = make_graphs(sizes=[8] * 6)
    layout = PairLayout.complete([8] * 6)
    allowed = torch.rand(layout.num_pairs, generator=torch.Generator().manual_seed(0)) < 0.5
    logits = torch.where(allowed, 0.0, -torch.inf)
    result = refine(graphs, make_teacher(), steps=150, rewire=0.5, relabel=0.0, edge_weights=(layout, logits))
    before, after = dense(graphs.edges), dense(result.graphs.edges)
    row, col = layout.pair_nodes()
    new = (after[row, col] == 1) & (before[row, col] == 0)
    assert new.sum() > 3 and not (new & ~allowed).any()


def test_without_energy_the_metropolis_chain_is_uniform_over_graphs():
    count = 1500
    graphs = make_graphs(sizes=[3] * count, degree=0.0, kind="constant")
    settings_ = RefineSettings(steps=60, lam_k=0.0, w_ce=0.0, temperature=1.0, share=1.0, rewire=0.3, connected=False)
    refiner = Refiner(make_teacher(), graphs, settings_, seed=11)
    refiner.advance(60)
    lists = EdgeLists.from_edges(refiner.graphs().edges)
    observed = torch.bincount(edge_sets(lists), minlength=8)
    chi_square = ((observed - count / 8) ** 2 / (count / 8)).sum()
    # 99.9 % point of chi-square with 7 degrees of freedom.
    assert chi_square < 24.3, observed


def test_metropolis_returns_the_best_it_saw():
    graphs, teacher = make_graphs(), make_teacher()
    result = refine(graphs, teacher, steps=200, temperature=2.0, seed=1, share=1.0)
    assert result.energy.diff().max() > 0
    fresh = Refiner(teacher, result.graphs, RefineSettings()).metrics()["energy"]
    assert fresh == pytest.approx(float(result.energy[::10].min()), rel=1e-5)
    assert fresh < float(result.energy[-1])


def test_a_teacher_without_batch_norm_is_searched_by_cross_entropy():
    graphs, teacher = make_graphs(), make_teacher("plain")
    with pytest.warns(RuntimeWarning, match="no BatchNorm layer") as caught:
        result = refine(graphs, teacher, steps=150)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert result.k is None and result.warning is None
    assert result.energy[-1] < result.energy[0] and result.energy.diff().max() <= 1e-12


def test_a_high_k_is_reported():
    with pytest.warns(RuntimeWarning, match="k: expected at most 0.05"):
        result = refine(make_graphs(), make_teacher(), steps=1)
    assert result.k > 0.05 and result.warning.startswith("k: expected at most 0.05")


def test_stop_k_ends_the_search_early():
    graphs = make_graphs(sizes=[8, 12] * 8, seed=4)
    full = refine(graphs, make_teacher(), steps=300, seed=2)
    goal = float(2 * full.k)
    short = refine(graphs, make_teacher(), steps=300, seed=2, stop_k=goal, min_steps=20)
    assert 20 <= short.steps < 300 and short.k < goal * 1.001
    assert torch.equal(short.energy, full.energy[: short.steps + 1])
    assert refine(graphs, make_teacher(), steps=300, seed=2, stop_k=1e9, min_steps=70).steps == 70


def test_zero_steps_return_the_start():
    graphs = make_graphs()
    with pytest.warns(RuntimeWarning, match="k: expected"):
        result = refine(graphs, make_teacher(), steps=0)
    assert same(result.graphs, graphs) and result.steps == result.accepted == 0


def nan_teacher():
    module = make_teacher().module
    return as_teacher(module, call=lambda m, g: m(g.x, g.edges) * torch.nan)


def edited_graphs(**changes) -> GraphBatch:
    graphs = make_graphs()
    return GraphBatch(changes.get("x", graphs.x), changes.get("edges", graphs.edges), changes.get("y", graphs.y))


def with_entry(row: int, col: int, value: float = 1.0) -> GraphBatch:
    edges = make_graphs().edges
    index, weight = edges.to_edge_index()
    index = torch.cat([index, torch.tensor([[col], [row]])], 1)
    return edited_graphs(edges=EdgeSample.from_edge_index(index, edges.ptr, torch.cat([weight, torch.tensor([value])])))


COMPLETE = PairLayout.complete(SIZES)
ABSENT = (dense(make_graphs().edges)[:6, :6] == 0).logical_xor(torch.eye(6, dtype=torch.bool)).nonzero()[0].tolist()
HALVED = make_graphs().edges.with_value(torch.full((make_graphs().edges.num_edges,), 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps: expected an integer, 0 or more"),
        ({"share": 0.0}, r"share: expected a number in \(0, 1\]"),
        ({"share": 1.5}, r"share: expected a number in \(0, 1\]"),
        ({"temperature": -0.1}, "temperature: expected a finite number, 0 or more"),
        ({"lam_k": float("nan")}, "lam_k: expected a finite number"),
        ({"cap": "low"}, "cap: expected a finite number"),
        ({"relabel": 1.1}, "relabel: expected a share"),
        ({"rewire": -0.1}, "rewire: expected a share"),
        ({"stop_k": 0.0}, "stop_k: expected None or a number above 0"),
        ({"min_steps": 1.5}, "min_steps: expected an integer"),
        ({"report_every": 0}, "report_every: expected"),
        ({"feature_kind": "two-hot"}, "feature_kind: expected one of"),
        ({"graphs": edited_graphs(x=torch.rand(45, WIDTH)), "feature_kind": "one-hot"}, "graphs.x: expected one-hot"),
        ({"graph_ids": [0] * 8}, "graph_ids: expected distinct ids"),
        ({"seed": 2**64}, "seed: expected an integer"),
        ({"graphs": edited_graphs(y=torch.full((8,), 2))}, r"graphs.y: expected a label in 0..1 .* got labels \[2\]"),
        ({"graphs": edited_graphs(y=torch.full((8,), -1))}, r"graphs.y: expected a label in 0..1 .* got labels \[-1\]"),
        ({"graphs": edited_graphs(y=None)}, "graphs.y: expected a label in 0..1 for every graph, got none"),
        ({"graphs": edited_graphs(x=torch.ones(45, 3))}, "width 4"),
        ({"graphs": make_graphs().select([])}, "graphs: expected a GraphBatch of 1 graph or more"),
        ({"graphs": with_entry(0, 0)}, "edges: expected simple undirected graphs"),
        ({"graphs": with_entry(0, 1)}, "edges: expected simple undirected graphs"),
        ({"graphs": with_entry(*ABSENT)}, "edges: expected simple undirected graphs"),
        ({"graphs": edited_graphs(edges=HALVED)}, "edges: expected simple undirected graphs"),
        ({"teacher": nan_teacher()}, "teacher: expected finite logits"),
        ({"edge_weights": (COMPLETE, torch.zeros(3))}, "edge_weights: expected a tensor of shape"),
        ({"edge_weights": (COMPLETE, torch.full((COMPLETE.num_pairs,), torch.nan))}, "edge_weights: expected logits"),
        ({"edge_weights": (PairLayout.complete([45]), torch.zeros(990))}, "edge_weights: expected a layout with the"),
        ({"edge_weights": (PairLayout.complete(SIZES, directed=True), torch.zeros(3))}, "an undirected PairLayout"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"graphs": make_graphs(), "teacher": make_teacher(), "steps": 2, **change}
    with pytest.raises(InputError, match=message) as caught:
        refine(**arguments)
    assert "\n" not in str(caught.value)
