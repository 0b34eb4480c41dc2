"""The student's settings in run folders, the command line, the report; resumption with everything switched on."""

from __future__ import annotations

import json

import pytest
import torch
from run_helpers import FILES, folder_contents, make_teacher
from test_command_line import DATA, SMALL, invoke, one_line_error
from test_run import Stop, make_config, make_evaluation
from test_student_reuse import Theirs

from acgkd_fast import checkpoints
from acgkd_fast.distill.config import RunConfig
from acgkd_fast.distill.projector import projected_student
from acgkd_fast.distill.run import Run
from acgkd_fast.errors import InputError
from acgkd_fast.nn import ProjectedClassifier
from acgkd_fast.report import parameter_line
from acgkd_fast.teachers import as_teacher

pytestmark = pytest.mark.filterwarnings("ignore:k. expected at most:RuntimeWarning", "ignore:student. expected the")

EVERYTHING = {
    "student.epochs": 24,
    "student.reuse_classifier": True,
    "student.projector_heads": 2,
    "student.feature_weight": 0.5,
    "student.curriculum.difficulty": "disagreement",
    "student.curriculum.weights": "log",
    "student.adversary.mode": "graph",
}


def lines(folder, stage):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def test_a_run_with_everything(tmp_path):
    folder = tmp_path / "run"
    config = make_config(**EVERYTHING)
    run = Run(folder, make_teacher(), config, student="gcn3-6")
    results = run.execute(make_evaluation(), students=2)
    assert folder_contents(folder) == FILES
    names = [row["row"] for row in results]
    (equal,) = (name for name in names if "of equal size" in name)
    assert equal.startswith("plain gcn3-") and len(names) == 6

    sizes = lines(folder, "parameters")
    assert len(sizes) == 1 and sizes[0]["student"] == run.parameters["student"]
    student, _ = checkpoints.load_model(folder / "student.safetensors")
    assert isinstance(student, ProjectedClassifier)
    assert sum(p.numel() for p in student.parameters()) == run.parameters["student"]
    assert torch.equal(student.head.classifier.weight, make_teacher().classifier.weight)
    epochs = lines(folder, "student-0")
    assert len(epochs) == 24 and all({"loss", "share", "temperature"} <= row.keys() for row in epochs)
    agreement = lines(folder, "agreement")
    assert [row["step"] for row in agreement] == [0, 1] and all(0 <= row["agreement"] <= 1 for row in agreement)
    page = (folder / "report.html").read_text()
    for words in ("Parameters", "reused classifier", "Agreement of student", "adversarial temperature", equal):
        assert words in page
    recorded = json.loads((folder / "config.json").read_text())["settings"]
    assert RunConfig.from_dict(recorded) == config
    assert recorded["student"]["adversary"]["mode"] == "graph"


@pytest.mark.parametrize("at", [3, 15])
def test_interrupted_and_resumed_with_everything(tmp_path, at):
    config = make_config(**EVERYTHING)
    Run(tmp_path / "whole", make_teacher(), config).execute(students=2)

    def interrupt(name, step, total, values):
        if name == "student-1" and step == at:
            raise Stop

    folder = tmp_path / "cut"
    with pytest.raises(Stop):
        Run(folder, make_teacher(), config, progress=interrupt).execute(students=2)
    Run(folder, make_teacher(), config, resume=True).execute(students=2)
    for product in ("student.safetensors", "pseudo_graphs.safetensors"):
        assert (folder / product).read_bytes() == (tmp_path / "whole" / product).read_bytes()
    for stage in ("student-0", "student-1", "agreement", "parameters"):
        ours, theirs = ([{**row, "time": 0} for row in lines(run, stage)] for run in (folder, tmp_path / "whole"))
        assert ours == theirs, stage


def test_a_student_that_has_not_learned_its_pool_is_told(tmp_path):
    teacher = make_teacher()
    # One class far ahead of the other on every second graph is nothing that one epoch learns.
    config = make_config(**{"student.epochs": 1, "student.lr": 1e-6, "student.recalibrate": False, "num_graphs": 24})
    with pytest.warns(RuntimeWarning, match=r"student: expected the teacher's class on 70% of the pseudo-graphs, got"):
        for seed in range(6):
            Run(tmp_path / str(seed), teacher, config.with_settings({"seed": seed})).execute()


def test_what_cannot_be_reused_is_told_before_any_work(tmp_path):
    config = make_config(**{"student.reuse_classifier": True})
    with pytest.raises(
        InputError, match=r"student.reuse_classifier: expected a teacher of this package.* got a Theirs"
    ):
        Run(tmp_path / "run", Theirs(), config)
    narrow = make_config(**{"student.reuse_classifier": True, "student.projector": "none"})
    with pytest.raises(InputError, match="projector: expected 'gat' or 'linear'"):
        Run(tmp_path / "run", make_teacher(), narrow)
    assert not (tmp_path / "run").exists()


def test_command_line(tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    make_teacher(teacher)
    out = tmp_path / "run"
    options = ("--reuse-classifier", "--projector", "linear", "--feature-weight", 0.5)
    options += ("--curriculum", "edges", "--adversary", "global")
    result = invoke("distill", "--teacher", teacher, "--out", out, *SMALL, *options)
    assert result.exit_code == 0, result.output
    assert "parameters: teacher" in result.output and "projector" in result.output
    settings = json.loads((out / "config.json").read_text())["settings"]["student"]
    assert settings["reuse_classifier"] and settings["projector"] == "linear" and settings["feature_weight"] == 0.5
    assert settings["curriculum"]["difficulty"] == "edges" and settings["adversary"]["mode"] == "global"
    again = invoke("distill", "--teacher", teacher, "--out", tmp_path / "b", "--config", out / "config.json", *SMALL)
    assert again.exit_code == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["settings"]["student"] == settings
    for flag, word in (("--projector", "mlp"), ("--curriculum", "size"), ("--adversary", "local")):
        refused = invoke("distill", "--teacher", teacher, "--out", tmp_path / "c", *SMALL, flag, word)
        one_line_error(refused, "expected one of", word)
    assert not (tmp_path / "c").exists()


def test_parameter_line():
    counts = {"teacher": 100, "student": 40, "trained": 40, "projector": 0, "reused_classifier": 0}
    assert parameter_line(counts) == "parameters: teacher 100, student 40"
    counts |= {"trained": 30, "projector": 20, "reused_classifier": 10}
    assert parameter_line(counts).endswith("student 40 (trained 30, of which projector 20; reused classifier 10)")


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the data sets in {DATA}")
def test_evaluate_needs_no_teacher(tmp_path, monkeypatch):
    pytest.importorskip("torch_geometric", reason="reading TUDatasets needs torch-geometric")
    monkeypatch.setenv("ACGKD_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "student.safetensors"
    checkpoints.save_model(path, projected_student(as_teacher(make_teacher(width=7)), "gcn3-6", 0).eval())
    scored = invoke("evaluate", "--model", path, "--dataset", "MUTAG", "--data-root", DATA, "--json")
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.output)["num_graphs"] == 57
