"""Operator of the search: schema and fake. It has no gradient."""

from __future__ import annotations

from typing import Any

import torch

from .._library import define
from . import reference


def _fake(
    pairs: torch.Tensor,
    counts: torch.Tensor,
    label: torch.Tensor,
    sums: torch.Tensor,
    loss: torch.Tensor,
    hit: torch.Tensor,
    total: torch.Tensor,
    level: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    steps = rest[_STEPS]
    state = tuple(torch.empty_like(part) for part in (pairs, counts, label, sums, loss, hit, total, level))
    return *state, loss.new_empty(steps), counts.new_empty(2)


# Position of `steps` behind the eight tensors of the state.
_STEPS = 12
SEARCH_STEPS = define(
    "search_steps(Tensor pairs, Tensor counts, Tensor label, Tensor sums, Tensor loss, Tensor hit, Tensor total, "
    "Tensor level, Tensor x, Tensor y, Tensor ptr, Tensor ids, Tensor parameters, Tensor running, Tensor rng, "
    "bool gin, int depth, int width, int classes, int readout, int steps, int interval, int edited, "
    "int num_labels, float below_relabel, float below_rewire, float below_add, float lam_k, float w_ce, float cap, "
    "float temperature, float stop_k, int min_steps, int proposals, float two_hop, bool keep_degrees, bool connected, "
    "int max_degree, Tensor? weight, Tensor? cumulative, Tensor? table, int kind) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.search_steps,
    _fake,
)
