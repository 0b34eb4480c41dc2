"""Triton kernels of the edge operators; installed as ``acgkd_fast.kernels``.

Importing this package does not import Triton. ``register`` does, and puts the kernels behind the operators
for CUDA tensors; the first operator call on a CUDA tensor calls it.
"""

from __future__ import annotations

import functools
import importlib

import torch

from acgkd_fast import _library, _native

__all__ = ["OPERATORS", "register"]

OPERATORS = {
    "edges": (
        "sample_edges",
        "sample_edges_backward",
        "candidate_port",
        "candidate_port_backward",
        "candidate_gradient",
        "candidate_backward",
        "node_port",
        "pair_uniforms",
    ),
    "factors": ("sample_factor_edges", "sample_factor_edges_backward"),
}

# A registration lives as long as its library object.
_registered: list[torch.library.Library] = []


@functools.cache
def register() -> str | None:
    """Register the kernels for CUDA tensors, once.

    Returns:
        None, or why it cannot be done, in one sentence.
    """
    try:
        modules = {name: importlib.import_module(f"{__name__}.{name}") for name in OPERATORS}
    except ImportError as error:
        return f"Triton cannot be imported ({error})."
    library = torch.library.Library(_library.NAMESPACE, "IMPL")
    for module, names in OPERATORS.items():
        for name in names:
            library.impl(name, getattr(modules[module], name), "CUDA")
            _native.TRITON_OPS.add(name)
    _registered.append(library)
    return None
