"""The compiled search: its state against forward passes from scratch, its edits against the generic engine's."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import OPCHECKED, opcheck, reference_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from search_helpers import SIZES, WIDTH, GraphNormTeacher, PlainTeacher, assert_simple, edge_sets, make_graphs

from acgkd_fast import EdgeSample, GraphBatch, InputError, _library
from acgkd_fast.distill.edge_lists import EdgeLists
from acgkd_fast.distill.energy import Energy, GraphScores
from acgkd_fast.distill.moves import MoveMix
from acgkd_fast.distill.refine import Refiner, RefineSettings, refine
from acgkd_fast.distill.statistics import BatchNormProbe
from acgkd_fast.nn.models import build_model
from acgkd_fast.search import pack_teacher, search_steps
from acgkd_fast.search.api import SearchState
from acgkd_fast.search.reference import forward
from acgkd_fast.teachers import Teacher, as_teacher

OPCHECKED.add("search_steps")
NATIVE = _library.backend("search_steps", "cpu") == "native"
native_only = pytest.mark.skipif(not NATIVE, reason="the extension is not built")
pytestmark = [
    pytest.mark.filterwarnings("ignore:k. expected at most 0.05"),
    pytest.mark.filterwarnings("ignore:teacher. no BatchNorm"),
]


def make_teacher(arch: str = "gcn3-8", readout: str = "sum", seed: int = 0, logit_scale: float = 1.0) -> Teacher:
    """Statistics and affine parameters of every norm are drawn, so that each counts."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = build_model(arch, WIDTH, 2, readout=readout)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.3, 2.0, generator=generator)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
            torch.nn.init.normal_(layer.bias, generator=generator)
    with torch.no_grad():
        model.classifier.weight.mul_(logit_scale)
        for block in model.blocks:
            if hasattr(block.conv, "eps"):
                block.conv.eps.fill_(0.3)
    return as_teacher(model)


def searched(teacher, graphs, seed=3, steps=100, **options) -> Refiner:
    refiner = Refiner(teacher, graphs, RefineSettings(steps=steps, **options), seed=seed)
    refiner.advance(steps)
    return refiner


def assert_state_is_fresh(refiner: Refiner) -> None:
    """Sums, losses and energy are those of a forward pass over the graphs as they stand."""
    now = refiner.graphs()
    assert_simple(now.edges, refiner._sizes.tolist())
    energy = refiner._energy
    fresh_energy, fresh = Energy.start(energy.lam_k, energy.w_ce, energy.cap, refiner.teacher, now)
    size = fresh.sums.abs().amax((0, 2)).clamp(min=1.0)[None, :, None]
    torch.testing.assert_close(refiner._scores.sums / size, fresh.sums / size, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(refiner._scores.loss, fresh.loss, rtol=1e-4, atol=1e-4 * float(fresh.loss.max()) + 1e-5)
    margin = forward(pack_teacher(refiner.teacher.module), now.x, now.edges)[0].diff(dim=1).abs().squeeze(1)
    assert (refiner._scores.hit == fresh.hit)[margin > 1e-3].all()
    torch.testing.assert_close(refiner._total, refiner._scores.sums.sum(0), rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(refiner._excess, energy.excess(refiner._scores.loss).sum(), rtol=1e-9, atol=1e-9)
    value = fresh_energy.value(refiner._total, refiner._excess)
    torch.testing.assert_close(refiner._trace[-1], value, rtol=1e-9, atol=1e-12)


@native_only
@settings(max_examples=40, deadline=None)
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
    seed=st.integers(0, 1000),
)
def test_incremental_state_equals_a_forward_pass_from_scratch(
    kind, depth, width, readout, sizes, degree, features, rewire, interval, temperature, seed
):
    teacher = make_teacher(f"{kind}{depth + 1}-{width}", readout, seed)
    graphs = make_graphs(seed, sizes, degree, features)
    options = {"share": 0.7, "rewire": rewire, "interval": interval, "temperature": temperature, "engine": "native"}
    assert_state_is_fresh(searched(teacher, graphs, seed, 60, **options))


@native_only
@pytest.mark.parametrize("features", ["one-hot", "constant"])
@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8", "gcn2-16", "gcn5-20"])
def test_a_step_keeps_the_edits_that_the_generic_engine_keeps(arch, features):
    """Step by step from one state: many edits give an isomorphic graph, and which of those pass is rounding."""
    teacher, graphs = make_teacher(arch), make_graphs(kind=features, sizes=SIZES * 2)
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


def edge_lists(lists: EdgeLists) -> torch.Tensor:
    """Each graph's list as one number, float64; the order counts."""
    place = torch.arange(1, lists.pairs.shape[1] + 1).double().sqrt()
    return (torch.where(lists.used(), lists.pairs + 1, 0) * place).sum(1)


@native_only
@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8", "gcn4-12"])
def test_the_same_labels_as_the_generic_engine(arch):
    """Relabelling never gives an equivalent graph, so the searches stay together."""
    graphs = make_graphs(sizes=SIZES * 2)
    runs = [
        searched(make_teacher(arch), graphs, relabel=1.0, steps=200, engine=engine) for engine in ("generic", "native")
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


def operator_arguments(arch: str = "gcn3-8", *, steps: int = 6, relabel: float = 1.0, **options) -> tuple:
    """What `search_steps` hands to the operator."""
    refiner = Refiner(make_teacher(arch), make_graphs(sizes=SIZES * 2), RefineSettings(engine="generic"), seed=3)
    caught: list[tuple] = []
    plain = torch.ops.acgkd_fast.search_steps

    class Catch(Exception):
        pass

    def catch(*arguments):
        caught.append(arguments)
        raise Catch

    energy = refiner._energy
    energy = Energy(energy.lam_k, energy.w_ce, 0.0, energy.num_graphs, energy.rows, energy.running)
    excess = energy.excess(refiner._scores.loss).sum()
    level = torch.stack([excess, energy.value(refiner._total, excess)])
    state = SearchState(refiner._lists, refiner._x.argmax(1), refiner._scores, refiner._total, level)
    try:
        torch.ops.acgkd_fast.search_steps = catch
        search_steps(
            pack_teacher(refiner.teacher.module),
            energy,
            state,
            refiner._x,
            refiner._y,
            refiner._ptr,
            refiner._ids,
            seed=3,
            first_step=0,
            steps=steps,
            edited=9,
            mix=MoveMix(relabel, 0.5),
            num_labels=WIDTH,
            **options,
        )
    except Catch:
        pass
    finally:
        torch.ops.acgkd_fast.search_steps = plain
    return caught[0]


def test_opcheck(poison):
    opcheck("search_steps", [operator_arguments(), operator_arguments("gin3-8", steps=0)])
    with reference_kernels():
        opcheck("search_steps", [operator_arguments(relabel=0.5)])


@pytest.mark.parametrize("arch", ["gcn4-12", "gin3-8"])
@pytest.mark.parametrize("readout", ["sum", "mean", "max"])
def test_packed_weights_give_the_teachers_answers(arch, readout):
    teacher, graphs = make_teacher(arch, readout), make_graphs()
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
    refiner = searched(make_teacher(arch), make_graphs(sizes=SIZES * 5), steps=128, share=share, interval=interval)
    trace = torch.stack(refiner._trace)
    assert len(trace) == 129 and trace.diff().max() <= 1e-12 and trace[-1] < trace[0]
    assert (trace.diff()[[t for t in range(128) if (t + 1) % interval]] == 0).all()
    assert_state_is_fresh(refiner)


@native_only
def test_rounds_that_raise_the_energy_are_taken_back():
    """All graphs at once, in long rounds: together they overshoot, and the halving has to undo whole rounds."""
    refiner = Refiner(
        make_teacher(), make_graphs(sizes=(6,) * 40), RefineSettings(share=1.0, interval=32, cap=0.0), seed=1
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
    refiner = searched(make_teacher(arch), graphs, steps=60, rewire=0.4, share=1.0, engine="native")
    assert refiner.step == 60
    assert_state_is_fresh(refiner)
    assert torch.stack(refiner._trace).diff().max() <= 1e-12


@native_only
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_saturated_logits(scale):
    teacher, graphs = make_teacher(logit_scale=scale), make_graphs(sizes=SIZES * 2)
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
        refiner = Refiner(make_teacher(), graphs, options, seed=4)
        while not refiner.finished:
            refiner.advance(chunk)
        traces.append(torch.stack(refiner._trace))
    assert torch.equal(traces[0], traces[1]) and torch.equal(traces[0], traces[2])


@native_only
def test_stop_k_ends_a_call_where_the_generic_engine_stops():
    graphs, options = make_graphs(sizes=[8, 12] * 8, seed=4), {"relabel": 1.0, "steps": 300, "seed": 2}
    goal = 1.1 * refine(graphs, make_teacher(), **options).k
    runs = [
        refine(graphs, make_teacher(), stop_k=goal, min_steps=20, engine=engine, **options)
        for engine in ("native", "generic")
    ]
    assert runs[0].steps == runs[1].steps < 300 and runs[0].k < goal * 1.001
    assert torch.equal(runs[0].graphs.x, runs[1].graphs.x)


@native_only
def test_the_metropolis_chain_has_the_boltzmann_distribution():
    """All 64 graphs of 4 nodes by enumeration; without K every graph is a chain of its own."""
    count, heat = 4000, 0.7
    teacher = make_teacher("gcn3-8", logit_scale=10.0)
    graphs = make_graphs(sizes=[4] * count, degree=0.0, kind="constant")
    graphs = GraphBatch(graphs.x, graphs.edges, torch.zeros(count, dtype=torch.int64))
    options = {"lam_k": 0.0, "cap": 0.0, "temperature": heat, "share": 1.0, "rewire": 0.3, "engine": "native"}
    refiner = searched(teacher, graphs, 11, 150, **options)
    observed = torch.bincount(edge_sets(EdgeLists.from_edges(refiner.graphs().edges)), minlength=64)

    every = [[pair for pair in range(6) if mask >> pair & 1] for mask in range(64)]
    ends = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    index = [(4 * g + a, 4 * g + b) for g, pairs in enumerate(every) for a, b in (ends[p] for p in pairs)]
    both = torch.tensor(index + [(b, a) for a, b in index]).T
    batch = GraphBatch(torch.ones(256, WIDTH), EdgeSample.from_edge_index(both, torch.arange(0, 257, 4)))
    loss = torch.nn.functional.cross_entropy(teacher(batch), torch.zeros(64, dtype=torch.int64), reduction="none")
    expected = count * torch.softmax(-loss.double() / heat, 0)
    assert expected.max() > 3 * expected.min() > 15
    chi_square = ((observed - expected) ** 2 / expected).sum()
    # 99.9 % point of chi-square with 63 degrees of freedom.
    assert chi_square < 103.4, chi_square


def hooked() -> Teacher:
    teacher = make_teacher()
    teacher.module.classifier.register_forward_hook(lambda module, args, out: out * 2)
    return teacher


def exchanged() -> Teacher:
    teacher = make_teacher()
    teacher.module.blocks[1].norm = copy.deepcopy(teacher.module.blocks[1].norm)
    teacher.module.blocks[0].conv.add_self_loops = False
    return teacher


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (lambda: as_teacher(GraphNormTeacher()), "GraphNormTeacher is no plain GraphClassifier"),
        (lambda: as_teacher(PlainTeacher()), "PlainTeacher is no plain GraphClassifier"),
        (lambda: as_teacher(make_teacher().module, call=lambda m, g: m(g.x, g.edges)), "called through an adapter"),
        (hooked, "hooks are registered on it"),
        (exchanged, "a layer of it was exchanged"),
    ],
)
@native_only
def test_other_teachers_take_the_generic_engine(teacher, reason):
    graphs = make_graphs()
    refiner = searched(teacher(), graphs, steps=30)
    assert refiner.engine == "generic" and refiner.step == 30 and refiner.accepted > 0
    message = f"engine: expected 'auto' or 'generic' .* got 'native', but .*{reason}"
    with pytest.raises(InputError, match=message) as caught:
        Refiner(teacher(), graphs, RefineSettings(engine="native"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="interval: expected 1 for the generic engine, got 4"):
        Refiner(teacher(), graphs, RefineSettings(interval=4))


@native_only
def test_double_precision_takes_the_generic_engine():
    teacher, graphs = make_teacher(), make_graphs()
    wide = as_teacher(copy.deepcopy(teacher.module).double())
    graphs = GraphBatch(graphs.x.double(), graphs.edges.with_value(graphs.edges.value.double()), graphs.y)
    assert searched(wide, graphs, steps=5).engine == "generic"
    with pytest.raises(InputError, match="the features are float64, not float32"):
        Refiner(wide, graphs, RefineSettings(engine="native"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "fast"}, "engine: expected one of auto, native, generic, got 'fast'"),
        ({"interval": 0}, "interval: expected 1 step or more"),
        ({"interval": 2.0}, "interval: expected 1 step or more"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(InputError, match=message):
        RefineSettings(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps: expected 0 or more"),
        ({"interval": 0}, "interval: expected 1 step or more"),
        ({"seed": 2**64}, "seed: expected an integer"),
        ({"edited": 0}, "edited: expected 1..8 graphs"),
        ({"edited": 9}, "edited: expected 1..8 graphs"),
    ],
)
def test_bad_arguments_are_named(change, message):
    refiner = Refiner(make_teacher(), make_graphs(), RefineSettings())
    state = SearchState(
        refiner._lists, refiner._x.argmax(1), refiner._scores, refiner._total, torch.zeros(2, dtype=torch.float64)
    )
    options = {"seed": 0, "first_step": 0, "steps": 1, "edited": 1, "mix": MoveMix(0.5, 0.5), "num_labels": 4, **change}
    with pytest.raises(InputError, match=message):
        search_steps(
            pack_teacher(refiner.teacher.module),
            refiner._energy,
            state,
            refiner._x,
            refiner._y,
            refiner._ptr,
            refiner._ids,
            **options,
        )


@native_only
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, lambda t: t[:, :1], "room for one more edge per step"),
        (0, lambda t: t + 50, "edges low < high inside them"),
        (1, lambda t: t - 100, "room for one more edge per step"),
        (2, lambda t: t + 4, "label: expected values in 0..3"),
        (9, lambda t: t + 2, "y: expected values in 0..1"),
        (10, lambda t: t + 1, "ptr, pairs, counts: expected graphs"),
        (12, lambda t: t[1:], "parameters: expected a contiguous Float cpu tensor"),
        (13, lambda t: t.float(), "running: expected a contiguous Double cpu tensor"),
    ],
)
def test_the_kernel_checks_what_it_reads(place, value, message):
    arguments = list(operator_arguments())
    arguments[place] = value(arguments[place]).contiguous()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.acgkd_fast.search_steps(*arguments)


def test_scores_of_the_start_come_from_the_teacher():
    refiner = Refiner(make_teacher(), make_graphs(), RefineSettings())
    with torch.no_grad(), BatchNormProbe(refiner.teacher.module) as probe:
        fresh = GraphScores.of(refiner.teacher, probe, refiner.graphs())
    torch.testing.assert_close(refiner._scores.sums, fresh.sums)
