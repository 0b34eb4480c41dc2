"""GCN message passing on freshly drawn edges: forward plus backward on one GPU, beside its peers.

    python bench/bench_propagate_gpu.py --out bench/results/propagate_gpu.jsonl [--compile] [--seconds 540]

One line of JSON per size, written as soon as it is measured, the sizes of the targets first; sizes already in the file
are skipped, so that a run that was cut off is continued by the same command. Every peer starts from the same CSR edges
and pays for the format it needs. A peer is timed only after its output and its gradients of features and edge values
agree with float64. Three times, medians in microseconds: `host` is wall time of one call with a synchronisation on
either side; `cold` is device time with the L2 cache flushed before; `graph` is device time per replay of a captured
CUDA graph with a warm cache. Not yet run on a GPU. `--device cpu` runs the whole script on small sizes without one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_table import GpuTable
from propagate_peers import Layer, available, ours

# Importing `propagate` declares its operators, whose oracle is taken by name.
from acgkd_fast import EdgeSample, _library, propagate  # noqa: F401

NODES, BATCHES, WIDTHS = (20, 100, 430, 3_000, 100_000), (1, 32, 128, 1024), (16, 64, 256)
# Share of node pairs that are joined, and the share of edges that end in one of three hubs.
DENSITIES = {"MUTAG": (0.13, 0.0), "COLLAB": (0.3, 0.0), "REDDIT-B": (0.006, 0.3), "1e7 edges": (0.001, 0.0)}
MAX_ENTRIES, MAX_NODE_FEATURES, MAX_DENSE_BYTES = 2.5e7, 2**28, 8 * 2**30
REPEATS = 30
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Size:
    nodes: int  # of each graph
    batch: int
    width: int
    density: str

    @property
    def entries(self) -> float:
        return self.batch * self.nodes * (self.nodes - 1) * DENSITIES[self.density][0]


TARGETS = [
    Size(100_000, 1, 64, "1e7 edges"),
    Size(20, 128, 64, "MUTAG"),
    Size(100, 128, 64, "COLLAB"),
    Size(430, 32, 64, "REDDIT-B"),
]


def sizes() -> Iterator[Size]:
    """The sizes with a target first, then every combination that fits."""
    yield from TARGETS
    for density, nodes, batch, width in itertools.product(DENSITIES, NODES, BATCHES, WIDTHS):
        size = Size(nodes, batch, width, density)
        fits = size.entries <= MAX_ENTRIES and nodes * batch * width <= MAX_NODE_FEATURES
        # Fewer than an edge per node is no graph of these data sets, and 1e7 edges is a size of its own.
        if size not in TARGETS and fits and size.entries >= nodes * batch and density != "1e7 edges":
            yield size


def draw(size: Size, device: torch.device, dtype: torch.dtype) -> EdgeSample:
    """Random symmetric edges; repeated draws are dropped, so slightly fewer than the density says."""
    generator = torch.Generator().manual_seed(1)
    share, hub_share = DENSITIES[size.density]
    pairs = max(1, round(share * size.nodes * (size.nodes - 1) / 2))
    total = size.batch * pairs
    low = torch.randint(0, size.nodes, (total,), generator=generator)
    hubs = torch.rand(total, generator=generator) < hub_share
    low = torch.where(hubs, low % 3, low)
    high = (low + torch.randint(1, size.nodes, (total,), generator=generator)) % size.nodes
    graph = torch.arange(size.batch).repeat_interleave(pairs)
    low, high = torch.minimum(low, high) + graph * size.nodes, torch.maximum(low, high) + graph * size.nodes
    total_nodes = size.batch * size.nodes
    key = torch.unique(low * total_nodes + high)
    low, high = key // total_nodes, key % total_nodes
    weight = torch.rand(len(low), generator=generator).add_(0.5).to(dtype)
    both = torch.stack([torch.cat([low, high]), torch.cat([high, low])])
    ptr = torch.arange(size.batch + 1) * size.nodes
    return EdgeSample.from_edge_index(both, ptr, torch.cat([weight, weight]), symmetric=True).to(device)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Problem:
    """Inputs of one size, and the gradients that every peer has to find."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.edges = draw(size, device, dtype)
        generator = torch.Generator(device).manual_seed(2)
        shape = (size.batch * size.nodes, size.width)
        self.x = torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()
        self.value = self.edges.value.clone().requires_grad_()
        self.grad_out = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        self.expected = self._oracle()

    def step(self, layer: Layer) -> tuple[torch.Tensor, ...]:
        out = layer(self.x, self.edges, self.value)
        return (out, *torch.autograd.grad(out, (self.x, self.value), self.grad_out))

    def _oracle(self) -> tuple[torch.Tensor, ...]:
        """Output and gradients in float64, by whole matrices of the features' columns to save memory."""
        forward, backward = _library.reference("gcn_propagate"), _library.reference("gcn_propagate_backward")
        edges, value = self.edges, self.value.detach().double()
        x, grad_out = self.x.detach().double(), self.grad_out.double()
        matrix = (edges.rowptr, edges.col, None, None, None)
        outs, grads, entry = [], [], 0.0
        for columns in torch.arange(x.shape[1]).split(max(1, 2**28 // max(1, edges.col.numel()))):
            part = slice(int(columns[0]), int(columns[-1]) + 1)
            out, scale = forward(x[:, part], value, None, None, *matrix, True, 0)
            # All three gradients are sums over the columns of the features.
            grad_x, grad_value, _ = backward(grad_out[:, part], x[:, part], out, value, scale, *matrix, True)
            outs.append(out)
            grads.append(grad_x)
            entry = entry + grad_value
        return torch.cat(outs, 1), torch.cat(grads, 1), self._symmetrised(entry)

    def _symmetrised(self, entry: torch.Tensor) -> torch.Tensor:
        """The sum of an entry's gradient and its mirror image's, which alone is defined."""
        key = self.edges.row() * self.edges.num_nodes + self.edges.col.long()
        mirrored = self.edges.col.long() * self.edges.num_nodes + self.edges.row()
        return entry + entry[torch.searchsorted(key, mirrored)]

    def error(self, layer: Layer) -> float:
        """Largest error of output and gradients, relative to the largest entry of each."""
        out, grad_x, grad_value = (t.detach().double() for t in self.step(layer))
        found = (out, grad_x, self._symmetrised(grad_value))
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, self.expected, strict=True))

    def bytes_moved(self) -> dict[str, int]:
        """What one fused forward and backward pass must read and write, per pass of our kernels."""
        item, width = self.x.element_size(), self.x.shape[1]
        nodes, entries = self.edges.num_nodes, self.edges.col.numel()
        # Per edge one gathered row and its index and value; per node its rows in and out, and rowptr and scale.
        forward = entries * (width * item + 4 + item) + nodes * (2 * width * item + 8)
        backward = entries * (width * item + 4 + 2 * item) + nodes * (4 * width * item + 12)
        return {"forward": forward, "backward": backward}


def median_us(times: list[float]) -> float:
    return round(1e6 * statistics.median(times), 2)


def time_host(run: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return median_us(times)


def time_events(run: Callable[[], Any], before: Callable[[], Any] | None = None) -> float:
    times = []
    for _ in range(REPEATS):
        if before is not None:
            before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Work that keeps the device busy while the host enqueues, so that events enclose no gaps.
        torch.cuda._sleep(2_000_000)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return median_us(times)


def waits_for_device(run: Callable[[], Any]) -> bool:
    """Whether a call makes the host wait, by torch's own detector."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def time_graph(run: Callable[[], Any]) -> float | str:
    """Device time per replay, or why the call cannot be captured (peers that read sizes back cannot)."""
    # A capture that fails half way would leave torch's allocator unable to free cached memory.
    if waits_for_device(run):
        return "the host waits for the device"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return str(error).splitlines()[0][:120]
    return time_events(graph.replay)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a device-to-device copy of 1 GiB, reads and writes counted."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (time_events(lambda: target.copy_(source)) * 1e-6) / 1e9


def measure(problem: Problem, layer: Layer, flush: torch.Tensor | None) -> dict[str, Any]:
    error = problem.error(layer)
    if not error <= TOLERANCE[problem.dtype]:
        return {"error": error, "refused": "disagrees with float64"}
    for _ in range(3):
        problem.step(layer)
    result: dict[str, Any] = {"error": error, "host_us": time_host(lambda: problem.step(layer), problem.device)}
    if flush is None:
        return result
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    problem.step(layer)
    result["peak_bytes"] = torch.cuda.max_memory_allocated() - held
    result["cold_us"] = time_events(lambda: problem.step(layer), before=flush.zero_)
    captured = time_graph(lambda: problem.step(layer))
    result["graph_us" if isinstance(captured, float) else "not_captured"] = captured
    return result


def environment(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    found = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip(),
        "kernels": _library.backend("gcn_propagate", device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "l2_bytes": properties.L2_cache_size}
    return found


def bench(
    size: Size, device: torch.device, dtype: str, flush: torch.Tensor | None, *, compile_naive: bool
) -> dict[str, Any]:
    problem = Problem(size, device, getattr(torch, dtype))
    layers, absent = available(size.width, device, compile_naive=compile_naive)
    if size.batch * size.nodes**2 * problem.x.element_size() > MAX_DENSE_BYTES:
        layers.pop("dense bmm")
        absent["dense bmm"] = "the padded matrices exceed 8 GiB"
    results = {}
    for name, layer in layers.items():
        try:
            results[name] = measure(problem, layer, flush)
        except (RuntimeError, NotImplementedError) as error:
            results[name] = {"refused": str(error).splitlines()[0][:200]}
    degrees = problem.edges.rowptr.diff()
    facts = {"entries": problem.edges.col.numel(), "max_degree": int(degrees.max()), "bytes": problem.bytes_moved()}
    return {**asdict(size), "dtype": dtype, **facts, "peers": results, "absent": absent}


def summary(row: dict[str, Any], bandwidth: float | None) -> str:
    key = "cold_us" if bandwidth is not None else "host_us"
    times = {name: result[key] for name, result in row["peers"].items() if key in result}
    label = f"{row['density']} n={row['nodes']} batch={row['batch']} width={row['width']} entries={row['entries']}"
    if "acgkd_fast" not in times:
        return f"{label}: ours was refused: {row['peers']['acgkd_fast']}"
    mine = times.pop("acgkd_fast")
    best = min(times, key=times.__getitem__) if times else None
    against = f", {times[best] / mine:.2f}x of the best peer ({best}, {times[best]} us)" if best else ""
    roof = ""
    if bandwidth is not None:
        row["share_of_copy_bandwidth"] = sum(row["bytes"].values()) / (mine * 1e-6) / 1e9 / bandwidth
        roof = f", {100 * row['share_of_copy_bandwidth']:.0f} % of copy bandwidth"
    return f"{label}: {mine} us{against}{roof}"


@pytest.mark.gpu
@pytest.mark.parametrize("size", TARGETS, ids=lambda size: size.density)
def test_target_sizes(size: Size, benchmark: Any) -> None:
    """The sizes with a target, for `make gpu-check`; the script measures the whole table."""
    device = torch.device("cuda")
    facts, bandwidth = environment(device), copy_bandwidth(device)
    flush = torch.empty(4 * facts["l2_bytes"], dtype=torch.uint8, device=device)
    row = bench(size, device, "float32", flush, compile_naive=False)
    assert "refused" not in row["peers"]["acgkd_fast"], row
    print(summary(row, bandwidth))
    benchmark.extra_info.update({**row, **facts, "copy_bandwidth_gb_per_s": bandwidth})
    problem = Problem(size, device, torch.float32)
    benchmark.pedantic(lambda: time_host(lambda: problem.step(ours), device), rounds=1)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the naive path")


def main() -> None:
    table = GpuTable(__doc__, _options)
    device, dtype = table.device, table.options.dtype
    facts = environment(device)
    bandwidth, flush = None, None
    if device.type == "cuda":
        bandwidth = copy_bandwidth(device)
        facts["copy_bandwidth_gb_per_s"] = bandwidth
        flush = torch.empty(4 * facts["l2_bytes"], dtype=torch.uint8, device=device)
    print(json.dumps(facts), flush=True)
    fitting = (size for size in sizes() if device.type == "cuda" or size.entries * size.width <= 2e6)
    for size in table.remaining(
        fitting,
        lambda size: (size.density, size.nodes, size.batch, size.width, dtype),
        lambda row: tuple(row[name] for name in ("density", "nodes", "batch", "width", "dtype")),
    ):
        row = bench(size, device, dtype, flush, compile_naive=table.options.compile)
        print(summary(row, bandwidth), flush=True)
        table.write({**row, **facts})


if __name__ == "__main__":
    main()
