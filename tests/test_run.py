"""The run folder: whole runs, interruption and resumption, bad settings."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from run_helpers import FILES, WIDTH, folder_contents, make_teacher
from safetensors import safe_open

from acgkd_fast import checkpoints, files
from acgkd_fast.distill.config import RunConfig
from acgkd_fast.distill.metrics import MetricsLog
from acgkd_fast.distill.pool import start_graphs
from acgkd_fast.distill.run import Evaluation, Run
from acgkd_fast.distill.student import teacher_logits
from acgkd_fast.errors import DataError, InputError
from acgkd_fast.pseudo_graphs import GraphPrior
from acgkd_fast.report import result_table, write_report
from acgkd_fast.teachers import as_teacher

DATA = Path(__file__).parents[2] / "shared" / "data"

pytestmark = pytest.mark.filterwarnings("ignore:k. expected at most:RuntimeWarning", "ignore:student. expected the")


def make_config(**changes):
    small = {
        "num_graphs": 12,
        "prior.min_nodes": 5,
        "prior.max_nodes": 8,
        "refine.steps": 120,
        "student.epochs": 6,
        **changes,
    }
    return RunConfig().with_settings(small)


def make_evaluation():
    real = start_graphs(as_teacher(make_teacher()), GraphPrior(5, 8), 20, seed=9)
    return Evaluation("made up", real.select(range(10)), real.select(range(10, 20)))


class Stop(Exception):
    """Stands for Ctrl-C or a killed process."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn.steps": 15, "refine.steps": 0, "student.redraw": True},
        {"learn.steps": 10, "refine.steps": 60},
        {"refine.steps": 0},
        {"student.reuse_classifier": False},
    ],
    ids=["refine", "learn and redraw", "learn then refine", "start graphs alone", "plain student"],
)
def test_whole_run(tmp_path, changes):
    teacher = make_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    results = Run(tmp_path / "run", teacher, make_config(**changes)).execute(make_evaluation(), students=2)

    assert folder_contents(tmp_path / "run") == FILES
    rows = {row["row"]: row for row in results}
    plain = (
        set() if changes.get("student.reuse_classifier") is False else {"plain gcn3-35 of equal size on pseudo-graphs"}
    )
    assert set(rows) == plain | {
        "teacher (made up)",
        "student on pseudo-graphs",
        "same student on random graphs",
        "same student on real graphs",
        "majority class",
    }
    assert rows["student on pseudo-graphs"]["seeds"] == 2
    assert all(0.0 <= row["accuracy"] <= 1.0 for row in results)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), f"the run changed the teacher's {name}"

    student, metadata = checkpoints.load_model(tmp_path / "run" / "student.safetensors")
    assert metadata["arch"] == "gcn3-32" and student.num_features == WIDTH
    pool, _ = checkpoints.load_graphs(tmp_path / "run" / "pseudo_graphs.safetensors")
    assert pool.num_graphs == 12 and int(pool.sizes.min()) >= 5 and int(pool.sizes.max()) <= 8
    if changes == {"refine.steps": 0}:
        # Nobody has made them fit labels of their own, so they have the teacher's.
        assert torch.equal(pool.y, teacher_logits(as_teacher(teacher), pool).argmax(1))
    else:
        assert (pool.y.bincount() == 6).all()
    with safe_open(tmp_path / "run" / "student.safetensors", "pt") as file:
        assert file.keys()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert RunConfig.from_dict(config["settings"]) == make_config(**changes)
    assert config["versions"]["torch"] == torch.__version__
    page = (tmp_path / "run" / "report.html").read_text()
    assert "student on pseudo-graphs" in page and page.count("<svg") >= 2
    assert "divergence K" in page and "Start graphs tried" in page and "<p>Chosen: " in page
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (said,) = [line for line in lines if line["stage"] == "pool"]
    assert said["graphs"] == 12 and said["nodes"] == pool.num_nodes and 2 * said["edges"] == pool.edges.num_edges
    assert said["k"] > 0.0 and 0.0 <= said["agreement"] <= 1.0 and said["peak_memory_mib"] > 1.0
    assert (said["candidates"] > 0) == (changes.get("learn.steps", 0) > 0)
    *tried, found = [line for line in lines if line["stage"] == "prior"]
    shape = ("hub_share", "size_spread", "degree_growth", "ego_networks")
    kinds = [[line[name] for name in shape] for line in tried]
    assert len(tried) > 1 and "k" not in found
    assert [found[name] for name in shape] in kinds
    assert round(found["mean_degree"], 2) in [line["mean_degree"] for line in tried]


DEGREES = {"prior.feature_kind": "degree"}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 6),
        ({"start_share": 0.25}, 3),
        ({"start_share": 0.0}, 0),
        ({"start_share": 1.0}, 12),
        ({"refine.steps": 0}, 12),
    ],
    ids=["default", "a quarter", "none", "all", "no search"],
)
def test_start_graphs_whose_features_are_degrees_stay(tmp_path, changes, kept):
    teacher = make_teacher(width=6)
    run = Run(tmp_path / "run", teacher, make_config(**DEGREES, **changes))
    pool = run.make_graphs()
    start = start_graphs(as_teacher(teacher), run.prior, 12, seed=run.config.seed)
    assert torch.equal(pool.sizes, start.sizes)

    def alike(graph):
        one, other = pool.select([graph]), start.select([graph])
        return torch.equal(one.x, other.x) and torch.equal(one.edges.col, other.edges.col)

    same = [alike(graph) for graph in range(12)]
    assert all(same[12 - kept :]) and (kept == 12 or not all(same[: 12 - kept]))
    stay = torch.arange(12 - kept, 12)
    answers = teacher_logits(as_teacher(teacher), pool).argmax(1)
    assert torch.equal(pool.y[stay], answers[stay])
    # Of the others the search deals labels anew, each class equally often.
    assert abs(int(pool.y[: 12 - kept].bincount(minlength=2).diff())) <= kept % 2
    degrees = pool.edges.rowptr.diff().long().clamp(max=5)
    assert torch.equal(pool.x.argmax(1)[pool.batch() >= 12 - kept], degrees[pool.batch() >= 12 - kept])


def test_which_start_graphs_stay():
    degrees = make_config(**DEGREES)
    assert make_config().kept_share() == 0.0 and degrees.kept_share() == 0.5
    assert degrees.kept_share(constrained=True) == 0.0
    for bounded in ({"refine.max_degree": 3}, {"refine.keep_degrees": True}, {"learn.steps": 5}):
        assert degrees.with_settings(bounded).kept_share() == 0.0
    assert degrees.with_settings({"start_share": 0.1, "refine.max_degree": 3}).kept_share() == 0.1
    for wrong in (-0.1, 1.5, "half"):
        with pytest.raises(InputError, match=r"start_share: expected None or a number in \[0, 1\]"):
            make_config(start_share=wrong)
    with pytest.raises(InputError, match=r"start_share: expected None or 0 with a learning stage, got 0\.5"):
        make_config(**{"start_share": 0.5, "learn.steps": 5})


def test_a_run_from_several_mean_degrees(tmp_path):
    Run(tmp_path / "run", make_teacher(), make_config(**{"prior.mean_degree": (2.05, 4.0)})).execute()
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["prior"]["mean_degree"] == [2.05, 4.0]
    assert RunConfig.from_dict(settings).prior.mean_degree == (2.05, 4.0)
    assert "mean degree 2.05 and 4, hub share" in (tmp_path / "run" / "report.html").read_text()


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        Run(tmp_path / name, make_teacher(), make_config()).execute()
    for product in ("student.safetensors", "pseudo_graphs.safetensors"):
        assert (tmp_path / "a" / product).read_bytes() == (tmp_path / "b" / product).read_bytes()
    Run(tmp_path / "c", make_teacher(), make_config(seed=1)).execute()
    assert (tmp_path / "a" / product).read_bytes() != (tmp_path / "c" / product).read_bytes()


@pytest.mark.parametrize(
    ("stage", "at"), [("prior", 2), ("learn", 10), ("refine", 50), ("student-0", 3), ("student-1", 2)]
)
def test_interrupted_and_resumed_run_has_the_same_files(tmp_path, monkeypatch, stage, at):
    monkeypatch.setattr("acgkd_fast.distill.run._SAVE_SECONDS", 0.0)
    config = make_config(**{"learn.steps": 20, "refine.steps": 100})
    Run(tmp_path / "whole", make_teacher(), config).execute(students=2)

    def interrupt(name, step, total, values):
        if name == stage and step >= at:
            raise Stop

    folder = tmp_path / "cut"
    with pytest.raises(Stop):
        Run(folder, make_teacher(), config, progress=interrupt).execute(students=2)
    Run(folder, make_teacher(), config, resume=True).execute(students=2)
    assert folder_contents(folder) == FILES
    for product in ("student.safetensors", "pseudo_graphs.safetensors"):
        assert (folder / product).read_bytes() == (tmp_path / "whole" / product).read_bytes()

    def steps(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(line["stage"], line["step"]) for line in lines]

    assert sorted(steps(folder)) == sorted(steps(tmp_path / "whole"))


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", make_teacher(), make_config())
    real = files.write_bytes

    def write(path, data):
        if Path(path).name == "student.safetensors":
            raise DataError(f"{path}: expected to write {len(data)} bytes, got an error ({os.strerror(errno.ENOSPC)})")
        real(path, data)

    monkeypatch.setattr(files, "write_bytes", write)
    with pytest.raises(DataError, match="No space left"):
        run.execute()
    assert "pseudo_graphs.safetensors" in folder_contents(tmp_path / "run")
    monkeypatch.undo()
    Run(tmp_path / "run", make_teacher(), make_config(), resume=True).execute()
    assert folder_contents(tmp_path / "run") == FILES


def test_folders_in_use_and_settings_that_differ(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="out: expected an empty or new folder"):
        Run(folder, make_teacher(), make_config())
    assert (folder / "mine.txt").read_text() == "keep me"
    with pytest.raises(InputError, match="resume: expected an interrupted run"):
        Run(tmp_path / "nowhere", make_teacher(), make_config(), resume=True)
    Run(tmp_path / "other", make_teacher(), make_config())
    other = make_config(**{"num_graphs": 13, "refine.cap": 0.2})
    with pytest.raises(InputError, match=r"resume: expected the settings .* got others of num_graphs, refine.cap$"):
        Run(tmp_path / "other", make_teacher(), other, resume=True)
    with pytest.raises(InputError, match=r"got others of student$"):
        Run(tmp_path / "other", make_teacher(), make_config(), student="gin3-32", resume=True)
    record = tmp_path / "other" / "config.json"
    record.write_text(record.read_text().replace('"perturbation": null', '"perturb": 0.0'))
    with pytest.raises(InputError, match=r"got others of perturbation, perturb$"):
        Run(tmp_path / "other", make_teacher(), make_config(perturbation=0.1), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_graphs": 0}, "num_graphs: expected at least 1"),
        ({"xi": 0.0}, "xi: expected a number in"),
        ({"xi": 1.5}, "xi: expected a number in"),
        ({"prior.min_nodes": 9, "prior.max_nodes": 5}, "min_nodes, max_nodes"),
        ({"prior.min_nodes": 0}, "min_nodes, max_nodes"),
        ({"prior.feature_kind": "colour"}, "feature_kind: expected one of"),
        ({"learn.temperature": -1.0}, "temperature: expected a number above 0"),
        ({"refine.temperature": -1.0}, "temperature"),
        ({"refine.share": 0.0}, "share"),
        ({"student.temperature": 0.0}, "temperature"),
        ({"student.loss": "l7"}, "loss"),
        (
            {"student.kl_weight": 0.0, "student.feature_weight": 0.0},
            "kl_weight, mse_weight, feature_weight: expected one of them above 0",
        ),
        (
            {"student.feature_weight": 1.0, "student.reuse_classifier": False},
            "feature_weight: expected 0 without reuse_classifier",
        ),
        ({"student.projector": "mlp"}, "projector: expected one of gat, linear, none"),
        ({"student.curriculum.difficulty": "size"}, "difficulty: expected one of"),
        ({"student.curriculum.start_share": 0.0}, "start_share: expected a number in"),
        ({"student.curriculum": "teacher_loss"}, "config.student.curriculum: expected an object of settings"),
        ({"student.adversary.mode": "local"}, "mode: expected one of"),
        ({"student.adversary.low": 30.0}, "low, high: expected 0 < low < high"),
        ({"student.adversary.mode": "global", "student.temperature": 1.0}, "temperature: expected a start between"),
        ({"student.redraw": True}, "redraw"),
        ({"learn.stepps": 3}, "stepps"),
        ({"nonsense": 3}, "nonsense"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        RunConfig().with_settings(changes)


@pytest.mark.parametrize("nodes, steps", [((5, 9), 100), ((20, 30), 100), ((40, 60), 200), ((200, 600), 400)])
def test_larger_graphs_are_searched_longer(nodes, steps):
    sizes = {"prior.min_nodes": nodes[0], "prior.max_nodes": nodes[1], "refine.steps": 100}
    assert RunConfig().with_settings(sizes).search.steps == steps
    assert RunConfig().with_settings({**sizes, "scale_steps": False}).search.steps == 100


def test_settings_leave_what_they_are_given_alone():
    prior = {"mean_degree": 5.0, "max_nodes": 20}
    config = RunConfig().with_settings({"prior": prior, "prior.mean_degree": 2.0})
    assert config.prior.mean_degree == 2.0 and prior == {"mean_degree": 5.0, "max_nodes": 20}


def test_config_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(DataError, match="expected a JSON file"):
        RunConfig.from_file(path)
    path.write_text("{")
    with pytest.raises(DataError, match="expected JSON"):
        RunConfig.from_file(path)
    path.write_text("[1]")
    with pytest.raises(DataError, match="JSON object"):
        RunConfig.from_file(path)
    path.write_text(json.dumps({"num_graphs": 7, "refine": {"steps": 3}}))
    config = RunConfig.from_file(path)
    assert (config.num_graphs, config.refine.steps, config.student) == (7, 3, RunConfig().student)


def test_result_table_and_report_without_results(tmp_path):
    rows = [{"row": "a", "accuracy": 0.5, "deviation": 0.01, "seeds": 5}, {"row": "bb", "accuracy": 1.0}]
    assert result_table(rows).splitlines()[1:] == ["a    50.0 % +- 1.0 (5 seeds)", "bb  100.0 %"]
    pool = make_evaluation().test
    path = write_report(tmp_path, [], pool, {"settings": "<script>"})
    assert "<script>" not in path.read_text()


def test_metrics_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("learn", 1, {"loss": 2.0})
    with path.open("a") as file:
        file.write('{"stage": "lea')
    log = MetricsLog(path)
    log.write("learn", 2, {"loss": 1.0})
    assert [row["step"] for row in log.read()] == [1, 2]
    log.rewind("learn", 1)
    assert [row["step"] for row in log.read()] == [1]
