"""The search operator in plain torch: the oracle of its kernels. Whole forward passes, no incremental state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..distill.edge_lists import EdgeLists
from ..distill.energy import Energy, GraphScores
from ..distill.moves import (
    LANES,
    Lane,
    Limits,
    MoveMix,
    best_candidates,
    log_proposal_ratio,
    proposal_uniforms,
    propose,
)
from ..distill.proposal_weights import EdgeProposals
from ..distill.statistics import RunningGaussians, graph_moment_sums
from ..edge_sample import EdgeSample
from ..graphs import _concatenated_ranges
from ..layout import PairLayout
from ..propagate import gcn_propagate, gin_propagate, readout
from .packing import PackedTeacher

# As in distill/refiner.py.
_CHECK_EVERY = 10


def forward(packed: PackedTeacher, x: torch.Tensor, edges: EdgeSample) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [B, classes], and the inputs of every BatchNorm."""
    take = _reader(packed.parameters)
    norms: list[torch.Tensor] = []

    def activated(before: torch.Tensor) -> torch.Tensor:
        norms.append(before)
        scale, shift = take(packed.width), take(packed.width)
        return torch.relu(before * scale + shift)

    h, inputs = x, packed.features
    for number in range(packed.depth):
        weight, bias = take(inputs, packed.width), take(packed.width)
        if packed.gin:
            a = gin_propagate(h, edges, eps=take(1) - 1.0) @ weight + bias
            hidden = activated(a)
            a = hidden @ take(packed.width, packed.width) + take(packed.width)
        else:
            a = gcn_propagate(h @ weight, edges) + bias
        out = activated(a)
        h, inputs = (out + h if number else out), packed.width
    pooled = readout(h, edges.ptr, ("sum", "mean", "max")[packed.readout])
    weight = take(packed.classes, packed.width)
    return pooled @ weight.T + take(packed.classes), norms


def _reader(parameters: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Takes tensors of given shapes off the front of a flat one."""
    position = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        start, position = position, position + math.prod(shape)
        return parameters[start:position].view(shape)

    return take


@dataclass(frozen=True)
class _Thresholds(MoveMix):
    add: float = 0.0

    def thresholds(self) -> tuple[float, float, float]:
        return self.relabel, self.rewire, self.add


def search_steps(
    pairs: torch.Tensor,
    counts: torch.Tensor,
    label: torch.Tensor,
    sums: torch.Tensor,
    loss: torch.Tensor,
    hit: torch.Tensor,
    total: torch.Tensor,
    level: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    ptr: torch.Tensor,
    ids: torch.Tensor,
    parameters: torch.Tensor,
    running: torch.Tensor,
    rng: torch.Tensor,
    gin: bool,
    depth: int,
    width: int,
    classes: int,
    readout_mode: int,
    steps: int,
    interval: int,
    edited: int,
    num_labels: int,
    below_relabel: float,
    below_rewire: float,
    below_add: float,
    lam_k: float,
    w_ce: float,
    cap: float,
    temperature: float,
    stop_k: float,
    min_steps: int,
    proposals: int,
    two_hop: float,
    keep_degrees: bool,
    connected: bool,
    max_degree: int,
    weight: torch.Tensor | None,
    cumulative: torch.Tensor | None,
    table: torch.Tensor | None,
    kind: int,
) -> tuple[torch.Tensor, ...]:
    """See :func:`acgkd_fast.search.search_steps`; rounds of `interval` steps share one slope of K."""
    packed = PackedTeacher(parameters, gin, depth, x.shape[1], width, classes, readout_mode)
    rows = torch.full((packed.channels,), float(x.shape[0]), dtype=torch.float64, device=x.device)
    energy = Energy(lam_k, w_ce, cap, y.numel(), rows, RunningGaussians(*running.unbind()))
    mix = _Thresholds(below_relabel, below_rewire, two_hop, keep_degrees, below_add)
    limits, weights = Limits(connected, max_degree), None
    if weight is not None and cumulative is not None and table is not None:
        weights = EdgeProposals(PairLayout.from_table(table, kind), weight, cumulative)
    lists, label = EdgeLists(pairs.clone(), counts.clone()), label.clone()
    scores = GraphScores(sums.clone(), loss.clone(), hit.clone())
    sizes, labelled = ptr[1:] - ptr[:-1], num_labels > 1
    seed, first = rng.tolist()
    u = proposal_uniforms(ids, first, steps, seed, proposals)
    trace = torch.full((steps,), torch.nan, dtype=torch.float64, device=x.device)
    excess, value = level.unbind()
    step, accepted = first, 0

    def scored(graphs: torch.Tensor, trial: EdgeLists, node: torch.Tensor, new_label: torch.Tensor) -> GraphScores:
        nodes, graph_ptr = _concatenated_ranges(ptr, graphs)
        labels = label[nodes].index_put((graph_ptr[:-1] + node - ptr[:-1][graphs],), new_label)
        features = torch.nn.functional.one_hot(labels, num_labels).to(x.dtype) if labelled else x[nodes]
        logits, norms = forward(packed, features, trial.to_edges(graph_ptr, nodes.numel()))
        losses = torch.nn.functional.cross_entropy(logits, y[graphs], reduction="none").double()
        return GraphScores(graph_moment_sums(norms, graph_ptr, nodes.numel()), losses, logits.argmax(1) == y[graphs])

    while step < first + steps:
        stop = min(first + steps, (step // interval + 1) * interval)
        if stop_k > 0:
            stop = min(stop, (step // _CHECK_EVERY + 1) * _CHECK_EVERY)
        start = lists.clone(), label.clone(), GraphScores(scores.sums.clone(), scores.loss.clone(), scores.hit.clone())
        delta, passed = torch.zeros_like(loss), torch.zeros_like(counts)
        for number in range(step - first, stop - first):
            graphs = u[number, :, Lane.CHOICE].argsort(stable=True)[:edited].sort()[0]
            tried = graphs.repeat_interleave(proposals)
            draws, before = u[number, graphs].view(-1, LANES), lists.select(tried)
            edits = propose(before, sizes[tried], draws, mix, num_labels, limits=limits, weights=weights, graphs=tried)
            node = ptr[:-1][tried] + edits.node
            new_label = (label[node] + edits.shift) % max(num_labels, 1)
            new = scored(tried, before.edited(edits), node, new_label)
            old = scores.select(tried)
            gain = energy.first_order(total, new.sums - old.sums, energy.excess(new.loss) - energy.excess(old.loss))
            best = best_candidates(gain, edits.valid, proposals)
            before, edits, old, new = before.select(best), edits.select(best), old.select(best), new.select(best)
            node, new_label, gain = node[best], new_label[best], gain[best]
            allowed = torch.zeros_like(gain)
            if temperature > 0.0:
                ratio = log_proposal_ratio(edits, before, sizes[graphs], mix, weights, graphs)
                allowed = (ratio - draws[::proposals, Lane.ACCEPT].log()) * (temperature / y.numel())
            keep = edits.valid & (gain < allowed)
            scores.put(graphs, new.where(keep, old))
            lists.put(graphs, before, edits, keep)
            label[node] = torch.where(keep, new_label, label[node])
            delta[graphs] += torch.where(keep, gain, 0.0)
            passed[graphs] += keep
        kept, order = passed > 0, None
        earlier = value
        while bool(kept.any()):
            new_total = total + torch.where(kept[:, None, None], scores.sums - start[2].sums, 0.0).sum(0)
            gains = energy.excess(scores.loss) - energy.excess(start[2].loss)
            new_excess = excess + torch.where(kept, gains, 0.0).sum()
            new_value = energy.value(new_total, new_excess)
            if temperature > 0.0 or bool(new_value <= value):
                total, excess, value = new_total, new_excess, new_value
                break
            if order is None:
                order = torch.where(kept, delta, torch.inf).argsort(stable=True)
            kept = torch.zeros_like(kept).index_fill_(0, order[: int(kept.sum()) // 2], True)
        scores = scores.where(kept, start[2])
        lists.pairs = torch.where(kept[:, None], lists.pairs, start[0].pairs)
        lists.counts = torch.where(kept, lists.counts, start[0].counts)
        label = torch.where(kept.repeat_interleave(sizes), label, start[1])
        accepted += int(passed[kept].sum())
        trace[step - first : stop - first] = earlier
        trace[stop - first - 1] = value
        step = stop
        if stop_k > 0 and step >= min_steps and step % _CHECK_EVERY == 0 and bool(energy.k(total) < stop_k):
            break
    progress = torch.tensor([step - first, accepted], device=counts.device)
    final = (lists.pairs, lists.counts, label, scores.sums, scores.loss, scores.hit, total.clone())
    return *final, torch.stack([excess, value]), trace, progress
