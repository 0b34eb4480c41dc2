"""The CUDA kernels' own sources, compiled for the host and run thread by thread, against the oracle.

See csrc/cuda/emulation.h. Values and gradients of all operators, and results that do not depend on the order in which
threads run between two barriers, which is how a missing barrier shows without a GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from types import SimpleNamespace

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
from emulated_kernels import CUDA_SOURCES, assert_order_does_not_matter, emulated_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import acgkd_fast.normalize  # noqa: F401  declares operators whose schemas are copied
from acgkd_fast import _library

# The search has a module of its own.
SOURCES = [source for source in CUDA_SOURCES if not source.stem.startswith("search")]
DTYPES = tuple(TOLERANCE)
OPERATORS = [
    name
    for name in _library.operators()
    if name.startswith(("gcn_", "gin_", "gat_", "readout", "column_moments", "frozen_norm_relu"))
]
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(not SOURCES, reason="needs the sources in csrc/cuda"),
    pytest.mark.usefixtures("poison"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    with emulated_kernels(SOURCES, OPERATORS, tmp_path_factory.mktemp("emulation")) as kernels:
        yield kernels


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(1, 9), max_size=4),
    width=st.integers(0, 40),
    layer=st.sampled_from(LAYERS),
    dtype=st.sampled_from(DTYPES),
    symmetric=st.booleans(),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    capacity_slack=st.sampled_from([0, 1, 300]),
    misaligned=st.booleans(),
    eps_dtype=st.sampled_from(DTYPES),
    processors=st.sampled_from([1, 4]),
    seed=st.integers(0, 99),
)
def test_ragged_batches(emulated, layer, dtype, eps_dtype, processors, sizes, **options):
    emulated.configure(0, processors)
    compare(emulated.ops, layer, Inputs(Case(tuple(sizes), **options), dtype), eps_dtype)


@pytest.mark.parametrize("width", [1, 4, 33, 64, 130, 256, 260, 520])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["tied", "directed"])
def test_widths_of_one_and_several_tiles(emulated, dtype, symmetric, width):
    for layer in ("gcn", "gin"):
        compare(emulated.ops, layer, Inputs(Case((7, 1, 12), width, symmetric=symmetric), dtype))


@pytest.mark.parametrize("width", [3, 8, 260])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["tied", "directed"])
def test_rows_too_long_for_one_group(emulated, dtype, symmetric, width):
    """Two nodes of degree 200 among nodes of degree 4, so the block shares their entries."""
    inputs = Inputs(Case((200, 5), width, hubs=2, symmetric=symmetric, capacity_slack=3), dtype)
    degrees = inputs.edges.rowptr.diff()
    # Of a directed matrix the hubs' columns are long instead: rows of the transpose.
    assert degrees.max() > 128 or (inputs.edges.transposed()[0].diff().max() > 128 and not symmetric)
    for layer in ("gcn", "gin"):
        compare(emulated.ops, layer, inputs)


def test_transpose_of_long_rows(emulated):
    """A directed matrix whose rows, not columns, are long."""
    inputs = Inputs(Case((200,), 5, hubs=2, symmetric=False), torch.float32)
    row, col = inputs.edges.col.long(), inputs.edges.row()
    flipped = type(inputs.edges).from_edge_index(torch.stack([col, row]), inputs.edges.ptr, inputs.edges.value)
    assert flipped.rowptr.diff().max() > 128
    inputs.edges = flipped
    for layer in ("gcn", "gin"):
        compare(emulated.ops, layer, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("processors", [1, 4], ids=["64 rows per block", "16 rows per block"])
def test_features_staged_in_shared_memory(emulated, dtype, processors):
    """Dense small graphs: rows are gathered many times, and the window of a block fits."""
    emulated.configure(0, processors)
    for layer in ("gcn", "gin"):
        compare(emulated.ops, layer, Inputs(Case((30, 40, 20), 64, density=0.6), dtype))


def test_staging_confirms_the_order_of_columns(emulated):
    """Columns that do not ascend give a window that the ends of the rows do not show."""
    inputs = Inputs(Case((30, 40), 64, density=0.6), torch.float32)
    edges = inputs.edges
    row = edges.row()
    order = torch.argsort(row * 2 + torch.rand(len(row), generator=torch.Generator().manual_seed(1)))
    edges.col, edges.value = edges.col[order], edges.value[order]
    inputs.edges.symmetric, inputs.case = False, Case((30, 40), 64, symmetric=False)
    found = run(emulated.ops, "gcn", inputs)
    matrix = inputs.oracle_matrix()
    out, _ = _library.reference("gcn_propagate")(inputs.x.double(), inputs.oracle_value(), None, None, *matrix, True, 0)
    torch.testing.assert_close(found["out"].double(), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [Case((18,) * 131, 64, density=0.13, capacity_slack=999), Case((75,) * 8, 64)],
    ids=["MUTAG", "COLLAB"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_of_real_data(emulated, case, dtype):
    emulated.configure(0, 132)
    for layer in ("gcn", "gin"):
        compare(emulated.ops, layer, Inputs(case, dtype))


def test_launches(emulated):
    """Degrees are folded into the forward kernel of a small batch, and backward is one sweep."""

    def count(layer: str, inputs: Inputs) -> int:
        emulated.configure(0, 4)
        run(emulated.ops, layer, inputs, torch.zeros(1))
        return emulated.configure(0, 4)

    small, large = Inputs(Case((9, 4), 8), torch.float32), Inputs(Case((4200,), 8, hubs=1), torch.float32)
    assert count("gcn", small) == 1 + 1
    assert count("gcn", large) == 2 + 1
    # The second launch of GIN's backward pass adds up the gradient of eps.
    assert count("gin", small) == 1 + 2


def test_large_batches_take_degrees_from_their_own_launch(emulated):
    for symmetric in (True, False):
        compare(emulated.ops, "gcn", Inputs(Case((4200, 3), 5, hubs=2, symmetric=symmetric), torch.float32))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("nodes", [0, 5])
def test_an_overflowed_sample_is_empty(emulated, layer, nodes):
    inputs = Inputs(Case((nodes,) if nodes else (), 6, density=0.0, capacity_slack=700), torch.float32)
    found = compare(emulated.ops, layer, inputs)
    assert not found["grad_value"].any() and len(found["grad_value"]) == 700


@pytest.mark.parametrize("layer", ["gcn", "gin"])
@pytest.mark.parametrize(
    "case",
    [
        Case((12, 30), 20, density=0.5),
        Case((30, 40, 20), 64, density=0.6),
        Case((200, 5), 8, hubs=2),
        Case((200, 5), 8, hubs=2, symmetric=False),
        Case((12, 9), 260, symmetric=False),
    ],
    ids=["scalar", "staged", "long rows", "long rows directed", "tiles directed"],
)
def test_order_of_threads_does_not_matter(emulated, layer, case):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Inputs(case, dtype)
        assert_order_does_not_matter(emulated, lambda inputs=inputs: run(emulated.ops, layer, inputs, torch.zeros(1)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(1, 9), max_size=4),
    width=st.integers(0, 40),
    heads=st.integers(1, 3),
    loops=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    symmetric=st.booleans(),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    capacity_slack=st.sampled_from([0, 1, 300]),
    misaligned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_on_ragged_batches(emulated, heads, loops, dtype, sizes, **options):
    compare_attention(emulated.ops, heads, Inputs(Case(tuple(sizes), **options), dtype), loops)


@pytest.mark.parametrize(
    "case",
    [
        Case((12, 30), 20, density=0.5),
        Case((12, 9), 130, symmetric=False, density=0.5),
        Case((70, 5), 8, hubs=2),
        Case((70, 5), 33, hubs=2, symmetric=False, capacity_slack=3),
    ],
    ids=["dense", "tiles directed", "long rows", "long rows directed"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_shapes_that_differ(emulated, dtype, case):
    """More channels than a tile has, and more entries in a row than a warp has lanes."""
    inputs = Inputs(case, dtype)
    for heads in (1, 2):
        compare_attention(emulated.ops, heads, inputs)
    assert_order_does_not_matter(emulated, lambda: run_attention(emulated.ops, 2, inputs, True))


def test_attention_of_absent_edges(emulated):
    """Weights of 0 take no part in the largest score, and have a slope; rows of nothing but them give zeros."""
    for loops in (True, False):
        for share in (0.5, 1.0):
            inputs = Inputs(Case((9, 40), 5, density=0.5), torch.float32)
            absent = torch.rand(len(inputs.edges.value), generator=torch.Generator().manual_seed(1)) < share
            inputs.edges.value = inputs.edges.value.masked_fill(absent, 0.0)
            inputs.edges.symmetric = False
            compare_attention(emulated.ops, 2, inputs, loops)


def test_launches_of_attention(emulated):
    inputs = Inputs(Case((9, 4), 8), torch.float32)
    emulated.configure(0, 4)
    run_attention(emulated.ops, 2, inputs, True)
    assert emulated.configure(0, 4) == 1 + 2


@pytest.mark.parametrize("mode", READOUT_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_readout(emulated, dtype, mode):
    for sizes in ([], [1], [3, 0, 17, 1], [0]):
        for width, misaligned in ((0, False), (1, False), (8, False), (8, True), (130, False)):
            compare_readout(emulated.ops, sizes, width, mode, dtype, misaligned=misaligned)


@pytest.mark.parametrize("mode", READOUT_MODES)
def test_readout_of_large_graphs_in_slices(emulated, mode):
    for width in (5, 64, 300):
        for dtype in (torch.float32, torch.bfloat16):
            assert_order_does_not_matter(
                emulated, lambda w=width, d=dtype: compare_readout(emulated.ops, [900, 0, 3], w, mode, d), processors=8
            )
    emulated.configure(0, 8)
    compare_readout(emulated.ops, [900, 0, 3], 64, mode, torch.float32)
    assert emulated.configure(0, 4) == 3


def test_maximum_of_not_a_number(emulated):
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    x[7, 2], x[3, 4] = float("nan"), float("-inf")
    ptr = torch.tensor([0, 10, 20])
    expected = _library.reference("readout")(x, ptr, 2)
    for actual, oracle in zip(emulated.ops.readout(x, ptr, 2), expected, strict=True):
        torch.testing.assert_close(actual, oracle, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize(emulated, dtype):
    for rows, width in [(0, 5), (1, 1), (5, 3), (129, 8), (300, 64), (70, 130), (4, 0)]:
        compare_normalize(emulated.ops, rows, width, dtype, misaligned=rows == 129)


def test_moments_of_many_blocks(emulated):
    """With eight processors 900 rows of 64 are eight blocks, merged by a second launch."""
    for width in (64, 300):
        assert_order_does_not_matter(
            emulated, lambda w=width: compare_normalize(emulated.ops, 900, w, torch.float32), processors=8
        )
    x, constants = torch.randn(900, 64), [torch.ones(64)] * 4
    emulated.configure(0, 8)
    emulated.ops.column_moments(x)
    assert emulated.configure(0, 8) == 2
    emulated.ops.frozen_norm_relu(x, None, *constants, 1e-5, True)
    assert emulated.configure(0, 8) == 2
    emulated.ops.frozen_norm_relu(x, None, *constants, 1e-5, False)
    assert emulated.configure(0, 4) == 1


def test_not_a_number_passes_the_frozen_norm_alone(emulated):
    x, one = torch.tensor([[float("nan"), 1.0]]), torch.ones(2)
    out, *_ = emulated.ops.frozen_norm_relu(x, None, 0 * one, one, one, 0 * one, 1e-5, False)
    assert out[0, 0].isnan() and not out[0, 1].isnan()
    grad = emulated.ops.frozen_norm_relu_backward(
        torch.ones(1, 2), None, None, x, torch.empty(0), 0 * one, one, one, 0 * one, 1e-5
    )
    reference = _library.reference("frozen_norm_relu_backward")
    torch.testing.assert_close(
        grad, reference(torch.ones(1, 2), None, None, x, torch.empty(0), 0 * one, one, one, 0 * one, 1e-5)
    )


def test_bad_operands_are_named(emulated):
    inputs = Inputs(Case((5, 4), 8, density=1.0), torch.float32)
    matrix, value = inputs.matrix(), inputs.value()

    def forward(x=inputs.x, value=value, rowptr=matrix[0], col=matrix[1]):
        return emulated.ops.gcn_propagate(x, value, None, None, rowptr, col, None, None, None, True, 0)

    forward()
    with pytest.raises(RuntimeError, match="x: expected 2 dimensions"):
        forward(x=inputs.x[0])
    with pytest.raises(RuntimeError, match="x: expected float32, float64 or bfloat16"):
        forward(x=inputs.x.half(), value=value.half())
    with pytest.raises(RuntimeError, match="value: expected the dtype of x"):
        forward(value=value.double())
    with pytest.raises(RuntimeError, match="value: expected 32 elements, got 31"):
        forward(value=value[:-1])
    with pytest.raises(RuntimeError, match="rowptr: expected 10 elements, got 9"):
        forward(rowptr=matrix[0][:-1])
    with pytest.raises(RuntimeError, match="expected int32"):
        forward(col=matrix[1].long())
    with pytest.raises(RuntimeError, match="eps: expected one element, got 2"):
        emulated.ops.gin_propagate(inputs.x, value, torch.zeros(2), None, None, *matrix, 0)
    with pytest.raises(RuntimeError, match="grad_out: expected shape, dtype and device of x"):
        emulated.ops.gin_propagate_backward(inputs.x[:-1], inputs.x, value, torch.zeros(1), *matrix)
    with pytest.raises(RuntimeError, match="expected all three or none"):
        broken = (*matrix[:2], matrix[0], None, None)
        emulated.ops.gin_propagate_backward(inputs.x, inputs.x, value, torch.zeros(1), *broken)
    with pytest.raises(RuntimeError, match="ptr: expected int64"):
        emulated.ops.readout(inputs.x, torch.tensor([0, 9], dtype=torch.int32), 0)
