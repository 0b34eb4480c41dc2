"""Several candidates, two-hop bias, logits, swaps and limits: both engines alike, limits kept, a user's constraint."""

from __future__ import annotations

import json

import networkx as nx
import pytest
import torch
from helpers import opcheck, reference_kernels
from hypothesis import example, given, settings
from hypothesis import strategies as st
from search_helpers import (
    SIZES,
    WIDTH,
    assert_state_is_fresh,
    drawn_logits,
    drawn_teacher,
    edge_lists,
    listed,
    make_graphs,
    make_teacher,
    operator_arguments,
    searched,
)

from acgkd_fast import GraphBatch, InputError, _library
from acgkd_fast.checkpoints import save_model
from acgkd_fast.cli import main
from acgkd_fast.distill.config import RunConfig
from acgkd_fast.distill.edge_lists import EdgeLists
from acgkd_fast.distill.energy import GraphScores
from acgkd_fast.distill.moves import LANES, Lane, Limits, MoveMix, proposal_uniforms, propose
from acgkd_fast.distill.refine import Refiner, RefineSettings, refine
from acgkd_fast.distill.run import Run
from acgkd_fast.distill.statistics import BatchNormProbe

NATIVE = _library.backend("search_steps", "cpu") == "native"
native_only = pytest.mark.skipif(not NATIVE, reason="the extension is not built")
pytestmark = pytest.mark.filterwarnings("ignore:k. expected at most 0.05")
ENGINES = ["generic", pytest.param("native", marks=native_only)]
LOGITS, RING = drawn_logits(SIZES * 2), drawn_logits(SIZES * 2, 0.5)
# As for a Refiner; "logits" stands for its edge_weights.
OPTIONS = {
    "two-hop": {"two_hop": 0.5, "connected": False},
    "always two-hop": {"two_hop": 1.0, "connected": False},
    "swaps": {"keep_degrees": True, "connected": False},
    "connected": {"connected": True},
    "degree": {"max_degree": 2, "connected": False},
    "connected swaps": {"keep_degrees": True, "connected": True},
    "limits and two-hop": {"two_hop": 0.7, "connected": True, "max_degree": 3},
    "logits": {"logits": LOGITS, "connected": False},
    "logits of a ring": {"logits": RING, "max_degree": 3, "connected": False},
    "logits, two-hop": {"logits": LOGITS, "two_hop": 0.6, "connected": False},
    "logits of a ring, two-hop": {"logits": RING, "two_hop": 1.0, "connected": True},
}


def both(arch: str, features: str, logits=None, degree=None, **options) -> tuple[Refiner, Refiner]:
    teacher, graphs = drawn_teacher(arch), make_graphs(kind=features, sizes=SIZES * 2, degree=degree)
    made = (
        Refiner(teacher, graphs, RefineSettings(engine=engine, **options), seed=3, edge_weights=logits)
        for engine in ("generic", "native")
    )
    return next(made), next(made)


@native_only
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("arch", "degree"), [("gcn3-8", None), ("gin3-8", 2.5)])
def test_annealed_searches_stay_together(arch, degree, options):
    """Each decision compares with a random number, so that rounding seldom decides."""
    settings_ = {"steps": 150, "relabel": 0.2, "rewire": 0.5, "share": 0.8, "temperature": 2.0}
    generic, native = both(arch, "one-hot", degree=degree, **settings_, **options)
    generic.advance(150)
    native.advance(150)
    assert generic.accepted == native.accepted > 300
    assert torch.equal(edge_lists(generic._lists), edge_lists(native._lists))
    assert torch.equal(generic._x, native._x)
    traces = [torch.stack(refiner._trace) for refiner in (generic, native)]
    torch.testing.assert_close(*traces, rtol=1e-4, atol=1e-5)


@native_only
@pytest.mark.parametrize("proposals", [1, 4])
@pytest.mark.parametrize("options", [{"connected": False}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@pytest.mark.parametrize("arch", ["gcn4-12", "gin3-8"])
def test_greedy_searches_stay_together(arch, options, proposals):
    """With features that tell all nodes apart no two edits are equivalent."""
    generic, native = both(arch, "continuous", steps=150, rewire=0.5, share=0.3, proposals=proposals, **options)
    generic.advance(150)
    native.advance(150)
    assert torch.equal(edge_lists(generic._lists), edge_lists(native._lists))
    assert generic.accepted == native.accepted > 20
    traces = [torch.stack(refiner._trace) for refiner in (generic, native)]
    torch.testing.assert_close(*traces, rtol=1e-4, atol=1e-5)
    assert traces[1].diff().max() <= 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_of_several_candidates_is_kept(engine):
    """By hand: every candidate alone, measured by a forward pass over the whole graph."""
    several, graphs, teacher = 6, make_graphs(sizes=(8,) * 12), drawn_teacher()
    options = {"lam_k": 0.0, "cap": 0.0, "share": 1.0, "connected": False, "proposals": several, "engine": engine}
    refiner = Refiner(teacher, graphs, RefineSettings(**options), seed=9)
    lists, sizes, start = refiner._lists.clone(), refiner._sizes, refiner._scores.loss.clone()
    lists.reserve(1)
    refiner.advance()
    u = proposal_uniforms(torch.arange(12), 0, 1, 9, several)[0].view(12, several, LANES)
    losses, label = [], graphs.x.argmax(1)
    with torch.no_grad(), BatchNormProbe(teacher.module) as probe:
        for candidate in u.unbind(1):
            edits = propose(lists, sizes, candidate, MoveMix(0.6, 0.9), WIDTH)
            node = graphs.ptr[:-1] + edits.node
            changed = label.index_put((node,), (label[node] + edits.shift) % WIDTH)
            x = torch.nn.functional.one_hot(changed, WIDTH).float()
            edited = GraphBatch(x, lists.edited(edits).to_edges(graphs.ptr, 96), graphs.y)
            losses.append(torch.where(edits.valid, GraphScores.of(teacher, probe, edited).loss, torch.inf))
    best = torch.stack(losses).amin(0)
    assert (best < start - 1e-5).sum() > 5 and (torch.stack(losses)[0] > best + 1e-5).any()
    torch.testing.assert_close(refiner._scores.loss, torch.minimum(best, start), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_candidate_is_that_of_a_single_one(engine):
    one, three = (proposal_uniforms(torch.arange(5), 7, 4, 1, several) for several in (1, 3))
    assert torch.equal(one, three[..., :LANES])
    assert not torch.equal(three[..., :LANES], three[..., LANES : 2 * LANES])
    graphs = make_graphs()
    plain = refine(graphs, drawn_teacher(), steps=60, engine=engine)
    named = refine(graphs, drawn_teacher(), steps=60, engine=engine, proposals=1, two_hop=0.0, max_degree=None)
    assert torch.equal(plain.energy, named.energy)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_candidates_make_more_of_each_step(engine):
    graphs = make_graphs(sizes=[8, 12] * 8, seed=4)
    ends = [refine(graphs, make_teacher(), steps=150, proposals=k, engine=engine, seed=2).energy for k in (1, 8)]
    assert ends[1][-1] < 0.8 * ends[0][-1] and all(energy.diff().max() <= 1e-12 for energy in ends)


def degrees(edges: list[tuple[int, int]], n: int) -> list[int]:
    return [sum(node in edge for edge in edges) for node in range(n)]


@settings(max_examples=60, deadline=None)
@given(
    engine=st.sampled_from(["generic", "native"] if NATIVE else ["generic"]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    degree=st.sampled_from([None, 0.0, 2.0, 100.0]),
    connected=st.booleans(),
    keep_degrees=st.booleans(),
    max_degree=st.sampled_from([None, 1, 3]),
    two_hop=st.sampled_from([0.0, 0.5, 1.0]),
    weighted=st.booleans(),
    greedy=st.booleans(),
    seed=st.integers(0, 100),
)
@example("generic", [2, 1], None, False, False, None, 0.5, True, False, 0)
def test_limits_hold_after_every_search(
    engine, sizes, degree, connected, keep_degrees, max_degree, two_hop, weighted, greedy, seed
):
    graphs = make_graphs(seed, sizes, degree)
    options = {"connected": connected, "keep_degrees": keep_degrees, "max_degree": max_degree, "share": 1.0}
    options |= {"proposals": 2} if greedy else {"temperature": 20.0}
    options |= {} if keep_degrees else {"two_hop": two_hop}
    logits = drawn_logits(sizes, None, seed) if weighted and not keep_degrees else None
    refiner = searched(
        drawn_teacher(), graphs, seed, 40, relabel=0.1, rewire=0.4, engine=engine, edge_weights=logits, **options
    )
    before = EdgeLists.from_edges(graphs.edges)
    assert_state_is_fresh(refiner, graphs)
    for g, n in enumerate(sizes):
        edges = listed(before, g), listed(refiner._lists, g)
        first, last = (degrees(part, n) for part in edges)
        whole = [nx.is_connected(nx.Graph([*part, *((k, k) for k in range(n))])) for part in edges]
        assert not connected or whole[1] or not whole[0]
        assert not keep_degrees or first == last
        limit = max_degree or n
        assert all(there <= max(limit, here) for here, there in zip(first, last, strict=True))
        if logits is not None:
            layout, values = logits
            allowed = {pair for pair, value in zip(zip(*local_pairs(layout, g), strict=True), values, strict=False)}
            assert set(edges[1]) - set(edges[0]) <= allowed


def local_pairs(layout, graph: int) -> tuple[list[int], list[int]]:
    pairs = torch.arange(int(layout.pair_ptr[graph]), int(layout.pair_ptr[graph + 1]))
    base = int(layout.node_ptr[graph])
    low, high = layout.pair_nodes(pairs)
    return (low - base).tolist(), (high - base).tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_in_parts_may_be_joined_and_then_stays_whole(engine):
    graphs = make_graphs(sizes=[6] * 30, degree=1.0, seed=2)
    options = {"connected": True, "temperature": 1e6, "relabel": 0.0, "rewire": 0.5, "share": 1.0, "steps": 400}
    refiner = Refiner(drawn_teacher(), graphs, RefineSettings(engine=engine, **options), seed=1)
    whole = refiner._lists.connected(refiner._sizes)
    assert 0 < whole.sum() < 15
    for _ in range(40):
        refiner.advance(10)
        now = refiner._lists.connected(refiner._sizes)
        assert (now | ~whole).all()
        whole = now
    assert whole.sum() > 25


@pytest.mark.parametrize("options", [{"proposals": 3}, *OPTIONS.values()], ids=["several", *OPTIONS])
@pytest.mark.parametrize("interval", [1, 4])
@native_only
def test_operator_and_oracle_agree(options, interval):
    logits, several = options.get("logits"), options.get("proposals", 1)
    mix = MoveMix(0.3 if several == 1 else 0.0, 0.5, options.get("two_hop", 0.0), options.get("keep_degrees", False))
    arguments = operator_arguments(
        steps=40,
        # No two edits are equivalent, between which rounding would decide.
        features="one-hot" if several == 1 else "continuous",
        interval=interval,
        mix=mix,
        edge_weights=logits,
        proposals=several,
        limits=Limits(options.get("connected", True), options.get("max_degree", 0)),
        temperature=0.0 if several > 1 else 0.5,
    )
    with reference_kernels() as ran:
        expected = torch.ops.acgkd_fast.search_steps(*arguments)
    assert "search_steps" in ran
    actual = torch.ops.acgkd_fast.search_steps(*arguments)
    assert torch.equal(actual[-1], expected[-1]) and int(expected[-1][1]) > 10
    assert torch.equal(actual[2], expected[2]) and torch.equal(actual[1], expected[1])
    lists = [EdgeLists(result[0], result[1]) for result in (actual, expected)]
    assert torch.equal(edge_lists(lists[0]), edge_lists(lists[1]))
    for ours, theirs in zip(actual[3:9], expected[3:9], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_opcheck(poison):
    mix, limits = MoveMix(0.3, 0.5, 0.5), Limits(True, 3)
    cases = [operator_arguments(mix=mix, limits=limits, edge_weights=LOGITS, proposals=2)]
    opcheck("search_steps", [*cases, operator_arguments(mix=MoveMix(0.3, 0.5, 0.0, True))])


@native_only
def test_bits_do_not_depend_on_the_number_of_threads():
    options = {"mix": MoveMix(0.3, 0.5, 0.5), "limits": Limits(True, 4), "edge_weights": LOGITS, "proposals": 3}
    arguments, before, results = operator_arguments(steps=64, **options), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.acgkd_fast.search_steps(*arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


def valence(graphs: GraphBatch) -> torch.Tensor:
    """Nodes of label 0 have two partners at most."""
    degree = graphs.edges.rowptr.diff()
    broken = (graphs.x[:, 0] == 1) & (degree > 2)
    return ~torch.zeros(graphs.num_graphs, dtype=torch.bool).index_put((graphs.batch()[broken],), torch.tensor(True))


@pytest.mark.parametrize("options", [{}, {"proposals": 3}, {"temperature": 3.0}, {"two_hop": 0.5}])
def test_a_users_constraint_is_kept(options):
    graphs = make_graphs(sizes=SIZES * 3)
    graphs = GraphBatch(graphs.x.roll(1, 1) * 0 + torch.eye(WIDTH)[3], graphs.edges, graphs.y)
    assert valence(graphs).all()
    free = refine(graphs, make_teacher(), steps=200, engine="generic", **options)
    assert not valence(free.graphs).all()
    refiner = Refiner(make_teacher(), graphs, RefineSettings(steps=200, **options), constraint=valence)
    assert refiner.engine == "generic"
    for _ in range(20):
        refiner.advance(10)
        assert valence(refiner.graphs()).all()
    assert refiner.accepted > 50 and (refiner.graphs().x[:, 0] == 1).any()


def test_a_run_keeps_to_a_constraint_and_the_commands_options(tmp_path):
    config = RunConfig(num_graphs=12).with_settings({"refine.steps": 60, "student.epochs": 1, "prior.max_nodes": 12})
    few = lambda graphs: torch.bincount(graphs.batch(), graphs.x[:, 0], graphs.num_graphs) <= 4  # noqa: E731
    graphs = Run(tmp_path / "run", make_teacher(), config, constraint=few).make_graphs()
    plain = Run(tmp_path / "plain", make_teacher(), config).make_graphs()
    assert few(graphs).sum() > few(plain).sum()

    save_model(tmp_path / "teacher.safetensors", make_teacher().module)
    search = ["--refine-steps", "20", "--proposals", "2", "--any-parts", "--max-degree", "3", "--two-hop", "0.25"]
    options = [*search, "--num-graphs", "8", "--nodes", "5:7", "--epochs", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="0"):
        main(["distill", "--teacher", str(tmp_path / "teacher.safetensors"), *options])
    settings_ = json.loads((tmp_path / "out/config.json").read_text())["settings"]["refine"]
    assert settings_["proposals"] == 2 and not settings_["connected"] and not settings_["keep_degrees"]
    assert settings_["max_degree"] == 3 and settings_["two_hop"] == 0.25


def test_learned_logits_and_swaps_go_together_in_a_run(tmp_path):
    settings_ = {"learn.steps": 2, "refine.steps": 40, "refine.keep_degrees": True, "prior.max_nodes": 12}
    config = RunConfig(num_graphs=6).with_settings(settings_)
    assert Run(tmp_path / "run", make_teacher(), config).make_graphs().num_graphs == 6


def test_a_constraint_that_cannot_be_used_is_named():
    graphs, teacher = make_graphs(), make_teacher()
    if NATIVE:
        with pytest.raises(InputError, match=r"engine: .* got 'native', but a constraint is given, a Python function"):
            refine(graphs, teacher, engine="native", constraint=valence)
    with pytest.raises(InputError, match="constraint: expected a function of a GraphBatch"):
        refine(graphs, teacher, constraint=[True])
    for answer in (True, torch.ones(3, dtype=torch.bool), torch.ones(graphs.num_graphs)):
        with pytest.raises(InputError, match="constraint: expected"):
            refine(graphs, teacher, steps=3, constraint=lambda _, answer=answer: answer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"two_hop": 1.5}, "two_hop: expected a share"),
        ({"proposals": 0}, "proposals: expected 1..1024, got 0"),
        ({"proposals": 2.0}, "proposals: expected 1..1024"),
        ({"proposals": 2, "temperature": 0.1}, "proposals: expected 1 with a temperature above 0, got 2"),
        ({"max_degree": 0}, "max_degree: expected None or 1 or more, got 0"),
        ({"connected": 1}, "connected: expected True or False"),
        ({"keep_degrees": None}, "keep_degrees: expected True or False"),
        ({"keep_degrees": True, "two_hop": 0.5}, "two_hop: expected 0 with keep_degrees, got 0.5"),
        ({"keep_degrees": True, "edge_weights": drawn_logits(SIZES)}, "edge_weights: expected none with keep_degrees"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(InputError, match=message) as caught:
        refine(make_graphs(), make_teacher(), steps=2, **change)
    assert "\n" not in str(caught.value)


@native_only
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (33, 0, "proposals: expected 1 or more"),
        (38, lambda t: t[1:], "weight: expected a contiguous Double cpu tensor"),
        (39, lambda t: t[1:], "cumulative: expected a contiguous Double cpu tensor"),
        (40, lambda t: t + 1, "table: expected the offsets of a PairLayout"),
        (40, None, "weight: expected cumulative sums and an undirected layout"),
        (41, 2, "weight: expected cumulative sums and an undirected layout"),
        (40, drawn_logits(SIZES * 2, 0.5)[0].table.flip(1), "table: expected the offsets"),
    ],
)
def test_the_kernel_checks_the_weights(place, value, message):
    arguments = list(operator_arguments(edge_weights=LOGITS))
    assert Lane.NEAR < LANES
    arguments[place] = value(arguments[place]).contiguous() if callable(value) else value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.acgkd_fast.search_steps(*arguments)
