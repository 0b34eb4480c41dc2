"""One learning step on a GPU: the captured graph, our eager step, PyTorch Geometric and padded dense matrices.

    python bench/bench_step_gpu.py --out bench/results/step_gpu.json

Targets at the size of MUTAG: at most 150 us for the captured step, and a twentieth of PyTorch Geometric's eager one.
Nothing is timed before the networks agree on a drawn graph, and before the captured steps leave the state that plain
ones leave. `host_us` is wall time per step of a run of steps with one synchronisation at its end, medians over
several runs; `device_us` is time per replay between device events. Not yet run on a GPU. `--device cpu` runs the
script without one, the static step eagerly.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_propagate_gpu import environment, synchronise, time_events
from step_peers import SHAPES, Shape, check_agreement, dense_bmm, make_learner, pyg_drawn_edges

from acgkd_fast.distill.captured import StaticStep
from acgkd_fast.distill.inversion import Learner

ESTIMATORS = ("sparse_straight_through", "straight_through")
CAPTURED, EAGER, PYG, DENSE = "acgkd-fast captured", "acgkd-fast eager", "PyG eager", "padded dense bmm"
TARGET_US, TARGET_RATIO = 150.0, 20.0
AGREEMENT_STEPS = 5


def state(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in learner.pseudo_graphs.named_parameters()}


def check_captured(shape: Shape, estimator: str, device: str) -> float:
    """Largest difference between captured and plain steps, relative to how far the parameters have moved."""
    plain, learner = (make_learner(shape, estimator, device) for _ in range(2))
    start = {name: tensor.clone() for name, tensor in state(plain).items()}
    StaticStep(learner).advance(AGREEMENT_STEPS)
    for _ in range(AGREEMENT_STEPS):
        plain.advance()
    worst = 0.0
    for name, tensor in state(plain).items():
        moved = (tensor - start[name]).abs().max()
        worst = max(worst, float((tensor - state(learner)[name]).abs().max() / moved))
    if not worst <= 1e-3:
        raise AssertionError(f"captured steps left another state than plain ones: {worst}")
    return worst


def per_step(run: Callable[[int], Any], device: str, steps: int, repeats: int) -> float:
    """Microseconds per step of a run of steps, median over runs."""
    times = []
    for _ in range(repeats):
        synchronise(torch.device(device))
        begin = time.perf_counter()
        run(steps)
        synchronise(torch.device(device))
        times.append((time.perf_counter() - begin) / steps)
    return round(1e6 * statistics.median(times), 2)


def repeated(step: Callable[[], Any]) -> Callable[[int], None]:
    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


def contenders(shape: Shape, estimator: str, device: str) -> tuple[StaticStep, dict[str, Callable[[int], Any]]]:
    """Ways to take so many steps, by name; PyTorch Geometric only where it is installed."""
    static = StaticStep(make_learner(shape, estimator, device))
    eager = make_learner(shape, estimator, device)
    ways: dict[str, Callable[[int], Any]] = {
        CAPTURED: static.advance,
        EAGER: repeated(eager.advance),
        DENSE: repeated(dense_bmm(shape, device)),
    }
    if importlib.util.find_spec("torch_geometric") is not None:
        ways[PYG] = repeated(pyg_drawn_edges(shape, device))
    return static, ways


def bench(shape: Shape, estimator: str, device: str, *, steps: int, repeats: int) -> dict[str, Any]:
    if importlib.util.find_spec("torch_geometric") is not None:
        check_agreement(shape, device)
    row: dict[str, Any] = {"shape": shape.name, "estimator": estimator}
    row["difference_from_plain"] = check_captured(shape, estimator, device)
    begin = time.perf_counter()
    static, ways = contenders(shape, estimator, device)
    row["prepare_s"] = round(time.perf_counter() - begin, 3)
    for run in ways.values():
        run(3)
    row["host_us"] = {name: per_step(run, device, steps, repeats) for name, run in ways.items()}
    if device == "cuda":
        assert static._graph is not None
        row["device_us"] = time_events(static._graph.replay)
        row["peak_bytes"] = {name: peak_bytes(run) for name, run in ways.items()}
    mine = row["host_us"][CAPTURED]
    row["times_slower_than_captured"] = {name: us / mine for name, us in row["host_us"].items() if name != CAPTURED}
    return row


def peak_bytes(run: Callable[[int], Any]) -> int:
    """Most bytes alive above those before the step; a replay's memory was taken when it was captured."""
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run(1)
    return torch.cuda.max_memory_allocated() - held


def targets(row: dict[str, Any]) -> dict[str, bool]:
    """Which targets a row of the size of MUTAG meets."""
    met = {"at most 150 us": row["host_us"][CAPTURED] <= TARGET_US}
    if PYG in row["host_us"]:
        met["20 times faster than PyG eager"] = row["times_slower_than_captured"][PYG] >= TARGET_RATIO
    return met


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", SHAPES)
def test_step(name: str, estimator: str, benchmark: Any) -> None:
    """For `make gpu-check`. Not yet run on a GPU."""
    row = bench(SHAPES[name], estimator, "cuda", steps=50, repeats=7)
    if name == "MUTAG":
        row["targets"] = targets(row)
    print(json.dumps(row))
    benchmark.extra_info.update({**row, **environment(torch.device("cuda"))})
    static, _ = contenders(SHAPES[name], estimator, "cuda")
    benchmark.pedantic(lambda: static.advance(10), rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=50, help="steps per run")
    parser.add_argument("--repeats", type=int, default=7, help="runs, of which the median is taken")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_step_gpu: no CUDA device (try --device cpu for a dry run)")
    rows = []
    for name in args.shapes:
        for estimator in ESTIMATORS:
            row = bench(SHAPES[name], estimator, args.device, steps=args.steps, repeats=args.repeats)
            if name == "MUTAG" and args.device == "cuda":
                row["targets"] = targets(row)
            print(json.dumps(row), flush=True)
            rows.append(row)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**environment(torch.device(args.device)), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
