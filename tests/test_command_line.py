"""The command line: whole runs, what it says of the graphs, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from run_helpers import FILES, folder_contents, make_teacher

from acgkd_fast import checkpoints
from acgkd_fast.cli import main

DATA = Path(__file__).parents[2] / "shared" / "data"

pytestmark = pytest.mark.filterwarnings("ignore:k. expected at most:RuntimeWarning", "ignore:student. expected the")


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
    changed = ("--perturb", 0.3, "--start-share", 0.25, "--twins", 0.4)
    shape = ("--mean-nodes", 8, "--mean-degree", 3.0, "--hub-share", 0.25)
    result = invoke("distill", "--teacher", teacher_file, "--out", out, *small, *changed, *shape)
    assert result.exit_code == 0, result.output
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert (settings["perturbation"], settings["start_share"], settings["twins"]) == (0.3, 0.25, 0.4)
    prior = settings["prior"]
    assert (prior["min_nodes"], prior["max_nodes"]) == (4, 12)
    assert (prior["mean_degree"], prior["hub_share"], prior["size_spread"]) == (3.0, 0.25, None)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tried = [row for row in rows if row["stage"] == "prior" and "k" in row]
    assert {row["size_spread"] for row in tried} == {0.0, 0.5, 1.0}
    assert {(row["mean_degree"], row["hub_share"]) for row in tried} == {(3.0, 0.25)}
    stated = ("--mean-nodes", 8, "--size-spread", 0.5, "--degree-growth", 1, "--mean-degree", 3, "--hub-share", 0)
    stated += ("--no-ego-networks",)
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
