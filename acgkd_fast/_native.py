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
TRITON_OPS: set[str] = set()
_load_error: str | None = None
_library: Path | None = None


def load() -> None:
    """Load the extension once; a failure is kept for `why_missing`, never swallowed."""
    global _load_error, _library
    if _library is not None:
        return
    found = sorted(_FOLDER.glob("_C*.so")) + sorted(_FOLDER.glob("_C*.pyd"))
    if not found:
        _load_error = "the extension was not built."
        return
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        _load_error = f"the extension {found[0].name} does not load ({error})."
        return
    _library = found[0]


def why_missing(device: str) -> str:
    """One sentence on why no native kernel serves a device type."""
    if _load_error is not None:
        return _load_error
    return f"the extension was built without {device} kernels."


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
        ``loaded`` (bool), ``library`` (path or None), ``error`` (why it is not loaded, or None),
        and, from the build: ``kernels`` ("cpu", "cpu+cuda" or "none"), ``reason``, ``torch``,
        ``cuda``, ``arch_list``, ``compiler``.
    """
    return {
        "loaded": _library is not None,
        "library": str(_library) if _library else None,
        "error": _load_error,
        **_recorded(),
    }
