"""nvcc builds every CUDA source for the architectures we name, without spills, and the objects link and register.

Needs the CUDA compiler and runtime library, but neither a GPU nor a torch with CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
OPERATORS = re.findall(r'm\.impl\("(\w+)"', "".join(source.read_text() for source in SOURCES))

# Called for CPU tensors only; elsewhere torch's own kernels are used.
LEFT_TO_TORCH = {"softmax_rows", "softmax_rows_backward", "mean_entropy", "mean_entropy_backward", "frozen_linear"}


def cuda_home() -> Path | None:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    homes = [Path(named)] if named else [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes.append(Path("/usr/local/cuda"))
    # nvcc on PATH may be a wrapper script that lives elsewhere.
    parts = ("bin/nvcc", "include/cuda_runtime.h")
    return next((home for home in homes if all((home / part).exists() for part in parts)), None)


HOME = cuda_home()
pytestmark = [
    pytest.mark.skipif(HOME is None, reason="needs nvcc (CUDA_HOME, PATH, /usr/local/cuda)"),
    pytest.mark.skipif(not SOURCES, reason="needs the sources in csrc/cuda"),
]


@dataclass
class Compiled:
    succeeded: bool
    target: Path
    log: str


def compile_one(source: Path, folder: Path) -> Compiled:
    target = folder / f"{source.stem}.o"
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    # Device code is optimised by default; the host half is not worth the time here.
    options = [
        "-std=c++17",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        "-Xptxas",
        "-v",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    includes = [option for path in cpp_extension.include_paths() for option in ("-isystem", path)]
    command = [f"{HOME}/bin/nvcc", *options, "-DUSE_CUDA", *archs, *includes, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    return Compiled(done.returncode == 0, target, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    folder = tmp_path_factory.mktemp("cuda")
    # The sources that take longest go first.
    sources = sorted(SOURCES, key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((s.name for s in sources), pool.map(lambda s: compile_one(s, folder), sources), strict=True))


@pytest.mark.parametrize("name", [source.name for source in SOURCES])
def test_compiles_for_every_architecture_without_spills(compiled, name):
    found = compiled[name]
    assert found.succeeded, found.log
    assert "warning" not in found.log, found.log
    entry = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
    kernels = {
        arch: {name for name, built_for in entry.findall(found.log) if built_for == arch} for arch in ARCHITECTURES
    }
    assert kernels[ARCHITECTURES[0]] and len(set(map(frozenset, kernels.values()))) == 1
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", found.log)
    assert len(usage) >= sum(map(len, kernels.values()))
    # Shown by pytest -rP.
    for kernel, built_for, registers in re.findall(
        r"entry function '(\w+)' for 'sm_(\d+)'.*?Used (\d+) registers", found.log, re.DOTALL
    ):
        print(f"sm_{built_for} {registers:>3} registers {kernel}")
    # A stack frame without spills is a register array that is indexed at run time: as slow as a spill.
    assert set(usage) == {("0", "0", "0")}, found.log


def test_links_and_registers(compiled, tmp_path):
    """No symbol is left open against a torch that may have no CUDA, and every operator gets its CUDA kernel."""
    failed = [name for name, found in compiled.items() if not found.succeeded]
    assert not failed
    runtimes = [folder for folder in (HOME / "lib64", HOME / "lib") if (folder / "libcudart.so").exists()]
    if not runtimes:
        pytest.skip(f"needs libcudart.so in {HOME}")
    library = tmp_path / "libacgkd_fast_cuda.so"
    folders = [str(runtimes[0]), *cpp_extension.library_paths()]
    paths = [option for folder in folders for option in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", "-lcudart", "-ldl"]
    objects = [str(found.target) for found in compiled.values()]
    link = ["g++", "-shared", "-Wl,-z,defs", "-o", str(library), *objects, *paths, *libraries]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A process of its own: this one may have loaded the package's library, which registers the same kernels.
    script = f"""
import torch
torch.ops.load_library({str(library)!r})
for name in {OPERATORS!r}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("acgkd_fast::" + name, "CUDA"), name
print("registered", {len(OPERATORS)})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == f"registered {len(OPERATORS)}", done.stderr


def test_every_operator_has_a_cuda_kernel():
    from acgkd_fast import _library, normalize, propagate, search

    owners = (propagate.__name__, normalize.__name__, search.__name__)
    expected = {n for n in _library.operators() if _library.reference(n).__module__.startswith(owners)}
    assert expected - LEFT_TO_TORCH == set(OPERATORS)


def test_no_atomics():
    """Equal input gives equal bits: no floating-point sum may depend on which thread comes first."""
    for path in (ROOT / "csrc/cuda").iterdir():
        if path.name != "emulation.h":
            assert not re.search(r"\batomic\w*\(|\bred\.|__threadfence", path.read_text()), path.name
