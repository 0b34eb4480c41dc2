"""The Triton kernels on a GPU: edges, gradients, bits, capture, sizes, memory. Run by `make gpu-check`.

test_triton_interpret.py runs the same kernels without a GPU on tiny inputs. Not yet run on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from helpers import LAYOUT_KINDS, make_layout, normal, sanitize
from triton_gpu_cases import MARGIN, Draw, check_rows, check_sample

import acgkd_fast as af
from acgkd_fast import _library, edges, kernels
from acgkd_fast.edges import ESTIMATORS, FactorLogits

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]
OPS = torch.ops.acgkd_fast
CASES = [(e, n) for e in ESTIMATORS for n in edges.NOISES if (e, n) != ("arm", "gumbel")]
SIZES = {
    "ragged": [1, 5, 2, 33, 1, 1, 300, 64],
    "one graph": [1025],
    "small batch": [20] * 128,
    "single nodes": [1] * 2000 + [3] + [1] * 100,
    "nothing": [],
}


@pytest.fixture(scope="module", autouse=True)
def triton_kernels() -> None:
    """A fall back to plain torch must not pass for a success of the kernels."""
    names = {name for group in kernels.OPERATORS.values() for name in group}
    assert {name: _library.backend(name, "cuda") for name in names} == dict.fromkeys(names, "triton")


def logits_on_gpu(layout: af.PairLayout, dtype: torch.dtype = torch.float32, shift: float = -1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    values = torch.randn(layout.num_pairs, generator=generator, device="cuda", dtype=torch.float32)
    return (2 * values + shift).to(dtype)


def same_bits(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def tensors(sample: af.EdgeSample) -> tuple[torch.Tensor, ...]:
    return sample.rowptr, sample.col, sample.pair, sample.value


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edges_against_the_formulas_and_again(kind, name, dtype):
    layout = make_layout(kind, SIZES[name], device="cuda")
    logits = logits_on_gpu(layout, dtype)
    for estimator, noise in CASES:
        options = {"seed": 2**40 + 7, "step": 5, "temperature": 0.6, "estimator": estimator, "noise": noise}
        options["absent_rate"] = 0.25
        sample = af.sample_edges(logits, layout, **options)
        same_bits(tensors(sample), tensors(af.sample_edges(logits, layout, **options)))
        roomy = af.sample_edges(logits, layout, capacity=sample.num_edges + 1500, **options)
        assert not roomy.overflowed() and torch.equal(roomy.rowptr, sample.rowptr)
        count = sample.num_edges
        same_bits([t[:count] for t in tensors(roomy)[1:]], tensors(sample)[1:])
        padding = [t[count:] for t in tensors(roomy)[1:]]
        assert padding[0].eq(0).all() and padding[1].eq(-1).all() and padding[2].eq(0).all()
        if count:
            short = af.sample_edges(logits, layout, capacity=count - 1, **options)
            assert short.overflowed() and int(short.needed) == count and not short.rowptr.any()
        check_sample(sample, logits, **options)


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_uniforms_are_the_oracles_bits(kind):
    layout = make_layout(kind, [1, 7, 2, 501, 30], graph_ids=[2**32 - 1, 3, 0, 2**31, 9])
    for seed, step in ((0, 0), (-1, 2**32 - 1), (2**62 + 1, 12)):
        for stream in range(4):
            rng = torch.tensor([seed, step])
            want = _library.reference("pair_uniforms")(layout.table, rng, layout.kind, stream, layout.num_pairs)
            got = OPS.pair_uniforms(layout.table.cuda(), rng.cuda(), layout.kind, stream, layout.num_pairs)
            assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("name", [name for name in SIZES if name != "nothing"])
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_against_float64(kind, name, dtype):
    """Backward operators on the same structure; the oracle gets float64 copies of the same numbers."""
    layout = make_layout(kind, SIZES[name], device="cuda")
    logits = logits_on_gpu(layout, dtype)
    rng = torch.tensor([3, 4], device="cuda")
    temperature = torch.full((1,), 0.8, dtype=torch.float64, device="cuda")
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 2e-5}

    def margin(estimator: str, noise: str) -> torch.Tensor:
        draw = Draw(3, 4, temperature=0.8, estimator=estimator, noise=noise, absent_rate=0.25)
        return draw.decide(layout, torch.arange(layout.num_pairs, device="cuda"), logits.double())[2]

    def compare(operator: str, arguments: tuple, margin: torch.Tensor) -> None:
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
        got = getattr(OPS, operator)(*arguments)
        same_bits([got], [getattr(OPS, operator)(*arguments)])
        want = _library.reference(operator)(*wide)
        # A pair on the threshold may count as drawn in one and as absent in the other.
        off = ~torch.isclose(got.double(), want, **tolerance) & (margin > MARGIN)
        assert not off.any(), (operator, int(off.sum()), off.numel())

    shared = (logits, layout.table, rng, temperature, layout.kind)
    for estimator, noise in CASES:
        settings = (ESTIMATORS.index(estimator), edges.NOISES.index(noise), -0.1, 1.1, 0.25)
        value, rowptr, col, pair, _ = OPS.sample_edges(*shared, *settings, layout.num_nodes, -1)
        grad = torch.randn_like(value)
        arguments = (grad, rowptr, col, pair, *shared, *settings)
        compare("sample_edges_backward", arguments, margin(estimator, noise))
    margins = [margin("straight_through", noise) for noise in edges.NOISES]
    for width in (1, 20, 64):
        left = torch.randn(layout.num_nodes, width, device="cuda").to(dtype)
        right, term = torch.randn_like(left), torch.randn_like(left[:, 0])
        arguments = (left, right, term, layout.table, layout.kind, layout.num_pairs)
        compare("candidate_gradient", arguments, torch.ones_like(margins[0]))
        for noise in range(2):
            compare("candidate_backward", (left, right, term, *shared, noise), margins[noise])
    for noise in range(2):
        compare("candidate_port_backward", (torch.randn_like(logits), *shared, noise), margins[noise])


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_layers_reach_every_candidate_through_node_ports(kind):
    """Against the CPU's float64 gradient, which goes through a float per candidate."""
    layout = make_layout(kind, [1, 70, 5, 33])
    logits, x = normal(layout.num_pairs, 1), normal((layout.num_nodes, 12), 2)
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        leaf = logits.to(device, dtype).requires_grad_()
        sample = af.sample_edges(leaf, layout.to(device), seed=6, temperature=0.8)
        hidden = torch.tanh(af.gcn_propagate(x.to(device, dtype), sample))
        out = af.gin_propagate(hidden, sample, 0.1)
        results.append((sample.pair.cpu(), torch.autograd.grad(out.square().sum(), leaf)[0].cpu().double()))
    (pairs, want), (same_pairs, got) = results
    assert torch.equal(pairs, same_pairs) and want.count_nonzero() > 0.9 * want.numel()
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4 * float(want.abs().max()))


def test_float32_products_are_not_rounded_to_tf32():
    """1 + 2^-12 needs more than tf32's 10 bits."""
    layout = make_layout("complete", [70], device="cuda")
    left = torch.full((70, 16), 1 + 2**-12, device="cuda")
    term = torch.zeros(70, device="cuda")
    got = OPS.candidate_gradient(left, left, term, layout.table, 0, layout.num_pairs)
    torch.testing.assert_close(got, torch.full_like(got, 32 * (1 + 2**-12) ** 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in SIZES if name != "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("estimator", edges.estimators.FACTOR_ESTIMATORS)
def test_factorised_logits(estimator, dtype, name, monkeypatch):
    from acgkd_fast.kernels import factors

    layout = make_layout("complete", SIZES[name], device="cuda")
    for width in (3, 32):
        z = (normal((layout.num_nodes, width), 1, torch.float32) / width**0.25).to(dtype).cuda().requires_grad_()
        bias = (normal(layout.num_graphs, 2, torch.float32) - 1).to(dtype).cuda().requires_grad_()
        options = {"seed": 5, "temperature": 0.7, "estimator": estimator, "absent_rate": 0.25}
        monkeypatch.undo()
        sample = af.sample_edges(FactorLogits(z, bias), layout, **options)
        dense = FactorLogits(z.detach().double(), bias.detach().double()).to_dense(layout)
        check_sample(sample, dense, **options)
        # On the threshold forward, backward and the formula may take a pair for drawn or for absent.
        margin = Draw(**options).decide(layout, sample.pair, dense[sample.pair])[2]
        grad = torch.randn_like(sample.value) * (margin > MARGIN)
        gradients = torch.autograd.grad(sample.value, (z, bias), grad, retain_graph=True)
        same_bits(gradients, torch.autograd.grad(sample.value, (z, bias), grad))
        wide = [t.detach().double() for t in (grad, z, bias)]
        rng, tau = torch.tensor([5, 0], device="cuda"), torch.full((1,), 0.7, dtype=torch.float64, device="cuda")
        want = _library.reference("sample_factor_edges_backward")(
            wide[0], sample.rowptr, sample.col, sample.pair, *wide[1:], layout.table, rng, tau,
            ESTIMATORS.index(estimator), 0, 0.25,
        )  # fmt: skip
        for ours, theirs in zip(gradients, want, strict=True):
            error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
            assert float(error) < (3e-2 if dtype == torch.bfloat16 else 1e-3)
        monkeypatch.setattr(factors, "WINDOW_WORDS", 97)
        same_bits(tensors(sample), tensors(af.sample_edges(FactorLogits(z, bias), layout, **options)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_captured_step_replays_with_new_noise_and_temperature(estimator):
    """Seed, step and temperature live on the device; the capture would fail on any wait of the host."""
    layout = make_layout("complete", [20] * 128, device="cuda")
    logits = logits_on_gpu(layout).requires_grad_()
    seed, step = torch.tensor(7, device="cuda"), torch.tensor(0, device="cuda")
    temperature = torch.tensor(1.0, dtype=torch.float64, device="cuda")
    capacity = 2 * layout.num_pairs
    weight = torch.randn(capacity, device="cuda")

    def draw() -> tuple[torch.Tensor, ...]:
        sample = af.sample_edges(
            logits, layout, seed=seed, step=step, temperature=temperature, estimator=estimator, capacity=capacity
        )
        if estimator == "arm":
            return (*tensors(sample), sample.antithetic.pair)
        gradients = torch.autograd.grad((sample.value * weight).sum(), logits, retain_graph=sample.port is not None)
        if sample.port is not None:
            gradients += torch.autograd.grad((sample.port * weight[: layout.num_pairs]).sum(), logits)
        return (*tensors(sample), *gradients)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            draw()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw()
    drawn = []
    for number in range(3):
        step.fill_(number)
        temperature.fill_(1.0 / (1 + number))
        graph.replay()
        drawn.append(captured[2].clone())
        same_bits(captured, draw())
    assert estimator == "relaxed" or not torch.equal(drawn[0], drawn[1])


def test_no_host_read_with_capacity():
    """torch's own detector of synchronising calls; the one without capacity shows that it works."""
    layout = make_layout("complete", [30, 40], device="cuda")
    logits = logits_on_gpu(layout)
    arguments = (
        logits, layout.table, torch.tensor([1, 2], device="cuda"),
        torch.ones(1, dtype=torch.float64, device="cuda"), 0, 3, 0, -0.1, 1.1, 0.25, 70,
    )  # fmt: skip
    OPS.sample_edges(*arguments, 5000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS.sample_edges(*arguments, 5000)
        with pytest.raises(RuntimeError):
            OPS.sample_edges(*arguments, -1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_with_numbers_for_seed_and_temperature_does_not_wait(estimator):
    """What a user writes first: no copy from the host, forward or backward."""
    layout = make_layout("complete", [30, 40], device="cuda")
    logits = logits_on_gpu(layout).requires_grad_()

    def step() -> None:
        sample = af.sample_edges(
            logits, layout, seed=2**63 + 1, step=2, temperature=0.5, estimator=estimator, capacity=5000
        )
        if estimator != "arm":
            sample.value.sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_begin_anywhere(kind, dtype):
    """A slice of a longer tensor is contiguous, but not a multiple of 16 bytes."""
    layout = make_layout(kind, [3, 100, 7], device="cuda")
    logits = logits_on_gpu(layout, dtype)
    moved = torch.empty(layout.num_pairs + 3, dtype=dtype, device="cuda")[3:].copy_(logits)
    found = []
    for values in (logits, moved):
        leaf = values.detach().requires_grad_()
        sample = af.sample_edges(leaf, layout, seed=4, estimator="straight_through")
        (grad,) = torch.autograd.grad((sample.value.sum(), sample.port.sum()), leaf)
        found.append((*tensors(sample), grad))
    assert found[1][-1].any()
    same_bits(*found)


def enough_memory(bytes_needed: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < bytes_needed:
        pytest.skip(f"needs {bytes_needed / 2**30:.0f} GiB of free GPU memory, {free / 2**30:.0f} are there")


def some_rows(n: int) -> torch.Tensor:
    return torch.tensor([0, 1, 31, 32, n // 3, n // 2, n - 33, n - 2, n - 1], device="cuda")


def test_more_than_2_to_31_pairs():
    n = 70_000
    enough_memory(6 * 4 * n * (n - 1) / 2)
    layout = af.PairLayout.complete([n], device="cuda")
    logits = torch.full((layout.num_pairs,), -6.0, device="cuda")
    logits[-n:] = -1.0
    sample = af.sample_edges(logits, layout, seed=1, estimator="sparse_straight_through", absent_rate=0.01)
    expected = 2 * (layout.num_pairs - n) / (1 + torch.e**6)
    assert 0.9 * expected < float(sample.value.sum()) < 1.2 * expected + 2 * n
    check_rows(
        sample, some_rows(n), lambda _r, _c, pair: logits[pair].double(),
        seed=1, estimator="sparse_straight_through", absent_rate=0.01,
    )  # fmt: skip
    leaf = logits.requires_grad_()
    again = af.sample_edges(leaf, layout, seed=1, estimator="sparse_straight_through", absent_rate=0.01)
    same_bits(tensors(sample), [t.detach() for t in tensors(again)])
    (grad,) = torch.autograd.grad(again.value.sum(), leaf)
    assert int((grad != 0).sum()) == sample.num_edges // 2 and bool((grad[sample.pair] > 0).all())


def test_a_graph_of_100_000_nodes_without_a_matrix():
    n, width = 100_000, 16
    layout = af.PairLayout.complete([n], device="cuda")
    generator = torch.Generator("cuda").manual_seed(3)
    z = (0.3 * torch.randn(n, width, generator=generator, device="cuda")).requires_grad_()
    bias = torch.tensor([-8.5], device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    sample = af.sample_edges(
        FactorLogits(z, bias), layout, seed=1, estimator="sparse_straight_through", absent_rate=0.02
    )
    sample.value.sum().backward()
    peak = torch.cuda.max_memory_allocated() - held
    # The matrix would take 40 GB in float32, its upper half 20 GB, one bit per pair 0.6 GB.
    assert peak < 2**30, f"{peak / 2**20:.0f} MiB"
    wide, offset = z.detach().double(), float(bias.detach())
    check_rows(
        sample, some_rows(n), lambda row, col, _p: (wide[row] * wide[col]).sum(-1) + offset,
        seed=1, estimator="sparse_straight_through", absent_rate=0.02,
    )  # fmt: skip
    assert z.grad.isfinite().all() and float(bias.grad) > 0


def test_ragged_batch_with_a_large_graph():
    layout = make_layout("complete", [1] * 1000 + [4000] + [20] * 500 + [1], device="cuda")
    logits = logits_on_gpu(layout, shift=-6.0)
    sample = af.sample_edges(logits, layout, seed=3)
    check_sample(sample, logits, seed=3)


def test_memory_checker_finds_nothing():
    # conftest stands in for hypothesis where that is missing.
    script = "import conftest, triton_sanitize; triton_sanitize.main()"
    sanitize("memcheck", script, last_words="all kernels ran")
