"""Ahead-of-time compilation of recorded launches, and what the result spills."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from triton_launches import Launch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Usage:
    """Registers per thread; bytes of memory per thread that spills (or anything else) take.

    AMD's compiler also spills scalar registers to lanes of vector registers, which costs no memory.
    """

    registers: int
    spilled: int
    scalars_to_vectors: int = 0


def compile_launch(launch: Launch, target: str) -> Usage:
    """Compile to machine code for a target that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constexprs), attributes)
    amd = target.startswith("gfx")
    machine = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    with warnings.catch_warnings():
        # Some releases announce that their default for contracting a * b + c will change; either serves.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        compiled = triton.compile(source, target=machine, options=dict(launch.options))
    return _amd_usage(compiled.asm["amdgcn"]) if amd else _nvidia_usage(compiled.asm["cubin"])


def _nvidia_usage(cubin: bytes) -> Usage:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(knobs.nvidia.cuobjdump.path)
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    assert found, report
    registers, stack, local = map(int, found.groups())
    return Usage(registers, stack + local)


def _amd_usage(assembly: str) -> Usage:
    def count(field: str) -> int:
        found = re.search(rf"\.{field}:\s+(\d+)", assembly)
        assert found, field
        return int(found.group(1))

    return Usage(count("vgpr_count"), count("private_segment_fixed_size"), count("sgpr_spill_count"))
