"""Graph-free knowledge distillation with fast Binary Concrete edges.

Importing the package loads torch and nothing heavier; submodules arrive with their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ._native import build_info as build_info
    from .distill.curriculum import CurriculumSettings as CurriculumSettings
    from .distill.inversion import LearnSettings as LearnSettings
    from .distill.inversion import learn as learn
    from .distill.perturbed import perturbed_pool as perturbed_pool
    from .distill.pool import random_pool as random_pool
    from .distill.pool import start_graphs as start_graphs
    from .distill.prior_search import find_prior as find_prior
    from .distill.refine import RefineSettings as RefineSettings
    from .distill.refine import refine as refine
    from .distill.student import StudentSettings as StudentSettings
    from .distill.student import distill_student as distill_student
    from .distill.temperature import AdversarySettings as AdversarySettings
    from .distill.twins import twinned_pool as twinned_pool
    from .edges import FactorLogits as FactorLogits
    from .edges import arm_gradient as arm_gradient
    from .edges import sample_dense_edges as sample_dense_edges
    from .edges import sample_edges as sample_edges
    from .errors import DataError as DataError
    from .errors import InputError as InputError
    from .generator import Generator as Generator
    from .graph_pool import GraphPool as GraphPool
    from .graphs import EdgeSample as EdgeSample
    from .graphs import GraphBatch as GraphBatch
    from .layout import PairLayout as PairLayout
    from .nn.accelerate import accelerate as accelerate
    from .nn.accelerate import acceleration_report as acceleration_report
    from .nn.accelerate import restore as restore
    from .propagate import gat_propagate as gat_propagate
    from .propagate import gcn_propagate as gcn_propagate
    from .propagate import gin_propagate as gin_propagate
    from .propagate import readout as readout
    from .pseudo_graphs import GraphPrior as GraphPrior
    from .pseudo_graphs import PseudoGraphs as PseudoGraphs
    from .synthesizer import GraphSynthesizer as GraphSynthesizer
    from .teachers import Teacher as Teacher
    from .teachers import as_teacher as as_teacher

_HOMES = {
    "AdversarySettings": ".distill.temperature",
    "CurriculumSettings": ".distill.curriculum",
    "build_info": "._native",
    "find_prior": ".distill.prior_search",
    "LearnSettings": ".distill.inversion",
    "learn": ".distill.inversion",
    "perturbed_pool": ".distill.perturbed",
    "random_pool": ".distill.pool",
    "twinned_pool": ".distill.twins",
    "start_graphs": ".distill.pool",
    "RefineSettings": ".distill.refine",
    "refine": ".distill.refine",
    "StudentSettings": ".distill.student",
    "distill_student": ".distill.student",
    "FactorLogits": ".edges",
    "arm_gradient": ".edges",
    "sample_dense_edges": ".edges",
    "sample_edges": ".edges",
    "DataError": ".errors",
    "InputError": ".errors",
    "Generator": ".generator",
    "GraphPool": ".graph_pool",
    "EdgeSample": ".graphs",
    "GraphBatch": ".graphs",
    "PairLayout": ".layout",
    "accelerate": ".nn.accelerate",
    "acceleration_report": ".nn.accelerate",
    "restore": ".nn.accelerate",
    "gat_propagate": ".propagate",
    "gcn_propagate": ".propagate",
    "gin_propagate": ".propagate",
    "readout": ".propagate",
    "GraphPrior": ".pseudo_graphs",
    "PseudoGraphs": ".pseudo_graphs",
    "GraphSynthesizer": ".synthesizer",
    "Teacher": ".teachers",
    "as_teacher": ".teachers",
}
_MODULES = ("checkpoints", "data", "distill", "edges", "nn", "philox", "propagate", "report", "teachers")

__all__ = [*_HOMES, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
