"""Learn the graph along with a node classifier: half of the edges that we were given are noise.

    python examples/learn_structure.py

Every pair of nodes carries a logit, `sample_edges` draws a graph from them at each step, and two GCN layers
classify the nodes on it. The weights learn from one half of the labelled nodes, the logits from the other
half, whose loss on the drawn graph is back-propagated through the edges (straight-through, absent pairs too).
Two levels as in LDS (Franceschi et al., arXiv 1903.11960), with one gradient step each instead of unrolling.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

import acgkd_fast as af
from acgkd_fast.nn import GCNConv


class NodeClassifier(torch.nn.Module):
    def __init__(self, features: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = GCNConv(features, width), GCNConv(width, classes)

    def forward(self, x: torch.Tensor, edges: af.EdgeSample) -> torch.Tensor:
        return self.second(torch.relu(self.first(x, edges)), edges)


def make_task(num_nodes: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weak features [N, 8], classes [N], and 0/1 of all pairs [P]: edges inside classes, and as many anywhere."""
    y = torch.arange(num_nodes) % classes
    x = 0.6 * torch.nn.functional.one_hot(y, 8) + torch.randn(num_nodes, 8) * 0.5
    row, col = torch.tril_indices(num_nodes, num_nodes, offset=-1)
    inside = y[row] == y[col]
    true = inside & (torch.rand(len(row)) < 4.0 / (num_nodes / classes))
    noise = torch.rand(len(row)) < true.double().mean()
    return x, y, (true | noise).float()


def homophily(edges: af.EdgeSample, y: torch.Tensor) -> float:
    """Share of the edges that join nodes of one class."""
    return float((y[edges.row()] == y[edges.col[: edges.num_edges].long()]).double().mean())


def main(num_nodes: int = 150, steps: int = 300, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    x, y, given = make_task(num_nodes)
    layout = af.PairLayout.complete([num_nodes])
    parts = torch.randperm(num_nodes).split(num_nodes // 5)
    inner, outer, test = parts[0], parts[1], torch.cat(parts[2:])

    def evaluate(model: NodeClassifier, samples: list[af.EdgeSample]) -> float:
        with torch.no_grad():
            votes = sum(model(x, edges).softmax(1) for edges in samples)
        assert isinstance(votes, torch.Tensor)
        return float((votes.argmax(1) == y)[test].double().mean())

    # What the given graph is worth: all labels for the weights, the edges as they are.
    fixed = af.sample_edges(200.0 * given - 100.0, layout, seed=0)
    model = NodeClassifier(x.shape[1], 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=5e-3)
    labelled = torch.cat([inner, outer])
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x, fixed)[labelled], y[labelled]).backward()
        optimizer.step()
    before = evaluate(model, [fixed])

    # Logits that start at what was given: edges likely, the other pairs rare but possible.
    logits = torch.nn.Parameter(given * 5.0 - 4.0 - 1.0 * (1 - given))
    model = NodeClassifier(x.shape[1], 3)
    weights_optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=5e-3)
    edge_optimizer = torch.optim.Adam([logits], lr=0.1)
    for step in range(steps):
        edges = af.sample_edges(logits, layout, seed=seed, step=step, estimator="straight_through")
        weights_optimizer.zero_grad()
        cross_entropy(model(x, edges)[inner], y[inner]).backward(inputs=list(model.parameters()))
        weights_optimizer.step()
        if step >= steps // 4:
            edges = af.sample_edges(logits, layout, seed=seed + 1, step=step, estimator="straight_through")
            edge_optimizer.zero_grad()
            cross_entropy(model(x, edges)[outer], y[outer]).backward(inputs=[logits])
            edge_optimizer.step()
    with torch.no_grad():
        drawn = [af.sample_edges(logits, layout, seed=seed + 2, step=step) for step in range(16)]
    return {
        "accuracy, given graph": before,
        "accuracy, learned graph": evaluate(model, drawn),
        "edges inside classes, given": homophily(fixed, y),
        "edges inside classes, learned": sum(homophily(edges, y) for edges in drawn) / len(drawn),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.3f}")
