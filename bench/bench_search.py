"""The compiled search beside the generic one, and proposals per second beside their arithmetic.

The floor of a proposal is the work of a whole forward pass of one graph, 2 nodes width^2 per hidden product and
2 (nodes + 2 edges) width per sum over neighbours, over the rate that torch.mm reaches in the same run on matrices of
2048 rows; the search recomputes only the rows that an edit reaches, so it may come below. Rates are per second of CPU
time of all threads, so that a busy machine does not count; comparisons of the engines give wall time too. With several
candidates per step each counts as a proposal.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import gemm_rate

from acgkd_fast._library import backend
from acgkd_fast.checkpoints import load_model
from acgkd_fast.distill.refine import Refiner, RefineSettings
from acgkd_fast.distill.starts import balanced_labels, random_features, random_graphs, random_trees
from acgkd_fast.graphs import GraphBatch
from acgkd_fast.nn.models import build_model
from acgkd_fast.teachers import Teacher, as_teacher

pytestmark = [
    pytest.mark.skipif(backend("search_steps", "cpu") != "native", reason="the extension is not built"),
    pytest.mark.filterwarnings("ignore:k. expected at most 0.05"),
]
THREADS = int(os.environ.get("ACGKD_FAST_BENCH_THREADS", "1"))
# Trained teachers: gcn5-64 on MUTAG (7 labels) and on house-or-cycle (constant features).
MUTAG_TEACHER = os.environ.get("ACGKD_FAST_MUTAG_TEACHER", "")
HOUSE_TEACHER = os.environ.get("ACGKD_FAST_HOUSE_TEACHER", "")


def trees(sizes: list[int], kind: str, width: int, seed: int = 0) -> GraphBatch:
    edges = random_trees(sizes, seed=seed)
    x = random_features(kind, width, edges.num_nodes, seed=seed)
    return GraphBatch(x, edges, balanced_labels(len(sizes), 2, seed))


def untrained(arch: str) -> Teacher:
    """Statistics of other graphs of its own."""
    torch.manual_seed(0)
    model = build_model(arch, 7, 2)
    graphs = trees([12, 25] * 20, "one-hot", 7, seed=1)
    with torch.no_grad():
        for _ in range(20):
            model(graphs.x, graphs.edges)
    return as_teacher(model)


def run(teacher: Teacher, graphs: GraphBatch, steps: int, kind: str, **options: Any) -> tuple[float, float, Refiner]:
    """Wall and CPU seconds of the steps alone."""
    refiner = Refiner(teacher, graphs, RefineSettings(steps=steps, **options), feature_kind=kind)
    wall, cpu = time.perf_counter(), time.process_time()
    refiner.advance(steps)
    return time.perf_counter() - wall, time.process_time() - cpu, refiner


@pytest.mark.skipif(not Path(MUTAG_TEACHER).is_file(), reason="ACGKD_FAST_MUTAG_TEACHER names no file")
def test_mutag(benchmark: Any) -> None:
    """131 graphs of 10-29 nodes, 7 labels, 2,000 steps: both engines in turn, and the intervals."""
    torch.set_num_threads(THREADS)
    teacher = as_teacher(load_model(MUTAG_TEACHER)[0])
    sizes = torch.randint(10, 30, (131,), generator=torch.Generator().manual_seed(0)).tolist()
    graphs, found = trees(sizes, "one-hot", 7), {}
    for name, options in [
        ("generic", {"engine": "generic"}),
        *((f"interval {n}", {"interval": n}) for n in (1, 5, 20)),
        ("best of 4", {"proposals": 4, "steps": 500}),
    ]:
        wall, cpu, refiner = run(teacher, graphs, options.pop("steps", 2000), "one-hot", **options)
        found[name] = {"wall": wall, "cpu": cpu, **refiner.metrics()}
        k, cross_entropy = found[name]["k"], found[name]["cross_entropy"]
        print(f"\n{name:12} wall {wall:6.2f} s  CPU {cpu:5.2f} s  K {k:.5f}  CE {cross_entropy:.4f}", end="")
    benchmark.extra_info.update({"threads": THREADS, "results": found})
    benchmark.pedantic(lambda: run(teacher, graphs, 2000, "one-hot"), rounds=3)


@pytest.mark.skipif(not Path(HOUSE_TEACHER).is_file(), reason="ACGKD_FAST_HOUSE_TEACHER names no file")
def test_house_or_cycle(benchmark: Any) -> None:
    """420 graphs of 25 nodes with constant features, 2,000 steps."""
    torch.set_num_threads(THREADS)
    teacher = as_teacher(load_model(HOUSE_TEACHER)[0])
    graphs = trees([25] * 420, "constant", teacher.num_features)
    wall, cpu, refiner = benchmark.pedantic(lambda: run(teacher, graphs, 2000, "constant"), rounds=3)
    print(f"\nhouse or cycle wall {wall:6.2f} s  CPU {cpu:5.2f} s  K {refiner.metrics()['k']:.5f}", end="")
    benchmark.extra_info.update({"threads": THREADS, "wall": wall, "cpu": cpu, **refiner.metrics()})


def pool_of(shape: str, nodes: int, count: int) -> GraphBatch:
    """Sparse trees; trees with hubs, as REDDIT-B's threads; a third of all pairs, as in COLLAB."""
    sizes = [nodes] * count
    if shape == "dense":
        edges = random_graphs(sizes, 0.3 * (nodes - 1), seed=0)
    else:
        edges = random_trees(sizes, attachment=1.0 if shape == "hubs" else 0.5, seed=0)
    return GraphBatch(random_features("one-hot", 7, edges.num_nodes, seed=0), edges, balanced_labels(count, 2, 0))


@pytest.mark.parametrize(
    ("shape", "nodes", "arch", "graphs", "options"),
    [
        *(("trees", nodes, "gcn5-64", 64, {}) for nodes in (10, 20, 40, 75, 430)),
        ("hubs", 430, "gcn5-64", 64, {}),
        ("dense", 75, "gcn5-64", 64, {}),
        *(("trees", 20, f"gcn5-{width}", 64, {}) for width in (16, 32, 128)),
        *(("trees", 20, arch, 64, {}) for arch in ("gcn2-64", "gcn3-64", "gcn9-64", "gin5-64")),
        *(("trees", 20, "gcn5-64", count, {}) for count in (1, 8, 512)),
        *(("trees", 20, "gcn5-64", 512, options) for options in ({"interval": 5}, {"proposals": 4})),
        *(("trees", 20, "gcn5-64", 64, options) for options in ({"proposals": 4}, {"connected": True, "two_hop": 0.5})),
        *(("trees", 20, "gcn5-64", 64, options) for options in ({"keep_degrees": True}, {"relabel": 0.0})),
        *((*case, "gcn5-64", 64, {"engine": "generic"}) for case in (("trees", 20), ("dense", 75), ("hubs", 430))),
    ],
)
def test_proposals(shape: str, nodes: int, arch: str, graphs: int, options: dict[str, Any], benchmark: Any) -> None:
    torch.set_num_threads(THREADS)
    teacher, pool = untrained(arch), pool_of(shape, nodes, graphs)
    kind, depth, width = arch[:3], int(arch[3 : arch.index("-")]) - 1, int(arch.split("-")[1])
    # Every call starts with a forward pass over the pool, which short runs would be made of.
    steps = 20 if options.get("engine") == "generic" else max(100, 400_000 // (nodes * graphs))
    tried = steps * max(1, round(0.3 * graphs)) * options.get("proposals", 1)
    _, seconds, _ = benchmark.pedantic(lambda: run(teacher, pool, steps, "one-hot", **options), rounds=3)
    products = (depth - 1) + (depth if kind == "gin" else 0)
    entries = nodes + pool.edges.num_edges / graphs
    floor = (2 * nodes * width**2 * products + 2 * entries * width * depth) / gemm_rate(width)
    rate = tried / seconds
    benchmark.extra_info.update(
        {"threads": THREADS, "proposals_per_second": rate, "floor_us": 1e6 * floor, "us": 1e6 / rate}
    )
    print(f"\n{shape} {nodes:4} {arch:9} {graphs:4} graphs {options}: {rate:9.0f} proposals/s, ", end="")
    print(f"{1e6 / rate:7.2f} us each, floor {1e6 * floor:7.2f} us", end="")
