"""Refinement: hard graphs are edited until the teacher finds them convincing, by forward passes only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..errors import check
from ..graphs import GraphBatch
from ..layout import PairLayout
from ..teachers import Teacher
from .refine_settings import RefineResult, RefineSettings
from .refiner import Constraint, Refiner

__all__ = ["Constraint", "RefineResult", "RefineSettings", "Refiner", "refine"]

Progress = Callable[[int, dict[str, float]], None]


def refine(
    graphs: GraphBatch,
    teacher: Teacher | nn.Module,
    *,
    steps: int = 8000,
    lam_k: float = 3.0,
    w_ce: float = 1.0,
    cap: float = 0.1,
    unlabelled: float = 0.0,
    share: float = 0.3,
    relabel: float = 0.6,
    rewire: float = 0.9,
    temperature: float = 0.0,
    stop_k: float | None = None,
    min_steps: int = 500,
    engine: str = "auto",
    interval: int = 1,
    two_hop: float = 0.0,
    keep_degrees: bool = False,
    connected: bool = True,
    max_degree: int | None = None,
    proposals: int = 1,
    seed: int = 0,
    feature_kind: str | None = None,
    edge_weights: tuple[PairLayout, torch.Tensor] | None = None,
    constraint: Constraint | None = None,
    graph_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
    report_every: int = 50,
) -> RefineResult:
    """Change hard graphs edit by edit until the teacher finds them convincing.

    Lowers ``lam_k * K + w_ce * mean_g max(CE_g - cap, 0)``: K is the divergence between the pool's BatchNorm
    statistics and the running ones, CE_g the cross-entropy of graph g with its label. Forward passes
    only, so any teacher module will do. For a search that can be saved and resumed, see :class:`Refiner`.

    Args:
        graphs: where to start: simple undirected graphs of weight 1 (sparse and connected is best, see
            ``starts.random_trees``) with features x [N, F] and labels y, the classes equally often. Their sizes stay;
            their features too unless they are labels, and y unless `unlabelled`.
        teacher: a Teacher or any module that `as_teacher` accepts; stays frozen.
        steps, lam_k, w_ce, cap, unlabelled, share, relabel, rewire, temperature, stop_k, min_steps, engine, interval,
        two_hop, keep_degrees, connected, max_degree, proposals: see :class:`RefineSettings`.
        seed, feature_kind, edge_weights, constraint, graph_ids: see :class:`Refiner`.
        progress: called with (step, metrics) every `report_every` steps and after the last.
        report_every: how often.

    Returns:
        RefineResult. Equal input gives equal graphs.

    Gradients:
        None.

    Raises:
        InputError: a setting out of its range, or as in :class:`Refiner`.

    Warns:
        RuntimeWarning: the teacher has no BatchNorm though `lam_k` asks for K, or K ended above 0.05.
    """
    check(isinstance(report_every, int) and report_every >= 1, "report_every", "1 or more steps", report_every)
    settings = RefineSettings(
        steps=steps,
        lam_k=lam_k,
        w_ce=w_ce,
        cap=cap,
        unlabelled=unlabelled,
        share=share,
        relabel=relabel,
        rewire=rewire,
        temperature=temperature,
        stop_k=stop_k,
        min_steps=min_steps,
        engine=engine,
        interval=interval,
        two_hop=two_hop,
        keep_degrees=keep_degrees,
        connected=connected,
        max_degree=max_degree,
        proposals=proposals,
    )
    refiner = Refiner(
        teacher,
        graphs,
        settings,
        seed=seed,
        feature_kind=feature_kind,
        edge_weights=edge_weights,
        constraint=constraint,
        graph_ids=graph_ids,
    )
    while not refiner.finished:
        refiner.advance(report_every - refiner.step % report_every)
        if progress is not None:
            progress(refiner.step, refiner.metrics())
    result = refiner.result()
    if result.warning is not None:
        warnings.warn(result.warning, RuntimeWarning, stacklevel=2)
    return result
