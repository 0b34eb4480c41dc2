"""How well does what a run says about itself predict how good its student is? Rank correlations over finished cells.

    python bench/study_witness.py bench/results/table.jsonl

Reads the cells of ``acgkd-fast table`` whose pool is our own. Compared are cells of the same data set, teacher, split
and student, which differ in one part of the method: Spearman's correlation of each witness with the fidelity (share of
held-out graphs on which student and teacher agree), one per group of five cells or more, then mean and share of groups
with the expected sign. "between" ranks the groups' own default cells against each other: does the witness tell on which
task the student can be trusted?
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Witness -> sign that a useful one has.
WITNESSES = {"k": -1, "cross_entropy": -1, "agreement": 1, "student_agreement": 1, "student_divergence": -1}
LEAST = 5


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    return [statistics.fmean([sum(v < x for v in values) + 1, sum(v <= x for v in values)]) for x in values]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, None where one side does not vary."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return statistics.correlation(ranks(a), ranks(b))


def study(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per witness: ``within`` (mean), ``right_sign``, ``groups``, ``between``, ``tasks``."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        if "cross_entropy" in cell and "fidelity" in cell:
            groups[tuple(cell[name] for name in ("dataset", "teacher", "split", "student"))].append(cell)
    rows = []
    for name, sign in WITNESSES.items():
        found = []
        for group in groups.values():
            pairs = [(cell[name], cell["fidelity"]) for cell in group if name in cell]
            value = spearman(*zip(*pairs, strict=True)) if len(pairs) >= LEAST else None
            if value is not None:
                found.append(value)
        own = [cell for group in groups.values() for cell in group if cell["row"] == "acgkd-fast" and name in cell]
        between = spearman([c[name] for c in own], [c["fidelity"] for c in own]) if len(own) >= LEAST else None
        rows.append(
            {
                "witness": name,
                "within": statistics.fmean(found) if found else None,
                "right_sign": statistics.fmean(value * sign > 0 for value in found) if found else None,
                "groups": len(found),
                "between": between,
                "tasks": len(own),
            }
        )
    return rows


def render(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| witness | within a task | expected sign | groups | between tasks | tasks |", "| --- |" + " --- |" * 5]
    for row in rows:
        within, right, between = (row[name] for name in ("within", "right_sign", "between"))
        shown = [
            "-" if within is None else f"{within:+.2f}",
            "-" if right is None else f"{100 * right:.0f} %",
            str(row["groups"]),
            "-" if between is None else f"{between:+.2f}",
            str(row["tasks"]),
        ]
        lines.append(f"| {row['witness']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How well a run's own figures predict its student.")
    parser.add_argument("cells", type=Path, help="JSON lines written by acgkd-fast table")
    cells = [json.loads(line) for line in parser.parse_args().cells.read_text().splitlines()]
    print(render(study(cells)))


if __name__ == "__main__":
    main()
