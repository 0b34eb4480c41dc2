"""What the compiled search refuses, and what then takes its place."""

from __future__ import annotations

import copy

import pytest
import torch
from search_helpers import GraphNormTeacher, PlainTeacher, drawn_teacher, make_graphs, operator_arguments, searched

from acgkd_fast import GraphBatch, InputError, _library
from acgkd_fast.distill.energy import GraphScores
from acgkd_fast.distill.moves import MoveMix
from acgkd_fast.distill.refine import Refiner, RefineSettings
from acgkd_fast.distill.statistics import BatchNormProbe
from acgkd_fast.search import pack_teacher, search_steps
from acgkd_fast.search.api import SearchState
from acgkd_fast.teachers import Teacher, as_teacher

NATIVE = _library.backend("search_steps", "cpu") == "native"
native_only = pytest.mark.skipif(not NATIVE, reason="the extension is not built")
pytestmark = [
    pytest.mark.filterwarnings("ignore:k. expected at most 0.05"),
    pytest.mark.filterwarnings("ignore:teacher. no BatchNorm"),
]


def hooked() -> Teacher:
    teacher = drawn_teacher()
    teacher.module.classifier.register_forward_hook(lambda module, args, out: out * 2)
    return teacher


def exchanged() -> Teacher:
    teacher = drawn_teacher()
    teacher.module.blocks[1].norm = copy.deepcopy(teacher.module.blocks[1].norm)
    teacher.module.blocks[0].conv.add_self_loops = False
    return teacher


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (lambda: as_teacher(GraphNormTeacher()), "GraphNormTeacher is no plain GraphClassifier"),
        (lambda: as_teacher(PlainTeacher()), "PlainTeacher is no plain GraphClassifier"),
        (lambda: as_teacher(drawn_teacher().module, call=lambda m, g: m(g.x, g.edges)), "called through an adapter"),
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
    teacher, graphs = drawn_teacher(), make_graphs()
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
    refiner = Refiner(drawn_teacher(), make_graphs(), RefineSettings())
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
    refiner = Refiner(drawn_teacher(), make_graphs(), RefineSettings())
    with torch.no_grad(), BatchNormProbe(refiner.teacher.module) as probe:
        fresh = GraphScores.of(refiner.teacher, probe, refiner.graphs())
    torch.testing.assert_close(refiner._scores.sums, fresh.sums)
