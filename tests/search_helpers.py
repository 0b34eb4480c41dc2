"""Teachers and graphs for the tests of the search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from helpers import dense

from acgkd_fast import EdgeSample, GraphBatch, gin_propagate, readout
from acgkd_fast.distill.edge_lists import EdgeLists, unpack
from acgkd_fast.distill.starts import balanced_labels, random_features, random_graphs, random_trees
from acgkd_fast.nn.models import GraphClassifier, build_model
from acgkd_fast.teachers import Teacher, as_teacher

WIDTH = 4
SIZES = (6, 9, 1, 5, 2, 12, 7, 3)


class GraphNormTeacher(GraphClassifier):
    """A BatchNorm after the readout: one row per graph."""

    def __init__(self) -> None:
        super().__init__("gcn3-8", WIDTH, 2)
        self.norm = torch.nn.BatchNorm1d(8)

    def classify(self, h, ptr):
        return self.classifier(self.norm(readout(h, ptr, "mean")))


class PlainTeacher(torch.nn.Module):
    """No BatchNorm at all."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(WIDTH, 8), torch.nn.Linear(8, 2)

    def forward(self, x, edges):
        return self.second(readout(torch.relu(self.first(gin_propagate(x, edges))), edges.ptr))


def make_teacher(kind: str = "gcn3-8") -> Teacher:
    torch.manual_seed(0)
    if kind == "plain":
        return as_teacher(PlainTeacher())
    model = GraphNormTeacher() if kind == "graph-norm" else build_model(kind, WIDTH, 2)
    # Statistics of graphs unlike the start, so that there is something to reach.
    graphs = make_graphs(seed=50, sizes=[8, 12] * 20, degree=3.0)
    skewed = torch.nn.functional.one_hot((graphs.x.argmax(1) * 0.6).long(), WIDTH).float()
    for _ in range(40):
        model(skewed, graphs.edges)
    return as_teacher(model)


def make_graphs(
    seed: int = 0, sizes: Sequence[int] = SIZES, degree: float | None = None, kind: str = "one-hot"
) -> GraphBatch:
    edges = random_trees(sizes, seed=seed) if degree is None else random_graphs(sizes, degree, seed=seed)
    x = random_features(kind, WIDTH, edges.num_nodes, seed=seed, edges=edges)
    return GraphBatch(x, edges, balanced_labels(len(sizes), 2, seed))


def assert_simple(edges: EdgeSample, sizes: Sequence[int]) -> None:
    """Symmetric, no self-loop, no doubled edge, none between graphs, columns ascending."""
    adjacency = dense(edges)
    assert edges.ptr.tolist() == [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    assert ((adjacency == 0) | (adjacency == 1)).all()
    assert torch.equal(adjacency, adjacency.T) and (adjacency.diagonal() == 0).all()
    blocks = torch.block_diag(*[torch.ones(n, n) for n in sizes])
    assert (adjacency <= blocks).all()
    rowptr, col = edges.rowptr.tolist(), edges.col.tolist()
    for row in range(edges.num_nodes):
        assert col[rowptr[row] : rowptr[row + 1]] == sorted(set(col[rowptr[row] : rowptr[row + 1]]))


def listed(lists: EdgeLists, graph: int) -> list[tuple[int, int]]:
    low, high = unpack(lists.pairs[graph, : int(lists.counts[graph])])
    return list(zip(low.tolist(), high.tolist(), strict=True))


def edge_sets(lists: EdgeLists) -> torch.Tensor:
    """Each graph's edges as a bit mask over pair numbers, int64 [B]; a plain sum, so doubled edges would show."""
    low, high = unpack(lists.pairs)
    return torch.where(lists.used(), 1 << (high * (high - 1) // 2 + low), 0).sum(1)
