"""The Triton kernels on CPU tensors, against the oracle. A script: run with TRITON_INTERPRET=1 in the environment.

Prints one JSON object: for each case "passed" or the traceback; or under "refusal" why this Triton's
interpreter runs nothing here. bfloat16 is left out, because the interpreter computes it wrongly without
saying so.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from helpers import LAYOUT_KINDS, make_layout, normal

from acgkd_fast import _library
from acgkd_fast.edges import factorised
from acgkd_fast.edges.estimators import Estimator, Noise
from acgkd_fast.kernels import edges, factors
from acgkd_fast.kernels.backward import twin_entry
from acgkd_fast.kernels.layout import last_not_above
from acgkd_fast.layout import PairLayout

Case = Callable[[], None]
SETTINGS = (-0.1, 1.1, 0.25)
RNG = torch.tensor([-5, 3])
TEMPERATURE = torch.tensor([0.7], dtype=torch.float64)
SIZES = [1, 5, 2, 34]


def oracle(name: str, *args):
    return _library.reference(name)(*args)


def draw_arguments(layout: PairLayout, estimator: int, noise: int, rng: torch.Tensor = RNG) -> tuple:
    logits = normal(layout.num_pairs, 1, torch.float32)
    return (logits, layout.table, rng, TEMPERATURE, layout.kind, int(estimator), int(noise), *SETTINGS)


def check_sample(got: tuple, want: tuple, tolerance: float = 1e-5) -> None:
    """The same edges; values of relaxations may differ in the last bits of log and exp."""
    for name, ours, theirs in zip(("rowptr", "col", "pair", "needed"), got[1:], want[1:], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)


def check_draw(layout: PairLayout, estimator: int, noise: int, capacity: int, rng: torch.Tensor = RNG) -> None:
    arguments = (*draw_arguments(layout, estimator, noise, rng), layout.num_nodes, capacity)
    check_sample(edges.sample_edges(*arguments), oracle("sample_edges", *arguments))


def uniforms() -> None:
    """Extreme seeds, steps and ids; graphs that begin on every lane."""
    for seed, step in ((0, 0), (-1, 2**32 - 1), (2**62 + 12345, 77)):
        for kind in LAYOUT_KINDS:
            layout = make_layout(kind, [1, 3, 2, 9, 4], graph_ids=[2**32 - 1, 5, 0, 2**31, 17])
            for stream in range(4):
                arguments = (layout.table, torch.tensor([seed, step]), layout.kind, stream, layout.num_pairs)
                assert torch.equal(edges.pair_uniforms(*arguments), oracle("pair_uniforms", *arguments))


def draws(kind: str) -> None:
    """Every estimator; noises, and exact, ample and too small buffers, in turn."""
    layout = make_layout(kind, SIZES, graph_ids=[9, 2**32 - 1, 0, 4])
    turn = LAYOUT_KINDS.index(kind)
    for estimator in Estimator:
        capacity = (-1, 3 * layout.num_pairs, 7)[(estimator + turn) % 3]
        # ARM is defined for logistic noise.
        noise = 0 if estimator in (Estimator.ARM, Estimator.ARM_MIRRORED) else (estimator + turn) // 2 % 2
        check_draw(layout, estimator, noise, capacity)


def long_rows(kind: str, n: int, xi: float) -> None:
    """More than 256 slots in a row, and more than one block of pairs."""
    layout = make_layout(kind, [n], xi=xi)
    check_draw(layout, Estimator.STRAIGHT_THROUGH, Noise.LOGISTIC, -1)


def int64(kind: str) -> None:
    with mock.patch.object(edges, "needs_int64", lambda *_: True):
        check_draw(make_layout(kind, SIZES), Estimator.SPARSE_STRAIGHT_THROUGH, Noise.GUMBEL, -1)


def block_size_and_batch_order() -> None:
    """Neither changes what a graph draws."""
    layout = make_layout("complete", [5, 9, 7], graph_ids=[3, 8, 1])
    logits = normal(layout.num_pairs, 1, torch.float32)
    settings = (int(Estimator.SPARSE_STRAIGHT_THROUGH), 0, *SETTINGS)
    shared = (RNG, TEMPERATURE, 0, *settings)
    whole = edges.sample_edges(logits, layout.table, *shared, layout.num_nodes, -1)
    with mock.patch.object(edges, "PAIR_BLOCK", 128), mock.patch.object(edges, "SCAN_BLOCK", 2):
        check_sample(edges.sample_edges(logits, layout.table, *shared, layout.num_nodes, -1), whole, 0.0)
    order = [2, 0, 1]
    moved = layout.select(order)
    pieces = logits.split(list(layout.pairs_per_graph))
    value, rowptr, col, _, _ = edges.sample_edges(
        torch.cat([pieces[g] for g in order]), moved.table, *shared, moved.num_nodes, -1
    )
    for position, g in enumerate(order):
        here, there = moved.node_ptr.tolist()[position], layout.node_ptr.tolist()[g]
        for node in range(layout.sizes[g]):
            mine = slice(*rowptr[here + node : here + node + 2].tolist())
            theirs = slice(*whole[1][there + node : there + node + 2].tolist())
            assert torch.equal(col[mine] - here, whole[2][theirs] - there)
            assert torch.equal(value[mine], whole[0][theirs])


def empty_batches() -> None:
    for sizes in ([], [1], [1, 1, 1]):
        for kind in LAYOUT_KINDS:
            for capacity in (-1, 0, 3):
                check_draw(make_layout(kind, sizes), Estimator.STRAIGHT_THROUGH, Noise.LOGISTIC, capacity)
    layout = make_layout("complete", [1, 1])
    arguments = draw_arguments(layout, Estimator.RELAXED, Noise.LOGISTIC)
    _, *structure, _ = oracle("sample_edges", *arguments, 2, 3)
    assert edges.sample_edges_backward(torch.zeros(3), *structure, *arguments).shape == (0,)


def extreme_logits() -> None:
    """Certain and impossible edges, and a logit that is no number: it draws nothing."""
    layout = make_layout("complete", [6])
    logits = torch.tensor([float("inf"), float("-inf"), float("nan"), 200.0, -200.0] * 3)
    for noise in Noise:
        arguments = (logits, layout.table, RNG, TEMPERATURE, 0, int(Estimator.STRAIGHT_THROUGH), int(noise), *SETTINGS)
        value, _, _, pair, _ = edges.sample_edges(*arguments, 6, -1)
        assert sorted(pair.tolist()) == sorted(2 * [0, 5, 10, 3, 8, 13]) and value.eq(1).all()


def value_gradients(kind: str) -> None:
    layout = make_layout(kind, SIZES)
    for estimator in Estimator:
        noise = estimator % 2
        arguments = draw_arguments(layout, estimator, noise)
        value, *structure, _ = oracle("sample_edges", *arguments, layout.num_nodes, (-1, 3000)[noise])
        grad = normal(value.shape, 2, torch.float32)
        want = oracle("sample_edges_backward", grad, *structure, *arguments)
        torch.testing.assert_close(
            edges.sample_edges_backward(grad, *structure, *arguments), want, rtol=1e-5, atol=2e-6
        )


def candidate_gradients(kind: str, sizes: list[int], width: int) -> None:
    layout = make_layout(kind, sizes)
    nodes = layout.num_nodes
    left, right = normal((nodes, width), 2, torch.float32), normal((nodes, width), 3, torch.float32)
    factored = (left, right, normal(nodes, 4, torch.float32))
    tolerances = {"rtol": 1e-5, "atol": 1e-5}
    arguments = (*factored, layout.table, layout.kind, layout.num_pairs)
    want = oracle("candidate_gradient", *arguments)
    torch.testing.assert_close(edges.candidate_gradient(*arguments), want, **tolerances)
    # An entry written behind the last pair would land in memory of others.
    guarded = torch.full((layout.num_pairs + 99,), 7.0)
    edges._candidates(*factored, None, layout.table, None, None, guarded[: layout.num_pairs], layout.kind, 0)
    assert guarded[layout.num_pairs :].eq(7.0).all() and guarded[: layout.num_pairs].isfinite().all()
    for noise in Noise:
        shared = (*draw_arguments(layout, 0, 0)[:5], int(noise))
        got = edges.candidate_backward(*factored, *shared)
        torch.testing.assert_close(got, oracle("candidate_backward", *factored, *shared), **tolerances)
        got = edges.candidate_port_backward(want, *shared)
        torch.testing.assert_close(got, oracle("candidate_port_backward", want, *shared), **tolerances)


@triton.jit
def bisection_kernel(rowptr, col, out, begin, wanted):
    lane = tl.arange(0, 2)
    row = wanted + lane
    tl.store(out + lane, twin_entry(rowptr, col, row, 0 * lane, row >= 0))
    low = begin + 0 * lane
    tl.store(out + 2 + lane, last_not_above(col, low, low + 40, 6, row))


def positions_above_2_to_30() -> None:
    """Where the sum of two positions leaves int32. Memory that nobody touches is not taken."""
    begin = 2**30
    col = torch.from_numpy(np.zeros(begin + 40, np.int32))
    col[begin:] = torch.arange(40)
    rowptr, out = torch.tensor([begin, begin + 40], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    bisection_kernel[(1,)](rowptr, col, out, begin, 7)
    assert (out - begin).tolist() == [7, 8, 7, 8]


def factorised_logits(window_words: int, sizes: list[int]) -> None:
    """One window, and several that split graphs and rows; gradients of z and bias."""
    layout = make_layout("complete", sizes, graph_ids=[7 + 3 * g for g in range(len(sizes))])
    z, bias = normal((layout.num_nodes, 5), 1, torch.float32), normal(len(sizes), 2, torch.float32)
    for estimator in (Estimator.STRAIGHT_THROUGH, Estimator.SPARSE_STRAIGHT_THROUGH):
        noise = int(estimator % 2)
        drawn = (z, bias, layout.table, RNG, TEMPERATURE, int(estimator), noise, 0.25)
        for capacity in (-1, 5) if estimator == Estimator.STRAIGHT_THROUGH else (4000,):
            with mock.patch.object(factors, "WINDOW_WORDS", window_words):
                got = factors.sample_factor_edges(*drawn, layout.num_pairs, capacity)
            want = factorised.sample_factor_edges(*drawn, layout.num_pairs, capacity)
            check_sample(got, want, 0.0)
        grad = normal(want[0].shape, 3, torch.float32)
        arguments = (grad, *want[1:4], *drawn)
        for ours, theirs in zip(
            factors.sample_factor_edges_backward(*arguments),
            factorised.sample_factor_edges_backward(*arguments),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def cases() -> Iterator[tuple[str, Case]]:
    yield "uniforms", uniforms
    for kind in LAYOUT_KINDS:
        yield f"draws {kind}", lambda kind=kind: draws(kind)
        yield f"int64 {kind}", lambda kind=kind: int64(kind)
        yield f"value gradients {kind}", lambda kind=kind: value_gradients(kind)
        yield f"candidate gradients {kind}", lambda kind=kind: candidate_gradients(kind, [1, 5, 70, 2], 20)
    yield "long rows complete", lambda: long_rows("complete", 270, 1.0)
    yield "long rows budget", lambda: long_rows("budget", 150, 1.0)
    yield "long rows budget-directed", lambda: long_rows("budget-directed", 131, 0.99)
    yield "candidate gradients of one channel", lambda: candidate_gradients("budget", [9], 1)
    yield "block size and batch order", block_size_and_batch_order
    yield "empty batches", empty_batches
    yield "extreme logits", extreme_logits
    yield "positions above 2^30", positions_above_2_to_30
    yield "factorised logits", lambda: factorised_logits(2**26, [1, 5, 2, 34])
    yield "factorised logits in windows", lambda: factorised_logits(40, [5, 34])


@triton.jit
def counting_kernel(length, out):
    for i in range(tl.load(length)):
        tl.store(out + i, i)


def refusal() -> str | None:
    """Interpreters older than NumPy 2.4 cannot loop up to a loaded number under it."""
    out = torch.full((3,), -1)
    try:
        counting_kernel[(1,)](torch.tensor([3]), out)
    except Exception as error:
        return f"the interpreter of Triton {triton.__version__} fails under NumPy {np.__version__}: {error}"
    assert out.tolist() == [0, 1, 2]
    return None


def main() -> None:
    wanted = sys.argv[1:]
    reason = refusal()
    if reason is not None:
        print(json.dumps({"refusal": reason}))
        return
    torch.set_num_threads(1)
    # Fills what torch.empty returns, so that an entry nobody writes shows.
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    results = {}
    for name, case in cases():
        if wanted and name not in wanted:
            continue
        try:
            case()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    main()
