"""The compiled search: its state against forward passes from scratch, its edits against the generic engine's."""

from __future__ import annotations

import pytest
import torch
from helpers import OPCHECKED, opcheck, reference_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from search_helpers import (
    SIZES,
    assert_state_is_fresh,
    drawn_logits,
    drawn_teacher,
    edge_lists,
    make_graphs,
    operator_arguments,
    searched,
)

from acgkd_fast import _library
from acgkd_fast.distill.refine import Refiner, RefineSettings, refine
from acgkd_fast.distill.statistics import BatchNormProbe
from acgkd_fast.search import pack_teacher
from acgkd_fast.search.reference import forward

OPCHECKED.add("search_steps")
NATIVE = _library.backend("search_steps", "cpu") == "native"
native_only = pytest.mark.skipif(not NATIVE, reason="the extension is not built")
pytestmark = [
    pytest.mark.filterwarnings("ignore:k. expected at most 0.05"),
    pytest.mark.filterwarnings("ignore:teacher. no BatchNorm"),
]


@native_only
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["gcn", "gin"]),
    depth=st.integers(1, 5),
    width=st.sampled_from([1, 5, 16, 20, 33]),
    readout=st.sampled_from(["sum", "mean", "max"]),
    sizes=st.lists(st.integers(1, 14), min_size=1, max_size=6),
    degree=st.sampled_from([None, 0.0, 2.0, 100.0]),
    features=st.sampled_from(["one-hot", "constant", "continuous"]),
    rewire=st.sampled_from([0.0, 0.5, 1.0]),
    interval=st.sampled_from([1, 3, 50]),
    temperature=st.sampled_from([0.0, 0.0, 5.0]),
    proposals=st.sampled_from([1, 2, 5]),
    two_hop=st.sampled_from([0.0, 0.5, 1.0]),
    keep_degrees=st.booleans(),
    connected=st.booleans(),
    max_degree=st.sampled_from([None, 1, 4]),
    xi=st.sampled_from([None, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_incremental_state_equals_a_forward_pass_from_scratch(
    kind, depth, width, readout, sizes, degree, features, proposals, two_hop, keep_degrees, xi, seed, **options
):
    teacher = drawn_teacher(f"{kind}{depth + 1}-{width}", readout, seed)
    graphs = make_graphs(seed, sizes, degree, features)
    options |= {"share": 0.7, "engine": "native", "proposals": 1 if options["temperature"] else proposals}
    options |= {"keep_degrees": True} if keep_degrees else {"two_hop": two_hop}
    logits = None if keep_degrees or xi is None else drawn_logits(sizes, xi, seed)
    assert_state_is_fresh(searched(teacher, graphs, seed, 60, edge_weights=logits, **options), graphs)


@native_only
@pytest.mark.parametrize("features", ["one-hot", "constant"])
@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8", "gcn2-16", "gcn5-20"])
def test_a_step_keeps_the_edits_that_the_generic_engine_keeps(arch, features):
    """Step by step from one state: many edits give an isomorphic graph, and which of those pass is rounding."""
    teacher, graphs = drawn_teacher(arch), make_graphs(kind=features, sizes=SIZES * 2)
    generic, native = (
        Refiner(teacher, graphs, RefineSettings(steps=80, rewire=0.5, engine=engine), seed=3)
        for engine in ("generic", "native")
    )
    for _ in range(80):
        state, total = generic.state_dict(), generic._total
        native.load_state_dict(state)
        generic.advance()
        native.advance()
        lists = [refiner._lists for refiner in (generic, native)]
        unlike = edge_lists(lists[0]) != edge_lists(lists[1])
        label = (generic._x != native._x).any(1)
        unlike = unlike.index_put((graphs.batch()[label],), torch.tensor(True))
        ours, theirs, energy = native._scores, generic._scores, native._energy
        gain = energy.first_order(total, ours.sums - theirs.sums, energy.excess(ours.loss) - energy.excess(theirs.loss))
        assert (gain[unlike].abs() < 1e-5).all(), gain[unlike]
        torch.testing.assert_close(ours.sums[~unlike], theirs.sums[~unlike], rtol=1e-4, atol=1e-3)
    assert generic.accepted > 20


@native_only
@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8", "gcn4-12"])
def test_the_same_labels_as_the_generic_engine(arch):
    """Relabelling never gives an equivalent graph, so the searches stay together."""
    graphs = make_graphs(sizes=SIZES * 2)
    runs = [
        searched(drawn_teacher(arch), graphs, relabel=1.0, steps=200, engine=engine) for engine in ("generic", "native")
    ]
    assert torch.equal(runs[0]._x, runs[1]._x) and runs[0].accepted == runs[1].accepted > 30
    traces = [torch.stack(run._trace) for run in runs]
    torch.testing.assert_close(*traces, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("interval", [1, 4, 7])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"stop_k": 1e9, "min_steps": 15}])
@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8"])
def test_operator_and_oracle_agree(arch, options, interval):
    arguments = operator_arguments(arch, steps=40, interval=interval, **options)
    with reference_kernels() as ran:
        expected = torch.ops.acgkd_fast.search_steps(*arguments)
    assert "search_steps" in ran
    actual = torch.ops.acgkd_fast.search_steps(*arguments)
    taken = int(expected[-1][0])
    assert torch.equal(actual[-1], expected[-1]) and int(expected[-1][1]) > 5
    assert torch.equal(actual[2], expected[2]) and torch.equal(actual[1], expected[1])
    for ours, theirs in zip(actual[3:9], expected[3:9], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert actual[8][taken:].isnan().all()
    assert taken == (20 if "stop_k" in options else 40)


def test_opcheck(poison):
    opcheck("search_steps", [operator_arguments(), operator_arguments("gin3-8", steps=0)])
    with reference_kernels():
        opcheck("search_steps", [operator_arguments(relabel=0.5)])


@pytest.mark.parametrize("arch", ["gcn4-12", "gin3-8"])
@pytest.mark.parametrize("readout", ["sum", "mean", "max"])
def test_packed_weights_give_the_teachers_answers(arch, readout):
    teacher, graphs = drawn_teacher(arch, readout), make_graphs()
    with torch.no_grad(), BatchNormProbe(teacher.module) as probe:
        expected = teacher(graphs)
    logits, norms = forward(pack_teacher(teacher.module), graphs.x, graphs.edges)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(norms, probe.inputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@native_only
@pytest.mark.parametrize("interval", [1, 2, 8, 64])
@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("arch", ["gcn4-12", "gin3-8"])
def test_greedy_energy_never_rises(arch, share, interval):
    refiner = searched(drawn_teacher(arch), make_graphs(sizes=SIZES * 5), steps=128, share=share, interval=interval)
    trace = torch.stack(refiner._trace)
    assert len(trace) == 129 and trace.diff().max() <= 1e-12 and trace[-1] < trace[0]
    assert (trace.diff()[[t for t in range(128) if (t + 1) % interval]] == 0).all()
    assert_state_is_fresh(refiner)


@native_only
def test_rounds_that_raise_the_energy_are_taken_back():
    """All graphs at once, in long rounds: together they overshoot, and the halving has to undo whole rounds."""
    refiner = Refiner(
        drawn_teacher(), make_graphs(sizes=(6,) * 40), RefineSettings(share=1.0, interval=32, cap=0.0), seed=1
    )
    overshoots = 0
    for _ in range(6):
        before = refiner.state_dict()
        with reference_kernels():
            refiner.advance(32)
        expected = refiner.state_dict()
        moved = (expected["scores"]["sums"] != before["scores"]["sums"]).flatten(1).any(1)
        overshoots += int(moved.sum()) < 40
        refiner.load_state_dict(before)
        refiner.advance(32)
        assert_state_is_fresh(refiner)
    assert overshoots > 0


@native_only
@pytest.mark.parametrize("arch", ["gcn2-8", "gin2-8", "gcn5-20"])
@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (7,), (2, 2), (1, 5, 3)])
@pytest.mark.parametrize("degree", [0.0, 2.0, 100.0])
def test_degenerate_graphs(arch, sizes, degree):
    """Single nodes, no edges, all edges; one-layer teachers."""
    graphs = make_graphs(sizes=sizes, degree=degree, seed=1)
    refiner = searched(drawn_teacher(arch), graphs, steps=60, rewire=0.4, share=1.0, engine="native")
    assert refiner.step == 60
    assert_state_is_fresh(refiner, graphs)
    assert torch.stack(refiner._trace).diff().max() <= 1e-12


@native_only
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_saturated_logits(scale):
    teacher, graphs = drawn_teacher(logit_scale=scale), make_graphs(sizes=SIZES * 2)
    refiner = searched(teacher, graphs, engine="native")
    assert torch.stack(refiner._trace).isfinite().all() and refiner.accepted > 0
    assert_state_is_fresh(refiner)


@native_only
@pytest.mark.parametrize("interval", [1, 16])
@pytest.mark.parametrize("arch", ["gcn4-12", "gin3-8"])
def test_bits_do_not_depend_on_the_number_of_threads(arch, interval):
    arguments, before = operator_arguments(arch, steps=64, relabel=0.5, interval=interval), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.acgkd_fast.search_steps(*arguments))
    finally:
        torch.set_num_threads(before)
    assert int(results[0][-1][1]) > 30
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


@native_only
@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("interval", [1, 5, 7])
def test_calls_of_any_length_make_the_same_search(interval, temperature):
    graphs, traces = make_graphs(sizes=SIZES * 2), []
    for chunk in (300, 23, 3):
        options = RefineSettings(steps=300, rewire=0.5, interval=interval, temperature=temperature)
        refiner = Refiner(drawn_teacher(), graphs, options, seed=4)
        while not refiner.finished:
            refiner.advance(chunk)
        traces.append(torch.stack(refiner._trace))
    assert torch.equal(traces[0], traces[1]) and torch.equal(traces[0], traces[2])


@native_only
def test_stop_k_ends_a_call_where_the_generic_engine_stops():
    graphs, options = make_graphs(sizes=[8, 12] * 8, seed=4), {"relabel": 1.0, "steps": 300, "seed": 2}
    goal = 1.1 * refine(graphs, drawn_teacher(), **options).k
    runs = [
        refine(graphs, drawn_teacher(), stop_k=goal, min_steps=20, engine=engine, **options)
        for engine in ("native", "generic")
    ]
    assert runs[0].steps == runs[1].steps < 300 and runs[0].k < goal * 1.001
    assert torch.equal(runs[0].graphs.x, runs[1].graphs.x)
