"""The study of witnesses: rank correlations against hand-made cells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from study_witness import ranks, render, spearman, study


def test_ranks_and_correlation():
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([1.0, 2.0, 3.0], [1.0, 10.0, 100.0]) == pytest.approx(1.0)
    assert spearman([1.0, 2.0, 3.0], [5.0, 4.0, -1.0]) == pytest.approx(-1.0)
    assert spearman([1.0, 1.0, 1.0], [5.0, 4.0, -1.0]) is None


def cell(split, row, k, fidelity):
    task = {"dataset": "MUTAG", "teacher": "gcn5-64", "student": "gcn3-32", "split": split}
    return {**task, "row": row, "k": k, "cross_entropy": 0.1, "fidelity": fidelity}


def test_groups_are_compared_within_and_their_defaults_between():
    cells = [cell(split, f"v{i}", 10.0 * split + i, 0.9 - 0.1 * i) for split in (1, 2) for i in range(5)]
    cells += [cell(split, "acgkd-fast", float(split), 0.5 + 0.01 * split) for split in range(1, 6)]
    cells.append({"dataset": "MUTAG", "row": "majority class", "accuracy": 0.6})
    by_name = {row["witness"]: row for row in study(cells)}
    assert by_name["k"]["groups"] == 2 and by_name["k"]["tasks"] == 5
    assert by_name["k"]["between"] == pytest.approx(1.0)
    # The defaults' cells have the least K of their groups, but neither the best nor the worst student.
    assert -1.0 < by_name["k"]["within"] < 0.0 and by_name["k"]["right_sign"] == 1.0
    assert by_name["cross_entropy"]["within"] is None
    assert "| k | -0." in render(study(cells))
