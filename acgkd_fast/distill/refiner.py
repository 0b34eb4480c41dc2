"""The search behind ``refine``, as an object that can be stepped, saved and resumed.

Each step edits a random share of the graphs, one edit each, runs the teacher once over those graphs, and
keeps what lowers the energy (``energy.py``). The scores of all other graphs are cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ..errors import InputError, check, check_choice, check_tensor
from ..graphs import GraphBatch, _concatenated_ranges
from ..layout import PairLayout
from ..pseudo_graphs import FEATURE_KINDS
from ..teachers import Teacher, as_teacher
from .edge_lists import EdgeLists
from .energy import Energy, GraphScores
from .labels import deal_labels
from .moves import LANES, Edits, Lane, best_candidates, log_proposal_ratio, proposal_uniforms, propose
from .native_refiner import advance_native, choose_native
from .proposal_weights import EdgeProposals
from .refine_settings import RefineResult, RefineSettings
from .statistics import BatchNormProbe, warn_without_batch_norm

# Which of some edited graphs are allowed, bool [S].
Constraint = Callable[[GraphBatch], torch.Tensor]

# Above this K the prototype's pools taught their students little or nothing.
K_WARNING = 0.05
# Drawing for many steps at once spreads the hundreds of small tensor operations of the random stream.
_COUNTERS_AT_ONCE = 2**14
_STEPS_AT_ONCE = 64


class Refiner:
    """The search over one pool of graphs.

    Greedy (temperature 0): an edit passes if the linearised change of the energy is negative. Where all
    that passed together raise the true energy, the most promising half of them is tried, then a
    quarter, and so on; so the energy never rises.

    Metropolis (temperature T > 0): an edit passes with chance min(1, exp(-B d / T) q), where d is the
    linearised change of the energy, B the number of graphs and q the ratio of the proposal
    chances. q is exact (``moves.log_proposal_ratio``). d is exact in the cross-entropy and to first order in K, and
    graphs decide at the same time: the stationary distribution is therefore only approximately that of the energy.

    Args:
        teacher: a Teacher or any module that `as_teacher` accepts; stays frozen.
        graphs: simple undirected graphs of weight 1, with labels `y`. Not changed.
        settings: see :class:`RefineSettings`.
        seed: key of the proposals; step t uses counter word t.
        feature_kind: "one-hot" or "degree" for features that are free labels, "continuous" or
            "constant" for features to be left alone. Default: what the teacher says, else whether every row
            is one-hot.
        edge_weights: (layout, logits): ends of new and moved edges are drawn in proportion to
            sigmoid(logit); pairs without a logit are never proposed. Default: uniformly. Not with `keep_degrees`.
        constraint: says which edited graphs are allowed, such as those that keep to valences: called in every step with
            a GraphBatch of the S edited graphs, in an order of no meaning; returns bool [S]. Generic engine only.
        graph_ids: distinct ids that address the proposals; default 0..B-1.

    Attributes:
        step: steps taken.
        accepted: edits kept.

    Raises:
        InputError: graphs that are not simple, labels or features that do not fit the teacher, a teacher
            that answers with NaN or infinity, a BatchNorm layer that sees neither nodes nor graphs, a constraint that
            returns something else, or engine "native" or an interval for a search that needs the generic engine.
    """

    # Steps between two looks at `stop_k` and at the lowest energy of a Metropolis chain.
    CHECK_EVERY = 10

    def __init__(
        self,
        teacher: Teacher | nn.Module,
        graphs: GraphBatch,
        settings: RefineSettings,
        *,
        seed: int = 0,
        feature_kind: str | None = None,
        edge_weights: tuple[PairLayout, torch.Tensor] | None = None,
        constraint: Constraint | None = None,
        graph_ids: Sequence[int] | None = None,
    ) -> None:
        some = isinstance(graphs, GraphBatch) and graphs.num_graphs > 0
        check(some, "graphs", "a GraphBatch of 1 graph or more", graphs)
        self.teacher = as_teacher(teacher)
        self.settings = settings
        self.seed = seed
        self.step = 0
        self.accepted = 0
        self._ptr, self._sizes, self._y = graphs.ptr, graphs.sizes, _checked_labels(graphs, self.teacher)
        self._ids = PairLayout.complete(self._sizes.tolist(), graph_ids=graph_ids, device=graphs.x.device).table[2, :-1]
        self._lists = EdgeLists.from_edges(graphs.edges)
        self._x = graphs.x.detach().clone()
        labelled = _features_are_labels(self._x, feature_kind or self.teacher.feature_kind)
        self._num_labels = self._x.shape[1] if labelled else 0
        self._label_rows = torch.eye(self._x.shape[1], dtype=self._x.dtype, device=self._x.device)
        self._mix, self._limits = settings.mix(self._num_labels), settings.limits()
        check(constraint is None or callable(constraint), "constraint", "a function of a GraphBatch", constraint)
        self._constraint = constraint
        given = edge_weights is not None
        check(not (given and settings.keep_degrees), "edge_weights", "none with keep_degrees", edge_weights)
        drawn = None if edge_weights is None else EdgeProposals.from_logits(*edge_weights, self._ptr)
        # Where all graphs are single nodes there is nothing to draw from, and no edge move is possible anyway.
        self._weights = drawn if drawn is not None and drawn.weight.numel() else None
        self._edited = max(1, round(settings.share * graphs.num_graphs))
        self._draws, self._first_draw = torch.empty(0), 0
        self._energy, self._scores = self._measure()
        self._unlabelled = settings.unlabelled_steps > 0 and self._energy.running is not None
        self._weigh()
        if self._energy.running is None and settings.lam_k > 0.0:
            warn_without_batch_norm(
                "K is undefined and the search follows the cross-entropy alone; pools found so teach far less "
                "than real graphs do (docs/research.md)",
                stacklevel=3,
            )
        self._trace: list[torch.Tensor] = []
        self._set_out()
        self._native = choose_native(self)

    def _measure(self) -> tuple[Energy, GraphScores]:
        """Energy and scores of the graphs as they stand, from scratch."""
        settings = self.settings
        return Energy.start(settings.lam_k, settings.w_ce, settings.cap, self.teacher, self.graphs())

    def _weigh(self) -> None:
        """Without labels the cross-entropy counts nothing."""
        self._energy = replace(self._energy, w_ce=0.0 if self._unlabelled else self.settings.w_ce)

    def _set_out(self) -> None:
        """Begin to search from the graphs as they stand, whose energy takes the place of the last one."""
        self._total = self._scores.sums.sum(0)
        self._excess = self._energy.excess(self._scores.loss).sum()
        self._trace[-1:] = [self._energy.value(self._total, self._excess)]
        self._best = self._trace[-1], self._lists.clone(), self._x.clone()

    def _deal_labels(self) -> None:
        counts = self._y.bincount(minlength=self.teacher.num_classes)
        self._y = deal_labels(self.teacher(self.graphs()), counts)
        self._unlabelled = False
        self._energy, self._scores = self._measure()
        self._set_out()

    @property
    def engine(self) -> str:
        """Which engine takes the steps, "native" or "generic"."""
        return "generic" if self._native is None else "native"

    def graphs(self) -> GraphBatch:
        """The graphs as they stand."""
        return GraphBatch(self._x.clone(), self._lists.to_edges(self._ptr, self._x.shape[0]), self._y)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or K is as low as `stop_k` asks."""
        settings = self.settings
        if self.step >= settings.steps:
            return True
        if (
            self._unlabelled
            or settings.stop_k is None
            or self.step < settings.min_steps
            or self.step % self.CHECK_EVERY
        ):
            return False
        return bool(self._energy.k(self._total) < settings.stop_k)

    @torch.no_grad()
    def advance(self, steps: int = 1) -> None:
        """Take some steps, rounded up to whole intervals; fewer where the search ends before."""
        target = self.step + steps
        while self._unlabelled and self.step < target and not self.finished:
            self._take(min(target, self.settings.unlabelled_steps) - self.step)
            if self.step >= self.settings.unlabelled_steps:
                self._deal_labels()
        self._take(target - self.step)

    def _take(self, steps: int) -> None:
        target = self.step + steps
        while self._native is not None and self.step < target and not self.finished:
            before = self.step
            advance_native(self, self._native, target - self.step)
            self._remember_best(before)
        if self._native is not None:
            return
        with BatchNormProbe(self.teacher.module) as probe:
            for _ in range(steps):
                if self.finished:
                    return
                self._advance(probe)

    def metrics(self) -> dict[str, float]:
        """``energy``, ``k`` (where defined), ``cross_entropy``, ``agreement`` and ``accepted`` as things stand."""
        values = {
            "energy": float(self._trace[-1]),
            "cross_entropy": float(self._scores.loss.mean()),
            "agreement": float(self._scores.hit.double().mean()),
            "accepted": float(self.accepted),
        }
        if self._energy.running is not None:
            values["k"] = float(self._energy.k(self._total))
        return values

    def _uniforms(self) -> torch.Tensor:
        if not self._first_draw <= self.step < self._first_draw + self._draws.shape[0]:
            several = self.settings.proposals
            ahead = min(_STEPS_AT_ONCE, max(1, _COUNTERS_AT_ONCE // (2 * several * self._ids.numel())))
            self._draws = proposal_uniforms(self._ids, self.step, ahead, self.seed, several)
            self._first_draw = self.step
            self._lists.reserve(ahead)
        return self._draws[self.step - self._first_draw]

    def _advance(self, probe: BatchNormProbe) -> None:
        u, several = self._uniforms(), self.settings.proposals
        graphs = u[:, Lane.CHOICE].argsort(stable=True)[: self._edited].sort()[0]
        tried = graphs.repeat_interleave(several)
        u, sizes, before = u[graphs].view(-1, LANES), self._sizes[tried], self._lists.select(tried)
        edits = propose(
            before, sizes, u, self._mix, self._num_labels, limits=self._limits, weights=self._weights, graphs=tried
        )

        nodes, ptr = _concatenated_ranges(self._ptr, tried)
        x, row = self._x[nodes], ptr[:-1] + edits.node
        old_rows = new_rows = x[row]
        if self._num_labels > 1:
            new_rows = self._label_rows[(old_rows.argmax(1) + edits.shift) % self._num_labels]
            x[row] = new_rows
        edited = GraphBatch(x, before.edited(edits).to_edges(ptr, x.shape[0]), self._y[tried])
        edits.valid &= self._permitted(edited)
        old = self._scores.select(tried)
        new = GraphScores.of(self.teacher, probe, edited)

        # A graph on which the teacher answers NaN compares as not lower.
        change = new.sums - old.sums
        excess = self._energy.excess(new.loss) - self._energy.excess(old.loss)
        delta = self._energy.first_order(self._total, change, excess)
        if several > 1:
            best = best_candidates(delta, edits.valid, several)
            before, edits, old, new = before.select(best), edits.select(best), old.select(best), new.select(best)
            old_rows, new_rows, row, delta, change, excess = (
                part[best] for part in (old_rows, new_rows, row, delta, change, excess)
            )
        keep = edits.valid & (delta < self._allowed(u, edits, before, sizes, graphs))
        keep = self._settle(keep, delta, change, excess)

        self._scores.put(graphs, new.where(keep, old))
        self._lists.put(graphs, before, edits, keep)
        if self._num_labels > 1:
            self._x[nodes[row]] = torch.where(keep[:, None], new_rows, old_rows)
        self.accepted += int(keep.sum())
        self.step += 1
        self._remember_best(self.step - 1)

    def _permitted(self, edited: GraphBatch) -> torch.Tensor | bool:
        """What the user's constraint says of some edited graphs."""
        if self._constraint is None:
            return True
        answer = self._constraint(edited)
        check_tensor("constraint", answer, shape=(edited.num_graphs,), dtypes=(torch.bool,), device=self._x.device)
        return answer

    def _remember_best(self, before: int) -> None:
        look = self.settings.temperature > 0.0 and self.step // self.CHECK_EVERY > before // self.CHECK_EVERY
        if look and bool(self._trace[-1] < self._best[0]):
            self._best = self._trace[-1], self._lists.clone(), self._x.clone()

    def _allowed(
        self, u: torch.Tensor, edits: Edits, before: EdgeLists, sizes: torch.Tensor, graphs: torch.Tensor
    ) -> torch.Tensor | float:
        """The change of the energy below which an edit passes."""
        if self.settings.temperature == 0.0:
            return 0.0
        ratio = log_proposal_ratio(edits, before, sizes, self._mix, self._weights, graphs)
        return (ratio - u[:, Lane.ACCEPT].log()) * (self.settings.temperature / self._y.numel())

    def _settle(
        self, keep: torch.Tensor, delta: torch.Tensor, change: torch.Tensor, excess: torch.Tensor
    ) -> torch.Tensor:
        """Take over the sums of the edits that pass, and return which those are in the end."""
        order = None
        while True:
            # where and not a product: a rejected edit may hold NaN.
            total = self._total + torch.where(keep[:, None, None], change, 0.0).sum(0)
            summed = self._excess + torch.where(keep, excess, 0.0).sum()
            value = self._energy.value(total, summed)
            if self.settings.temperature > 0.0 or bool(value <= self._trace[-1]):
                self._total, self._excess = total, summed
                self._trace.append(value)
                return keep
            if order is None:
                order = torch.where(keep, delta, torch.inf).argsort(stable=True)
            keep = torch.zeros_like(keep).index_fill_(0, order[: int(keep.sum()) // 2], True)

    def result(self) -> RefineResult:
        """The graphs of lowest energy, measured from scratch.

        In Metropolis mode the lowest energy is looked for every 10 steps.
        """
        lists, x = self._lists, self._x
        if self._best[0] < self._trace[-1]:
            _, lists, x = self._best
        graphs = GraphBatch(x.clone(), lists.to_edges(self._ptr, x.shape[0]), self._y)
        energy, scores = Energy.start(self._energy.lam_k, self._energy.w_ce, self._energy.cap, self.teacher, graphs)
        k = None if energy.running is None else float(energy.k(scores.sums.sum(0)))
        warning = None
        if k is not None and k > K_WARNING:
            warning = (
                f"k: expected at most {K_WARNING} of graphs that resemble the teacher's own, got {k:.3g}; "
                "search longer, or start from another density"
            )
        return RefineResult(
            graphs,
            torch.stack(self._trace).cpu(),
            k,
            float(scores.loss.mean()),
            float(scores.hit.double().mean()),
            self.step,
            self.accepted,
            warning,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that another process needs to go on from here, bit for bit."""
        best_energy, best_lists, best_x = self._best
        return {
            "step": self.step,
            "accepted": self.accepted,
            "lists": asdict(self._lists),
            "x": self._x.clone(),
            "y": self._y,
            "unlabelled": self._unlabelled,
            "scores": asdict(self._scores),
            "total": self._total,
            "excess": self._excess,
            "trace": torch.stack(self._trace),
            "best": {"energy": best_energy, "lists": asdict(best_lists), "x": best_x},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a search with the same teacher, graphs, settings and seed.

        Raises:
            InputError: a state of other graphs.
        """
        same = state["x"].shape == self._x.shape and state["lists"]["counts"].shape == self._lists.counts.shape
        check(same, "state", "a search over as many graphs and nodes", state["x"])
        state = _on(self._x.device, state)
        self.step, self.accepted = state["step"], state["accepted"]
        self._lists, self._x = EdgeLists(**state["lists"]), state["x"]
        self._y, self._unlabelled = state["y"], state["unlabelled"]
        self._weigh()
        self._scores = GraphScores(**state["scores"])
        self._total, self._excess = state["total"], state["excess"]
        self._trace = list(state["trace"].unbind())
        best = state["best"]
        self._best = best["energy"], EdgeLists(**best["lists"]), best["x"]
        self._draws, self._first_draw = torch.empty(0), 0


def _on(device: torch.device, value: Any) -> Any:
    """A copy of nested dictionaries with their tensors on a device."""
    if isinstance(value, dict):
        return {key: _on(device, item) for key, item in value.items()}
    return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value


def _checked_labels(graphs: GraphBatch, teacher: Teacher) -> torch.Tensor:
    y, classes = graphs.y, teacher.num_classes
    if y is None or not 0 <= int(y.min()) <= int(y.max()) < classes:
        got = "none" if y is None else f"labels {sorted(set(y.tolist()))}"
        raise InputError(f"graphs.y: expected a label in 0..{classes - 1} for every graph, got {got}")
    return y


def _features_are_labels(x: torch.Tensor, kind: str | None) -> bool:
    one_hot = bool(((x == 0) | (x == 1)).all()) and bool((x.sum(1) == 1).all())
    if kind is None:
        return one_hot
    check_choice("feature_kind", kind, FEATURE_KINDS)
    free = kind in ("one-hot", "degree")
    check(one_hot or not free, "graphs.x", f"one-hot rows for feature_kind {kind!r}", x)
    return free
