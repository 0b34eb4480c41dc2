"""Graph-free knowledge distillation with fast Binary Concrete edges.

Importing the package loads torch and nothing heavier; submodules arrive with their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ._native import build_info as build_info
    from .edges import arm_gradient as arm_gradient
    from .edges import sample_edges as sample_edges
    from .errors import DataError as DataError
    from .errors import InputError as InputError
    from .graphs import EdgeSample as EdgeSample
    from .graphs import GraphBatch as GraphBatch
    from .layout import PairLayout as PairLayout
    from .propagate import gcn_propagate as gcn_propagate
    from .propagate import gin_propagate as gin_propagate
    from .propagate import readout as readout

_HOMES = {
    "build_info": "._native",
    "arm_gradient": ".edges",
    "sample_edges": ".edges",
    "DataError": ".errors",
    "InputError": ".errors",
    "EdgeSample": ".graphs",
    "GraphBatch": ".graphs",
    "PairLayout": ".layout",
    "gcn_propagate": ".propagate",
    "gin_propagate": ".propagate",
    "readout": ".propagate",
}
_MODULES = ("checkpoints", "data", "distill", "edges", "hosts", "nn", "philox", "propagate", "report", "teachers")

__all__ = [*_HOMES, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
