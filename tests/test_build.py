"""What setup.py promises, and what importing the package costs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import acgkd_fast
from acgkd_fast import _native

ROOT = Path(__file__).parents[1]


def run(arguments: list[str], cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        k: v for k, v in os.environ.items() if k not in ("ACGKD_FAST_BUILD", "FORCE_CUDA", "CUDA_HOME", "CUDA_PATH")
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=300
    )


def build_extension(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(["setup.py", "-q", "build_ext", "-b", str(folder / "lib"), "-t", str(folder / "temp")], **environment)


def assert_one_line_error(result: subprocess.CompletedProcess[str], text: str) -> None:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("acgkd-fast: error: ")]
    assert len(errors) == 1
    assert re.search(text, errors[0])


@pytest.mark.parametrize("request_cuda", [{"ACGKD_FAST_BUILD": "cuda"}, {"FORCE_CUDA": "1"}])
def test_cuda_without_nvcc_fails_in_one_line(tmp_path, request_cuda):
    result = build_extension(tmp_path, CUDA_HOME=str(tmp_path), **request_cuda)
    assert_one_line_error(result, "CUDA kernels were asked for, but nvcc was not found")


def test_unknown_kind_of_build_is_named(tmp_path):
    result = build_extension(tmp_path, ACGKD_FAST_BUILD="gpu")
    assert_one_line_error(result, "ACGKD_FAST_BUILD: expected auto, cpu, cuda or none, got 'gpu'")


def test_without_torch_metadata_works_and_a_build_says_what_to_do(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    isolated = {"PYTHONPATH": str(tmp_path)}
    assert run(["setup.py", "-q", "--version"], **isolated).stdout.split()[-1] == acgkd_fast.__version__
    assert_one_line_error(build_extension(tmp_path, **isolated), "pip install --no-build-isolation")


def test_build_of_none_runs_on_plain_torch(tmp_path):
    built = run(["setup.py", "-q", "build", "-b", str(tmp_path)], ACGKD_FAST_BUILD="none")
    assert built.returncode == 0, built.stderr
    lib = tmp_path / "lib"
    assert not list(lib.rglob("*.so"))
    assert (lib / "acgkd_fast/kernels/__init__.py").exists()
    script = """
import json, warnings
import torch, acgkd_fast as af
from acgkd_fast import _library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    edges = af.sample_edges(torch.zeros(6), af.PairLayout.complete([4]), seed=1)
    af.gcn_propagate(torch.ones(4, 2), edges)
print(json.dumps([af.build_info(), _library.backend("sample_edges", "cpu"), [str(w.message) for w in caught]]))
"""
    result = run(["-c", script], cwd=tmp_path, PYTHONPATH=str(lib))
    assert result.returncode == 0, result.stderr
    info, backend, warnings = json.loads(result.stdout)
    assert (info["loaded"], info["kernels"], backend) == (False, "none", "reference")
    assert info["error"] == "the extension was left out (ACGKD_FAST_BUILD=none)."
    assert len(warnings) == 1
    assert info["error"] in warnings[0]


def test_importing_the_package_loads_nothing_heavy():
    result = run(["-X", "importtime", "-c", "import acgkd_fast, acgkd_fast.edges, acgkd_fast.propagate, acgkd_fast.nn"])
    assert result.returncode == 0, result.stderr
    modules = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert "acgkd_fast" in modules
    # torch itself loads tqdm.
    heavy = {"triton", "torch_geometric", "torch_sparse", "torch_scatter", "matplotlib", "scipy", "pandas", "click"}
    assert not modules & heavy


def test_build_info_says_what_is_loaded():
    info = acgkd_fast.build_info()
    assert info["loaded"] == (info["library"] is not None) == (info["error"] is None)
    assert info.get("kernels", "none") in ("none", "cpu", "cpu+cuda")
    assert info["loaded"] == (info.get("kernels", "none") != "none"), "built, but not loaded"
    if info["loaded"]:
        assert info["reason"] and info["torch"] and info["compiler"]


@pytest.mark.skipif("cpu" not in _native._loaded, reason="the native extension is not built")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_library_needs_the_stable_interface_only():
    library = acgkd_fast.build_info()["library"]
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    # C++ names of libtorch change with its versions.
    assert not [name for name in names if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
