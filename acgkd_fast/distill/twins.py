"""Graphs in which some nodes have twins: denser, and all the same to a teacher that normalises by degree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from ..errors import check, is_integer, is_number
from ..graphs import EdgeSample, GraphBatch
from .statistics import BatchNormProbe
from .student import Pool

# Moments that differ by less, as a share of the largest, differ by rounding.
_SAME = 1e-3


def twinned_pool(pool: Pool, share: float = 0.3, *, seed: int = 0) -> Pool:
    """The pool, and behind it once more with twins for some of its nodes, others in every epoch.

    A node's twin has its features and its neighbours and is joined to it; twins of neighbours are joined too. Where
    every node has one, a GCN layer computes for both what it computed for the one (self-loops included, all degrees
    and all sums are twice what they were), while a layer that sums over neighbours sees other numbers. So a GCN teacher
    cannot tell how dense its graphs were, and its student has to learn that it does not matter. With twins for some
    nodes that holds nearly. Each graph draws a probability of its own, uniform in [0, `share`), with which each of its
    nodes gets one. The pool as it is stays, since its density may be right; so an epoch has twice as many graphs. The
    teacher answers for the graphs as they have become (docs/research.md, sections 18 and 20).

    Args:
        pool: graphs without self-loops, or a function of the epoch that gives such graphs, on one device.
        share: the largest probability, in [0, 1].
        seed: of all draws, together with the epoch.

    Returns:
        A function of the epoch, which gives the graphs of `pool` and then, in the same order, those with twins; equal
        ones for equal pool, seed and epoch. With a share of 0 `pool` itself. Labels stay.

    Raises:
        InputError: an argument out of range, or self-loops; those of a function when an epoch is drawn.
    """
    check(is_number(share) and 0.0 <= share <= 1.0, "share", "a number in [0, 1]", share)
    check(is_integer(seed) and 0 <= seed < 2**40, "seed", "a number in 0..2^40-1", seed)
    if share == 0.0:
        return pool
    if isinstance(pool, GraphBatch):
        _check_loops("pool", pool)

    def draw(epoch: int) -> GraphBatch:
        graphs = pool(epoch) if callable(pool) else pool
        stream = _stream(seed, epoch)
        chance = share * torch.rand(graphs.num_graphs, generator=stream)
        hit = torch.rand(graphs.num_nodes, generator=stream) < chance[graphs.batch().cpu()]
        return GraphBatch.concatenate([graphs, with_twins(graphs, hit.to(graphs.x.device))])

    return draw


def _stream(seed: int, epoch: int) -> torch.Generator:
    # A generator takes 32 bits of its seed, which a perturbed pool of equal seed and epoch may have too: without a
    # digest the nodes that get twins would be those whose features were replaced.
    digest = hashlib.blake2b(f"twins {seed} {epoch}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _check_loops(name: str, graphs: GraphBatch) -> None:
    # A node with a loop and its twin would be joined twice.
    check(not graphs.edges.has_self_loops(), name, "no self-loops", "some")


def with_twins(graphs: GraphBatch, chosen: torch.Tensor) -> GraphBatch:
    """Graphs in which the chosen nodes have twins, each right after its node.

    Args:
        graphs: without self-loops. Edges keep their weights, those between twins have 1.
        chosen: bool [N].

    Raises:
        InputError: self-loops.
    """
    _check_loops("graphs", graphs)
    (row, col), value = graphs.to_edge_index()
    copies = 1 + chosen.long()
    first = copies.cumsum(0) - copies
    twins = first[chosen]
    parts = [torch.stack([twins, twins + 1]), torch.stack([twins + 1, twins])]
    values = [value.new_ones(len(twins))] * 2
    for of_row, of_col in ((0, 0), (1, 0), (0, 1), (1, 1)):
        both = (chosen[row] | (of_row == 0)) & (chosen[col] | (of_col == 0))
        parts.append(torch.stack([first[row[both]] + of_row, first[col[both]] + of_col]))
        values.append(value[both])
    ptr = torch.nn.functional.pad(copies.cumsum(0), (1, 0))[graphs.ptr]
    pairs = EdgeSample.from_edge_index(torch.cat(parts, 1), ptr, torch.cat(values), symmetric=graphs.edges.symmetric)
    return GraphBatch(graphs.x.repeat_interleave(copies, 0), pairs, graphs.y)


@torch.no_grad()
def tells_twins(module: nn.Module, call: Callable[[GraphBatch], torch.Tensor], graphs: GraphBatch) -> bool:
    """Whether a model's node features have other statistics, beyond rounding, when every node has a twin.

    Args:
        module: in eval mode. What enters its BatchNorm layers counts, what follows the last of them does not; without
            any the answer is yes.
        call: calls it with a batch.
        graphs: as of :func:`with_twins`.
    """
    everyone = torch.ones(graphs.num_nodes, dtype=torch.bool, device=graphs.x.device)
    found = []
    for batch in (graphs, with_twins(graphs, everyone)):
        with BatchNormProbe(module) as probe:
            call(batch)
        found.append([moment for layer in probe.inputs for moment in (layer.mean(0), layer.square().mean(0))])
    before, after = found
    return not before or any(
        bool((one - two).abs().max() > _SAME * one.abs().max()) for one, two in zip(before, after, strict=True)
    )
