"""Native CPU kernels against the oracle: every operator, sizes across block bounds, extreme values, threads.

The formulas themselves are tested, with all kernels, in the modules named after the operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers import LAYOUT_KINDS, layouts, make_layout, normal, random_edges
from hypothesis import given, settings
from hypothesis import strategies as st

import acgkd_fast.linear
import acgkd_fast.normalize  # noqa: F401 - both register their operators
from acgkd_fast import EdgeSample, PairLayout, _library, build_info, philox
from acgkd_fast.edges.estimators import Estimator, Noise
from acgkd_fast.edges.factorised import FactorLogits
from acgkd_fast.edges.reference import compute_dtype, perturbed_logits

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not build_info()["loaded"], reason="the native extension is not built"),
]

OPS = torch.ops.acgkd_fast
STRETCH = (-0.1, 1.1, 0.25)
# Of the largest entry of a tensor; a bfloat16 stores 8 bits.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
# Graphs whose pairs and nodes cross the bounds of blocks of 4, 8, 16 and 64, and of ranges of 2^14 pairs.
SIZES = ([1], [2, 1, 3, 4], [5, 9, 12], [16, 17, 1, 33], [65, 8], [190, 3])
WIDTHS = (0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129)
quick = settings(deadline=None, max_examples=60)


def oracle(name: str, *arguments):
    """The oracle on the same numbers in float64, its result narrowed again where it is a feature or a gradient."""

    def widen(value):
        narrow = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if narrow else value

    return _library.reference(name)(*map(widen, arguments))


def assert_close(found: torch.Tensor, wanted: torch.Tensor, scale: float = 1.0) -> None:
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    bound = TOLERANCE[found.dtype] * scale * max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
    assert (found.double() - wanted.double()).abs().max().item() <= bound if wanted.numel() else True


def state(seed: int, step: int = 0, temperature: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([seed, step]), torch.tensor([temperature], dtype=torch.float64)


def clear_cut(logits: torch.Tensor, layout: PairLayout, rng, temperature, estimator: int, noise: int) -> torch.Tensor:
    """The logits, with -20 in place of those that the last bits of an exponential could decide."""
    wide = logits.double()
    margins = []
    for mirrored in (False, True):
        perturbed = perturbed_logits(wide, layout, rng, noise, mirrored=mirrored)
        soft = torch.sigmoid(perturbed / temperature)
        v = layout.uniforms(seed=rng[0], step=rng[1], stream=philox.Stream.ABSENT, dtype=torch.float64)
        margins += [perturbed, soft * 1.2 - 0.1, v - (soft * (1.0 - soft)).clamp(max=1.0)]
    unclear = torch.stack(margins).abs().amin(0) < 1e-5
    # Minus infinity: what stays in doubt at -20 too.
    return torch.where(unclear, -torch.inf if estimator != Estimator.RELAXED else -20.0, logits)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@quick
@given(layout=layouts(max_size=40), seed=st.integers(-(2**63), 2**63 - 1), step=st.integers(0, 2**32 - 1))
def test_numpy_torch_and_native_draw_the_same_words(layout, seed, step):
    rng, _ = state(seed, step)
    for stream in philox.Stream:
        native = OPS.pair_uniforms(layout.table, rng, layout.kind, int(stream), layout.num_pairs)
        assert torch.equal(native, _library.reference("pair_uniforms")(layout.table, rng, layout.kind, int(stream), 0))
        graph = np.repeat(np.arange(layout.num_graphs), layout.pairs_per_graph)
        local = np.concatenate([np.arange(count) for count in layout.pairs_per_graph] or [np.zeros(0, int)])
        ids = np.asarray(layout.graph_ids, dtype=np.int64)[graph]
        counter = np.stack([local // 4, ids, np.full_like(local, step), np.full_like(local, stream)], -1)
        words = philox.words_numpy(counter, seed)[np.arange(len(local)), local % 4]
        assert np.array_equal(native.numpy(), ((words >> 9).astype(np.float32) + 0.5) * np.float32(2.0**-23))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", Noise)
@pytest.mark.parametrize("estimator", Estimator)
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_samples_and_their_gradients(kind, estimator, noise, dtype):
    for index, sizes in enumerate(SIZES):
        layout = make_layout(kind, sizes, xi=0.6)
        # The kernel has a way of its own for temperature 1.
        rng, temperature = state(index, 5, (0.7, 1.0)[index % 2])
        logits = normal(layout.num_pairs, index, dtype) * 2 - 1
        logits = clear_cut(logits, layout, rng, temperature, estimator, noise)
        check_sample(logits, layout, rng, temperature, estimator, noise)


@quick
@given(
    layout=layouts(max_size=12),
    estimator=st.sampled_from(Estimator),
    noise=st.sampled_from(Noise),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.05, 0.5, 1.0, 8.0]),
    extremes=st.lists(st.sampled_from([1e4, -1e4, torch.inf, -torch.inf, 88.0, -88.0, 0.0]), max_size=6),
)
def test_ragged_layouts_with_extreme_logits(layout, estimator, noise, dtype, seed, temperature, extremes):
    rng, temperature = state(seed, seed // 3, temperature)
    logits = normal(layout.num_pairs, seed, dtype)
    logits[: len(extremes)] = torch.tensor(extremes, dtype=dtype)[: layout.num_pairs]
    logits = clear_cut(logits, layout, rng, temperature, estimator, noise)
    check_sample(logits, layout, rng, temperature, estimator, noise)


def check_sample(logits, layout, rng, temperature, estimator, noise):
    shared = (layout.table, rng, temperature, layout.kind, int(estimator), int(noise), *STRETCH)
    found = OPS.sample_edges(logits, *shared, layout.num_nodes, -1)
    wanted = oracle("sample_edges", logits, *shared, layout.num_nodes, -1)
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert found[0].dtype == logits.dtype
    # Divided by the temperature, a rounding error of theta + L grows.
    widened = max(1.0, 1.0 / temperature.item())
    assert_close(found[0], wanted[0], 4 * widened)

    edges = found[4].item()
    for capacity in {edges, edges + 3, max(0, edges - 1)}:
        value, rowptr, col, pair, needed = OPS.sample_edges(logits, *shared, layout.num_nodes, capacity)
        fits = _library.reference("sample_edges")(logits, *shared, layout.num_nodes, capacity)
        assert torch.equal(value[:edges] if capacity >= edges else value, found[0] if capacity >= edges else fits[0])
        assert torch.equal(value[edges:], fits[0][edges:])
        assert all(map(torch.equal, (rowptr, col, pair, needed), fits[1:]))

    grad = normal(len(found[0]), 3, logits.dtype)
    backward = (grad, *found[1:4], logits)
    gradient = OPS.sample_edges_backward(*backward, *shared)
    assert gradient.dtype == logits.dtype
    scale = max(1.0, 1.0 / temperature.item())
    if estimator != Estimator.ARM_MIRRORED:
        assert_close(gradient, oracle("sample_edges_backward", *backward, *shared), 40 * scale)

    index, entries = OPS.sample_edges_backward_sparse(*backward, *shared)
    wanted = oracle("sample_edges_backward_sparse", *backward, *shared)
    assert torch.equal(index, wanted[0])
    assert torch.equal(torch.zeros_like(logits).index_copy_(0, index, entries), gradient)
    assert layout.kind or torch.equal(index, index.unique())

    port = OPS.candidate_port(logits, *shared[:4], int(noise))
    assert port.untyped_storage().nbytes() == port.element_size()
    assert torch.equal(port, torch.zeros_like(logits))
    grad = normal(layout.num_pairs, 4, logits.dtype)
    arguments = (grad, logits, *shared[:4], int(noise))
    assert_close(OPS.candidate_port_backward(*arguments), oracle("candidate_port_backward", *arguments), 40 * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_candidate_gradient(kind, dtype):
    for index, sizes in enumerate(SIZES):
        layout = make_layout(kind, sizes, xi=0.6)
        for width in WIDTHS[index % 2 :: 2]:
            left, right = (normal((layout.num_nodes, width), seed, dtype) for seed in (index, 7))
            arguments = (left, right, normal(layout.num_nodes, 9, dtype), layout.table, layout.kind, layout.num_pairs)
            assert_close(OPS.candidate_gradient(*arguments), oracle("candidate_gradient", *arguments), 4)
            rng, temperature = state(index)
            logits = normal(layout.num_pairs, 2, dtype)
            logits = clear_cut(logits, layout, rng, temperature, Estimator.STRAIGHT_THROUGH, Noise.LOGISTIC)
            arguments = (*arguments[:3], logits, layout.table, rng, temperature, layout.kind, int(Noise.LOGISTIC))
            assert_close(OPS.candidate_backward(*arguments), oracle("candidate_backward", *arguments), 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", [Estimator.STRAIGHT_THROUGH, Estimator.SPARSE_STRAIGHT_THROUGH])
@pytest.mark.parametrize("noise", Noise)
def test_factorised_logits(noise, estimator, dtype):
    for index, sizes in enumerate(SIZES):
        for rank in (0, 1, 5, 8, 21):
            layout = PairLayout.complete(sizes)
            rng, temperature = state(index, rank)
            z, bias = normal((layout.num_nodes, rank), index, dtype), normal(layout.num_graphs, 5, dtype) - 1
            shared = (layout.table, rng, temperature, int(estimator), int(noise), 0.25)
            found = OPS.sample_factor_edges(z, bias, *shared, layout.num_pairs, -1)
            logits = FactorLogits(z.double(), bias.double()).to_dense(layout)
            # A pair that rounding could decide is rare, and cannot be moved here without moving others.
            if torch.equal(logits, clear_cut(logits, layout, rng, temperature, estimator, noise)):
                wanted = oracle("sample_factor_edges", z, bias, *shared, layout.num_pairs, -1)
                for ours, theirs in zip(found[1:], wanted[1:], strict=True):
                    assert ours.dtype == theirs.dtype
                    assert torch.equal(ours, theirs)
                assert torch.equal(found[0].double(), wanted[0])
            grad = normal(len(found[0]), 3, dtype)
            arguments = (grad, *found[1:4], z, bias, *shared)
            for ours, theirs in zip(
                OPS.sample_factor_edges_backward(*arguments),
                oracle("sample_factor_edges_backward", *arguments),
                strict=True,
            ):
                assert_close(ours, theirs, 20)


def matrix_of(edges: EdgeSample) -> tuple:
    return (edges.rowptr, edges.col, *edges.transposed())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_message_passing(width, symmetric, dtype):
    for index, sizes in enumerate(([1], [5, 1, 12], [70, 3])):
        edges, _ = random_edges(sizes, symmetric=symmetric, seed=index, rounded_to=dtype)
        value, matrix = edges.value.detach().to(dtype), matrix_of(edges)
        x, grad_out = (normal((edges.num_nodes, width), seed, dtype) for seed in (index, 5))
        exact = functools.partial(summed, edges) if symmetric else lambda entries: entries
        for loops in (True, False):
            out, scale = OPS.gcn_propagate(x, value, None, None, *matrix, loops, 0)
            wanted = oracle("gcn_propagate", x, value, None, None, *matrix, loops, 0)
            assert_close(out, wanted[0], 4)
            assert_close(scale, wanted[1], 4)
            assert scale.dtype == compute_dtype(dtype)
            arguments = (grad_out, x, out, value, scale, *matrix, loops)
            found, wanted = OPS.gcn_propagate_backward(*arguments), oracle("gcn_propagate_backward", *arguments)
            assert_close(found[0], wanted[0], 8)
            assert_close(found[2], wanted[2], 16)
            assert_close(exact(found[1]), exact(wanted[1]), 16)
        for eps in (torch.tensor(0.3), torch.tensor([[-1.0]], dtype=torch.float64)):
            out = OPS.gin_propagate(x, value, eps, None, None, *matrix, 0)
            assert_close(out, oracle("gin_propagate", x, value, eps, None, None, *matrix, 0), 4)
            arguments = (grad_out, x, value, eps, *matrix)
            found, wanted = OPS.gin_propagate_backward(*arguments), oracle("gin_propagate_backward", *arguments)
            assert_close(found[0], wanted[0], 8)
            assert_close(exact(found[1]), exact(wanted[1]), 8)
            assert (found[2].dtype, found[2].shape) == (eps.dtype, eps.shape)
            assert_close(found[2].float(), wanted[2], 4 * max(1.0, (width * edges.num_nodes) ** 0.5))


def summed(edges: EdgeSample, entries: torch.Tensor) -> torch.Tensor:
    """Gradients of tied entries: only the sum over both directions is defined."""
    row, col = edges.row(), edges.col.long()
    key = torch.minimum(row, col) * edges.num_nodes + torch.maximum(row, col)
    place = torch.unique(key, return_inverse=True)[1]
    sums = torch.zeros(len(entries), dtype=torch.float64).index_add_(0, place, entries.double())
    return sums.to(entries.dtype)


def test_gradient_of_a_sample_whose_directions_disagree():
    """An entry without its opposite, which no draw makes, is still found or left out as the oracle says."""
    layout = PairLayout.complete([4])
    rng, temperature = state(1)
    logits = normal(layout.num_pairs, 1)
    # Rows 2 and 3 hold (2, 0), (2, 1) and (3, 1), row 1 holds (1, 3) alone, row 0 (0, 2).
    rowptr, col = torch.tensor([0, 1, 2, 4, 5], dtype=torch.int32), torch.tensor([2, 3, 0, 1, 1], dtype=torch.int32)
    pair = torch.tensor([1, 4, 1, 2, 4])
    shared = (layout.table, rng, temperature, 0, int(Estimator.STRAIGHT_THROUGH), 0, *STRETCH)
    grad = normal(5, 2)
    arguments = (grad, rowptr, col, pair, logits, *shared)
    assert_close(OPS.sample_edges_backward(*arguments), oracle("sample_edges_backward", *arguments), 4)


def test_spare_capacity_is_written():
    layout = PairLayout.complete([9, 4])
    rng, temperature = state(1)
    value, rowptr, col, _, _ = OPS.sample_edges(
        normal(layout.num_pairs, 0), layout.table, rng, temperature, 0, 2, 0, *STRETCH, 13, 60
    )
    x, used = normal((13, 5), 1), int(rowptr[-1])
    assert 0 < used < 60
    matrix = (rowptr, col, None, None, None)
    out, scale = OPS.gcn_propagate(x, value, None, None, *matrix, True, 0)
    gcn = OPS.gcn_propagate_backward(x, x, out, value, scale, *matrix, True)[1]
    gin = OPS.gin_propagate_backward(x, x, value, torch.zeros(1), *matrix)[1]
    for gradient in (gcn, gin):
        assert torch.equal(gradient[used:], torch.zeros(60 - used, dtype=torch.float64))
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("width", WIDTHS)
def test_readout(width, mode, dtype):
    ptr = torch.tensor([0, 0, 1, 9, 9, 40])
    # Few distinct values, so that the maximum is reached more than once.
    x = normal((40, width), 2, dtype).round()
    out, argmax = OPS.readout(x, ptr, mode)
    wanted, first = oracle("readout", x, ptr, mode)
    assert_close(out, wanted, 4)
    assert torch.equal(argmax, first)
    grad = normal((5, width), 3, dtype)
    assert_close(
        OPS.readout_backward(grad, argmax, ptr, mode, 40), oracle("readout_backward", grad, first, ptr, mode, 40)
    )


def test_readout_of_nan_is_nan():
    x = torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])
    found, wanted = (call(x, torch.tensor([0, 2]), 2) for call in (OPS.readout, _library.reference("readout")))
    assert torch.equal(found[0].nan_to_num(-1), wanted[0].nan_to_num(-1))
    assert torch.equal(found[1], wanted[1])
    grad = OPS.readout_backward(torch.ones(1, 2), found[1], torch.tensor([0, 2]), 2, 2)
    assert torch.equal(grad, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


@functools.cache
def large_calls() -> dict[str, Callable[[], tuple]]:
    """One call of each operator, large enough to be split among threads."""
    calls: dict[str, Callable[[], tuple]] = {}

    def add(label: str, name: str, *arguments) -> tuple:
        def call() -> tuple:
            out = getattr(OPS, name)(*arguments)
            return out if isinstance(out, tuple) else (out,)

        calls[label] = call
        return call()

    for kind in ("complete", "budget-directed"):
        layout = make_layout(kind, [300, 20, 250, 7], xi=0.4)
        rng, temperature = state(3)
        logits = normal(layout.num_pairs, 1, torch.float32) - 1
        shared = (layout.table, rng, temperature, layout.kind)
        nodes = layout.num_nodes
        for estimator in Estimator:
            edge = (int(estimator), 0, *STRETCH)
            value, *where = add(f"sample_edges {kind} {estimator}", "sample_edges", logits, *shared, *edge, nodes, -1)
            grad = normal(len(value), 2, torch.float32)
            label = f"sample_edges_backward {kind} {estimator}"
            add(label, "sample_edges_backward", grad, *where[:3], logits, *shared, *edge)
            add(f"{label} sparse", "sample_edges_backward_sparse", grad, *where[:3], logits, *shared, *edge)
        grad = normal(layout.num_pairs, 2, torch.float32)
        add(f"candidate_port {kind}", "candidate_port", logits, *shared, 0)
        add(f"candidate_port_backward {kind}", "candidate_port_backward", grad, logits, *shared, 0)
        add(f"pair_uniforms {kind}", "pair_uniforms", layout.table, rng, layout.kind, 0, layout.num_pairs)
        x, grad_out = (normal((nodes, 48), seed, torch.float32) for seed in (4, 5))
        candidates = (x, grad_out, x[:, 0].contiguous(), layout.table, layout.kind, layout.num_pairs)
        add(f"candidate_gradient {kind}", "candidate_gradient", *candidates)
        add(f"candidate_backward {kind}", "candidate_backward", *candidates[:3], logits, *shared, 0)
    layout = PairLayout.complete([300, 20, 250, 7])
    z, bias = normal((577, 9), 1, torch.float32), normal(4, 2, torch.float32) - 3
    shared = (layout.table, rng, temperature, int(Estimator.SPARSE_STRAIGHT_THROUGH), 0, 0.25)
    value, *where = add("factors", "sample_factor_edges", z, bias, *shared, layout.num_pairs, -1)
    add("factors backward", "sample_factor_edges_backward", value, *where[:3], z, bias, *shared)
    for symmetric in (True, False):
        edges, _ = random_edges([300, 20, 250, 7], symmetric=symmetric, seed=1, dtype=torch.float32)
        value, matrix, eps = edges.value.detach(), matrix_of(edges), torch.tensor(0.2)
        out, scale = add(f"gcn {symmetric}", "gcn_propagate", x, value, None, None, *matrix, True, 0)
        add(f"gcn backward {symmetric}", "gcn_propagate_backward", grad_out, x, out, value, scale, *matrix, True)
        add(f"gin {symmetric}", "gin_propagate", x, value, eps, None, None, *matrix, 0)
        add(f"gin backward {symmetric}", "gin_propagate_backward", grad_out, x, value, eps, *matrix)
        operands = (x, *(x[:, k : k + 3].contiguous() for k in (0, 9)), value)
        sums = add(f"gat {symmetric}", "gat_propagate", *operands, *matrix, 0.2, True)
        add(f"gat backward {symmetric}", "gat_propagate_backward", grad_out, *operands, *sums, *matrix, 0.2, True)
    features = normal((20_000, 7), 3, torch.float32)
    soft = add("softmax_rows", "softmax_rows", features)[0]
    add("softmax_rows_backward", "softmax_rows_backward", features, soft)
    add("mean_entropy", "mean_entropy", soft)
    add("mean_entropy_backward", "mean_entropy_backward", torch.tensor(0.7), soft)
    rows, weight = normal((20_000, 64), 4, torch.float32), normal((32, 64), 5, torch.float32)
    add("frozen_linear", "frozen_linear", rows, weight, weight[:, 0].contiguous(), False)
    ptr = torch.arange(578)
    for mode in (0, 1, 2):
        out, argmax = add(f"readout {mode}", "readout", x, ptr, mode)
        add(f"readout_backward {mode}", "readout_backward", out, argmax, ptr, mode, nodes)
    return calls


def test_bits_depend_neither_on_threads_nor_on_the_run():
    for label, call in large_calls().items():
        results = []
        for count in (1, 2, 3, 2):
            with threads(count):
                results.append(call())
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0])), label
