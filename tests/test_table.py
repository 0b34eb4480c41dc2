"""The grid of cells: resumed without repeats, rendered with means, and the whole command in small."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import acgkd_fast as af
from acgkd_fast.cli import main
from acgkd_fast.distill.config import RunConfig
from acgkd_fast.errors import InputError
from acgkd_fast.nn import ProjectedClassifier
from acgkd_fast.table import BASELINES, ROWS, VARIANTS, Table, default_rows
from acgkd_fast.table_view import render

pytest.importorskip("torch_geometric", reason="house-or-cycle needs torch-geometric")

SMALL = RunConfig().with_settings({"num_graphs": 8, "refine.steps": 60, "student.epochs": 1, "learn.steps": 0})


def cells(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


MUTAG = {"teacher": "gcn5-64", "student": "gcn3-32", "dataset": "MUTAG", "stage": "x", "step": 0}


def write_cells(path, values, *more):
    """A file of cells: for each row, the accuracy of each split."""
    cells = [
        {**MUTAG, "row": row, "split": split, "accuracy": value}
        for row, accuracies in values.items()
        for split, value in enumerate(accuracies)
    ]
    path.write_text("".join(json.dumps(cell) + "\n" for cell in (*cells, *more)))


def small_table(tmp_path, monkeypatch, said):
    from acgkd_fast import table

    quick = table.train_classifier
    monkeypatch.setattr(table, "train_classifier", lambda *args, **named: quick(*args, **{**named, "epochs": 1}))
    return Table(tmp_path / "cells.jsonl", tmp_path / "work", None, SMALL, report=said.append)


def test_cells_are_run_once_and_hold_what_the_table_needs(tmp_path, monkeypatch):
    said: list[str] = []
    table = small_table(tmp_path, monkeypatch, said)
    rows = ("majority class", "teacher", "real graphs", "random graphs anew", "acgkd-fast", "short")
    arguments = {"splits": (1, 2), "rows": rows, "variants": {"short": {"refine.steps": 1}}}
    table.run(["house-or-cycle"], **arguments)
    first = cells(tmp_path / "cells.jsonl")
    assert len(first) == len(said) == 12
    table.run(["house-or-cycle"], **arguments)
    assert cells(tmp_path / "cells.jsonl") == first
    by_row = {(cell["row"], cell["split"]): cell for cell in first}
    assert all(0.0 <= cell["accuracy"] <= 1.0 for cell in first)
    assert by_row["teacher", 1]["fidelity"] == 1.0
    assert by_row["acgkd-fast", 1]["k"] != by_row["short", 1]["k"]
    # A lost line is one cell to run again, and no other.
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in first[:-1]))
    table.run(["house-or-cycle"], **arguments)
    again = cells(tmp_path / "cells.jsonl")
    assert len(again) == 12 and again[-1]["accuracy"] == first[-1]["accuracy"]


def test_every_baseline_gives_a_student(tmp_path, monkeypatch):
    from acgkd_fast import table as module

    monkeypatch.setattr(module, "gfkd_graphs", lambda *args, **named: af.random_pool(*args, **named))
    monkeypatch.setattr(module, "dfad", lambda teacher, *_, **__: (teacher.module, None))
    said: list[str] = []
    small_table(tmp_path, monkeypatch, said).run(["house-or-cycle"], splits=(1,), rows=default_rows())
    assert len(said) == len(default_rows()) == 1 + len(BASELINES) + 1


def test_render_gives_means_deviations_and_the_share_of_the_gap(tmp_path):
    path = tmp_path / "cells.jsonl"
    values = {
        "majority class": (0.6, 0.6),
        "random graphs anew": (0.5, 0.4),
        "random graphs anew to a plain student": (0.2, 0.3),
        "real graphs": (0.8, 0.8),
        "acgkd-fast": (0.7, 0.8),
    }
    skipped = {**MUTAG, "row": "GFKD", "split": 0, "skipped": "too many pairs"}
    write_cells(path, values, skipped)
    text = render(path)
    assert "| acgkd-fast | 75.0 +- 7.1 | 75 % | - |" in text
    assert "| majority class | 60.0 +- 0.0 | - | -15.0 |" in text
    assert "| real graphs | 80.0 +- 0.0 | - | +5.0 |" in text
    assert "| GFKD |" not in text
    # Above random graphs anew 75 - 45, above those of plain students 75 - 25; skipped cells count nowhere.
    assert "| gcn3-32 | 75 % (1) | +30.0 (+30.0) | +50.0 (+50.0) | - | - |" in text
    assert "| all | 75 % (1) |" in text


def test_rows_with_fewer_splits_are_compared_on_the_splits_that_they_have(tmp_path):
    path = tmp_path / "cells.jsonl"
    values = {
        "majority class": (0.6, 0.2),
        "random graphs anew": (0.5, 0.4),
        "random graphs anew to a plain student": (0.7, 0.1),
        "real graphs": (0.8, 0.9),
        "acgkd-fast": (0.7, 0.8),
        "learn only": (0.75,),
    }
    write_cells(path, values)
    assert "| learn only | 75.0 (1) | 50 % | +5.0 |" in render(path)


def test_files_from_before_the_last_floor_are_compared_by_the_others(tmp_path):
    path = tmp_path / "cells.jsonl"
    values = {"majority class": (0.6,), "random graphs anew": (0.5,), "real graphs": (0.8,), "acgkd-fast": (0.7,)}
    write_cells(path, values)
    assert "| acgkd-fast | 70.0 | 50 % | - |" in render(path)


def test_cells_of_other_settings_are_refused(tmp_path, monkeypatch):
    rows = ("majority class", "acgkd-fast")
    small_table(tmp_path, monkeypatch, []).run(["house-or-cycle"], splits=(1,), rows=rows)
    other = Table(tmp_path / "cells.jsonl", tmp_path, None, SMALL.with_settings({"student.margin": 0.0}))
    with pytest.raises(InputError, match=r"out: expected cells of the settings at hand, got house-or-cycle.* new file"):
        other.run(["house-or-cycle"], splits=(1,), rows=rows)


def test_random_and_real_graphs_teach_both_kinds_of_student(tmp_path, monkeypatch):
    from acgkd_fast import table as module

    students, taught = [], module.distill_student

    def keep(*arguments, **named):
        students.append(taught(*arguments, **named))
        return students[-1]

    monkeypatch.setattr(module, "distill_student", keep)
    rows = (
        "random graphs anew",
        "random graphs anew to a plain student",
        "real graphs",
        "real graphs to a plain student",
    )
    small_table(tmp_path, monkeypatch, []).run(["house-or-cycle"], splits=(1,), rows=rows)
    assert [isinstance(student, ProjectedClassifier) for student in students] == [True, False, True, False]


def test_ablations_are_settings_of_the_run():
    for changes in VARIANTS.values():
        RunConfig().with_settings(changes)
    # The command takes names separated by commas.
    assert not any("," in name for name in ROWS)


def test_too_large_baselines_say_so(tmp_path, monkeypatch):
    from acgkd_fast import table as module

    monkeypatch.setattr(module, "_MOST_GFKD_PAIRS", 10)
    monkeypatch.setattr(module, "_MOST_DFAD_PAIRS", 10)
    small_table(tmp_path, monkeypatch, []).run(["house-or-cycle"], splits=(1,), rows=("GFKD", "DFAD-GNN"))
    assert all("pairs" in cell["skipped"] for cell in cells(tmp_path / "cells.jsonl"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--datasets", "MUTANT"], "datasets: expected names among"),
        (["--rows", "majority"], "rows: expected names among"),
        (["--splits", "one"], "splits: expected seeds"),
        (["--teachers", "gcn"], "arch"),
        (["--datasets", "MUTAG"], "data-root: expected the folder"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, arguments, message):
    result = CliRunner().invoke(main, ["table", "--out", str(tmp_path / "cells.jsonl"), *arguments])
    assert result.exit_code == 1 and message in result.output, result.output


def test_the_command_prints_the_table(tmp_path, monkeypatch):
    from acgkd_fast import table as module

    quick = module.train_classifier
    monkeypatch.setattr(module, "train_classifier", lambda *args, **named: quick(*args, **{**named, "epochs": 1}))
    arguments = ["--out", str(tmp_path / "cells.jsonl"), "--work", str(tmp_path / "work"), "--splits", "3"]
    result = CliRunner().invoke(main, ["table", *arguments, "--rows", "majority class,teacher"])
    assert result.exit_code == 0, result.output
    assert "| majority class | 50.0 | - |" in result.output
