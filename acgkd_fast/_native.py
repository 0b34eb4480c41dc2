"""The native extension: where it is, what it was built with, and why it may be missing.

The build writes ``_build_info.json`` beside the library; everything said here comes from that file
and from the attempt to load the library.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
# Two libraries, so that a CUDA one that does not load leaves the CPU kernels in place.
_FILES = {"cpu": "_C.abi3.so", "cuda": "_C_cuda.abi3.so"}
TRITON_OPS: set[str] = set()
_loaded: dict[str, Path] = {}
_errors: dict[str, str] = {}


def load() -> None:
    """Load the extension once; a failure is kept for `why_missing`, never swallowed."""
    if _loaded or _errors:
        return
    for device, name in _FILES.items():
        reason = _why_absent(device)
        if reason is None:
            try:
                torch.ops.load_library(str(_FOLDER / name))
            except OSError as error:
                reason = f"the extension {name} does not load ({error})."
        if reason is None:
            _loaded[device] = _FOLDER / name
        else:
            _errors[device] = reason


def _why_absent(device: str) -> str | None:
    """Why there is no library to load for a device type, or None if there is one."""
    kernels, reason = _recorded().get("kernels", ""), _recorded().get("reason")
    if kernels == "none":
        # A source tree may still hold the libraries of an earlier build.
        return f"the extension was left out ({reason})."
    if (_FOLDER / _FILES[device]).exists():
        return None
    if device in kernels:
        return f"the extension {_FILES[device]} was built, but is gone."
    return f"the extension was built without {device} kernels ({reason})." if reason else "the extension was not built."


def why_missing(device: str) -> str:
    """One sentence on why no native kernel serves a device type."""
    return _errors.get(device, f"no {device} kernel serves this operator.")


@cache
def _recorded() -> dict[str, Any]:
    path = _FOLDER / "_build_info.json"
    if not path.exists():
        return {}
    recorded: dict[str, Any] = json.loads(path.read_text())
    return recorded


def build_info() -> dict[str, Any]:
    """What was built and what is loaded.

    Returns:
        ``loaded`` (bool: the CPU kernels are in use), ``library`` (path or None), ``error`` (why they
        are not, or None), ``cuda_library`` and ``cuda_error`` likewise, and, from the build:
        ``kernels`` ("cpu", "cpu+cuda" or "none"), ``reason``, ``torch``, ``cuda``, ``arch_list``,
        ``compiler``.
    """
    return {
        "loaded": "cpu" in _loaded,
        "library": str(_loaded["cpu"]) if "cpu" in _loaded else None,
        "error": _errors.get("cpu"),
        "cuda_library": str(_loaded["cuda"]) if "cuda" in _loaded else None,
        "cuda_error": _errors.get("cuda"),
        **_recorded(),
    }
