"""A pool of graphs on the device: no files, no worker processes."""

from __future__ import annotations

from typing import Any

import torch

from .errors import InputError, check, check_tensor
from .graphs import GraphBatch
from .philox import Stream, graph_uniforms


class GraphPool:
    """Graphs that a synthesizer has made, oldest first.

    Args:
        capacity: graphs kept; the oldest leave. None keeps all.
        seed: of the order in which graphs are drawn; call t draws with step t.

    Attributes:
        calls: samples drawn so far; set it to resume.
    """

    def __init__(self, capacity: int | None = None, *, seed: int = 0) -> None:
        check(capacity is None or capacity >= 1, "capacity", "None or at least 1", capacity)
        self.capacity = capacity
        self.seed = seed
        self.calls = 0
        self._parts: list[GraphBatch] = []

    def __len__(self) -> int:
        return sum(part.num_graphs for part in self._parts)

    @property
    def graphs(self) -> GraphBatch:
        """All graphs as one batch.

        Raises:
            InputError: the pool is empty.
        """
        check(len(self._parts) > 0, "data_pool", "at least one graph (synthesize or add some first)", len(self))
        if len(self._parts) > 1:
            self._parts = [GraphBatch.concatenate(self._parts)]
        return self._parts[0]

    def add(self, graphs: GraphBatch, targets: torch.Tensor | None = None) -> None:
        """Take graphs in, without gradients and without entries of value 0.

        Args:
            graphs: on the device where the pool is to be.
            targets: int64 [B], labels in place of those of the graphs.

        Raises:
            InputError: labels on some graphs of the pool but not on all, or features of another width.
        """
        check(isinstance(graphs, GraphBatch), "graphs", "a GraphBatch", graphs)
        y = graphs.y if targets is None else targets
        if targets is not None:
            check_tensor("targets", targets, shape=(graphs.num_graphs,), dtypes=(torch.int64,), device=graphs.x.device)
        if self._parts:
            first = self._parts[0]
            check((first.y is None) == (y is None), "targets", "labels on all graphs of the pool or on none", y)
            check(first.x.shape[1] == graphs.x.shape[1], "graphs", f"features of width {first.x.shape[1]}", graphs.x)
        self._parts.append(GraphBatch(graphs.x.detach(), graphs.edges.drop_zeros(), y))
        excess = 0 if self.capacity is None else len(self) - self.capacity
        if excess > 0:
            everything = self.graphs
            kept = torch.arange(excess, everything.num_graphs, device=everything.x.device)
            self._parts = [everything.select(kept)]

    def sample(self, n: int | None = None, *, balance: bool = False) -> GraphBatch:
        """Graphs in random order, none twice before all have come.

        Args:
            n: how many; default all.
            balance: all classes equally often, as long as the pool has graphs of them.

        Raises:
            InputError: an empty pool, or `balance` without labels.
        """
        graphs = self.graphs
        n = graphs.num_graphs if n is None else n
        check(n >= 1, "n", "at least 1", n)
        rounds = [self._order(graphs, balance) for _ in range(-(-n // graphs.num_graphs))]
        return graphs.select(torch.cat(rounds)[:n])

    def _order(self, graphs: GraphBatch, balance: bool) -> torch.Tensor:
        ids = torch.arange(graphs.num_graphs, device=graphs.x.device)
        step = torch.tensor(self.calls, device=ids.device)
        self.calls += 1
        order = torch.argsort(graph_uniforms(ids, step, 1, stream=Stream.SHUFFLE, seed=self.seed).squeeze(-1))
        if not balance:
            return order
        if graphs.y is None:
            raise InputError("balance: expected labels on the graphs of the pool, got none")
        # The first of every class, then the second of every class, and so on.
        y = graphs.y[order]
        seen = torch.nn.functional.one_hot(y).cumsum(0).gather(1, y[:, None]).squeeze(1)
        return order[torch.argsort(seen, stable=True)]

    def get_dataset(self, transform: Any = None, labeled: bool = True) -> Any:
        """The pool as a PyTorch Geometric data set, for loops that want a DataLoader.

        Raises:
            ImportError: torch-geometric is not installed.
        """
        from .formats.pyg import PseudoGraphDataset

        graphs = self.graphs
        return PseudoGraphDataset(graphs if labeled else GraphBatch(graphs.x, graphs.edges), transform)

    def clear(self) -> None:
        self._parts = []
