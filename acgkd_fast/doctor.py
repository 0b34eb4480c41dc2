"""What was built, what runs where, and why: the report behind ``acgkd-fast doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from . import __version__, _library, _native, edges, normalize, propagate, search

# Declaring the operators is all that these are imported for.
assert edges and propagate and normalize and search

# What each optional distribution is for.
OPTIONAL = {
    "triton": "edge kernels on CUDA",
    "torch-geometric": "data sets, teachers written with it, conversions",
    "torch-scatter": "a peer in benchmarks",
    "torch-sparse": "SparseTensor conversion, a peer in benchmarks",
    "matplotlib": "figures of the report",
    "hypothesis": "tests",
    "pytest-benchmark": "benchmarks",
}


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _triton() -> dict[str, Any]:
    """Whether the Triton kernels can serve, and if not, why."""
    version = _installed("triton")
    if version is None:
        reason: str | None = "triton is not installed (extra 'triton')"
    elif importlib.util.find_spec("acgkd_fast.kernels") is None:
        reason = "the package acgkd_fast.kernels is missing: install acgkd-fast rather than run its source tree"
    elif not torch.cuda.is_available():
        reason = "there is no CUDA device; Triton kernels serve CUDA tensors only"
    else:
        reason = None if _native.TRITON_OPS else "no operator has a Triton kernel registered"
    return {"version": version, "usable": reason is None, "reason": reason}


def _operator(name: str, device: str) -> dict[str, Any]:
    backend = _library.backend(name, device)
    reason = _native.why_missing(device) if backend == "reference" else None
    return {"backend": backend, "reason": reason}


def report() -> dict[str, Any]:
    """Everything that decides which kernels run, as plain values for JSON.

    Returns:
        ``version``, ``python``, ``torch``, ``cuda`` (of torch, or None), ``devices`` (names of the
        GPUs), ``threads``, ``build`` (see `build_info`), ``triton`` (version, usable, reason),
        ``operators`` (device type -> operator -> backend and, for plain torch, the reason) and
        ``packages`` (optional distribution -> version or None, and its use).
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": {
            "used": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "build": _native.build_info(),
        "triton": _triton(),
        "operators": {
            device: {name: _operator(name, device) for name in sorted(_library.operators())} for device in _devices()
        },
        "packages": {name: {"version": _installed(name), "use": use} for name, use in OPTIONAL.items()},
    }


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    return [f"  {left:<{width}}  {right}" for left, right in rows]


def _build_lines(build: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("kernels", f"{build.get('kernels', 'none')} ({build.get('reason', 'no record of a build')})")]
    if build.get("torch"):
        rows.append(("built with", f"torch {build['torch']}, {build['compiler']}"))
    if build.get("cuda"):
        rows.append(("CUDA", f"{build['cuda']}, for {build['arch_list']}"))
    rows.append(("C++ library", build["library"] or f"not loaded: {build['error']}"))
    rows.append(("CUDA library", build["cuda_library"] or f"not loaded: {build['cuda_error']}"))
    return rows


def render(found: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    threads, triton = found["threads"], found["triton"]
    lines = [
        f"acgkd-fast {found['version']}, Python {found['python']}, torch {found['torch']} "
        f"(CUDA {found['cuda'] or 'none'})",
        f"GPUs: {', '.join(found['devices']) or 'none'}",
        f"threads: {threads['used']} of {threads['cores']} cores "
        f"(OMP_NUM_THREADS {threads['OMP_NUM_THREADS'] or 'not set'})",
        "",
        "native extension",
        *_table(_build_lines(found["build"])),
        "",
        f"triton: {triton['version'] or 'not installed'}, "
        + ("in use" if triton["usable"] else f"not used: {triton['reason']}"),
    ]
    for device, operators in found["operators"].items():
        lines += ["", f"operators on {device}"]
        backends = [(name, entry["backend"]) for name, entry in operators.items()]
        lines += _table(backends)
        lines += [
            f"  plain torch because {reason}"
            for reason in sorted({e["reason"] for e in operators.values() if e["reason"]})
        ]
    packages = [
        (name, f"{entry['version'] or 'not installed'} - {entry['use']}") for name, entry in found["packages"].items()
    ]
    return "\n".join([*lines, "", "optional packages", *_table(packages)])
