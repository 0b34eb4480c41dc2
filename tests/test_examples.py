"""The examples run, most of them in small."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {
    "own_model": ({"num_graphs": 40, "epochs": 5, "pool_size": 20, "steps": 20}, {"teacher", "student"}),
    "cmi_driver": (
        {"num_graphs": 30, "teacher_epochs": 2, "epochs": 1, "steps": 5, "kd_steps": 3},
        {"teacher", "student"},
    ),
    "dfad_loop": ({"num_graphs": 30, "teacher_epochs": 2, "rounds": 2, "batch_size": 8}, {"teacher", "student"}),
    "condensation": (
        {"num_graphs": 10, "per_class": 2, "steps": 3, "epochs": 5},
        {"all graphs", "start", "condensed"},
    ),
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:k. expected at most:RuntimeWarning")
@pytest.mark.parametrize("name", RUNS)
def test_example(name):
    pytest.importorskip("torch_geometric", reason="the examples' data are made with torch-geometric")
    arguments, rows = RUNS[name]
    scores = load(name).main(**arguments)
    assert set(scores) == rows
    assert all(0.0 <= score <= 1.0 for score in scores.values())


def test_learn_structure():
    """The learned graph keeps to classes better than the given one: at full size, which takes seconds."""
    scores = load("learn_structure").main()
    assert scores["edges inside classes, learned"] > scores["edges inside classes, given"] + 0.02
    assert all(0.0 <= score <= 1.0 for score in scores.values())


def test_explain_edges():
    """Even in small the edges of the motif come before the others more often than not."""
    pytest.importorskip("torch_geometric", reason="the example's classifier is written with torch-geometric")
    scores = load("explain_edges").main(num_graphs=80, epochs=60, explained=10, steps=60)
    assert scores["motif edges ranked"] > 0.55 and scores["accuracy"] > 0.7


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*RUNS, "learn_structure", "explain_edges"}
