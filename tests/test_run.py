"""The run folder and the command line: whole runs, interruption and resumption, bad input."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from acgkd_fast import checkpoints, files
from acgkd_fast.cli import main
from acgkd_fast.distill.config import RunConfig
from acgkd_fast.distill.metrics import MetricsLog
from acgkd_fast.distill.pool import start_graphs
from acgkd_fast.distill.run import Evaluation, Run
from acgkd_fast.errors import DataError, InputError
from acgkd_fast.nn.models import build_model
from acgkd_fast.pseudo_graphs import GraphPrior
from acgkd_fast.report import result_table, write_report
from acgkd_fast.teachers import as_teacher

DATA = Path(__file__).parents[2] / "shared" / "data"
WIDTH = 3

pytestmark = pytest.mark.filterwarnings("ignore:k. expected at most:RuntimeWarning", "ignore:student. expected the")


def make_teacher(path=None, width=WIDTH):
    torch.manual_seed(0)
    model = build_model("gcn3-8", width, 2).eval()
    if path is not None:
        checkpoints.save_model(path, model, {"feature_kind": "one-hot"})
    return model


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


def folder_contents(folder):
    return {path.name for path in folder.iterdir()}


FILES = {"student.safetensors", "pseudo_graphs.safetensors", "metrics.jsonl", "config.json", "report.html"}


class Stop(Exception):
    """Stands for Ctrl-C or a killed process."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn.steps": 15, "refine.steps": 0, "student.redraw": True},
        {"learn.steps": 10, "refine.steps": 60},
        {"refine.steps": 0},
    ],
    ids=["refine", "learn and redraw", "learn then refine", "start graphs alone"],
)
def test_whole_run(tmp_path, changes):
    teacher = make_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    results = Run(tmp_path / "run", teacher, make_config(**changes)).execute(make_evaluation(), students=2)

    assert folder_contents(tmp_path / "run") == FILES
    rows = {row["row"]: row for row in results}
    assert set(rows) == {
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
    kinds = [[line[name] for name in ("hub_share", "size_spread", "degree_growth")] for line in tried]
    assert len(tried) > 1 and "k" not in found
    assert [found[name] for name in ("hub_share", "size_spread", "degree_growth")] in kinds
    assert round(found["mean_degree"], 2) in [line["mean_degree"] for line in tried]


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
    with pytest.raises(InputError, match="resume: expected the settings"):
        Run(tmp_path / "other", make_teacher(), make_config(num_graphs=13), resume=True)


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
        ({"student.kl_weight": 0.0}, "kl_weight, mse_weight, feature_weight: expected one of them above 0"),
        ({"student.feature_weight": 1.0}, "feature_weight: expected 0 without reuse_classifier"),
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


# Command line


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line_error(result, *words):
    assert result.exit_code != 0
    lines = [line for line in result.output.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    for word in words:
        assert word in lines[0], result.output


@pytest.fixture
def teacher_file(tmp_path):
    path = tmp_path / "teacher.safetensors"
    make_teacher(path)
    return path


SMALL = ("--num-graphs", 8, "--nodes", "5:7", "--refine-steps", 30, "--epochs", 2)


def test_distill_command_and_resume(tmp_path, teacher_file):
    out = tmp_path / "run"
    result = invoke("distill", "--teacher", teacher_file, "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    assert folder_contents(out) == FILES
    again = invoke("distill", "--teacher", teacher_file, "--out", out, *SMALL)
    one_line_error(again, "empty or new folder")
    resumed = invoke("distill", "--teacher", teacher_file, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.output


def test_what_the_command_line_says_of_the_graphs(tmp_path, teacher_file):
    out = tmp_path / "run"
    small = ("--num-graphs", 8, "--refine-steps", 30, "--epochs", 2)
    shape = ("--mean-nodes", 8, "--mean-degree", 3.0, "--hub-share", 0.25)
    result = invoke("distill", "--teacher", teacher_file, "--out", out, *small, *shape)
    assert result.exit_code == 0, result.output
    prior = json.loads((out / "config.json").read_text())["settings"]["prior"]
    assert (prior["min_nodes"], prior["max_nodes"]) == (4, 12)
    assert (prior["mean_degree"], prior["hub_share"], prior["size_spread"]) == (3.0, 0.25, None)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tried = [row for row in rows if row["stage"] == "prior" and "k" in row]
    assert {row["size_spread"] for row in tried} == {0.0, 0.5, 1.0}
    assert {(row["mean_degree"], row["hub_share"]) for row in tried} == {(3.0, 0.25)}
    stated = ("--mean-nodes", 8, "--size-spread", 0.5, "--degree-growth", 1, "--mean-degree", 3, "--hub-share", 0)
    result = invoke("distill", "--teacher", teacher_file, "--out", tmp_path / "other", *small, *stated)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "other" / "metrics.jsonl").read_text()
    assert not any(line["stage"] == "prior" and "k" in line for line in map(json.loads, text.splitlines()))


def test_a_spread_in_the_file_stays_where_the_mean_is_given(tmp_path, teacher_file):
    small = ("--num-graphs", 8, "--refine-steps", 5, "--epochs", 1, "--mean-nodes", 8, "--mean-degree", 3)
    for stated, wanted in ((0.5, 0.5), (0.0, None)):
        settings = tmp_path / "settings.json"
        settings.write_text(json.dumps({"prior": {"size_spread": stated, "hub_share": 0.0}, "prior_steps": 5}))
        out = tmp_path / f"run{stated}"
        result = invoke("distill", "--teacher", teacher_file, "--out", out, "--config", settings, *small)
        assert result.exit_code == 0, result.output
        assert json.loads((out / "config.json").read_text())["settings"]["prior"]["size_spread"] == wanted


def test_bad_command_lines(tmp_path, teacher_file):
    out = tmp_path / "run"
    both = ("--nodes", "5:7", "--mean-nodes", 8)
    one_line_error(invoke("distill", "--teacher", teacher_file, "--out", out, *both), "mean-nodes", "got 8")
    one_line_error(invoke("distill", "--teacher", teacher_file, "--out", out, "--mean-nodes", 1), "mean_nodes")
    one_line_error(invoke("distill", "--teacher", teacher_file, "--out", out, "--hub-share", 2), "hub_share")
    one_line_error(invoke("distill", "--teacher", tmp_path / "none", "--out", out), "none", "expected")
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(teacher_file.read_bytes()[:100])
    one_line_error(invoke("distill", "--teacher", corrupt, "--out", out), "corrupt")
    wrong = make_teacher()
    with torch.no_grad():
        wrong.classifier.weight[0, 0] = torch.nan
    nan_file = tmp_path / "nan.safetensors"
    checkpoints.save_model(nan_file, wrong)
    one_line_error(invoke("distill", "--teacher", nan_file, "--out", out), "classifier.weight")
    one_line_error(invoke("distill", "--teacher", teacher_file, "--out", out, "--nodes", "0:5"), "min_nodes")
    one_line_error(invoke("distill", "--teacher", teacher_file, "--out", out, "--nodes", "few"), "LOW:HIGH")
    one_line_error(invoke("distill", "--teacher", teacher_file, "--out", out, "--xi", "2"), "xi")
    one_line_error(invoke("distill", "--teacher", teacher_file, "--out", out, "--student", "cnn"), "arch")
    one_line_error(invoke("distill", "--teacher", teacher_file, "--out", out, "--eval-dataset", "MUTAG"), "data-root")
    missing = ("--eval-dataset", "MUTAG", "--data-root", tmp_path / "nowhere")
    one_line_error(invoke("distill", "--teacher", teacher_file, "--out", out, *missing), "MUTAG")
    # Nothing was begun for any of these.
    assert not out.exists()


def test_interruption_says_how_to_go_on(tmp_path, teacher_file, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("acgkd_fast.distill.run.Run.teach", interrupt)
    result = invoke("distill", "--teacher", teacher_file, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 130 and "--resume" in result.output
    monkeypatch.undo()
    assert (tmp_path / "run" / "pseudo_graphs.safetensors").exists()
    assert invoke("distill", "--teacher", teacher_file, "--out", tmp_path / "run", "--resume").exit_code == 0


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the data sets in {DATA}")
def test_mutag_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("torch_geometric", reason="reading TUDatasets needs torch-geometric")
    monkeypatch.setenv("ACGKD_FAST_CACHE", str(tmp_path / "cache"))
    data = ("--data-root", DATA)
    teacher, out = tmp_path / "teacher.safetensors", tmp_path / "run"
    trained = invoke("train-teacher", "--dataset", "MUTAG", *data, "--arch", "gcn3-16", "--epochs", 3, "--out", teacher)
    assert trained.exit_code == 0, trained.output
    distilled = invoke("distill", "--teacher", teacher, "--out", out, "--eval-dataset", "MUTAG", *data, *SMALL)
    assert distilled.exit_code == 0, distilled.output
    assert "same student on random graphs" in distilled.output
    scored = invoke("evaluate", "--model", out / "student.safetensors", "--dataset", "MUTAG", *data, "--json")
    answer = json.loads(scored.output)
    assert {"accuracy", "num_graphs", "majority"} <= answer.keys()
    assert answer["num_graphs"] == 57
    wrong = tmp_path / "wide.safetensors"
    make_teacher(wrong, width=4)
    one_line_error(invoke("evaluate", "--model", wrong, "--dataset", "MUTAG", *data), "4 features", "7 features")


def test_demo_quick(tmp_path):
    pytest.importorskip("torch_geometric", reason="the demo's graphs come from torch-geometric's generators")
    result = invoke("demo", "--quick", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    for row in ("teacher", "pseudo-graphs", "random graphs", "real graphs", "majority class"):
        assert row in result.output
    assert folder_contents(tmp_path / "demo") == FILES


def test_doctor_is_json_and_text():
    assert json.loads(invoke("doctor", "--json").output)
    assert "torch" in invoke("doctor").output


def test_import_is_light():
    heavy = "'torch_geometric', 'triton', 'matplotlib', 'click'"
    code = f"import acgkd_fast, sys; print([m for m in ({heavy}) if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
