"""Every Triton kernel variant in use, compiled for GPUs that need not be here; spills fail.

The variants are those that the host code asks for when it runs on tensors without data, so none is missed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton_launches import Launch, record, run_everything  # noqa: E402
from triton_targets import TARGETS, Usage, compile_launch  # noqa: E402

from acgkd_fast import InputError, PairLayout, _library, kernels  # noqa: E402
from acgkd_fast.edges.estimators import Estimator  # noqa: E402


def variants(target: str) -> list[Launch]:
    """What the host code launches on a target's kind of GPU."""
    hip = "any" if target.startswith("gfx") else None
    with mock.patch.object(torch.version, "hip", hip), record() as found:
        run_everything()
    return sorted({launch for launch, _ in found}, key=str)


@pytest.fixture(scope="module")
def usages() -> dict[str, dict[Launch, Usage]]:
    jobs = [(launch, target) for target in TARGETS for launch in variants(target)]
    # Forking a process that has started torch's threads can hang.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_launch, *zip(*jobs, strict=True), chunksize=4))
    table: dict[str, dict[Launch, Usage]] = {target: {} for target in TARGETS}
    for (launch, target), usage in zip(jobs, results, strict=True):
        table[target][launch] = usage
    return table


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles_without_spills(usages, target, record_property):
    table = usages[target]
    assert list(table) == variants(target)
    for launch, usage in table.items():
        record_property(str(launch), str(usage))
        print(f"{target:7} {usage.registers:4} registers {usage.spilled:4} bytes spilled  {launch}")
    assert not {str(launch): usage for launch, usage in table.items() if usage.spilled or not usage.registers}


def test_every_kernel_is_launched():
    """No kernel, and no branch of a compile-time switch, is left uncompiled."""
    launches = variants("sm_90")
    folder = Path(kernels.__file__).parent
    written = {
        node.name
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert written == {launch.kernel for launch in launches}
    for kernel in written:
        switches = [dict(launch.constexprs) for launch in launches if launch.kernel == kernel]
        for name, value in switches[0].items():
            if isinstance(value, bool):
                assert {switch[name] for switch in switches} == {False, True}, (kernel, name)


def test_dispatch_registers_every_declared_kernel():
    assert _library.register_triton() is None
    declared = {name for names in kernels.OPERATORS.values() for name in names}
    assert {name for name in _library.operators() if _library.backend(name, "cuda") == "triton"} == declared
    assert declared <= set(_library.operators())


def test_strided_operands_are_named():
    from acgkd_fast.kernels import edges

    layout = PairLayout.complete([5])
    strided = torch.zeros(20)[::2]
    rest = (layout.table, torch.zeros(2, dtype=torch.int64), torch.ones(1, dtype=torch.float64), 0)
    with pytest.raises(InputError, match=r"^sample_edges: logits: expected a contiguous tensor"):
        edges.sample_edges(strided, *rest, 2, 0, -0.1, 1.1, 0.25, 5, 9)
    with pytest.raises(InputError, match=r"^candidate_port_backward: grad_port: expected a contiguous tensor"):
        edges.candidate_port_backward(strided, torch.zeros(10), *rest, 0)


def test_import_does_not_load_triton():
    code = (
        "import sys, torch, acgkd_fast as af, acgkd_fast.kernels; layout = af.PairLayout.complete([3]);"
        "af.sample_edges(torch.zeros(3), layout, seed=0); print('triton' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_launch_sequence_of_a_small_batch():
    """128 graphs of 20 nodes: at most 5 kernels, and no host read between them."""
    from acgkd_fast.kernels import edges

    layout = PairLayout.complete([20] * 128)
    table = layout.table.to("meta")
    logits, rng = torch.empty(layout.num_pairs, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    temperature = torch.empty(1, dtype=torch.float64, device="meta")
    settings = (int(Estimator.STRAIGHT_THROUGH), 0, -0.1, 1.1, 0.25)
    with record() as found:
        # A read of a meta tensor raises.
        edges.sample_edges(logits, table, rng, temperature, 0, *settings, layout.num_nodes, 20000)
    assert [launch.kernel for launch, _ in found] == ["draw_bits_kernel", "count_kernel", "scan_kernel", "fill_kernel"]


@pytest.mark.parametrize(
    ("num_pairs", "num_nodes", "wide"),
    [(0, 1, False), (24320, 2560, False), (2**31 - 35, 1, False), (2**31 - 34, 1, True), (4999950000, 100000, True)],
)
def test_int64_where_int32_would_overflow(num_pairs, num_nodes, wide):
    from acgkd_fast.kernels.edges import needs_int64

    assert needs_int64(num_pairs, num_nodes) is wide


def _programs(share: tuple[int, int, int, int], pairs: int, nodes: int) -> int:
    """Programs that a graph gets at the least, whatever comes before it."""
    a, b, d, c = share
    return (a * pairs + b * nodes) // d + c


def test_every_graph_gets_the_programs_it_needs():
    """The closed forms of the grids against the counts they stand for, for every size up to 700 and some large."""
    from acgkd_fast.kernels import candidates, factors
    from acgkd_fast.kernels.launch import cdiv

    tile, high, low = candidates.TILE, factors.HIGH, factors.LOW
    for n in [*range(1, 700), 1000, 4095, 4096, 4097, 14142, 65536, 100000]:
        pairs = n * (n - 1) // 2
        assert _programs((1, 0, 1024, 1), pairs, n) >= cdiv(pairs, 1024)
        assert _programs((0, 1, 32, 1), pairs, n) >= cdiv(n, 32)
        assert _programs((2, 1 + 2 * tile, tile * tile, 1), pairs, n) >= cdiv(n, tile) ** 2
        factor_tiles = 8 * cdiv(n, 8 * high) * cdiv(n + 3, low)
        assert _programs((2, 4 + low + 8 * high, high * low, 9), pairs, n) >= factor_tiles
        padded_words = sum((k + 34) // 32 for k in range(n)) if n < 5000 else 0
        assert _programs((1, 34, 32, 1), pairs, n) >= padded_words
        for band in {min(1, n // 2), n // 5, n // 2}:
            budget_pairs = min(n * band, pairs)
            tiles = cdiv(n, tile) * cdiv(band + tile - 1, tile)
            assert _programs((2, 1 + 5 * tile, 2 * tile * tile, 2), budget_pairs, n) >= tiles
