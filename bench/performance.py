"""docs/performance.md and its pictures, made from bench/results and nothing else.

    python bench/performance.py [--check]

--check leaves the files as they are and fails if they are not what the results say.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pictures import digest, draw_growth, draw_roofline, drawn_from, growth_data, roofline_data
from verdicts import NO_GPU, RESULTS, Target, edges, search, step, tracking

ROOT = Path(__file__).parents[1]
PAGE, FOLDER = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance"
Entry = dict[str, Any]
Run = dict[str, list[Entry]]
# The operators' plain-torch references, written to be read; beating them is no feat.
ORACLE = "plain torch"
GPU_FILES = {
    "edges_gpu.jsonl": "drawing edges and back, beside eager torch, `torch.compile` and DosCond's way",
    "propagate_gpu.jsonl": "message passing and back, beside PyG, torch-scatter, torch-sparse, cuSPARSE and dense",
    "step_gpu.json": "the captured step, beside eager ones, PyG and padded dense",
    "search_gpu.jsonl": "proposals per second of the search",
}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def newest_run() -> tuple[Path, dict[str, Any]]:
    """The folder of the latest `make bench`, and its files by benchmark name."""
    runs = {}
    for folder in RESULTS.iterdir():
        files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        if files:
            runs[folder] = files
    if not runs:
        raise SystemExit(f"performance: expected results of `make bench` in {RESULTS}, got none")
    newest = max(runs, key=lambda folder: max(file["datetime"] for file in runs[folder].values()))
    return newest, runs[newest]


def entries_of(files: dict[str, Any]) -> Run:
    return {
        name: [{"name": e["name"], "stats": e["stats"], **e["extra_info"]} for e in content["benchmarks"]]
        for name, content in files.items()
    }


def milliseconds(us: float) -> str:
    return f"{us / 1e3:.3g}" if us < 1e6 else f"{us / 1e3:.0f}"


def target_rows(targets: list[Target]) -> list[str]:
    rows = [
        [t.group, t.wanted, t.measured, f"**{t.verdict}**" if t.verdict == "missed" else t.verdict] for t in targets
    ]
    return table(["for", "target", "measured", "verdict"], rows)


def compared(run: Run) -> Iterator[Entry]:
    """Benchmarks that have peers, but for the axes of growth, which have a picture. Our oracle is no peer."""
    for name, entries in run.items():
        for entry in entries:
            peers = {peer: ratio for peer, ratio in entry.get("times_slower_than_ours", {}).items() if peer != ORACLE}
            if name != "scaling" and peers:
                yield {"file": name, **entry, "times_slower_than_ours": peers}


def label_of(entry: Entry) -> str:
    parts = [entry.get("operator", ""), entry.get("shape", "")]
    if not entry.get("shape"):
        parts.append(entry["name"].partition("[")[2].removesuffix("]").removesuffix("-cpu") or entry["name"])
    if "width" in entry and entry.get("shape"):
        parts.append(f"width {entry['width']}")
    return ", ".join(part for part in parts if part)


def ratio_tables(run: Run) -> list[str]:
    lines, by_file = [], {}
    for entry in compared(run):
        by_file.setdefault(entry["file"], []).append(entry)
    for name, entries in by_file.items():
        rows = []
        for entry in entries:
            ratios = entry["times_slower_than_ours"]
            best = min(ratios, key=ratios.__getitem__)
            # The first contender is ours, whatever its name.
            own = next(iter(entry["median_us"]))
            low, high = entry["quartiles_us"][own]
            won = f"{ratios[best]:.2f}x" if ratios[best] >= 1 else f"**{ratios[best]:.2f}x**"
            others = ", ".join(
                f"{peer} {ratio:.1f}" for peer, ratio in sorted(ratios.items(), key=lambda r: r[1]) if peer != best
            )
            ours = f"{milliseconds(entry['median_us'][own])} ({milliseconds(low)}-{milliseconds(high)})"
            rows.append([label_of(entry), ours, best, won, others or "-"])
        lines += [f"### `bench_{name}.py`", ""]
        lines += table(["what", "ours, ms (quartiles)", "best peer", "best peer / ours", "other peers / ours"], rows)
    return lines


def absences(run: Run) -> list[str]:
    missing: dict[tuple[str, str], set[str]] = {}
    for entries in run.values():
        for entry in entries:
            where = entry.get("shape", entry["name"]).split(",")[0]
            for peer, why in entry.get("absent", {}).items():
                missing.setdefault((peer, why), set()).add(where)
    rows = [[peer, ", ".join(sorted(shapes)), why] for (peer, why), shapes in sorted(missing.items())]
    return table(["peer", "missing at", "why"], rows) if rows else ["None.", ""]


def slope(points: list[list[float]] | list[tuple[float, float]]) -> float:
    """Power of the growth between the last two sizes."""
    (x0, y0), (x1, y1) = points[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def growth_rows(run: Run) -> list[str]:
    curves, expected = growth_data(run.get("scaling", []))
    what = {entry["axis"]: entry["operator"] for entry in run.get("scaling", [])}
    rows = []
    for axis, lines in curves.items():
        powers = {label: slope(points) for label, points in lines.items()}
        others = ", ".join(f"{label} {power:.2f}" for label, power in powers.items() if label != "ours")
        span = f"{lines['ours'][0][0]:,} to {lines['ours'][-1][0]:,}"
        rows.append([axis, what[axis], span, f"{expected[axis]:g}", f"{powers['ours']:.2f}", others or "-"])
    return table(["axis", "of", "from, to", "expected power", "ours", "peer"], rows)


def overhead_rows(run: Run) -> list[str]:
    lines, times = [], ("public_us", "operators_us")
    for entry in run.get("overhead", []):
        rows = [
            [
                name,
                str(row["per_step"]),
                *(f"{row[key]:.0f}" for key in times),
                share(row, "operation"),
                share(row, "step"),
            ]
            for name, row in entry["operations"].items()
        ]
        lines += table(
            ["operation", "per step", "us", "of it operators", "Python, of the operation", "of the step"], rows
        )
        now = entry["step"]
        lines += [f"The whole step: {now['step_us'] / 1e3:.2f} ms, {share(now, 'step')} outside of operators.", ""]
    return lines


def share(row: dict[str, float], of: str) -> str:
    return f"{100 * row[f'share_of_{of}']:.1f} %"


def instruction_rows() -> list[str]:
    path = RESULTS / "instructions.json"
    if not path.exists():
        return ["Not counted yet.", ""]
    found = json.loads(path.read_text())
    rows = [[name, f"{n['native']:,}", f"{n['other']:,}"] for name, n in found["instructions"].items()]
    return [
        f"Commit {found['commit']}, torch {found['torch']}; per call, counted by callgrind (AVX2 kernels).",
        "",
        *table(["operator (job)", "ours", "torch's and Python's"], rows),
    ]


def changes() -> list[str]:
    rows = json.loads((RESULTS / "changes.json").read_text())
    return table(["what", "before", "after", "how"], [[r["what"], r["before"], r["after"], r["how"]] for r in rows])


TEMPLATE = """# Performance

Generated by `make performance` from `bench/results`; do not edit. A test compares page and results.

Run {run}: {device}, one thread; {versions}. `make bench` took {minutes:.1f} minutes.
Medians of rounds in which all contenders take turns, after a comparison of their results on the same input. The machine
was shared with other work, so times vary, and ratios within a row vary less.

## Targets

{count}.

{targets}
## Ours over the best peer

{won} of {comparisons} comparisons won, {lost} lost (bold). A ratio is the peer's time over ours; above 1 ours wins.
Formats that a peer needs are built in the call, since learned edges change in every step. Operators that were measured
beside our own plain-torch oracle alone are left out.

{ratios}
## Peers that are missing

{absences}
## Growth

![time against nodes, pairs, edges, width and batch](performance/growth.svg)

Powers are those between the two largest sizes. Below the expected one, fixed costs still count; above it, data leave
the caches.

{growth}
## Roofline

![GFLOP/s against operations per byte, under copy bandwidth and matrix product](performance/roofline.svg)

Bytes are what a fused pass must move, not what was moved; above the slope, data stay in the caches. Ceilings are
measured beside each benchmark, one thread; drawn are their medians.

## On a GPU

{gpu}
## Python's share of a step

MUTAG's size, one thread. Of an operation forward and backward, what is not spent in operators; `bench_overhead.py` says
how it is measured. Replayed operators free their results at once, so a part of the difference, above all of the whole
step's, is fresh memory and not Python.

{overhead}
## What was taken away

{changes}
## Instructions

{instructions}
## Again

    make bench                       # bench/results/COMMIT, continues where it was cut off
    make bench-compare BASE=COMMIT   # what lost ground to every peer of its own run
    make instructions                # callgrind counts, which repeat exactly
    make performance                 # this page
"""


def page() -> str:
    folder, files = newest_run()
    run = entries_of(files)
    seconds = sum(content["seconds"] for content in files.values())
    facts = next(e for entries in run.values() for e in entries if "versions" in e)
    targets = [*edges(), *step(run), *search(), *tracking(run, seconds)]
    verdicts = [t.verdict for t in targets]
    best = [min(entry["times_slower_than_ours"].values()) for entry in compared(run)]
    gpu = [[f"`{name}`", what, "there" if (RESULTS / name).exists() else NO_GPU] for name, what in GPU_FILES.items()]
    later = {name: content["commit_info"]["id"] for name, content in files.items()}
    others = ", ".join(f"`bench_{name}.py` {at}" for name, at in later.items() if at != folder.name)
    parts = {
        "targets": target_rows(targets),
        "ratios": ratio_tables(run),
        "absences": absences(run),
        "growth": growth_rows(run),
        "gpu": table(["results", "what", "state"], gpu),
        "overhead": overhead_rows(run),
        "changes": changes(),
        "instructions": instruction_rows(),
    }
    return TEMPLATE.format(
        run=folder.name + (f" ({others})" if others else ""),
        device=facts["device"],
        versions=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        minutes=seconds / 60,
        count=", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)),
        won=sum(ratio >= 1 for ratio in best),
        lost=sum(ratio < 1 for ratio in best),
        comparisons=len(best),
        **{name: "\n".join(lines) for name, lines in parts.items()},
    )


def pictures() -> dict[Path, tuple[Any, Any]]:
    """What each picture is drawn from, and how."""
    run = entries_of(newest_run()[1])
    curves, expected = growth_data(run.get("scaling", []))
    points = roofline_data(entry for entries in run.values() for entry in entries)
    return {
        FOLDER / "growth.svg": ([curves, expected], lambda path: draw_growth(curves, expected, path)),
        FOLDER / "roofline.svg": (points, lambda path: draw_roofline(points, path)),
    }


def stale() -> list[str]:
    """Files that are not what the results say."""
    found = [path.name for path, (data, _) in pictures().items() if drawn_from(path) != digest(data)]
    return found + ([] if PAGE.exists() and PAGE.read_text() == page() else [PAGE.name])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if something differs")
    if parser.parse_args(arguments).check:
        found = stale()
        if found:
            print(f"performance: differ from bench/results: {', '.join(found)} (make performance)", file=sys.stderr)
        return 1 if found else 0
    FOLDER.mkdir(exist_ok=True)
    for path, (_, draw) in pictures().items():
        draw(path)
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)} and {len(pictures())} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
