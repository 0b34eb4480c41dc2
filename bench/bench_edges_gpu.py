"""Drawing Binary Concrete edges on one GPU, forward and backward, beside eager torch, torch.compile and DosCond's way.

    python bench/bench_edges_gpu.py --out bench/results/edges_gpu.jsonl [--seconds 540]

One line of JSON per size, the sizes of the targets first; sizes already in the file are skipped. A way is timed only
after its edges for given uniforms, and our gradients, agree with the formulas. The dense ways stop at the adjacency
matrix; "eager torch to CSR" sorts as well, and its gradient reaches drawn edges only. Times are medians in
microseconds, three of each: `host` is wall time of one call with a synchronisation on either side; `cold` is device
time with the L2 cache flushed before; `graph` is device time per replay of a captured CUDA graph with a warm cache.
Bytes are what the fused passes must move (logits in, edges out; back: logits and candidate gradients in, logit
gradients out), set against the copy bandwidth measured in the same run. Not yet run on a GPU. `--device cpu` runs the
script on small sizes without one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from bench_propagate_gpu import copy_bandwidth, environment, time_events, time_graph, time_host
from edges_peers import PEERS, Problem, eager_to_csr, expand, ours
from gpu_table import GpuTable

import acgkd_fast as af
from acgkd_fast import _library
from acgkd_fast.edges import FactorLogits


@dataclass(frozen=True)
class Size:
    batch: int
    nodes: int
    density: float
    factors: int = 0  # columns of z; 0 for logits of their own

    @property
    def pairs(self) -> int:
        return self.batch * self.nodes * (self.nodes - 1) // 2


TARGETS = [Size(128, 20, 0.13), Size(1, 14_142, 0.01)]
SIZES = [
    *TARGETS,
    Size(128, 100, 0.1),
    Size(32, 430, 0.02),
    Size(1024, 430, 0.01),
    Size(16, 2_000, 0.01),
    Size(1, 40_000, 0.001),
    Size(1, 100_000, 0.0001, factors=16),
    Size(1, 100_000, 0.0001, factors=64),
]
# A pair that float32 puts on the threshold may fall on either side.
MISMATCHES = 1e-6


def device_times(run: Callable[[], Any], device: torch.device, flush: torch.Tensor | None) -> dict[str, Any]:
    for _ in range(3):
        run()
    found: dict[str, Any] = {"host_us": time_host(run, device)}
    if flush is None:
        return found
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    found["peak_bytes"] = torch.cuda.max_memory_allocated() - held
    found["cold_us"] = time_events(run, before=flush.zero_)
    captured = time_graph(run)
    found["graph_us" if isinstance(captured, float) else "not_captured"] = captured
    return found


def bytes_moved(pairs: int, nodes: int, entries: int, item: int = 4) -> dict[str, int]:
    """Per entry col, pair and value; per node a row offset."""
    out = entries * (4 + 8 + item) + 4 * nodes
    return {"forward": pairs * item + out, "backward": 3 * pairs * item + entries * (4 + 8 + item) + 4 * nodes}


def check_ours(problem: Problem) -> dict[str, torch.Tensor]:
    """Our edges and gradient against plain torch on the same noise; returns what the peers are compared with."""
    sample = ours(problem)
    assert not sample.overflowed()
    layout, logits = problem.layout, problem.logits.detach()
    u = torch.ops.acgkd_fast.pair_uniforms(layout.table, problem.rng, layout.kind, 0, layout.num_pairs)
    drawn = logits + torch.logit(u) > 0
    found = torch.zeros(layout.num_pairs, dtype=torch.bool, device=logits.device)
    found[sample.pair[: sample.num_edges]] = True
    mismatches = int((found != drawn).sum())
    if mismatches > max(2, MISMATCHES * layout.num_pairs):
        raise RuntimeError(f"ours disagrees on {mismatches} edges")
    generator = torch.Generator(logits.device).manual_seed(2)
    pull = torch.randn(layout.num_pairs, generator=generator, device=logits.device)
    gradient = our_backward(problem, sample, pull)()
    soft = torch.sigmoid(logits + torch.logit(u))
    # Both directions of a drawn edge bring `pull`, the port brings it once to an absent candidate.
    expected = torch.where(found, 2.0, 1.0) * pull * soft * (1 - soft)
    if not torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6):
        raise RuntimeError("our gradient disagrees with the formula")
    return {"u": u, "drawn": drawn, "pull": pull, "sample": sample}


def our_backward(problem: Problem, sample: af.EdgeSample, pull: torch.Tensor) -> Callable[[], torch.Tensor]:
    entries = torch.where(sample.pair >= 0, pull[sample.pair.clamp(min=0)], 0.0)

    def run() -> torch.Tensor:
        (grad,) = torch.autograd.grad(
            (sample.value, sample.port), problem.logits, (entries, pull), retain_graph=True
        )  # fmt: skip
        return grad

    return run


def measure_ours(
    problem: Problem, gate: dict[str, Any], device: torch.device, flush: torch.Tensor | None
) -> dict[str, Any]:
    backward = our_backward(problem, gate["sample"], gate["pull"])
    found = {
        "forward": device_times(lambda: ours(problem), device, flush),
        "backward": device_times(backward, device, flush),
        "kernels": _library.backend("sample_edges", device),
    }
    # Low densities store several sampled absentees per edge.
    capacity = int(ours(problem, "sparse_straight_through", capacity=0).needed)

    def draw_sparse() -> af.EdgeSample:
        return ours(problem, "sparse_straight_through", capacity)

    sparse = draw_sparse()
    pull = gate["pull"][sparse.pair]
    found["sparse entries"] = capacity
    found["sparse forward"] = device_times(draw_sparse, device, flush)
    found["sparse backward"] = device_times(
        lambda: torch.autograd.grad(sparse.value, problem.logits, pull, retain_graph=True), device, flush
    )
    return found


def allowed_mismatches(problem: Problem) -> float:
    return max(2.0, MISMATCHES * problem.layout.num_pairs)


def leaf_of(way: Callable[..., torch.Tensor], problem: Problem) -> torch.Tensor:
    """The logits that a peer differentiates."""
    return problem.logits if way is eager_to_csr else problem.dense_logits


def check_peer(way: Callable[..., torch.Tensor], problem: Problem, gate: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """(a peer's result for the uniforms of our draw, how many edges of it are not ours)."""
    if way is eager_to_csr:
        result = way(problem, gate["u"])
        return result, abs(result.numel() - 2 * int(gate["drawn"].sum()))
    result = way(problem, expand(gate["u"], problem.batch, problem.nodes, fill=0.5))
    drawn = expand(gate["drawn"].float(), problem.batch, problem.nodes, fill=0.0)
    return result, int((result.detach().tril(-1).round() != drawn).sum())


def measure_peer(
    way: Callable[..., torch.Tensor],
    problem: Problem,
    gate: dict[str, Any],
    device: torch.device,
    flush: torch.Tensor | None,
) -> dict[str, Any]:
    result, wrong = check_peer(way, problem, gate)
    if wrong > allowed_mismatches(problem):
        return {"refused": f"disagrees on {wrong} edges"}
    pull = torch.randn_like(result)
    leaf = leaf_of(way, problem)
    return {
        "forward": device_times(lambda: way(problem), device, flush),
        "backward": device_times(lambda: torch.autograd.grad(result, leaf, pull, retain_graph=True), device, flush),
    }


def bench_logits(size: Size, device: torch.device, flush: torch.Tensor | None) -> dict[str, Any]:
    # Eager torch holds about ten matrices in its forward and backward pass.
    needed = 10 * 4 * size.batch * size.nodes**2
    room = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 2**31
    dense = needed < room
    problem = Problem.make(size.batch, size.nodes, size.density, device, dense=dense)
    gate = check_ours(problem)
    entries = gate["sample"].num_edges
    peers: dict[str, Any] = {"acgkd_fast": measure_ours(problem, gate, device, flush)}
    for name, way in PEERS.items():
        if not dense:
            peers[name] = {"refused": f"needs about {needed / 2**30:.0f} GiB"}
            continue
        try:
            peers[name] = measure_peer(way, problem, gate, device, flush)
        except RuntimeError as error:
            peers[name] = {"refused": str(error).splitlines()[0][:200]}
    moved = bytes_moved(size.pairs, size.batch * size.nodes, entries)
    return {**asdict(size), "pairs": size.pairs, "entries": entries, "bytes": moved, "peers": peers}


def bench_factors(size: Size, device: torch.device, flush: torch.Tensor | None) -> dict[str, Any]:
    """No peer: each would need the matrix. Sparse straight-through, forward and backward."""
    layout = af.PairLayout.complete([size.nodes] * size.batch, device=device)
    generator = torch.Generator(device).manual_seed(1)
    z = torch.randn(layout.num_nodes, size.factors, generator=generator, device=device)
    z = (z * (0.25 / size.factors) ** 0.25).requires_grad_()
    bias = torch.full((size.batch,), torch.logit(torch.tensor(size.density)).item() - 0.125, device=device)
    bias.requires_grad_()
    seed, step = torch.tensor(3, device=device), torch.tensor(0, device=device)

    def draw(capacity: int | None) -> af.EdgeSample:
        return af.sample_edges(
            FactorLogits(z, bias), layout, seed=seed, step=step, estimator="sparse_straight_through", capacity=capacity
        )

    entries = draw(None).num_edges
    expected = 2 * size.pairs * size.density
    if not 0.5 * expected < float(draw(None).value.detach().sum()) < 2 * expected:
        raise RuntimeError("the number of edges is far from the expected one")
    capacity = int(1.02 * entries) + 1000
    sample = draw(capacity)
    grad = torch.ones_like(sample.value)
    found = {
        "forward": device_times(lambda: draw(capacity), device, flush),
        "backward": device_times(
            lambda: torch.autograd.grad(sample.value, (z, bias), grad, retain_graph=True), device, flush
        ),
        "kernels": _library.backend("sample_factor_edges", device),
    }
    # Products of all pairs' factors, one multiplication and one addition each.
    products = {"forward_flop": 2 * size.pairs * size.factors}
    return {**asdict(size), "pairs": size.pairs, "entries": entries, **products, "peers": {"acgkd_fast": found}}


def bench(size: Size, device: torch.device, flush: torch.Tensor | None) -> dict[str, Any]:
    return (bench_factors if size.factors else bench_logits)(size, device, flush)


def summary(row: dict[str, Any], bandwidth: float | None) -> str:
    key = "host_us" if bandwidth is None else "cold_us"
    parts = [f"{row['batch']} x {row['nodes']} density {row['density']}" + (" factorised" if row["factors"] else "")]
    for turn in ("forward", "backward"):
        mine = row["peers"]["acgkd_fast"][turn]
        text = f"{turn} {mine[key]} us ({row['pairs'] / mine[key] / 1e3:.2f}e9 pairs/s"
        if bandwidth is not None and "bytes" in row:
            share = row["bytes"][turn] / (mine[key] * 1e-6) / 1e9 / bandwidth
            row[f"{turn}_share_of_copy_bandwidth"] = share
            text += f", {100 * share:.0f} % of copy bandwidth"
        text += ")"
        for name, peer in row["peers"].items():
            if name != "acgkd_fast" and turn in peer:
                text += f", {name} {peer[turn][key] / mine[key]:.1f}x"
                if "peak_bytes" in mine:
                    text += f" time {peer[turn]['peak_bytes'] / max(1, mine['peak_bytes']):.1f}x memory"
        parts.append(text)
    return "; ".join(parts)


def gpu_environment(device: torch.device) -> dict[str, Any]:
    facts = environment(device)
    facts["kernels"] = _library.backend("sample_edges", device)
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    return facts


@pytest.mark.gpu
@pytest.mark.parametrize("size", TARGETS, ids=lambda size: f"{size.batch}x{size.nodes}")
def test_target_sizes(size: Size, benchmark: Any) -> None:
    """The sizes with a target, for `make gpu-check`; the script measures the whole table."""
    device = torch.device("cuda")
    facts, bandwidth = gpu_environment(device), copy_bandwidth(device)
    flush = torch.empty(4 * facts["l2_bytes"], dtype=torch.uint8, device=device)
    row = bench(size, device, flush)
    print(summary(row, bandwidth))
    benchmark.extra_info.update({**row, **facts, "copy_bandwidth_gb_per_s": bandwidth})
    problem = Problem.make(size.batch, size.nodes, size.density, device, dense=False)
    benchmark.pedantic(lambda: time_host(lambda: ours(problem), device), rounds=1)


def main() -> None:
    table = GpuTable(__doc__)
    device = table.device
    facts = gpu_environment(device)
    bandwidth, flush = None, None
    if device.type == "cuda":
        bandwidth = copy_bandwidth(device)
        facts["copy_bandwidth_gb_per_s"] = bandwidth
        flush = torch.empty(4 * facts["l2_bytes"], dtype=torch.uint8, device=device)
    print(json.dumps(facts), flush=True)
    dry = [Size(8, 20, 0.13), Size(2, 60, 0.05), Size(1, 300, 0.02, factors=8)]
    for size in table.remaining(
        SIZES if device.type == "cuda" else dry,
        lambda size: size,
        lambda row: Size(row["batch"], row["nodes"], row["density"], row["factors"]),
    ):
        try:
            row = bench(size, device, flush)
        except torch.OutOfMemoryError as error:
            print(f"{size}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(summary(row, bandwidth), flush=True)
        table.write({**row, **facts})


if __name__ == "__main__":
    main()
