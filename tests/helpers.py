"""Shared by the tests: which kernels run, small ragged inputs, and an independent random stream."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

# Importing the second and third declares their operators, which the lists below need.
from acgkd_fast import EdgeSample, PairLayout, _library, edges, propagate  # noqa: F401

LAYOUT_KINDS = ("complete", "budget", "complete-directed", "budget-directed")

_built = any(_library.backend(name, "cpu") == "native" for name in _library.operators())
KERNELS = ("native", "reference") if _built else ("reference",)


@contextmanager
def reference_kernels() -> Iterator[set[str]]:
    """Run the plain-torch oracle on the CPU, also where a native kernel is registered.

    Yields:
        The names of the operators that ran, filled as they do.
    """
    ran: set[str] = set()
    override = torch.library.Library(_library.NAMESPACE, "IMPL")

    def register(name: str) -> None:
        def run(*args):
            ran.add(name)
            return _library.reference(name)(*args)

        override.impl(name, run, "CPU")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in _library.operators():
            register(name)
    try:
        yield ran
    finally:
        override._destroy()


@pytest.fixture(scope="module", params=KERNELS)
def kernels(request: pytest.FixtureRequest, poison: None) -> Iterator[str]:
    """Run a module's tests once per kind of kernel, in poisoned memory; the test's id says which kind."""
    # Without the extension the dispatcher runs the oracle by itself.
    with reference_kernels() if _built and request.param == "reference" else nullcontext():
        yield request.param


def make_layout(kind: str, sizes: list[int], xi: float = 0.5, **options) -> PairLayout:
    directed = kind.endswith("-directed")
    if kind.startswith("budget"):
        return PairLayout.budget(sizes, xi, directed=directed, **options)
    return PairLayout.complete(sizes, directed=directed, **options)


@st.composite
def layouts(draw, min_graphs: int = 0, max_graphs: int = 4, max_size: int = 8) -> PairLayout:
    sizes = draw(st.lists(st.integers(1, max_size), min_size=min_graphs, max_size=max_graphs))
    ids = st.lists(st.integers(0, 2**32 - 1), min_size=len(sizes), max_size=len(sizes), unique=True)
    return make_layout(
        draw(st.sampled_from(LAYOUT_KINDS)),
        sizes,
        xi=draw(st.sampled_from([0.01, 0.3, 0.5, 0.75, 1.0])),
        graph_ids=draw(st.none() | ids),
    )


def normal(shape: int | tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def enumerate_pairs(layout: PairLayout) -> list[tuple[int, int, int]]:
    """(graph, row, col) of every candidate, in the order of the pair numbers, by plain loops."""
    found, first = [], 0
    for graph, n in enumerate(layout.sizes):
        if layout.is_complete:
            pairs = [(low, high) for high in range(n) for low in range(high)]
        else:
            band = n // 2 if layout.xi == 1 else min(n // 2, max(1, int(layout.xi * (n - 1) / 2 + 0.5)))
            pairs = []
            for distance in range(1, band + 1):
                for start in range(n):
                    pair = tuple(sorted((start, (start + distance) % n)))
                    # At half the ring's length each pair is met from both ends.
                    if pair not in pairs:
                        pairs.append(pair)
        for low, high in pairs:
            found.append((graph, first + low, first + high))
            if layout.directed:
                found.append((graph, first + high, first + low))
        first += n
    return found


def philox_words(counter: tuple[int, int, int, int], seed: int) -> list[int]:
    """Philox4x32-10 in Python's integers, straight from the paper's round function."""
    c = list(counter)
    k0, k1 = seed % 2**32, (seed // 2**32) % 2**32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 // 2**32 ^ c[1] ^ k0, p1 % 2**32, p0 // 2**32 ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def uniform(layout: PairLayout, pair: int, seed: int, step: int, stream: int) -> float:
    """The uniform of one candidate pair in the stream that the package promises."""
    graph = enumerate_pairs(layout)[pair][0]
    local = pair - sum(layout.pairs_per_graph[:graph])
    word = philox_words((local // 4, layout.graph_ids[graph], step, stream), seed)[local % 4]
    return ((word >> 9) + 0.5) / 2**23


def entries(sample: EdgeSample) -> list[tuple[int, int, int]]:
    """(row, col, position) of every stored entry, by a loop over the rows."""
    rowptr, col = sample.rowptr.tolist(), sample.col.tolist()
    return [(row, col[e], e) for row in range(sample.num_nodes) for e in range(rowptr[row], rowptr[row + 1])]


def dense(sample: EdgeSample) -> torch.Tensor:
    """The whole batch as one matrix [N, N], differentiable through the values."""
    place = torch.zeros(sample.num_nodes, sample.num_nodes, sample.value.numel(), dtype=sample.value.dtype)
    for row, col, entry in entries(sample):
        place[row, col, entry] = 1.0
    return place @ sample.value


def dense_gcn(adjacency: torch.Tensor, x: torch.Tensor, add_self_loops: bool = True) -> torch.Tensor:
    """D^-1/2 (A + I) D^-1/2 x with rows of degree zero left out."""
    if add_self_loops:
        adjacency = adjacency + torch.eye(len(adjacency), dtype=adjacency.dtype)
    degree = adjacency.sum(1)
    scale = torch.where(degree > 0, degree.where(degree > 0, torch.ones_like(degree)) ** -0.5, 0.0)
    return torch.diag(scale) @ adjacency @ torch.diag(scale) @ x


def dense_gin(adjacency: torch.Tensor, x: torch.Tensor, eps: torch.Tensor | float = 0.0) -> torch.Tensor:
    return (1.0 + eps) * x + adjacency @ x


def random_edges(
    sizes: list[int],
    *,
    symmetric: bool,
    seed: int,
    density: float = 0.4,
    dtype: torch.dtype = torch.float64,
    rounded_to: torch.dtype = torch.float64,
) -> tuple[EdgeSample, torch.Tensor]:
    """Random weighted edges, and the leaf that their values come from.

    The leaf has one weight per edge, or per pair of opposite edges if `symmetric`. With `rounded_to`
    a float64 copy has the very values of a narrower one.
    """
    rng = np.random.default_rng(seed)
    rows, cols, first = [], [], 0
    for n in sizes:
        present = rng.random((n, n)) < density
        np.fill_diagonal(present, False)
        if symmetric:
            present = np.triu(present)
        row, col = np.nonzero(present)
        rows.append(row + first)
        cols.append(col + first)
        first += n
    row = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows]))
    col = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *cols]))
    weight = torch.from_numpy(rng.uniform(0.2, 1.5, len(row))).to(rounded_to).to(dtype).requires_grad_()
    ptr = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int64)
    if symmetric:
        both = torch.stack([torch.cat([row, col]), torch.cat([col, row])])
        return EdgeSample.from_edge_index(both, ptr, torch.cat([weight, weight]), symmetric=True), weight
    return EdgeSample.from_edge_index(torch.stack([col, row]), ptr, weight), weight


# Operators that some test module runs through opcheck; test_operators.py demands that none is missing.
OPCHECKED: set[str] = set()


def opcheck(name: str, cases: list[tuple]) -> None:
    """Schema and fake tensors for every case; autograd registration and tracing, slow, for the first."""
    operator = getattr(torch.ops.acgkd_fast, name).default
    torch.library.opcheck(operator, cases[0])
    for arguments in cases[1:]:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def sanitize(tool: str, script: str, *, last_words: str = "finished") -> None:
    """Run a script that ends by printing `last_words` under a tool of compute-sanitizer; skips where there is none."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("needs compute-sanitizer")
    # torch's allocator would hide accesses behind the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0 and last_words in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
