"""Public search: checks, then one operator call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._library import backend
from ..distill.edge_lists import EdgeLists
from ..distill.energy import Energy, GraphScores
from ..distill.moves import Limits, MoveMix
from ..distill.proposal_weights import EdgeProposals
from ..errors import InputError, check
from ..philox import check_word
from ..teachers import Teacher
from . import ops
from .packing import PackedTeacher, why_not_packed, why_too_wide

assert ops.SEARCH_STEPS  # importing the module declares the operator


def why_unsupported(teacher: Teacher, x: torch.Tensor) -> str | None:
    """Why no native kernel can run the search, or None if one can.

    Args:
        teacher: the teacher.
        x: node features [N, F], for their dtype and device.
    """
    if x.dtype != torch.float32:
        return f"the features are {str(x.dtype).removeprefix('torch.')}, not float32"
    if backend("search_steps", x.device) != "native":
        return f"no native search kernel serves {x.device.type} tensors"
    reason = why_not_packed(teacher)
    if reason is None and x.is_cuda:
        # Older torch does not tell; every GPU has this much.
        least = 48 * 1024
        found = getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", least)
        return why_too_wide(teacher, found)
    return reason


@dataclass(eq=False)
class SearchState:
    """All that changes in a search.

    Attributes:
        lists: edges of the B graphs.
        label: int64 [N], node labels; zeros where features are no labels.
        scores: moment sums, loss and hit of each graph.
        total: float64 [2, C], moment sums of the pool.
        level: float64 [2], the cross-entropy term and the energy of the pool.
    """

    lists: EdgeLists
    label: torch.Tensor
    scores: GraphScores
    total: torch.Tensor
    level: torch.Tensor


def search_steps(
    packed: PackedTeacher,
    energy: Energy,
    state: SearchState,
    x: torch.Tensor,
    y: torch.Tensor,
    ptr: torch.Tensor,
    ids: torch.Tensor,
    *,
    seed: int,
    first_step: int,
    steps: int,
    edited: int,
    mix: MoveMix,
    num_labels: int,
    interval: int = 1,
    temperature: float = 0.0,
    stop_k: float | None = None,
    min_steps: int = 0,
    proposals: int = 1,
    limits: Limits | None = None,
    weights: EdgeProposals | None = None,
) -> tuple[SearchState, torch.Tensor, int, int]:
    """Take many steps of the search; see :class:`acgkd_fast.distill.refine.Refiner` for what a step is.

    Steps t with equal t // `interval` form a round, which shares one slope of K. Inside a round every graph decides its
    own edits one after the other. At its end the true energy of the pool is looked at; where it rose, the half of
    the graphs that promised less go back to where the round began, then three quarters, and so on. With interval 1
    these are the steps of the Refiner. A call's end ends a round, and so does every tenth step where `stop_k` is
    given.

    Args:
        packed: the teacher's weights, float32.
        energy: weights, cap and running statistics; `rows` must be the number of nodes throughout.
        state: where to start. Not changed.
        x: float32 [N, F]; read only where features are no labels.
        y: int64 [B], labels of the graphs.
        ptr: int64 [B + 1], node offsets.
        ids: int64 [B], ids that address the random draws, in 0..2^32-1.
        seed, first_step: of the random stream.
        steps: at most this many.
        edited: graphs edited in a step.
        mix: how edits are drawn.
        num_labels: node labels, 0 or 1 where features stay.
        interval: steps of a round.
        temperature, stop_k, min_steps, proposals: as in RefineSettings.
        limits: which edits are allowed; default all.
        weights: distribution of new edges, over the same graphs; default uniform.

    Returns:
        (state, trace, taken, accepted): trace float64 [taken], the energy after every step; inside a round that of its
        start. Equal input gives equal bits for any number of threads.

    Gradients:
        None.

    Raises:
        InputError: seed, steps, interval, edited or proposals out of range, options that exclude one another, or an
            energy without running statistics.
    """
    check_word("seed", seed, -(2**63), 2**64)
    check(steps >= 0, "steps", "0 or more", steps)
    check(interval >= 1, "interval", "1 step or more", interval)
    check(1 <= edited <= y.numel(), "edited", f"1..{y.numel()} graphs", edited)
    check(proposals >= 1, "proposals", "1 candidate or more", proposals)
    check(proposals == 1 or temperature == 0.0, "proposals", "1 with a temperature above 0", proposals)
    check(weights is None or not mix.keep_degrees, "weights", "none with keep_degrees", weights)
    limits = limits or Limits()
    running = energy.running
    if running is None:
        raise InputError("energy: expected running statistics, got none")
    state.lists.reserve(steps)
    key = seed - 2**64 if seed >= 2**63 else seed
    result = torch.ops.acgkd_fast.search_steps(
        state.lists.pairs.contiguous(),
        state.lists.counts,
        state.label,
        state.scores.sums,
        state.scores.loss,
        state.scores.hit,
        state.total,
        state.level,
        x.contiguous(),
        y,
        ptr,
        ids.contiguous(),
        packed.parameters,
        torch.stack([running.mean, running.target, running.floor]),
        torch.tensor([key, first_step], device=x.device),
        packed.gin,
        packed.depth,
        packed.width,
        packed.classes,
        packed.readout,
        steps,
        interval,
        edited,
        num_labels,
        *mix.thresholds(),
        energy.lam_k,
        energy.w_ce,
        energy.cap,
        temperature,
        0.0 if stop_k is None else stop_k,
        min_steps,
        proposals,
        mix.two_hop,
        mix.keep_degrees,
        limits.connected,
        limits.max_degree,
        None if weights is None else weights.weight,
        None if weights is None else weights.cumulative,
        None if weights is None else weights.layout.table,
        0 if weights is None else weights.layout.kind,
    )
    pairs, counts, label, sums, loss, hit, total, level, trace, progress = result
    taken, accepted = progress.tolist()
    after = SearchState(EdgeLists(pairs, counts), label, GraphScores(sums, loss, hit), total, level)
    return after, trace[:taken], taken, accepted
