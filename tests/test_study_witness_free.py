"""The study of norm-free witnesses measures what it says."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from acgkd_fast import GraphBatch, GraphPrior, RefineSettings, start_graphs
from acgkd_fast.distill.refine import Refiner
from acgkd_fast.teachers import as_teacher

pytest.importorskip("torch_geometric")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import study_witness_free as study


def make_task(norm: str = "layer", kind: str = "gcn") -> study.Task:
    torch.manual_seed(0)
    teacher = as_teacher(study.NormFree(kind, norm, 4, 3), feature_kind="one-hot")
    task = study.Task(teacher, None, None, GraphPrior(5, 8, feature_kind="one-hot"))
    graphs = start_graphs(task.teacher, task.prior, 40)
    return study.Task(teacher, graphs, graphs, task.prior)


@pytest.mark.parametrize("norm", ["none", "layer", "graph"])
@pytest.mark.parametrize("kind", ["gcn", "gin"])
def test_teachers_are_what_their_names_say(norm, kind):
    task = make_task(norm, kind)
    assert not task.teacher.batch_norms
    names = {type(layer).__name__ for layer in task.teacher.module.modules()}
    assert {"layer": "LayerNorm", "graph": "GraphNorm"}.get(norm, "Identity") in names
    assert ("GINConv" in names) is (kind == "gin")


def test_a_gauge_changes_no_answer_and_measures_what_it_is_told_to():
    task = make_task()
    graphs = start_graphs(task.teacher, task.prior, 30)
    for look in (lambda x: x, lambda x: (x > 0).to(x.dtype)):
        gauged = as_teacher(study.gauged(task, graphs, look))
        torch.testing.assert_close(gauged(graphs), task.teacher(graphs))
        # Nothing is far from itself; K of a Gauge is that of any BatchNorm.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Refiner(gauged, graphs, RefineSettings()).metrics()["k"] == pytest.approx(0.0, abs=1e-5)
        assert Refiner(gauged, start_graphs(task.teacher, task.prior, 7), RefineSettings()).metrics()["k"] > 1e-3
    half = study.gauged(task, None, lambda x: (x > 0).to(x.dtype))
    assert all((block.watch.target.running_mean == 0.5).all() for block in half.blocks)
    read = study.normalised(task)
    assert torch.equal(read.blocks[1].watch.target.running_mean, task.teacher.module.blocks[1].norm.bias)
    assert not task.teacher.batch_norms, "the teacher itself was changed"


@pytest.mark.parametrize("how", ["dropout", "noise"])
def test_perturbed_teachers_differ_and_answer_together(how, monkeypatch):
    task = make_task()
    graphs = start_graphs(task.teacher, task.prior, 10)
    before = copy.deepcopy(task.teacher.module.state_dict())
    together = study.perturbed(task, how)
    answers = torch.stack([member(graphs.x, graphs.edges).log_softmax(1) for member in together.members])
    assert len(answers) == 1 + study.COPIES and all(not torch.equal(a, answers[0]) for a in answers[1:])
    torch.testing.assert_close(together(graphs.x, graphs.edges), answers.mean(0))
    monkeypatch.setattr(study, "NOISE", 0.0)
    monkeypatch.setattr(study, "DROPPED", 0.0)
    same = study.perturbed(task, how)(graphs.x, graphs.edges)
    torch.testing.assert_close(same, task.teacher(graphs).log_softmax(1))
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.module.state_dict().items())


def test_labels_shares_and_selection():
    task = make_task()
    graphs = start_graphs(task.teacher, task.prior, 200)
    only_two = GraphBatch(torch.eye(4)[torch.arange(graphs.num_nodes) % 2], graphs.edges, graphs.y)
    stated = study.Task(task.teacher, only_two, only_two, task.prior)
    shares = study.with_shares(stated, graphs).x.mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.5, 0.0, 0.0]), atol=0.05, rtol=0.0)
    assert study.dealt(task, graphs).y.bincount().tolist() == graphs.y.bincount().tolist()
    some = study.selected(task, start_graphs(task.teacher, task.prior, 400))
    assert some.num_graphs == 3 * (study.GRAPHS // 3)


@pytest.mark.parametrize("row", study.ROWS)
def test_every_row_gives_a_pool_or_says_that_it_means_nothing(row, monkeypatch):
    monkeypatch.setattr(study, "GRAPHS", 9)
    monkeypatch.setattr(study, "STEPS", 3)
    for norm in ("layer", "none"):
        pool = study.ROWS[row](make_task(norm))
        if row.startswith("LayerNorm") and norm == "none":
            assert pool is None
        else:
            assert pool.num_graphs == (40 if row == "real graphs" else 9) and pool.y is not None


def test_the_table_reads_the_published_results(tmp_path):
    lines = study.read(study.RESULTS)
    assert lines and {line["row"] for line in lines} == set(study.ROWS)
    text = study.table(lines)
    assert "choose: MUTAG" in text and "confirm: house-or-cycle" in text
    line = next(line for line in lines if line["row"] == "start" and line["dataset"] == "MUTAG")
    (tmp_path / "one.jsonl").write_text(json.dumps(line) + "\n")
    mean = 100 * sum(line["accuracy"]) / len(line["accuracy"])
    assert f"{mean:.1f} (" in study.table(study.read(tmp_path / "one.jsonl")).splitlines()[-1]
