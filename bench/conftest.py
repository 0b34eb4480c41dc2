"""What the benchmarks share: contenders timed in turn, and a stand-in for a missing pytest-benchmark."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Contest = Callable[..., dict[str, float]]


def pytest_report_header() -> str:
    return f"torch {torch.__version__}; benchmarks on the CPU run on one thread"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark() -> None:
        pytest.skip("pytest-benchmark is not installed")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def commit() -> str:
    """Short hash of the source tree, marked where it was changed since."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or "unknown"


@pytest.fixture
def contest(benchmark: Any) -> Contest:
    """Time contenders in turn, so that a change of the machine's load meets all of them.

    The first contender is ours; it also goes through pytest-benchmark. The callable returns the
    median seconds of each; ``extra_info`` gets them, how many times slower each peer is, and what
    else the caller adds. Call it after the results have been compared. Slow contests get fewer rounds.
    """
    rounds, least_rounds, enough_seconds = 25, 5, 4.0

    def run(contenders: dict[str, Callable[[], object]], device: str = "cpu", **info: Any) -> dict[str, float]:
        def timed(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        seconds: dict[str, list[float]] = {label: [] for label in contenders}
        for call in contenders.values():
            timed(call)
        started = time.perf_counter()
        for done in range(rounds):
            if done >= least_rounds and time.perf_counter() - started > enough_seconds:
                break
            for label, call in contenders.items():
                seconds[label].append(timed(call))
        medians = {label: statistics.median(times) for label, times in seconds.items()}
        ours, *peers = medians
        benchmark.extra_info.update(
            info,
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            torch=str(torch.__version__),
            commit=commit(),
            median_us={label: 1e6 * median for label, median in medians.items()},
            times_slower_than_ours={peer: medians[peer] / medians[ours] for peer in peers},
        )
        benchmark.pedantic(timed, args=(contenders[ours],), rounds=least_rounds)
        return medians

    return run
