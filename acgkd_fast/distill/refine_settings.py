"""Settings and result of the search."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import check, check_choice, is_integer, is_number
from ..graphs import GraphBatch
from .moves import Limits, MoveMix

# Far above what pays; keeps counter words and batches small.
MAX_PROPOSALS = 1024
ENGINES = ("auto", "native", "generic")


@dataclass(frozen=True)
class RefineSettings:
    """Settings of the search.

    Attributes:
        steps: at most this many, each with one forward pass over the chosen graphs.
        lam_k: weight of K.
        w_ce: weight of the cross-entropy term.
        cap: cross-entropy of a graph below which nothing more is gained.
        unlabelled: share of the steps, in [0, 1), that come first and follow K alone. Then the labels are dealt
            anew, each class as often as before, to the graphs that the teacher finds most typical of it
            (:func:`~.labels.deal_labels`), and the cross-entropy term sets in. 0 keeps the labels as given; so does
            a teacher without BatchNorm.
        share: share of the graphs edited in a step, in (0, 1]; at least one is.
        relabel: share of the moves that relabel a node, where features are labels.
        rewire: share of the edge moves that move an edge's end; the others add and delete equally often.
        two_hop: chance that the new partner of a node is drawn among those at distance two, closing a triangle.
        keep_degrees: keep every node's degree: all edge moves are double edge swaps, and `rewire` means nothing.
        connected: no edit may leave a connected graph in parts. Graphs that are in parts already are searched freely.
        max_degree: no edit may raise a degree above this; None for no limit.
        proposals: candidate edits of a graph per step, of which the one of lowest energy is tried. Not with
            `temperature`, whose chain would lose its balance.
        temperature: 0 is greedy, above it Metropolis, in nats of one graph (see :class:`Refiner`).
        stop_k: end once K is below this; None runs all steps.
        min_steps: steps before which `stop_k` does not count.
        engine: "native" for the compiled search (see ``docs/search.md``), "generic" for forward passes of the whole
            teacher, "auto" for the native one where it supports teacher, features and device.
        interval: steps that share one linearisation of K; above 1 native only. Saves little time and costs energy, see
            ``docs/search.md``.
    """

    steps: int = 8000
    lam_k: float = 3.0
    w_ce: float = 1.0
    cap: float = 0.1
    share: float = 0.3
    relabel: float = 0.6
    rewire: float = 0.9
    temperature: float = 0.0
    stop_k: float | None = None
    min_steps: int = 500
    engine: str = "auto"
    interval: int = 1
    two_hop: float = 0.0
    keep_degrees: bool = False
    connected: bool = True
    max_degree: int | None = None
    proposals: int = 1
    unlabelled: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "min_steps"):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= 0, name, "an integer, 0 or more", value)
        check_choice("engine", self.engine, ENGINES)
        whole = isinstance(self.interval, int) and self.interval >= 1
        check(whole, "interval", "1 step or more", self.interval)
        for name in ("lam_k", "w_ce", "cap", "temperature"):
            value = getattr(self, name)
            check(is_number(value) and 0.0 <= value < float("inf"), name, "a finite number, 0 or more", value)
        for name in ("relabel", "rewire", "two_hop"):
            value = getattr(self, name)
            check(is_number(value) and 0.0 <= value <= 1.0, name, "a share in [0, 1]", value)
        check(is_number(self.share) and 0.0 < self.share <= 1.0, "share", "a number in (0, 1]", self.share)
        first = self.unlabelled
        check(is_number(first) and 0.0 <= first < 1.0, "unlabelled", "a share in [0, 1)", first)
        stop = self.stop_k
        check(stop is None or (is_number(stop) and stop > 0.0), "stop_k", "None or a number above 0", stop)
        for name in ("keep_degrees", "connected"):
            check(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        limit, several = self.max_degree, self.proposals
        check(limit is None or (is_integer(limit) and limit >= 1), "max_degree", "None or 1 or more", limit)
        check(is_integer(several) and 1 <= several <= MAX_PROPOSALS, "proposals", f"1..{MAX_PROPOSALS}", several)
        check(several == 1 or self.temperature == 0.0, "proposals", "1 with a temperature above 0", several)
        check(self.two_hop == 0.0 or not self.keep_degrees, "two_hop", "0 with keep_degrees", self.two_hop)

    def mix(self, num_labels: int) -> MoveMix:
        """How edits of graphs with so many node labels are drawn."""
        return MoveMix(self.relabel if num_labels > 1 else 0.0, self.rewire, self.two_hop, self.keep_degrees)

    @property
    def unlabelled_steps(self) -> int:
        return int(self.unlabelled * self.steps)

    def limits(self) -> Limits:
        return Limits(self.connected, self.max_degree or 0)


@dataclass(eq=False)
class RefineResult:
    """Refined graphs, and how convincing the teacher finds them (measured on them, from scratch).

    Attributes:
        graphs: the graphs of lowest energy seen, with the labels that they ended with.
        energy: float64 [steps + 1], energy of the pool before the first and after every step.
        k: divergence K of the pool, None where the teacher has no BatchNorm.
        cross_entropy: mean over the graphs.
        agreement: share of the graphs to which the teacher gives their label.
        steps: steps taken.
        accepted: edits kept.
        warning: what speaks against using the pool, or None.
    """

    graphs: GraphBatch
    energy: torch.Tensor
    k: float | None
    cross_entropy: float
    agreement: float
    steps: int
    accepted: int
    warning: str | None
