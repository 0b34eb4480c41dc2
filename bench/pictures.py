"""The pictures of docs/performance.md: growth against the expected power, and the roofline."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
Curves = dict[str, dict[str, list[tuple[float, float]]]]
_DIGEST = re.compile(r"data (\w{16})")


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def drawn_from(path: Path) -> str:
    """The digest of the data that a picture was made from; equal data need not give equal bytes elsewhere."""
    found = _DIGEST.search(path.read_text()) if path.exists() else None
    return found[1] if found else "nothing"


def growth_data(entries: Iterable[Entry]) -> tuple[Curves, dict[str, float]]:
    """(milliseconds against the amount, by axis and contender; the expected power of each axis)."""
    curves: Curves = {}
    expected = {}
    for entry in entries:
        expected[entry["axis"]] = entry["expected"]
        for label, us in entry["median_us"].items():
            curves.setdefault(entry["axis"], {}).setdefault(label, []).append((entry["amount"], us / 1e3))
    return {
        axis: {label: sorted(points) for label, points in lines.items()} for axis, lines in curves.items()
    }, expected


def roofline_data(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """One point per benchmark that says its bytes and its arithmetic."""
    return [
        {
            "what": entry["operator"],
            "intensity": entry["flop"] / entry["bytes"],
            "gflop_per_s": entry["gflop_per_s"],
            "copy_gb_per_s": entry["copy_gb_per_s"],
            "gemm_gflop_per_s": entry["gemm_gflop_per_s"],
        }
        for entry in entries
        if "flop" in entry and "bytes" in entry
    ]


def _save(figure: Any, path: Path, data: Any) -> None:
    import matplotlib

    # Equal data give equal bytes with one version of matplotlib: no date, no random identifiers, no font outlines.
    with matplotlib.rc_context({"svg.hashsalt": "acgkd-fast", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": f"data {digest(data)}"})


def draw_growth(curves: Curves, expected: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for panel, (axis, lines) in zip(panels, curves.items(), strict=False):
        for label, points in lines.items():
            amounts, times = zip(*points, strict=True)
            panel.plot(amounts, times, marker="o", markersize=3, label=label)
        # Through the last point of ours, where fixed costs weigh least.
        last, end = lines["ours"][-1]
        first = lines["ours"][0][0]
        power = expected[axis]
        line = f"O({axis.split(',')[0]}{'' if power == 1 else f'^{power:g}'})"
        panel.plot([first, last], [end * (first / last) ** power, end], "k--", linewidth=0.8, label=line)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        panel.minorticks_off()
        panel.legend(fontsize=7)
    for panel in list(figure.axes)[len(curves) :]:
        panel.remove()
    _save(figure, path, [curves, expected])


def draw_roofline(points: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    kinds: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        kinds.setdefault(point["what"], []).append((point["intensity"], point["gflop_per_s"]))
    for kind, where in kinds.items():
        panel.scatter(*zip(*where, strict=True), s=18, label=kind)
    bandwidth = sorted(p["copy_gb_per_s"] for p in points)[len(points) // 2]
    peak = sorted(p["gemm_gflop_per_s"] for p in points)[len(points) // 2]
    left = min(p["intensity"] for p in points) / 2
    right = max(*(p["intensity"] for p in points), 2 * peak / bandwidth)
    knee = peak / bandwidth
    panel.plot([left, knee, right], [left * bandwidth, peak, peak], "k-", linewidth=0.8)
    panel.annotate(f"copy {bandwidth:.0f} GB/s", (left, left * bandwidth), fontsize=8, va="top")
    panel.annotate(f"matrix product {peak:.0f} GFLOP/s", (knee, peak), fontsize=8, va="bottom", ha="left")
    panel.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="GFLOP/s")
    panel.legend(fontsize=8, loc="lower right")
    _save(figure, path, points)
