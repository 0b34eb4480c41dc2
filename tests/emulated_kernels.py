"""The CUDA kernels' own sources, compiled for the host and run thread by thread; see csrc/cuda/emulation.h."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import cpp_extension

CUDA_SOURCES = sorted((Path(__file__).parents[1] / "csrc/cuda").glob("*.cu"))
# The shared memory of a block of sm_90.
SHARED_BYTES = 227 * 1024


def compile_for_host(source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    options = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    defines = ["-DACGKD_FAST_EMULATION", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command = ["g++", *options, *defines, *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@contextmanager
def emulated_kernels(sources: Sequence[Path], operators: Sequence[str], folder: Path) -> Iterator[SimpleNamespace]:
    """`ops` with the emulated operators; `configure(order, processors)`, which returns the launches since;
    `share(bytes)`, the shared memory that a block may have."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compile_for_host(source, folder), sources))
    library = folder / "libacgkd_fast_emulation.so"
    paths = [option for path in cpp_extension.library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    link = ["g++", "-shared", "-o", str(library), *map(str, objects), *paths, "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(link, check=True)
    schemas = torch.library.Library("acgkd_fast_emulation", "DEF")
    for name in operators:
        schemas.define(str(getattr(torch.ops.acgkd_fast, name).default._schema).split("::", 1)[1])
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.acgkd_fast_emulate(0, 4)
    try:
        yield SimpleNamespace(
            ops=torch.ops.acgkd_fast_emulation,
            configure=loaded.acgkd_fast_emulate,
            share=loaded.acgkd_fast_emulate_shared,
        )
    finally:
        schemas._destroy()


def bits(outputs: dict[str, torch.Tensor] | Sequence[torch.Tensor]) -> list[bytes]:
    tensors = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def assert_order_does_not_matter(emulated: SimpleNamespace, compute: Callable[[], Any], processors: int = 4) -> None:
    """The same bits whichever thread and block goes first."""
    emulated.configure(0, processors)
    first = bits(compute())
    for order in (1, 7):
        emulated.configure(order, processors)
        assert bits(compute()) == first, order
    emulated.configure(0, 4)
