"""The table of finished cells as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .distill.metrics import MetricsLog
from .table import CEILING, FLOOR, MEAN_NODES, OURS, ROWS

# Accuracy in percent by split, by row and data set.
Scores = dict[tuple[str, str], dict[int, float]]


def render(path: Path) -> str:
    """The file of cells as Markdown: a table per teacher and student, mean and deviation over splits.

    A number of splits stands in brackets where others have more. The last columns compare on the same splits alone: the
    share that a row closes of the gap between the floor (the best of majority class and random graphs anew) and
    distillation on real graphs, as the mean over data sets where that gap is above 2 points, and the points above
    our own method at its defaults, as the mean over data sets.
    """
    cells = [cell for cell in MetricsLog(path).read() if "accuracy" in cell]
    pairs = sorted({(cell["teacher"], cell["student"]) for cell in cells})
    return "\n\n".join(_render_pair(cells, teacher, student) for teacher, student in pairs)


def _render_pair(cells: list[dict[str, Any]], teacher: str, student: str) -> str:
    scores: Scores = {}
    for cell in cells:
        if (cell["teacher"], cell["student"]) == (teacher, student):
            scores.setdefault((cell["row"], cell["dataset"]), {})[cell["split"]] = 100 * cell["accuracy"]
    datasets = [name for name in MEAN_NODES if any(key[1] == name for key in scores)]
    most = {name: max(len(found) for key, found in scores.items() if key[1] == name) for name in datasets}
    names = list(dict.fromkeys([*ROWS, *(key[0] for key in scores)]))
    rows = [name for name in names if any(key[0] == name for key in scores)]
    lines = [
        f"Teacher {teacher}, student {student}",
        "",
        f"| row | {' | '.join(datasets)} | gap closed | above {OURS} |",
        f"| --- |{' --- |' * (len(datasets) + 2)}",
    ]
    for row in rows:
        values = [_entry(scores.get((row, dataset), {}), most[dataset]) for dataset in datasets]
        compared = (_gap_closed(scores, row, datasets), _above_ours(scores, row, datasets))
        lines.append(f"| {row} | {' | '.join((*values, *compared))} |")
    return "\n".join(lines)


def _entry(values: dict[int, float], most: int) -> str:
    if not values:
        return "-"
    deviation = f" +- {statistics.stdev(values.values()):.1f}" if len(values) > 1 else ""
    fewer = f" ({len(values)})" if len(values) < most else ""
    return f"{statistics.fmean(values.values()):.1f}{deviation}{fewer}"


def _common(scores: Scores, dataset: str, rows: Sequence[str]) -> list[float] | None:
    """Means of several rows over the splits that all of them have, None where there is none."""
    found = [scores.get((row, dataset), {}) for row in rows]
    splits = set.intersection(*map(set, found))
    return [statistics.fmean(values[split] for split in splits) for values in found] if splits else None


def _gap_closed(scores: Scores, row: str, datasets: list[str]) -> str:
    """Mean over data sets of (row - floor) over (ceiling - floor), where the gap is above 2 points."""
    shares = []
    for dataset in datasets:
        means = _common(scores, dataset, (row, CEILING, *FLOOR))
        if means is not None and means[1] - max(means[2:]) > 2.0:
            shares.append((means[0] - max(means[2:])) / (means[1] - max(means[2:])))
    return f"{100 * statistics.fmean(shares):.0f} %" if shares and row not in (*FLOOR, CEILING) else "-"


def _above_ours(scores: Scores, row: str, datasets: list[str]) -> str:
    means = [_common(scores, dataset, (row, OURS)) for dataset in datasets]
    points = [pair[0] - pair[1] for pair in means if pair is not None]
    return f"{statistics.fmean(points):+.1f}" if points and row != OURS else "-"
