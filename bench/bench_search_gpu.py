"""Proposals per second of the search on one GPU.

    python bench/bench_search_gpu.py --out bench/results/search_gpu.jsonl [--seconds 540]

One line of JSON per size, written as soon as it is measured, the size of the target first; sizes already in the file
are skipped. A size is timed only after a search of relabelling has given the labels that the CPU engine gives. Wall
time of whole calls of 256 steps between two synchronisations, median of several. `first_round_us` is a call of one
round: the forward pass over the pool that every call begins with, and fixed costs; `step_us` is what every further step
adds. Not yet run on a GPU; the target is ten million proposals of graphs of 20 nodes through gcn5-64 per second on an
H200. `--device cpu` runs the whole script on small sizes with the CPU engine.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_search import trees, untrained
from gpu_table import GpuTable

from acgkd_fast._library import backend
from acgkd_fast.distill.native_refiner import STEPS_PER_CALL
from acgkd_fast.distill.refine import Refiner, RefineSettings
from acgkd_fast.graphs import GraphBatch
from acgkd_fast.teachers import Teacher, as_teacher

TARGET = 1e7
REPEATS = 7


@dataclass(frozen=True)
class Size:
    nodes: int
    graphs: int
    arch: str = "gcn5-64"
    share: float = 1.0
    interval: int = 8


# Enough graphs to keep three blocks on each of 132 processors busy for a few rounds.
TARGET_SIZE = Size(20, 2048)


def sizes() -> Iterator[Size]:
    """The size with the target, pools as they are used, then one thing changed at a time."""
    yield TARGET_SIZE
    yield Size(20, 131, share=0.3, interval=1)
    yield Size(25, 420, share=0.3, interval=1)
    for interval, graphs in itertools.product((1, 8, 32), (64, 512, 2048)):
        yield Size(20, graphs, interval=interval)
    for nodes, graphs in ((10, 4096), (40, 1024), (75, 512), (430, 128)):
        yield Size(nodes, graphs)
    for arch in ("gcn5-16", "gcn5-32", "gcn5-128", "gcn3-64", "gcn9-64", "gin5-64"):
        yield Size(20, 2048, arch)


def on(device: torch.device, size: Size) -> tuple[Teacher, GraphBatch]:
    teacher, graphs = untrained(size.arch), trees([size.nodes] * size.graphs, "one-hot", 7)
    module = teacher.module.to(device)
    moved = GraphBatch(graphs.x.to(device), graphs.edges.to(device), graphs.y.to(device))
    return as_teacher(module), moved


def search(device: torch.device, size: Size, steps: int, **options: Any) -> Refiner:
    settings = RefineSettings(steps=steps, share=size.share, interval=size.interval, engine="native", **options)
    return Refiner(*on(device, size), settings, feature_kind="one-hot")


def verify(device: torch.device, size: Size) -> None:
    """Relabelling gives the CPU engine's labels, but where rounding decides."""
    small = replace(size, graphs=min(size.graphs, 64))
    found = []
    for where in (device, torch.device("cpu")):
        refiner = search(where, small, 4 * size.interval, relabel=1.0)
        refiner.advance(4 * size.interval)
        found.append(refiner.graphs().x.argmax(1).cpu())
    unlike = float((found[0] != found[1]).float().mean())
    assert unlike < 1e-3, f"{unlike:.2%} of the labels are not those of the CPU engine"


def seconds_of(refiner: Refiner, device: torch.device, steps: int) -> float:
    """Median wall time of that many steps from one state."""
    state, times = refiner.state_dict(), []
    for _ in range(REPEATS):
        refiner.load_state_dict(state)
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        refiner.advance(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def bench(size: Size, device: torch.device) -> dict[str, Any]:
    verify(device, size)
    refiner = search(device, size, 10**9)
    edited = max(1, round(size.share * size.graphs))
    few = size.interval
    call, whole = seconds_of(refiner, device, few), seconds_of(refiner, device, STEPS_PER_CALL)
    return {
        **asdict(size),
        "proposals_per_second": edited * STEPS_PER_CALL / whole,
        "first_round_us": 1e6 * call,
        "step_us": 1e6 * (whole - call) / (STEPS_PER_CALL - few),
    }


def summary(row: dict[str, Any]) -> str:
    label = (
        f"{row['nodes']} nodes, {row['graphs']} graphs, {row['arch']}, share {row['share']}, every {row['interval']}"
    )
    return f"{label}: {row['proposals_per_second']:.3g} proposals/s, {row['step_us']:.1f} us a step"


def facts(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    kernels = backend("search_steps", device)
    return {"torch": torch.__version__, "commit": commit.stdout.strip(), "gpu": gpu, "kernels": kernels}


@pytest.mark.gpu
def test_target(benchmark: Any) -> None:
    """The size with the target, for `make gpu-check`; the script measures the whole table."""
    device = torch.device("cuda")
    row = bench(TARGET_SIZE, device)
    print(summary(row), f"({row['proposals_per_second'] / TARGET:.0%} of the target)")
    benchmark.extra_info.update({**row, **facts(device), "target_per_second": TARGET})
    refiner = search(device, TARGET_SIZE, 10**9)
    benchmark.pedantic(lambda: seconds_of(refiner, device, STEPS_PER_CALL), rounds=1)


def main() -> None:
    table = GpuTable(__doc__)
    device = table.device
    here = facts(device)
    print(json.dumps(here), flush=True)
    fitting = (size for size in sizes() if device.type == "cuda" or size.graphs * size.nodes <= 3000)
    for size in table.remaining(
        fitting, lambda size: size, lambda row: Size(**{key: row[key] for key in asdict(TARGET_SIZE)})
    ):
        row = bench(size, device)
        print(summary(row), flush=True)
        table.write({**row, **here})


if __name__ == "__main__":
    main()
