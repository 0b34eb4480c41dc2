"""What every figure is reported with: machine, versions, commit, measured ceilings, and the spread of its rounds."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

PEER_PACKAGES = ("torch-geometric", "torch-scatter", "torch-sparse", "networkx", "dgl")


@functools.cache
def commit() -> str:
    """Short hash of the source tree, marked where it was changed since. Results themselves do not count."""
    folder = Path(__file__).parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs")
    found = git("rev-parse", "--short", "HEAD")
    return (found + "-dirty" * bool(changed)) or "unknown"


@functools.cache
def processor() -> str:
    """The model name of the CPU."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@functools.cache
def versions() -> dict[str, str]:
    """Python, torch, this package and those peers that are installed."""
    import acgkd_fast

    found = {"python": platform.python_version(), "torch": str(torch.__version__), "acgkd-fast": acgkd_fast.__version__}
    for name in PEER_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def copy_bandwidth() -> float:
    """GB/s of a copy of 64 MB on the CPU, reads and writes counted, best of five."""
    source = torch.ones(2**24)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 8 * source.numel() / min(seconds[1:]) / 1e9


def gemm_rate(width: int) -> float:
    """FLOP per second of [2048, width] @ [width, width] on the CPU, the best of 20."""
    a, b = torch.randn(2048, width), torch.randn(width, width)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * 2048 * width**2 / min(times)


def spread(seconds: list[float]) -> list[float]:
    """First and third quartile."""
    if len(seconds) < 2:
        return [seconds[0], seconds[0]]
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return [first, third]


def rounded(value: Any, digits: int = 4) -> Any:
    """The same structure with floats of so many significant digits, so that result files stay small."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value


def report(
    seconds: dict[str, list[float]],
    *,
    device: str = "cpu",
    absent: dict[str, str] | None = None,
    moved: float | None = None,
    flop: float | None = None,
    bandwidth: float | None = None,
    **info: Any,
) -> dict[str, Any]:
    """The `extra_info` of a benchmark.

    Args:
        seconds: times of the rounds of each contender, ours first; further ones called "ours, ..." are no peers.
        device: "cpu" or "cuda".
        absent: why a peer is missing, by name.
        moved: bytes that a fused pass must read and write.
        flop: arithmetic of one call.
        bandwidth: GB/s of a copy, measured beside the contest; needed with `moved`.
        info: what else the benchmark says of its input.
    """
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    ours, *others = medians
    peers = [label for label in others if not label.startswith("ours")]
    found = {
        **info,
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "median_us": {label: 1e6 * median for label, median in medians.items()},
        "quartiles_us": {label: [1e6 * q for q in spread(times)] for label, times in seconds.items()},
        "rounds": len(seconds[ours]),
        "times_slower_than_ours": {peer: medians[peer] / medians[ours] for peer in peers},
        "absent": absent or {},
    }
    if flop is not None:
        found |= {"flop": flop, "gflop_per_s": flop / medians[ours] / 1e9}
        if device == "cpu":
            found["gemm_gflop_per_s"] = gemm_rate(64) / 1e9
    if moved is not None and bandwidth is not None:
        achieved = moved / medians[ours] / 1e9
        found |= {"bytes": moved, "gb_per_s": achieved, "copy_gb_per_s": bandwidth}
        found["share_of_copy_bandwidth"] = achieved / bandwidth
    return rounded(found)
