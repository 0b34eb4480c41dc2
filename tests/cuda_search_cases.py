"""Searches for the tests of the CUDA kernels, emulated and on a GPU, and what to compare of their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import normal
from search_helpers import SIZES, WIDTH, drawn_teacher, make_graphs

from acgkd_fast.distill.moves import MoveMix
from acgkd_fast.distill.proposal_weights import EdgeProposals
from acgkd_fast.distill.refine import Refiner, RefineSettings
from acgkd_fast.layout import PairLayout
from acgkd_fast.search import pack_teacher

NAMES = ("pairs", "counts", "label", "sums", "loss", "hit", "total", "level", "trace", "progress")


@dataclass(frozen=True)
class Search:
    """One operator call: teacher, pool and options of the search."""

    arch: str = "gcn3-8"
    readout: str = "sum"
    sizes: tuple[int, ...] = SIZES * 2
    degree: float | None = None
    features: str = "one-hot"
    steps: int = 40
    interval: int = 1
    edited: int = 9
    relabel: float = 0.4
    rewire: float = 0.5
    two_hop: float = 0.0
    keep_degrees: bool = False
    connected: bool = False
    max_degree: int = 0
    proposals: int = 1
    weights: str | None = None  # "complete" or "budget": distribution of new edges, by layout
    temperature: float = 0.0
    stop_k: float = 0.0
    min_steps: int = 0
    first_step: int = 0
    cap: float = 0.0
    logit_scale: float = 1.0
    seed: int = 3

    def operands(self, device: str = "cpu") -> tuple[Any, ...]:
        """What `search_steps` hands to the operator."""
        teacher = drawn_teacher(self.arch, self.readout, self.seed, self.logit_scale)
        graphs = make_graphs(self.seed, self.sizes, self.degree, self.features)
        refiner = Refiner(teacher, graphs, RefineSettings(engine="generic", cap=self.cap), seed=self.seed)
        energy, scores, lists = refiner._energy, refiner._scores, refiner._lists
        lists.reserve(self.steps)
        labelled = refiner._num_labels > 1
        label = refiner._x.argmax(1) if labelled else torch.zeros(graphs.num_nodes, dtype=torch.int64)
        packed, running = pack_teacher(teacher.module), energy.running
        rng = torch.tensor([self.seed, self.first_step])
        parts = (
            *(lists.pairs.contiguous(), lists.counts, label, scores.sums, scores.loss, scores.hit, refiner._total),
            *(torch.stack([refiner._excess, refiner._trace[-1]]), refiner._x, refiner._y, refiner._ptr, refiner._ids),
            *(packed.parameters, torch.stack([running.mean, running.target, running.floor]), rng),
            *(packed.gin, packed.depth, packed.width, packed.classes, packed.readout),
            *(self.steps, self.interval, min(self.edited, len(self.sizes)), WIDTH if labelled else 0),
            *MoveMix(self.relabel if labelled else 0.0, self.rewire, self.two_hop, self.keep_degrees).thresholds(),
            *(energy.lam_k, energy.w_ce, energy.cap, self.temperature, self.stop_k, self.min_steps),
            *(self.proposals, self.two_hop, self.keep_degrees, self.connected, self.max_degree),
            *self._weights(refiner._ptr),
        )
        return tuple(part.to(device) if isinstance(part, torch.Tensor) else part for part in parts)

    def _weights(self, ptr: torch.Tensor) -> tuple[Any, ...]:
        if self.weights is None:
            return None, None, None, 0
        sizes = list(self.sizes)
        layout = PairLayout.complete(sizes) if self.weights == "complete" else PairLayout.budget(sizes, 0.4)
        logits = 3.0 * normal((layout.num_pairs,), self.seed, torch.float64)
        weights = EdgeProposals.from_logits(layout, logits, ptr)
        return weights.weight, weights.cumulative, layout.table, layout.kind


def least_shared_bytes(operands: tuple[Any, ...]) -> int:
    """What a search needs besides its graphs; see `fixed_bytes` in csrc/cuda/search.h."""
    gin, depth, width, classes = operands[15:19]
    stride, norms, trial = -(-width // 16) * 16, depth * (2 if gin else 1), 224
    return 8 * (2 * norms * stride + classes) + trial + 4 * (stride + depth + 1) + 16


def used(found: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Results by name, without what stands behind the edges of a graph, on the CPU."""
    named = {name: part.cpu() for name, part in zip(NAMES, found, strict=True)}
    behind = torch.arange(named["pairs"].shape[1]) >= named["counts"][:, None]
    named["pairs"] = named["pairs"].masked_fill(behind, 0)
    return named


def compare(operator: Callable[..., Any], expected: tuple[torch.Tensor, ...], operands: tuple[Any, ...]) -> int:
    """The same edits, and scores that agree within float64 rounding of another order. Returns edits kept."""
    ours, theirs = used(operator(*operands)), used(expected)
    for name in ("progress", "counts", "label", "hit", "pairs"):
        assert torch.equal(ours[name], theirs[name]), name
    for name in ("sums", "loss", "total", "level", "trace"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)
    return int(theirs["progress"][1])


# Options that every kernel of the search must know, alone and together.
SEARCHES = {
    "gcn": Search(),
    "gin": Search("gin3-8"),
    "five blocks": Search("gcn6-20", "mean", interval=5),
    "gin, maximum": Search("gin4-33", "max", interval=3),
    "rounds": Search(interval=7, edited=16),
    "Metropolis": Search(temperature=0.5),
    "two hops": Search(two_hop=0.7),
    "two hops, Metropolis": Search(two_hop=0.6, temperature=0.5, relabel=0.1),
    "several candidates": Search(proposals=4, edited=16),
    "swaps": Search(keep_degrees=True, degree=3.0),
    "connected": Search(connected=True, relabel=0.1, rewire=0.3),
    "degrees": Search(max_degree=3, relabel=0.1),
    "weights": Search(weights="complete", relabel=0.1),
    "weights, Metropolis": Search(weights="complete", relabel=0.1, temperature=0.5),
    "band, two hops, Metropolis": Search(weights="budget", two_hop=0.5, relabel=0.1, temperature=0.5),
    "all together": Search(
        "gin3-8", weights="budget", two_hop=0.5, connected=True, max_degree=4, proposals=3, interval=4, first_step=3
    ),
    "swaps that connect": Search(keep_degrees=True, connected=True, proposals=2, interval=2, degree=2.0),
    "stops": Search(stop_k=1e9, min_steps=15, interval=7),
    "no labels": Search(features="continuous", degree=3.0),
    "full graphs": Search(degree=100.0, relabel=0.2),
    "no edges": Search(degree=0.0, relabel=0.2),
    "single nodes": Search(sizes=(1, 1, 1), edited=3),
    "one graph": Search(sizes=(7,), edited=1),
    "saturated": Search(logit_scale=1e30),
    "several words": Search("gcn4-12", sizes=(40, 70, 33, 64), edited=3, degree=3.0, steps=12, two_hop=0.3),
    "nothing to do": Search(steps=0),
}


def relabelling(arch: str) -> Search:
    """Relabelling never gives an equivalent graph, so that no rounding decides."""
    return replace(SEARCHES["gcn"], arch=arch, relabel=1.0, steps=60)
