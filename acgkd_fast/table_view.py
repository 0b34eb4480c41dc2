"""The table of finished cells as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from .distill.metrics import MetricsLog
from .table import CEILING, FLOOR, MEAN_NODES, OURS, ROWS

# What a method has to be better than, beside the majority class.
_RIVALS = (*FLOOR[1:], "GFKD", "DFAD-GNN")

# Accuracy in percent by split, by row and data set.
Scores = dict[tuple[str, str], dict[int, float]]


def render(path: Path) -> str:
    """The file of cells as Markdown: a table per teacher and student, mean and deviation over splits.

    A number of splits stands in brackets where others have more. The last columns compare on the same splits alone: the
    share that a row closes of the gap between the floor (the best of majority class and random graphs anew) and
    distillation on real graphs, as the mean over data sets where that gap is above 2 points, and the points above
    our own method at its defaults, as the mean over data sets.
    """
    pairs = _scores(path)
    tables = [_render_pair(scores, teacher, student) for (teacher, student), scores in sorted(pairs.items())]
    return "\n\n".join([*tables, _render_summary(pairs)] if pairs else [])


def _scores(path: Path) -> dict[tuple[str, str], Scores]:
    """By teacher and student."""
    found: dict[tuple[str, str], Scores] = {}
    for cell in MetricsLog(path).read():
        if "accuracy" in cell:
            scores = found.setdefault((cell["teacher"], cell["student"]), {})
            scores.setdefault((cell["row"], cell["dataset"]), {})[cell["split"]] = 100 * cell["accuracy"]
    return found


def _render_summary(pairs: dict[tuple[str, str], Scores]) -> str:
    """Our own method over all teachers and data sets: a row per student and one for all.

    A comparison is between the means of one teacher, student and data set over the splits that both rows have.
    """
    lines = [
        f"{OURS} over all teachers and data sets",
        "",
        f"| student | gap closed (gaps) | {' | '.join(f'above {row} (worst)' for row in _RIVALS)} |",
        f"| --- | --- |{' --- |' * len(_RIVALS)}",
    ]
    students = sorted({student for _, student in pairs})
    for name, chosen in [*((student, (student,)) for student in students), ("all", tuple(students))]:
        scores = [found for (_, student), found in sorted(pairs.items()) if student in chosen]
        shares = [share for found in scores for share in _gap_shares(found, OURS)]
        entries = [f"{100 * statistics.fmean(shares):.0f} % ({len(shares)})" if shares else "-"]
        for row in _RIVALS:
            above = [-points for found in scores for points in _points_above_ours(found, row)]
            entries.append(f"{statistics.fmean(above):+.1f} ({min(above):+.1f})" if above else "-")
        lines.append(f"| {name} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _datasets(scores: Scores) -> list[str]:
    return [name for name in MEAN_NODES if any(key[1] == name for key in scores)]


def _render_pair(scores: Scores, teacher: str, student: str) -> str:
    datasets = _datasets(scores)
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
        compared = (_gap_closed(scores, row), _above_ours(scores, row))
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


def _gap_shares(scores: Scores, row: str) -> list[float]:
    """Of each data set with a gap above 2 points: (row - floor) over (ceiling - floor)."""
    shares = []
    for dataset in _datasets(scores):
        # Files from before the last of these rows existed are still compared.
        floor = [name for name in FLOOR if name in FLOOR[:2] or (name, dataset) in scores]
        means = _common(scores, dataset, (row, CEILING, *floor))
        if means is not None and means[1] - max(means[2:]) > 2.0:
            shares.append((means[0] - max(means[2:])) / (means[1] - max(means[2:])))
    return shares


def _gap_closed(scores: Scores, row: str) -> str:
    shares = _gap_shares(scores, row)
    return f"{100 * statistics.fmean(shares):.0f} %" if shares and row not in (*FLOOR, CEILING) else "-"


def _points_above_ours(scores: Scores, row: str) -> list[float]:
    means = [_common(scores, dataset, (row, OURS)) for dataset in _datasets(scores)]
    return [pair[0] - pair[1] for pair in means if pair is not None]


def _above_ours(scores: Scores, row: str) -> str:
    points = _points_above_ours(scores, row)
    return f"{statistics.fmean(points):+.1f}" if points and row != OURS else "-"
