"""Which node pairs of which graph carry a logit, in closed form.

No index tensor is stored: pair number and node pair are computed from one another. Batches are
ragged; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from . import philox
from .errors import InputError, check, is_integer, is_number

# A counter word holds pair // 4 in 32 bits.
_MAX_PAIRS_PER_GRAPH = 2**34
_MAX_NODES = 2**31 - 1


def _triangle(n: torch.Tensor) -> torch.Tensor:
    return n * (n - 1) // 2


@dataclass(frozen=True, eq=False)
class PairLayout:
    """Candidate node pairs of a batch of B graphs with sizes n_1..n_B.

    Build one with :meth:`complete` or :meth:`budget`. Pairs are numbered graph by graph; inside a
    graph the undirected pair {i < j} has number

    - complete: ``j * (j - 1) / 2 + i`` (independent of n, so that a grown graph keeps its draws);
    - budget: ``(d - 1) * n + i`` where ``j = (i + d) mod n`` and ``1 <= d <= band``: every node
      keeps its ``2 * band`` nearest partners on a ring, about xi * (n - 1) of them.

    A directed layout numbers the ordered pair (row, col) as twice the undirected number, plus one
    where row > col. A row receives messages from its columns.

    Attributes:
        sizes: nodes of each graph, a tuple of B ints.
        xi: the spatial complexity parameter in (0, 1]; 1 keeps all pairs.
        directed: whether (i, j) and (j, i) carry separate logits.
        graph_ids: identity of each graph in the random stream; draws follow it, not the position
            in the batch.
        table: int64 [4, B + 1] on the layout's device: node offsets, pair offsets, graph ids and
            band widths (the last column of the latter two is unused).
        pairs_per_graph: candidate pairs of each graph, a tuple of B ints. Kept on the host, so that
            a shape never waits for the device.
    """

    sizes: tuple[int, ...]
    xi: float
    directed: bool
    graph_ids: tuple[int, ...]
    is_complete: bool
    table: torch.Tensor = field(repr=False)
    pairs_per_graph: tuple[int, ...] = field(repr=False)

    @classmethod
    def complete(
        cls,
        sizes: Sequence[int],
        *,
        directed: bool = False,
        graph_ids: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> PairLayout:
        """All pairs i < j of every graph (ordered pairs i != j if `directed`).

        Args:
            sizes: number of nodes of each graph, each at least 1.
            directed: give (i, j) and (j, i) a logit each, as GFKD does.
            graph_ids: distinct ids in 0..2^32-1 that address the noise; default 0..B-1.
            device: where `table` lives.

        Raises:
            InputError: a size below 1, too many nodes or pairs, or bad graph ids.
        """
        return cls._build(sizes, 1.0, directed, graph_ids, device, is_complete=True)

    @classmethod
    def budget(
        cls,
        sizes: Sequence[int],
        xi: float,
        *,
        directed: bool = False,
        graph_ids: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> PairLayout:
        """About xi * (n - 1) partners per node, so that memory and time are O(xi n^2).

        Partners are the nearest on a ring of the node numbers. Every ring, tree of small
        bandwidth and local motif can be expressed; a hub that is joined to more than
        2 * band nodes cannot. This is one reading of ACGKD's spatial complexity parameter
        (arXiv 2504.00540), whose formula is not public.

        Args:
            sizes: as in :meth:`complete`.
            xi: share of the partners that each node keeps, in (0, 1]; at least one partner on
                either side is kept.
            directed, graph_ids, device: as in :meth:`complete`.

        Raises:
            InputError: xi outside (0, 1], or as in :meth:`complete`.
        """
        check(is_number(xi) and 0.0 < xi <= 1.0, "xi", "a number in (0, 1]", xi)
        return cls._build(sizes, float(xi), directed, graph_ids, device, is_complete=False)

    @classmethod
    def _build(
        cls,
        sizes: Sequence[int],
        xi: float,
        directed: bool,
        graph_ids: Sequence[int] | None,
        device: torch.device | str,
        *,
        is_complete: bool,
    ) -> PairLayout:
        sizes = _as_ints("sizes", sizes)
        small = [n for n in sizes if n < 1]
        if small:
            raise InputError(f"sizes: expected at least 1 node in every graph, got a graph of {small[0]}")
        check(sum(sizes) <= _MAX_NODES, "sizes", f"at most {_MAX_NODES} nodes in all", sum(sizes))
        ids = tuple(range(len(sizes))) if graph_ids is None else _as_ints("graph_ids", graph_ids)
        check(len(ids) == len(sizes), "graph_ids", f"{len(sizes)} ids, one per graph", ids)
        check(len(set(ids)) == len(ids), "graph_ids", "distinct ids", ids)
        check(all(0 <= g < 2**32 for g in ids), "graph_ids", "ids in 0..2^32-1", ids)

        n = torch.tensor(sizes, dtype=torch.int64)
        # round() would send xi (n - 1) / 2 = 0.5 to 0; floor(x + 1/2) keeps ties upward.
        band = torch.floor(xi * (n - 1).double() / 2 + 0.5).long().clamp_(min=1)
        band = torch.minimum(band, n // 2)
        if is_complete or xi == 1.0:
            band = n // 2
        per_graph = _triangle(n) if is_complete else torch.minimum(n * band, _triangle(n))
        if directed:
            per_graph = 2 * per_graph
        largest = int(per_graph.max()) if len(sizes) else 0
        check(largest <= _MAX_PAIRS_PER_GRAPH, "sizes", "at most 2^34 candidate pairs per graph", largest)

        table = torch.zeros(4, len(sizes) + 1, dtype=torch.int64)
        table[0, 1:] = n.cumsum(0)
        table[1, 1:] = per_graph.cumsum(0)
        if len(sizes):
            table[2, :-1] = torch.tensor(ids, dtype=torch.int64)
            table[3, :-1] = band
        return cls(sizes, xi, directed, ids, is_complete, table.to(device), tuple(per_graph.tolist()))

    @classmethod
    def from_table(cls, table: torch.Tensor, kind: int) -> PairLayout:
        """Rebuild a layout from what the ops receive. Reads `table` on the host."""
        node_ptr = table[0].tolist()
        sizes = tuple(b - a for a, b in pairwise(node_ptr))
        ids = tuple(table[2, :-1].tolist())
        pairs = tuple((table[1, 1:] - table[1, :-1]).tolist())
        directed, complete_pairs = bool(kind & 2), sum(n * (n - 1) // 2 for n in sizes)
        xi = sum(pairs) / ((2 if directed else 1) * complete_pairs) if complete_pairs else 1.0
        return cls(sizes, xi, directed, ids, not kind & 1, table, pairs)

    @property
    def num_graphs(self) -> int:
        return len(self.sizes)

    @property
    def num_nodes(self) -> int:
        return sum(self.sizes)

    @property
    def num_pairs(self) -> int:
        """Candidate pairs of the whole batch: the length of the logits."""
        return sum(self.pairs_per_graph)

    @property
    def kind(self) -> int:
        """Integer that the ops take: bit 0 = budget, bit 1 = directed."""
        return (0 if self.is_complete else 1) | (2 if self.directed else 0)

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def node_ptr(self) -> torch.Tensor:
        """int64 [B + 1]: graph g owns nodes node_ptr[g] .. node_ptr[g + 1] - 1."""
        return self.table[0]

    @property
    def pair_ptr(self) -> torch.Tensor:
        """int64 [B + 1]: graph g owns pairs pair_ptr[g] .. pair_ptr[g + 1] - 1."""
        return self.table[1]

    def to(self, device: torch.device | str) -> PairLayout:
        """The same layout with `table` on another device."""
        if torch.device(device) == self.device:
            return self
        return replace(self, table=self.table.to(device))

    def select(self, graphs: Sequence[int]) -> PairLayout:
        """The layout of some of the graphs, in the order given; draws stay what they were."""
        chosen = _as_ints("graphs", graphs)
        check(all(0 <= g < self.num_graphs for g in chosen), "graphs", f"positions in 0..{self.num_graphs - 1}", chosen)
        return PairLayout._build(
            [self.sizes[g] for g in chosen],
            self.xi,
            self.directed,
            [self.graph_ids[g] for g in chosen],
            self.device,
            is_complete=self.is_complete,
        )

    def graph_of_node(self) -> torch.Tensor:
        """int64 [N]: the position in the batch of each node's graph."""
        ptr = self.node_ptr
        graphs = torch.arange(self.num_graphs, device=self.device)
        return graphs.repeat_interleave(ptr[1:] - ptr[:-1], output_size=self.num_nodes)

    def graph_of_pair(self, pair: torch.Tensor) -> torch.Tensor:
        """int64: the position in the batch of the graph that owns each pair number."""
        return torch.searchsorted(self.pair_ptr, pair.contiguous(), right=True) - 1

    def pair_nodes(self, pair: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Node pair of each pair number, as node numbers of the whole batch.

        Args:
            pair: int64 pair numbers, any shape; default all of them.

        Returns:
            (row, col), int64 of the same shape. Undirected pairs come with row < col.
        """
        if pair is None:
            pair = torch.arange(self.num_pairs, device=self.device)
        graph = self.graph_of_pair(pair)
        local = pair - self.pair_ptr[graph]
        lower_first = torch.ones_like(local, dtype=torch.bool)
        if self.directed:
            lower_first = local % 2 == 0
            local = local // 2
        if self.is_complete:
            low, high = _complete_pair(local)
        else:
            n = self.node_ptr[graph + 1] - self.node_ptr[graph]
            start = local % n
            end = (start + local // n + 1) % n
            low, high = torch.minimum(start, end), torch.maximum(start, end)
        first = self.node_ptr[graph]
        low, high = low + first, high + first
        return torch.where(lower_first, low, high), torch.where(lower_first, high, low)

    def pair_index(self, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        """Pair number of each node pair; -1 where the layout holds no such candidate.

        Args:
            row, col: int64 node numbers of the whole batch, same shape.
        """
        graph = torch.searchsorted(self.node_ptr, row.contiguous(), right=True) - 1
        first = self.node_ptr[graph]
        n = self.node_ptr[graph + 1] - first
        low = torch.minimum(row, col) - first
        high = torch.maximum(row, col) - first
        # Either end may lie in another graph than `row`, before or behind it.
        valid = (row != col) & (low >= 0) & (high < n)
        if self.is_complete:
            local = high * (high - 1) // 2 + low
        else:
            ahead = high - low
            around = n - ahead
            # At distance n / 2 both directions name the pair; the lower node starts it.
            forward = ahead <= around
            distance = torch.where(forward, ahead, around)
            local = (distance - 1) * n + torch.where(forward, low, high)
            valid &= distance <= self.table[3][graph]
        if self.directed:
            local = 2 * local + (row > col).long()
        return torch.where(valid, local + self.pair_ptr[graph], -1)

    def uniforms(
        self,
        *,
        seed: int | torch.Tensor,
        step: int | torch.Tensor = 0,
        stream: philox.Stream = philox.Stream.EDGE,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """The uniform of every candidate pair, [P], from the package's random stream.

        Plain torch; the fused kernels draw the same numbers without storing them.
        """
        pair = torch.arange(self.num_pairs, device=self.device)
        graph = self.graph_of_pair(pair)
        local = pair - self.pair_ptr[graph]
        step_word = torch.as_tensor(step, device=self.device, dtype=torch.int64) & 0xFFFFFFFF
        counter = torch.stack(
            [local // 4, self.table[2][graph], step_word.expand_as(local), torch.full_like(local, int(stream))], dim=-1
        )
        words = philox.words_torch(counter, seed).gather(-1, (local % 4).unsqueeze(-1)).squeeze(-1)
        return philox.uniform_from_words(words, dtype)


def _complete_pair(local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert high * (high - 1) / 2 + low.

    Exact for local < 2^34: 1 + 8 local has less than 38 bits, its root is whole at the first pair of a
    triangle row, and at the pair before it at least 2^-17 below that, far more than float64 rounds away.
    """
    high = ((1.0 + torch.sqrt(1.0 + 8.0 * local.double())) / 2.0).long()
    return local - high * (high - 1) // 2, high


def _as_ints(name: str, values: Sequence[int] | torch.Tensor) -> tuple[int, ...]:
    listed = values.tolist() if isinstance(values, torch.Tensor) else values
    check(isinstance(listed, Iterable), name, "a sequence of integers", values)
    integers = tuple(listed)
    for value in integers:
        check(is_integer(value), name, "integers", value)
    return tuple(int(value) for value in integers)
