"""A pool whose graphs look a little different in every epoch, so that a student cannot learn them by heart."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import check, is_integer, is_number
from ..graphs import EdgeSample, GraphBatch
from .edge_lists import EdgeLists, pack, unpack


def perturbed_pool(
    graphs: GraphBatch, share: float = 0.2, *, seed: int = 0
) -> GraphBatch | Callable[[int], GraphBatch]:
    """The pool with some of its edges and node features changed anew in every epoch.

    Each graph draws a probability of its own, uniform in [0, `share`), so that in every epoch some graphs are nearly as
    they were. Each undirected edge is hit with its graph's: one of its ends, either with equal chance, moves to a node
    of its graph drawn at random, unless that is a self-loop or an edge of the pool. Each node is hit with the same
    probability and gets the features of a node drawn from the whole pool. The teacher answers for the graphs as they
    have become, and students that know their pool by heart learn more (docs/research.md, section 13).

    Args:
        graphs: simple undirected graphs of weight 1, as the search leaves them; their labels are not kept.
        share: the largest probability, in [0, 1).
        seed: of all draws, together with the epoch.

    Returns:
        A function of the epoch, which gives equal graphs for equal seed and epoch; with a share of 0 `graphs` itself.

    Raises:
        InputError: an argument out of range, or graphs that are not simple and undirected with edges of weight 1.
    """
    check(is_number(share) and 0.0 <= share < 1.0, "share", "a number in [0, 1)", share)
    check(is_integer(seed) and 0 <= seed < 2**40, "seed", "a number in 0..2^40-1", seed)
    if share == 0.0:
        return graphs
    EdgeLists.from_edges(graphs.edges)
    row, col = graphs.edges.row(), graphs.edges.col[: graphs.edges.num_edges].long()
    # A mirror image stands for each edge, so that both directions move together.
    ends = torch.stack([row, col])[:, row < col].cpu()
    ptr, graph = graphs.ptr.cpu(), graphs.batch().cpu()

    def draw(epoch: int) -> GraphBatch:
        # The order of mini-batches comes from the same numbers, which make other things of them there.
        stream = torch.Generator().manual_seed((seed << 20) + epoch)
        chance = share * torch.rand(graphs.num_graphs, generator=stream)
        x = _with_new_features(graphs.x, chance[graph], stream)
        both = _with_new_ends(ends, ptr, graph[ends[0]], chance, stream).to(x.device)
        ones = x.new_ones(both.shape[1])
        return GraphBatch(x, EdgeSample.from_edge_index(both, graphs.ptr, ones, symmetric=True))

    return draw


def _with_new_features(x: torch.Tensor, chance: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
    """x [N, F] with the row of another node where hit, with the probabilities [N]."""
    hit = torch.rand(len(x), generator=stream) < chance
    source = torch.randint(len(x), (len(x),), generator=stream) if len(x) else torch.zeros(0, dtype=torch.int64)
    return x[torch.where(hit, source, torch.arange(len(x))).to(x.device)]


def _with_new_ends(
    ends: torch.Tensor, ptr: torch.Tensor, graph: torch.Tensor, chance: torch.Tensor, stream: torch.Generator
) -> torch.Tensor:
    """Both directions of the edges [2, 2 E] after the hits on `ends` [2, E] of the graphs [E], whose probabilities
    are [B]."""
    count = ends.shape[1]
    hit = torch.rand(count, generator=stream) < chance[graph]
    moved = torch.randint(2, (count,), generator=stream)
    span = ptr[graph + 1] - ptr[graph]
    partner = ptr[graph] + (torch.rand(count, generator=stream, dtype=torch.float64) * span).long()
    stays = ends.gather(0, (1 - moved)[None])[0]
    pair, earlier = pack(torch.minimum(stays, partner), torch.maximum(stays, partner)), pack(*ends)
    hit &= (partner != stays) & ~torch.isin(pair, earlier)
    # Two edges that land on one pair are one edge afterwards.
    low, high = unpack(torch.where(hit, pair, earlier).unique())
    return torch.stack([torch.cat([low, high]), torch.cat([high, low])])
