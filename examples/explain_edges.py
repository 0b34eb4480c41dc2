"""Explain a graph classifier written with torch-geometric: which edges does it need?

    python examples/explain_edges.py

Needs the extra `pyg`. A classifier learns to tell house motifs from 5-cycles that hang on random trees. Its
layers take no edge weights; accelerated they do, so that one mask logit per edge can be learned by gradient
descent: keep the answer, keep few edges. The motif is the only part of a graph with cycles, so we know
which edges a good explanation ranks first.
"""

from __future__ import annotations

import torch
from torch_geometric.nn import GINConv, global_add_pool

import acgkd_fast as af
from acgkd_fast.data import house_or_cycle


class Classifier(torch.nn.Module):
    """Three GIN layers with BatchNorm; nothing here knows of masks or of this package."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(
            GINConv(torch.nn.Sequential(torch.nn.Linear(before, width), torch.nn.ReLU(), torch.nn.Linear(width, width)))
            for before in (1, width, width)
        )
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(width) for _ in self.convs)
        self.out = torch.nn.Linear(width, 2)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x, edge_index)))
        return self.out(global_add_pool(x, batch))


def train(model: Classifier, graphs: af.GraphBatch, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    edge_index, _ = graphs.to_edge_index()
    for _ in range(epochs):
        optimizer.zero_grad()
        logits = model(graphs.x, edge_index, graphs.batch())
        torch.nn.functional.cross_entropy(logits, graphs.y).backward()
        optimizer.step()


def explain(model: Classifier, graphs: af.GraphBatch, steps: int, price: float = 0.02) -> torch.Tensor:
    """Weights in (0, 1) of all edges: the model keeps its answers, at a price for every edge it may see."""
    edges = graphs.edges
    row, col = edges.row(), edges.col.long()
    # Both directions of an edge share one logit.
    pair = torch.minimum(row, col) * edges.num_nodes + torch.maximum(row, col)
    _, which = torch.unique(pair, return_inverse=True)
    mask = torch.full((int(which.max()) + 1,), 2.0, requires_grad=True)
    with torch.no_grad():
        answers = model(graphs.x, edges, graphs.batch()).argmax(1)
    optimizer = torch.optim.Adam([mask], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        weights = mask.sigmoid()
        logits = model(graphs.x, edges.with_value(weights[which], symmetric=True), graphs.batch())
        kept = torch.nn.functional.cross_entropy(logits, answers, reduction="sum")
        (kept + price * weights.sum()).backward()
        optimizer.step()
    return mask.detach().sigmoid()[which]


def in_cycles(edges: af.EdgeSample) -> torch.Tensor:
    """Which edges lie in the 2-core, the motif: what is left when leaves are plucked until there are none."""
    row, col = edges.row(), edges.col.long()
    there = torch.ones(edges.num_edges, dtype=torch.bool)
    while True:
        degree = torch.bincount(row[there], minlength=edges.num_nodes)
        fewer = there & (degree[row] > 1) & (degree[col] > 1)
        if torch.equal(fewer, there):
            return there
        there = fewer


def ranking(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Share of pairs (edge of the motif, other edge) in the right order; ties count half. Chance is 0.5."""
    difference = score[positive][:, None] - score[~positive][None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def main(num_graphs: int = 300, epochs: int = 150, explained: int = 40, steps: int = 150) -> dict[str, float]:
    torch.manual_seed(0)
    data = house_or_cycle(num_graphs)
    model = Classifier()
    train(model, data.graphs, epochs)
    af.accelerate(model).eval().requires_grad_(False)

    some = data.graphs.select(range(explained))
    with torch.no_grad():
        right = model(some.x, some.edges, some.batch()).argmax(1) == some.y
    weights = explain(model, some, steps)
    motif = in_cycles(some.edges)
    graph = some.batch()[some.edges.row()]
    scores = [ranking(weights[graph == g], motif[graph == g]) for g in range(explained)]
    return {"accuracy": float(right.double().mean()), "motif edges ranked": sum(scores) / len(scores)}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.3f}")
