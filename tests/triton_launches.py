"""Which Triton kernels the host code launches, found by running it on tensors without data.

`record` replaces the launch by a note of the kernel, its argument types and its constexprs, so what the
tests compile is what the package uses, int64 variants of huge batches included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from acgkd_fast.edges.estimators import Estimator

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One compiled variant: a kernel with its types, constexprs and options, all hashable.

    `aligned` are the positions of pointers to multiples of 16 bytes, as torch allocates them, except those
    for which the kernel promises to take any.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[int, ...]
    constexprs: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        types = {
            kind for name, kind in self.signature if name in ("logits", "left", "z", "value") and kind != "constexpr"
        }
        flags = [f"{name}={value}" for name, value in self.constexprs if isinstance(value, bool)]
        return " ".join([self.kernel, *sorted(types), *flags])


def _type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), value
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextmanager
def record() -> Iterator[list[tuple[Launch, tuple[int, ...]]]]:
    """Collect (launch, grid) in place of launching."""
    found: list[tuple[Launch, tuple[int, ...]]] = []

    def run(self, *args, grid, warmup, **keywords):
        options = tuple((name, keywords.pop(name)) for name in _OPTIONS if name in keywords)
        values = {**dict(zip(self.arg_names, args, strict=False)), **keywords}
        assert set(values) == set(self.arg_names)
        fixed = {p.name for p in self.params if p.is_constexpr}
        fixed |= {name for name, value in values.items() if value is None}
        # A size that Triton specialises would compile anew for 1 and for multiples of 16.
        free = {p.name for p in self.params if p.do_not_specialize}
        assert all(name in free for name, value in values.items() if type(value) is int and name not in fixed)
        signature = tuple((n, "constexpr" if n in fixed else _type_of(values[n])) for n in self.arg_names)
        loose = {p.name for p in self.params if p.do_not_specialize_on_alignment}
        pointers = [i for i, (n, kind) in enumerate(signature) if kind.startswith("*") and n not in loose]
        found.append(
            (
                Launch(
                    self.fn.__module__,
                    self.fn.__name__,
                    signature,
                    tuple(pointers),
                    tuple((n, values[n]) for n in self.arg_names if n in fixed),
                    options,
                ),
                tuple(grid),
            )
        )

    with mock.patch.object(JITFunction, "run", run):
        yield found


def _sizes(wide: bool) -> tuple[int, int]:
    """(pairs, nodes) of one graph that needs int64, or not."""
    return (70000 * 69999 // 2, 70000) if wide else (4950, 100)


def run_everything() -> None:
    """Call every host function once for each combination of layout, width and types."""
    from acgkd_fast.kernels import edges, factors

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    table, rng = empty(4, 3, dtype=torch.int64), empty(2, dtype=torch.int64)
    temperature = empty(1, dtype=torch.float64)
    sparse = int(Estimator.SPARSE_STRAIGHT_THROUGH)
    entries = (empty(8, dtype=torch.int32), empty(8, dtype=torch.int64))
    for wide in (False, True):
        pairs, nodes = _sizes(wide)
        rowptr = empty(nodes + 1, dtype=torch.int32)
        for dtype in (torch.float32, torch.bfloat16):
            logits = empty(pairs, dtype=dtype)
            for kind in range(4):
                shared = (logits, table, rng, temperature, kind)
                settings = (sparse, 0, -0.1, 1.1, 0.25)
                edges.sample_edges(*shared, *settings, nodes, 8)
                edges.sample_edges_backward(empty(8, dtype=dtype), rowptr, *entries, *shared, *settings)
                for width_dtype in (torch.float32, torch.bfloat16):
                    factor = empty(nodes, 8, dtype=width_dtype)
                    term = empty(nodes, dtype=width_dtype)
                    edges.candidate_gradient(factor, factor, term, table, kind, pairs)
                    edges.candidate_backward(factor, factor, term, *shared, 0)
            edges.candidate_port_backward(logits, *shared, 0)
            z, bias = empty(nodes, 8, dtype=dtype), empty(2, dtype=dtype)
            drawn = (table, rng, temperature, sparse, 0, 0.25)
            factors.sample_factor_edges(z, bias, *drawn, pairs, 8)
            factors.sample_factor_edges_backward(empty(8, dtype=dtype), rowptr, *entries, z, bias, *drawn)
        edges.pair_uniforms(table, rng, 0, 0, pairs)
