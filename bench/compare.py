"""Did anything become slower? Two results of `make bench`, or two of bench/instructions.py, side by side.

    python bench/compare.py BASE NEW        files or folders, or commits whose results lie in bench/results/

Times are compared relative to the peers that were measured in the same run, so that a slower machine or a busy hour
changes nothing: a benchmark counts as slower if we lost ground to every one of its peers by more than the tolerance.
Instructions are compared as they are. Leaves with status 1 if anything became slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TIME_TOLERANCE, INSTRUCTION_TOLERANCE = 0.3, 0.02


@dataclass(frozen=True)
class Change:
    """How much slower something became.

    Attributes:
        name: of the benchmark or operator.
        factor: 1 is no change, 1.5 is half as slow again; the median over peers.
        least: the smallest factor over the peers, which decides.
        against: the peers, or what else the figures are relative to.
    """

    name: str
    factor: float
    least: float
    against: str

    def slower(self, tolerance: float) -> bool:
        return self.least > 1.0 + tolerance


def find(name: str) -> Path:
    """A result file or folder by path, or by the beginning of its name in bench/results."""
    if Path(name).exists():
        return Path(name)
    known = [path for path in sorted(RESULTS.iterdir()) if path.is_dir() or path.suffix == ".json"]
    found = [path for path in known if path.name.startswith(name)]
    if len(found) != 1:
        have = ", ".join(path.stem for path in known) or "no results"
        raise SystemExit(f"compare: expected one result for {name!r}, got {len(found)}; in {RESULTS}: {have}")
    return found[0]


def load(path: Path) -> dict[str, Any]:
    """The content of a result file, or of all files of a folder together."""
    if path.is_file():
        return json.loads(path.read_text())
    parts = [json.loads(file.read_text()) for file in sorted(path.glob("*.json"))]
    return {"benchmarks": [entry for part in parts for entry in part["benchmarks"]]}


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times slower than we each peer was, by benchmark."""
    return {
        entry["fullname"]: entry["extra_info"]["times_slower_than_ours"]
        for entry in results["benchmarks"]
        if entry["extra_info"].get("times_slower_than_ours")
    }


def compare(base: dict[str, Any], new: dict[str, Any]) -> tuple[list[Change], float]:
    """(changes of what both files hold, the tolerance for their kind)."""
    if "instructions" in base and "instructions" in new:
        before, after = base["instructions"], new["instructions"]
        return [
            Change(name, factor, factor, "instructions")
            for name in before.keys() & after.keys()
            if (factor := after[name]["native"] / max(before[name]["native"], 1))
        ], INSTRUCTION_TOLERANCE
    if "benchmarks" not in base or "benchmarks" not in new:
        raise SystemExit("compare: expected two files of `make bench` or two of bench/instructions.py, got others")
    before_ratios, after_ratios = ratios(base), ratios(new)
    changes = []
    for name in before_ratios.keys() & after_ratios.keys():
        peers = sorted(before_ratios[name].keys() & after_ratios[name].keys())
        factors = [before_ratios[name][peer] / after_ratios[name][peer] for peer in peers]
        if factors:
            changes.append(Change(name, statistics.median(factors), min(factors), ", ".join(peers)))
    return changes, TIME_TOLERANCE


def describe(changes: list[Change], tolerance: float) -> str:
    """A line per benchmark, the worst first, and the verdict."""
    lines = []
    for change in sorted(changes, key=lambda change: -change.least):
        mark = "SLOWER" if change.slower(tolerance) else "      "
        lines.append(f"{mark} {change.factor:5.2f} x the time of before, relative to {change.against}: {change.name}")
    slower = sum(change.slower(tolerance) for change in changes)
    lines.append(f"{slower} of {len(changes)} became slower by more than {100 * tolerance:.0f} %")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("new")
    parser.add_argument("--tolerance", type=float, help="share that may be lost [default: 0.3; instructions 0.02]")
    given = parser.parse_args(arguments)
    base, new = (load(find(name)) for name in (given.base, given.new))
    changes, tolerance = compare(base, new)
    if not changes:
        raise SystemExit("compare: expected benchmarks that both files hold, got none")
    tolerance = tolerance if given.tolerance is None else given.tolerance
    print(describe(changes, tolerance))
    return 1 if any(change.slower(tolerance) for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
