"""The CUDA kernels of the search, run thread by thread on the host, beside the CPU engine and the oracle.

The kernels repeat the arithmetic of the CPU engine in its order, so both keep the same edits; only the energy of the
pool is added up in another order.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_search_cases import NAMES, SEARCHES, Search, compare, least_shared_bytes, relabelling, used
from emulated_kernels import CUDA_SOURCES, SHARED_BYTES, assert_order_does_not_matter, emulated_kernels
from search_helpers import assert_simple, drawn_teacher

import acgkd_fast.search  # noqa: F401  declares the operator
from acgkd_fast import _library
from acgkd_fast.distill.edge_lists import EdgeLists
from acgkd_fast.distill.statistics import graph_moment_sums
from acgkd_fast.search.packing import PackedTeacher, why_too_wide
from acgkd_fast.search.reference import forward

SOURCES = [source for source in CUDA_SOURCES if source.stem.startswith("search")]
CPU_INFO = Path("/proc/cpuinfo")
FUSED = not CPU_INFO.exists() or " fma " in CPU_INFO.read_text() or "asimd" in CPU_INFO.read_text()
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(not SOURCES, reason="needs the sources in csrc/cuda"),
    pytest.mark.usefixtures("poison"),
]
cpu_engine = pytest.mark.skipif(
    _library.backend("search_steps", "cpu") != "native" or not FUSED,
    reason="needs the C++ kernels on a processor with fused multiply-add",
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    with emulated_kernels(SOURCES, ["search_steps"], tmp_path_factory.mktemp("emulation")) as kernels:
        yield kernels


@pytest.fixture(params=[True, False], ids=["shared memory", "global memory"])
def kernel(emulated: SimpleNamespace, request: pytest.FixtureRequest):
    """The operator, its graphs all in shared memory or all of two nodes or more outside."""

    def search_steps(*operands):
        emulated.share(SHARED_BYTES if request.param else least_shared_bytes(operands))
        return emulated.ops.search_steps(*operands)

    yield search_steps
    emulated.share(SHARED_BYTES)


@cpu_engine
@pytest.mark.parametrize("name", SEARCHES)
def test_the_same_edits_as_the_cpu_engine(kernel, name):
    operands = SEARCHES[name].operands()
    kept = compare(kernel, torch.ops.acgkd_fast.search_steps(*operands), operands)
    assert kept > 0 or name in ("nothing to do", "single nodes", "one graph")


@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8", "gcn4-12", "gcn2-8"])
@pytest.mark.parametrize("interval", [1, 4])
def test_the_same_labels_as_the_oracle(kernel, arch, interval):
    operands = replace(relabelling(arch), interval=interval).operands()
    ours, theirs = used(kernel(*operands)), used(_library.reference("search_steps")(*operands))
    for name in ("progress", "label", "pairs", "counts"):
        assert torch.equal(ours[name], theirs[name]), name
    assert int(ours["progress"][1]) > 20
    for name in ("sums", "loss", "total", "level", "trace"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
@pytest.mark.parametrize(
    ("arch", "readout", "degree"), [("gcn6-20", "mean", 2.0), ("gin4-33", "max", None), ("gin2-5", "sum", 100.0)]
)
def test_the_state_after_many_edits_is_that_of_a_forward_pass(kernel, arch, readout, degree, temperature):
    search = Search(arch, readout, degree=degree, steps=150, interval=3, edited=14, temperature=temperature, cap=0.1)
    operands = search.operands()
    found = used(kernel(*operands))
    assert int(found["progress"][1]) > 40
    ptr, y, x = operands[10], operands[9], operands[8]
    edges = EdgeLists(found["pairs"], found["counts"]).to_edges(ptr, int(ptr[-1]))
    assert_simple(edges, search.sizes)
    gin, depth, width, classes, mode = operands[15:20]
    packed = PackedTeacher(operands[12], gin, depth, x.shape[1], width, classes, mode)
    features = torch.nn.functional.one_hot(found["label"], x.shape[1]).float()
    logits, norms = forward(packed, features, edges)
    sums = graph_moment_sums(norms, ptr, int(ptr[-1]))
    size = sums.abs().amax((0, 2)).clamp(min=1.0)[None, :, None]
    torch.testing.assert_close(found["sums"] / size, sums / size, rtol=1e-4, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits.double(), y, reduction="none")
    torch.testing.assert_close(found["loss"], loss, rtol=1e-4, atol=1e-4 * float(loss.max()) + 1e-5)
    torch.testing.assert_close(found["total"], found["sums"].sum(0), rtol=1e-9, atol=1e-7)


@cpu_engine
def test_graphs_that_fit_beside_graphs_that_do_not(emulated):
    """Of 1 to 12 nodes, up to 9 fit."""
    operands = Search(interval=2).operands()
    expected = torch.ops.acgkd_fast.search_steps(*operands)
    emulated.share(6_500)
    emulated.configure(0, 4)
    compare(emulated.ops.search_steps, expected, operands)
    launches = emulated.configure(0, 4)
    emulated.share(SHARED_BYTES)
    emulated.ops.search_steps(*operands)
    # Of 20 rounds and the start one launch each.
    assert launches - emulated.configure(0, 4) == 21


@cpu_engine
@pytest.mark.parametrize(("graphs", "interval"), [(40, 32), (128, 16), (129, 8), (300, 4)])
def test_rounds_that_overshoot_lose_their_worse_half(emulated, graphs, interval):
    """From 129 graphs on the totals take launches of their own. Together the edits raise the energy."""
    search = Search(sizes=(6,) * graphs, edited=graphs, steps=interval, interval=interval, cap=1e9)
    operands = search.operands()
    expected = torch.ops.acgkd_fast.search_steps(*operands)
    kept = compare(emulated.ops.search_steps, expected, operands)
    # At the lowest temperature the same edits pass, and rounds are not checked.
    unchecked = replace(search, temperature=1e-12).operands()
    assert 0 < kept < int(torch.ops.acgkd_fast.search_steps(*unchecked)[-1][1])


@pytest.mark.parametrize("name", ["gcn", "gin, maximum", "all together", "swaps that connect", "several words"])
def test_order_of_threads_does_not_matter(emulated, kernel, name):
    operands = replace(SEARCHES[name], steps=8).operands()
    assert_order_does_not_matter(emulated, lambda: used(kernel(*operands)))


def test_order_of_threads_does_not_matter_to_large_rounds(emulated):
    operands = Search(sizes=(4,) * 300, edited=200, steps=2).operands()
    assert_order_does_not_matter(emulated, lambda: used(emulated.ops.search_steps(*operands)))


@pytest.mark.parametrize("first", [1, 20, 39])
def test_calls_of_any_length_make_the_same_search(kernel, first):
    search = Search()
    whole = kernel(*search.operands())
    operands = list(replace(search, steps=first).operands())
    operands[0] = search.operands()[0]
    state = kernel(*operands)
    rest = list(replace(search, steps=40 - first, first_step=first).operands())
    rest[:8] = state[:8]
    ours, theirs = used(kernel(*rest)), used(whole)
    for name in NAMES[:8]:
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(torch.cat([state[8], ours["trace"]]), theirs["trace"])


def test_launches(emulated):
    """Two a step once it is under way, whatever the search does; none of the others waits for the host."""
    emulated.configure(0, 4)
    for steps, interval, rounds in ((10, 1, 10), (40, 8, 5)):
        emulated.ops.search_steps(*Search(steps=steps, interval=interval).operands())
        assert emulated.configure(0, 4) == 7 + 2 * rounds


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, lambda t: t[:, :1], "room for one more edge per step"),
        (0, lambda t: t + 50, "edges low < high inside them"),
        (1, lambda t: t - 100, "room for one more edge per step"),
        (2, lambda t: t + 4, "label: expected values in 0..3"),
        (9, lambda t: t + 2, "y: expected values in 0..1"),
        (10, lambda t: t + 1, "ptr, pairs, counts: expected graphs"),
        (10, lambda t: t.clone().index_fill_(0, torch.tensor([3]), 10**15), "ptr, pairs, counts: expected graphs"),
        (12, lambda t: t[1:], "parameters: expected a contiguous Float tensor"),
        (13, lambda t: t.float(), "running: expected a contiguous Double tensor"),
        (39, lambda t: t[1:], "cumulative: expected a contiguous Double tensor of shape"),
        (40, lambda t: t + 1, "table: expected a layout of the graphs of ptr"),
        (40, lambda t: t[:3], "table: expected a contiguous Long tensor"),
    ],
)
def test_bad_operands_are_named(emulated, place, value, message):
    operands = list(Search(weights="complete", steps=5).operands())
    emulated.ops.search_steps(*operands)
    operands[place] = value(operands[place]).contiguous()
    with pytest.raises(RuntimeError, match=message):
        emulated.ops.search_steps(*operands)


def test_a_teacher_too_wide_for_shared_memory_is_named(emulated):
    emulated.share(500)
    with pytest.raises(RuntimeError, match="moment sums and logits take 500 bytes of shared memory or fewer"):
        emulated.ops.search_steps(*Search().operands())
    emulated.share(SHARED_BYTES)


@pytest.mark.parametrize("arch", ["gcn3-8", "gin4-33", "gin5-64"])
def test_teachers_that_are_too_wide_are_known_beforehand(emulated, arch):
    teacher = drawn_teacher(arch)
    least = least_shared_bytes(Search(arch).operands())
    assert why_too_wide(teacher, least + 1024) is None
    reason = why_too_wide(teacher, least - 16)
    assert reason is not None and "bytes of shared memory" in reason
