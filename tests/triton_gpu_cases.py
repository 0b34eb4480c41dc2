"""Samples of any device against the formulas in float64: which edges may differ, and by how much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from acgkd_fast import EdgeSample, PairLayout
from acgkd_fast.philox import Stream, uniform_from_words, words_torch

# A pair may differ where float32 puts it on a decision's edge: log, exp and the products of factors.
MARGIN = 2e-5
LogitOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def pair_uniform(layout: PairLayout, pair: torch.Tensor, seed: int, step: int, stream: Stream) -> torch.Tensor:
    """Uniforms of the given pairs in float64, on their device."""
    graph = layout.graph_of_pair(pair)
    local = pair - layout.pair_ptr[graph]
    words = [local // 4, layout.table[2][graph], torch.full_like(local, step), torch.full_like(local, int(stream))]
    lanes = words_torch(torch.stack(words, -1), seed)
    return uniform_from_words(lanes.gather(-1, (local % 4)[..., None])[..., 0], torch.float64)


def noise_of(u: torch.Tensor, noise: str) -> torch.Tensor:
    return torch.logit(u) if noise == "logistic" else -torch.log(-torch.log(u))


@dataclass(frozen=True)
class Draw:
    """How a sample was drawn; names and defaults are those of `sample_edges`."""

    seed: int
    step: int = 0
    temperature: float = 1.0
    estimator: str = "straight_through"
    noise: str = "logistic"
    gamma: float = -0.1
    zeta: float = 1.1
    absent_rate: float = 0.1

    def decide(
        self, layout: PairLayout, pair: torch.Tensor, theta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(stored, value, margin) of pairs in float64; the margin is the distance from another decision."""
        perturbed = theta + noise_of(pair_uniform(layout, pair, self.seed, self.step, Stream.EDGE), self.noise)
        soft = torch.sigmoid(perturbed / self.temperature)
        stored = perturbed > 0
        margin = perturbed.abs() / (1 + theta.abs())
        if self.estimator == "relaxed":
            return torch.ones_like(stored), soft, torch.ones_like(margin)
        if self.estimator == "hard_concrete":
            stretched = soft * (self.zeta - self.gamma) + self.gamma
            return stretched > 0, stretched.clamp(0, 1), torch.minimum(stretched.abs(), (1 - stretched).abs())
        value = stored.double()
        if self.estimator == "sparse_straight_through":
            chance = (4 * self.absent_rate * soft * (1 - soft)).clamp(max=1)
            v = pair_uniform(layout, pair, self.seed, self.step, Stream.ABSENT)
            stored = stored | (v < chance)
            margin = torch.minimum(margin, (v - chance).abs())
        return stored, value, margin


def check_values(found: torch.Tensor, expected: torch.Tensor, margin: torch.Tensor) -> None:
    error = (found.detach().double() - expected).abs()[margin > MARGIN]
    tolerance = 1e-2 if found.dtype == torch.bfloat16 else 2e-5
    assert error.numel() == 0 or float(error.max()) < tolerance


def check_sample(sample: EdgeSample, logits: torch.Tensor, **options) -> None:
    """A whole sample against its logits [P]: order, pair numbers, structure and values."""
    layout = sample.layout
    numbers = torch.arange(layout.num_pairs, device=logits.device)
    stored, value, margin = Draw(**options).decide(layout, numbers, logits.double())
    row, size = sample.row(), sample.num_edges
    col, pair = sample.col[:size].long(), sample.pair[:size]
    key = row * layout.num_nodes + col
    assert (key[1:] > key[:-1]).all(), "rows ascend, columns ascend in each"
    assert torch.equal(pair, layout.pair_index(row, col)) and (pair >= 0).all()
    count = torch.bincount(pair, minlength=layout.num_pairs)
    assert ((count == 0) | (count == (1 if layout.directed else 2))).all()
    wrong = ((count > 0) != stored) & (margin > MARGIN)
    assert not wrong.any(), f"{int(wrong.sum())} pairs differ far from the threshold"
    check_values(sample.value[:size], value[pair], margin[pair])


def check_rows(sample: EdgeSample, rows: torch.Tensor, logit_of: LogitOf, **options) -> None:
    """Some rows of a one-graph sample, where all would be too many.

    Args:
        rows: int64 node numbers.
        logit_of: float64 logits of (row, column, pair), three int64 tensors of one shape.
    """
    layout, draw, bounds = sample.layout, Draw(**options), sample.rowptr.long()
    column = torch.arange(layout.num_nodes, device=rows.device)
    for row in rows.tolist():
        others = column[column != row]
        here = torch.full_like(others, row)
        pair = layout.pair_index(here, others)
        stored, value, margin = draw.decide(layout, pair, logit_of(here, others, pair))
        entries = slice(int(bounds[row]), int(bounds[row + 1]))
        mine = sample.col[entries].long()
        assert (mine[1:] > mine[:-1]).all() and (mine != row).all()
        place = mine - (mine > row).long()
        assert torch.equal(sample.pair[entries], pair[place])
        found = torch.zeros_like(stored)
        found[place] = True
        assert not ((found != stored) & (margin > MARGIN)).any()
        check_values(sample.value[entries], value[place], margin[place])
