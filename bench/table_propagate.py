"""GCN message passing on freshly drawn edges on one CPU thread: forward plus backward, beside its peers.

    python bench/table_propagate.py --out bench/results/propagate_cpu.json [--seconds 270] [--compile]
    python bench/table_propagate.py --out bench/results/propagate_cpu.json --render

The file is written anew after every size; sizes in it are skipped, so the same command continues a run that was cut
off. Every peer starts from the same CSR edges and pays for the format that it needs, since learned edges change in
every step. A peer is timed only after its output and its gradients of features and edge values agree with float64.
Peers are timed in turn, and medians of CPU time are kept, so that other work on the machine counts little.
The copy bandwidth is measured beside each size for the same reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_propagate_gpu import BATCHES, DENSITIES, NODES, TOLERANCE, WIDTHS, Problem, Size, environment
from facts import copy_bandwidth, processor
from propagate_peers import Layer, available

from acgkd_fast.files import write_text

OURS = "acgkd_fast"
MAX_ENTRIES, MAX_MESSAGES, MAX_FEATURES, MAX_DENSE = 2e6, 3.2e7, 2**23, 2**26
ROUNDS, LEAST_ROUNDS, ENOUGH_SECONDS = 15, 3, 0.4
CPU = torch.device("cpu")
# Molecules have two or so partners whatever their size, so this density falls with n.
DEGREE = 2.2
DENSITIES |= {f"MUTAG, {n} nodes": (DEGREE / (n - 1), 0.0) for n in NODES}


def sizes() -> Iterator[tuple[Size, str | None]]:
    """Every combination, and why it is left out."""
    for name, nodes, batch, width in itertools.product(("MUTAG", "COLLAB", "REDDIT-B"), NODES, BATCHES, WIDTHS):
        size = Size(nodes, batch, width, f"MUTAG, {nodes} nodes" if name == "MUTAG" else name)
        skip = None
        if size.entries < nodes * batch:
            skip = "less than one entry per node"
        elif size.entries > MAX_ENTRIES:
            skip = f"{size.entries:.2g} entries, more than {MAX_ENTRIES:.0e}"
        elif size.entries * width > MAX_MESSAGES:
            skip = f"messages of {4e-9 * size.entries * width:.2g} GB, which peers store several times"
        elif nodes * batch * width > MAX_FEATURES:
            skip = f"features of {4e-9 * nodes * batch * width:.2g} GB"
        yield size, skip


def measure(size: Size, layers: dict[str, Layer]) -> dict[str, Any]:
    problem = Problem(size, CPU, torch.float32)
    peers: dict[str, dict[str, Any]] = {}
    running = dict(layers)
    floats = {
        "dense bmm": size.batch * size.nodes**2,
        # Its backward on the CPU multiplies out the whole matrix of the batch before it keeps the stored places.
        "torch CSR": (size.batch * size.nodes) ** 2,
    }
    for name, count in floats.items():
        if count > MAX_DENSE:
            running.pop(name)
            peers[name] = {"refused": f"would make dense matrices of {4e-9 * count:.2g} GB"}
    for name in list(running):
        try:
            error = problem.error(running[name])
        except (RuntimeError, NotImplementedError) as failure:
            peers[name] = {"refused": str(failure).splitlines()[0][:200]}
        else:
            agrees = error <= TOLERANCE[torch.float32]
            peers[name] = {"error": error} if agrees else {"error": error, "refused": "disagrees with float64"}
        if "refused" in peers[name]:
            del running[name]
    seconds: dict[str, list[float]] = {name: [] for name in running}
    begin = time.perf_counter()
    for done in range(ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - begin > ENOUGH_SECONDS:
            break
        for name, layer in running.items():
            start = time.process_time()
            problem.step(layer)
            seconds[name].append(time.process_time() - start)
    for name, times in seconds.items():
        peers[name]["median_us"] = round(1e6 * statistics.median(times), 1)
    moved, bandwidth = sum(problem.bytes_moved().values()), copy_bandwidth()
    row = {**asdict(size), "entries": problem.edges.col.numel(), "peers": peers, "bytes": moved}
    row["copy_gb_per_s"] = round(bandwidth, 1)
    if "median_us" in peers[OURS]:
        row["share_of_copy_bandwidth"] = round(moved / (1e3 * peers[OURS]["median_us"]) / bandwidth, 3)
        times = {name: peer["median_us"] for name, peer in peers.items() if "median_us" in peer and name != OURS}
        row["best_peer"] = min(times, key=times.__getitem__)
        row["best_peer_over_ours"] = round(times[row["best_peer"]] / peers[OURS]["median_us"], 2)
    return row


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["nodes"], row["batch"], row["width"], row["density"]


def render(found: dict[str, Any]) -> str:
    """Markdown: best peer over ours, one line per data set and graph size, one column per batch and width."""
    rows = {key(row): row for row in found["rows"]}
    columns = [(batch, width) for batch in BATCHES for width in WIDTHS]
    lines = [
        "| density, n | " + " | ".join(f"{batch} x {width}" for batch, width in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    labels = dict.fromkeys((size.density, size.nodes) for size, _ in sizes())
    for density, nodes in labels:
        cells = []
        for batch, width in columns:
            row = rows.get((nodes, batch, width, density))
            ratio = None if row is None else row.get("best_peer_over_ours")
            cells.append("-" if row is None or ratio is None else f"{ratio:.1f} {_SHORT.get(row['best_peer'], '?')}")
        if set(cells) != {"-"}:
            lines.append(f"| {density.split(',')[0]}, {nodes} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_SHORT = {
    "PyG": "P",
    "torch CSR": "S",
    "torch COO": "O",
    "dense bmm": "D",
    "gather-scatter": "G",
    "torch.compile": "C",
    "torch-scatter": "T",
    "torch-sparse": "U",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON; finished sizes in it are skipped")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further size after this long")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the naive path")
    parser.add_argument(
        "--render", action="store_true", help="print the table of what is in the file, and measure nothing"
    )
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    if args.render:
        print(render(found))
        return
    torch.set_num_threads(1)
    begin = time.monotonic()
    # Once for all sizes: a compiled peer keeps what it compiled.
    layers = {width: available(width, CPU, compile_naive=False) for width in WIDTHS}
    if args.compile:
        naive = available(WIDTHS[0], CPU, compile_naive=True)[0]["torch.compile"]
        for width in WIDTHS:
            layers[width][0]["torch.compile"] = naive
            layers[width][1].pop("torch.compile")
    done = {key(row) for row in found["rows"]}
    found["environment"] = {**environment(CPU), "threads": 1, "cpu": processor(), "python": platform.python_version()}
    found["absent"] = layers[WIDTHS[0]][1]
    found["skipped"] = [{**asdict(size), "why": why} for size, why in sizes() if why]
    # Cheap ones first: a run that is cut off has seen most of the table.
    for size in sorted(
        (size for size, why in sizes() if not why), key=lambda s: (s.entries + s.nodes * s.batch) * s.width
    ):
        if key(asdict(size)) in done:
            continue
        if time.monotonic() - begin > args.seconds:
            print("out of time; the same command continues", flush=True)
            return
        row = measure(size, layers[size.width][0])
        found["rows"].append(row)
        write_text(args.out, json.dumps(found, indent=1) + "\n")
        ratio, best = row.get("best_peer_over_ours"), row.get("best_peer")
        print(f"{size.density} n={size.nodes} batch={size.batch} width={size.width}: {ratio} of {best}", flush=True)


if __name__ == "__main__":
    main()
