"""The energy of a pool of graphs, whole and to first order in each graph.

    energy = lam_k * K(pool) + w_ce * mean_g max(CE_g - cap, 0)

K couples the graphs through the moments of the pool. Moments are sums over graphs, so K linearised in
them gives every graph a share of its own in any change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InputError
from ..graphs import GraphBatch
from ..teachers import Teacher
from .statistics import BatchNormProbe, RunningGaussians, graph_moment_sums


@dataclass(eq=False)
class GraphScores:
    """What the energy needs to know of each graph.

    Attributes:
        sums: float64 [B, 2, C], sums of x and x^2 over the graph's rows at all BatchNorm layers.
        loss: float64 [B], cross-entropy with the label.
        hit: bool [B], whether the teacher gives the label.
    """

    sums: torch.Tensor
    loss: torch.Tensor
    hit: torch.Tensor

    @classmethod
    def of(cls, teacher: Teacher, probe: BatchNormProbe, graphs: GraphBatch) -> GraphScores:
        """One forward pass. `probe` watches the teacher and is emptied first."""
        assert graphs.y is not None
        probe.reset()
        logits = teacher(graphs)
        loss = torch.nn.functional.cross_entropy(logits, graphs.y, reduction="none").double()
        sums = graph_moment_sums(probe.inputs, graphs.ptr, graphs.num_nodes)
        return cls(sums, loss, logits.argmax(1) == graphs.y)

    def select(self, graphs: torch.Tensor) -> GraphScores:
        return GraphScores(self.sums[graphs], self.loss[graphs], self.hit[graphs])

    def put(self, graphs: torch.Tensor, scores: GraphScores) -> None:
        self.sums[graphs], self.loss[graphs], self.hit[graphs] = scores.sums, scores.loss, scores.hit

    def where(self, keep: torch.Tensor, other: GraphScores) -> GraphScores:
        """These where `keep` [B], the other's elsewhere."""
        return GraphScores(
            torch.where(keep[:, None, None], self.sums, other.sums),
            torch.where(keep, self.loss, other.loss),
            torch.where(keep, self.hit, other.hit),
        )


@dataclass(frozen=True)
class Energy:
    """The function to be lowered; see the module's docstring.

    Attributes:
        lam_k, w_ce, cap: weights and cap.
        num_graphs: B of the whole pool.
        rows: float64 [C], rows that the pool sends through each channel: its nodes, or its graphs.
        running: running statistics of the teacher, or None where it has no BatchNorm and K is undefined.
    """

    lam_k: float
    w_ce: float
    cap: float
    num_graphs: int
    rows: torch.Tensor
    running: RunningGaussians | None

    @classmethod
    def start(
        cls, lam_k: float, w_ce: float, cap: float, teacher: Teacher, graphs: GraphBatch
    ) -> tuple[Energy, GraphScores]:
        """The energy of a pool and the scores of its graphs.

        Raises:
            InputError: NaN or infinity in the teacher's logits or BatchNorm inputs.
        """
        with torch.no_grad(), BatchNormProbe(teacher.module) as probe:
            scores = GraphScores.of(teacher, probe, graphs)
            rows = [float(features.shape[0]) for features in probe.inputs for _ in range(features.shape[1])]
            running = RunningGaussians.of(probe.running) if rows else None
        if not bool(scores.loss.isfinite().all() & scores.sums.isfinite().all()):
            raise InputError("teacher: expected finite logits and BatchNorm inputs on the graphs, got NaN or infinity")
        per_channel = torch.tensor(rows, dtype=torch.float64, device=graphs.x.device)
        return cls(lam_k, w_ce, cap, graphs.num_graphs, per_channel, running), scores

    def k(self, total: torch.Tensor) -> torch.Tensor:
        """K of a pool whose moment sums are `total` [2, C]; NaN where undefined."""
        if self.running is None:
            return total.new_full((), torch.nan)
        return self.running.divergence(total / self.rows)

    def excess(self, loss: torch.Tensor) -> torch.Tensor:
        """Each graph's part of the cross-entropy term, [B]; they add up to the term."""
        return (loss - self.cap).clamp(min=0.0) * (self.w_ce / self.num_graphs)

    def value(self, total: torch.Tensor, excess: torch.Tensor) -> torch.Tensor:
        """The energy of a pool with these moment sums [2, C] and this cross-entropy term."""
        return excess if self.running is None else self.lam_k * self.k(total) + excess

    def first_order(self, total: torch.Tensor, change: torch.Tensor, excess_change: torch.Tensor) -> torch.Tensor:
        """Change of the energy as each graph changes alone: exact in the cross-entropy, linear in the moments.

        Args:
            total: moment sums of the pool as it stands, [2, C].
            change: change of each graph's sums, [S, 2, C].
            excess_change: change of its part of the cross-entropy term, [S].

        Returns:
            float64 [S].
        """
        if self.running is None:
            return excess_change
        slope = self.running.gradient(total / self.rows) / self.rows
        return self.lam_k * (change.flatten(1) @ slope.flatten()) + excess_change
