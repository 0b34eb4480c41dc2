"""The CUDA kernels on a GPU: values, gradients, bits, capture, streams, memory. Run by `make gpu-check`.

test_cuda_emulation.py runs the same comparisons, and more shapes, without a GPU. Not yet run on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from cuda_cases import (
    LAYERS,
    READOUT_MODES,
    TOLERANCE,
    Case,
    Inputs,
    compare,
    compare_attention,
    compare_normalize,
    compare_readout,
    run,
    run_attention,
)
from helpers import normal, sanitize

import acgkd_fast as af
from acgkd_fast import EdgeSample, _library, normalize, propagate

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]
DTYPES = tuple(TOLERANCE)
OPS = torch.ops.acgkd_fast
SAMPLES = {
    "scalar": Case((12, 1, 30), 7, density=0.5, capacity_slack=50),
    "directed": Case((12, 1, 30), 64, density=0.5, symmetric=False),
    "misaligned": Case((12, 30), 64, misaligned=True),
    "tiles": Case((25, 9), 520),
    "MUTAG": Case((18,) * 131, 64, density=0.13, capacity_slack=999),
    "COLLAB": Case((75,) * 64, 64, density=0.3),
    "hubs": Case((3500, 40), 64, hubs=2),
    "hubs directed": Case((3500, 40), 33, hubs=2, symmetric=False),
    "no nodes": Case((), 16, capacity_slack=5),
    "no features": Case((9, 4), 0, density=0.5),
    "overflowed": Case((9, 4), 16, density=0.0, capacity_slack=1000),
    "large": Case((2000,) * 10, 16, density=0.01),
}


@pytest.fixture(scope="module", autouse=True)
def native_kernels() -> None:
    """A build without CUDA kernels must not pass for a success of the plain-torch ones."""
    owners = (propagate.__name__, normalize.__name__)
    names = [n for n in _library.operators() if _library.reference(n).__module__.startswith(owners)]
    assert {name: _library.backend(name, "cuda") for name in names} == dict.fromkeys(names, "native")


def assert_same_bits(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_against_the_oracle_and_again(layer, dtype, name):
    inputs = Inputs(SAMPLES[name], dtype, "cuda")
    first = compare(OPS, layer, inputs)
    second = run(OPS, layer, inputs, torch.tensor([0.25]))
    assert_same_bits(first.values(), second.values())


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_against_the_oracle_and_again(heads, dtype, name):
    inputs = Inputs(SAMPLES[name], dtype, "cuda")
    for loops in (True, False):
        first = compare_attention(OPS, heads, inputs, loops)
        assert_same_bits(first.values(), run_attention(OPS, heads, inputs, loops).values())


@pytest.mark.parametrize("eps_dtype", DTYPES, ids=str)
def test_eps_of_any_precision(eps_dtype):
    for dtype in DTYPES:
        compare(OPS, "gin", Inputs(Case((12, 30), 16), dtype, "cuda"), eps_dtype)


@pytest.mark.parametrize("mode", READOUT_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_readout(dtype, mode):
    for sizes in ([], [1], [3, 0, 17, 1], [18] * 131, [5000, 2, 30_000]):
        for width, misaligned in ((0, False), (1, False), (64, False), (64, True), (300, False)):
            first = compare_readout(OPS, sizes, width, mode, dtype, "cuda", misaligned)
            assert_same_bits(first, compare_readout(OPS, sizes, width, mode, dtype, "cuda", misaligned))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize(dtype):
    for rows, width in [(0, 5), (1, 1), (129, 8), (2400, 64), (20_000, 33), (70, 300)]:
        first = compare_normalize(OPS, rows, width, dtype, "cuda", misaligned=rows == 129)
        assert_same_bits(first, compare_normalize(OPS, rows, width, dtype, "cuda", misaligned=rows == 129))


@pytest.mark.parametrize("symmetric", [True, False], ids=["tied", "directed"])
def test_layers_agree_with_the_cpu(symmetric):
    """The public functions and their gradients, with absent candidates, on both devices."""
    layout = af.PairLayout.complete([20, 1, 45], directed=not symmetric)
    logits, x = normal(layout.num_pairs, 1), normal((66, 24), 2)

    def gradients(device: str) -> list[torch.Tensor]:
        theta, features = logits.clone().requires_grad_(), x.clone().requires_grad_()
        eps = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        # Drawn on the CPU, so that both devices see the same graph whichever sampler serves the GPU.
        edges = af.sample_edges(theta, layout, seed=3, estimator="straight_through").to(device)
        h = af.gcn_propagate(features.to(device), edges)
        h = af.gin_propagate(torch.tanh(h), edges, eps.to(device))
        h = af.gat_propagate(h, h[:, :2], h[:, 2:4], edges)
        pooled = [af.readout(h, edges.ptr, mode) for mode in READOUT_MODES]
        mean, variance = normalize.column_moments(h)
        loss = torch.cat(pooled).square().sum() + mean.sum() + variance.square().sum()
        return [loss.detach().cpu(), *torch.autograd.grad(loss, (theta, features, eps))]

    for actual, expected in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


class Step:
    """One forward and backward pass on buffers that stay where they are."""

    def __init__(self, case: Case) -> None:
        inputs = Inputs(case, torch.float32, "cuda")
        self.edges = inputs.edges.to("cuda")
        self.x = inputs.x.cuda().requires_grad_()
        self.value = self.edges.value.clone().requires_grad_()
        self.eps = torch.zeros(1, device="cuda", requires_grad=True)
        self.constants = [torch.rand(case.width, device="cuda") + 0.5 for _ in range(4)]

    def __call__(self) -> tuple[torch.Tensor, ...]:
        edges = self.edges.with_value(self.value, symmetric=self.edges.symmetric)
        h = af.gcn_propagate(self.x, edges)
        h, mean, variance = normalize.frozen_norm_relu(h, *self.constants, residual=self.x, moments=True)
        h = af.gin_propagate(h, edges, self.eps)
        h = af.gat_propagate(h, h[:, :2], h[:, 2:4], edges)
        out = torch.cat([af.readout(h, edges.ptr, mode) for mode in READOUT_MODES])
        loss = out.square().mean() + mean.sum() + variance.sum()
        return (out, *torch.autograd.grad(loss, (self.x, self.value, self.eps)))


@pytest.mark.parametrize("name", ["MUTAG", "COLLAB", "hubs"])
def test_capture_and_replay(name):
    """A captured step, replayed on new numbers, gives the bits of an eager one."""
    step = Step(SAMPLES[name])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            step.x.copy_(normal(tuple(step.x.shape), seed, torch.float32))
            step.value.copy_(normal(tuple(step.value.shape), seed, torch.float32).abs() + 0.1)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, step())


def test_no_host_synchronisation():
    step = Step(SAMPLES["MUTAG"])
    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_work_goes_to_the_current_stream():
    """The inputs are written late on a side stream; a kernel on another stream would read what was there before."""
    inputs = Inputs(SAMPLES["MUTAG"], torch.float32, "cuda")
    edges, x = inputs.edges.to("cuda"), inputs.x.cuda()
    expected = af.gcn_propagate(x, edges)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        found = af.gcn_propagate(late, edges)
    side.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_goes_to_the_device_of_the_tensors():
    inputs = Inputs(SAMPLES["MUTAG"], torch.float32, "cuda:1")
    assert torch.cuda.current_device() == 0
    for layer in LAYERS:
        compare(OPS, layer, inputs)


def test_more_than_two_to_the_31_features():
    """Offsets of rows behind 2^31 elements; three edges between the first nodes and the last."""
    nodes, width = 2**25 + 3, 64
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    low, high = torch.tensor([0, 1, 2]), torch.tensor([nodes - 1, nodes - 2, nodes - 3])
    both = torch.stack([torch.cat([low, high]), torch.cat([high, low])])
    weight = torch.tensor([2.0, 3.0, 4.0]).bfloat16()
    edges = EdgeSample.from_edge_index(both, torch.tensor([0, nodes]), torch.cat([weight, weight]), symmetric=True)
    x = torch.zeros(nodes, width, dtype=torch.bfloat16, device="cuda")
    x[:3], x[-3:] = 1.0, 5.0
    matrix = (edges.rowptr.cuda(), edges.col.cuda(), None, None, None)
    value, eps = edges.value.cuda(), torch.zeros(1, device="cuda")
    out = OPS.gin_propagate(x, value, eps, None, None, *matrix, 0)
    assert out[:3, 0].tolist() == [11.0, 16.0, 21.0] and out[-3:, -1].tolist() == [9.0, 8.0, 7.0]
    assert out[3:-3].count_nonzero() == 0
    grad_x, grad_value, grad_eps = OPS.gin_propagate_backward(x, x, value, eps, *matrix)
    assert torch.equal(grad_x, out)
    assert grad_value.tolist() == [64 * 5.0] * 6 and grad_eps.item() == 3 * 64 * 26.0
    pooled, _ = OPS.readout(x, torch.tensor([0, nodes], device="cuda"), 0)
    assert pooled[0].tolist() == [18.0] * width


SANITIZED = """
import torch
from cuda_cases import LAYERS, READOUT_MODES, Case, Inputs, compare, compare_normalize, compare_readout
cases = [Case((12, 30), 7, density=0.5, capacity_slack=50), Case((30, 40, 20), 64, density=0.6),
         Case((200, 5), 8, hubs=2), Case((200, 5), 33, hubs=2, symmetric=False),
         Case((4200,), 8, hubs=1), Case((), 4, capacity_slack=3)]
for dtype in (torch.float32, torch.bfloat16):
    for case in cases:
        for layer in LAYERS:
            compare(torch.ops.acgkd_fast, layer, Inputs(case, dtype, "cuda"))
    for mode in READOUT_MODES:
        compare_readout(torch.ops.acgkd_fast, [3, 0, 900], 33, mode, dtype, "cuda")
    compare_normalize(torch.ops.acgkd_fast, 900, 64, dtype, "cuda")
print("finished")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    sanitize(tool, SANITIZED)
