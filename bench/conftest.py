"""What the benchmarks share: contenders timed in turn, and a stand-in for a missing pytest-benchmark."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import facts
import pytest
import torch

Contest = Callable[..., dict[str, float]]
ROUNDS, LEAST_ROUNDS, ENOUGH_SECONDS = 25, 5, 3.0


def pytest_report_header() -> str:
    return f"torch {torch.__version__}; benchmarks on the CPU run on one thread"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leave out single rounds and what identifies a machine, so that results can be kept in the repository."""
    kept = ("min", "median", "max", "mean", "stddev", "iqr", "rounds")
    for entry in output_json["benchmarks"]:
        entry["stats"] = facts.rounded({key: entry["stats"][key] for key in kept})
        for unused in ("group", "param", "params", "options"):
            entry.pop(unused, None)
    machine = output_json["machine_info"]
    output_json["machine_info"] = {key: machine[key] for key in ("machine", "system", "python_version")}
    output_json["commit_info"] = {"id": facts.commit()}


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


def on_device(contenders: dict[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
    """Host-inclusive time, device time with a cold L2 cache, and per replay of a captured graph with a warm one."""
    from bench_edges_gpu import device_times

    device = torch.device("cuda")
    flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    return {label: device_times(call, device, flush) for label, call in contenders.items()}


def copy_bandwidth(device: str) -> float:
    if device == "cpu":
        return facts.copy_bandwidth()
    from bench_propagate_gpu import copy_bandwidth as on_gpu

    return on_gpu(torch.device(device))


@pytest.fixture
def contest(benchmark: Any) -> Contest:
    """Time contenders in turn, so that a change of the machine's load meets all of them.

    The first contender is ours; it also goes through pytest-benchmark. The callable returns the
    median seconds of each; ``extra_info`` gets what :func:`facts.report` makes of them. Call it after
    the results have been compared. Slow contests get fewer rounds, at least `least`.
    """

    def run(
        contenders: dict[str, Callable[[], object]],
        device: str = "cpu",
        *,
        least: int = LEAST_ROUNDS,
        moved: float | None = None,
        **info: Any,
    ) -> dict[str, float]:
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
        for done in range(ROUNDS):
            if done >= least and time.perf_counter() - started > ENOUGH_SECONDS:
                break
            for label, call in contenders.items():
                seconds[label].append(timed(call))
        if device == "cuda":
            info["device_us"] = on_device(contenders)
        bandwidth = None if moved is None else copy_bandwidth(device)
        benchmark.extra_info.update(facts.report(seconds, device=device, moved=moved, bandwidth=bandwidth, **info))
        ours = next(iter(contenders))
        benchmark.pedantic(timed, args=(contenders[ours],), rounds=min(3, least))
        return {label: statistics.median(times) for label, times in seconds.items()}

    return run
