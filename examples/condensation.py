"""Graph condensation by gradient matching (DosCond's loop) with this package's edge sampler.

    python examples/condensation.py

Here the data are at hand: 200 graphs, sparse ones and denser ones, become ten whose edges are Binary Concrete
variables. The score is that of a model trained on the ten, before (their logits tell nothing of the class) and after;
mean of five draws each.
"""

from __future__ import annotations

import torch

import acgkd_fast as af
from acgkd_fast.distill.starts import random_graphs, sample_sizes
from acgkd_fast.hosts.doscond import DiscreteGraphs
from acgkd_fast.teachers import evaluate, train_classifier

DEGREES = (3.0, 5.0)
NODES = 24


class DenseGIN(torch.nn.Module):
    """Two layers on padded graphs [G, n, n] and a mean readout, in plain torch: double backward goes through it."""

    def __init__(self, features: int = 1, width: int = 16, classes: int = 2) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(features, width), torch.nn.Linear(width, width)])
        self.out = torch.nn.Linear(width, classes)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x + adjacency @ x))
        return self.out((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def make_data(num_graphs: int, seed: int) -> af.GraphBatch:
    """Random graphs of two mean degrees; every node has the one feature 1."""
    sizes = sample_sizes((20, 28), num_graphs, seed)
    parts = [random_graphs(sizes, degree, seed + c) for c, degree in enumerate(DEGREES)]
    return af.GraphBatch.concatenate(
        [
            af.GraphBatch(torch.ones(e.num_nodes, 1), e, torch.full((num_graphs,), c, dtype=torch.int64))
            for c, e in enumerate(parts)
        ]
    )


def gradients(model: DenseGIN, graphs: tuple[torch.Tensor, ...], y: torch.Tensor, keep: bool) -> list[torch.Tensor]:
    loss = torch.nn.functional.cross_entropy(model(*graphs), y)
    return list(torch.autograd.grad(loss, list(model.parameters()), create_graph=keep))


def main(num_graphs: int = 100, per_class: int = 5, steps: int = 150, epochs: int = 100) -> dict[str, float]:
    torch.manual_seed(0)
    seen, held_out = make_data(num_graphs, seed=0), make_data(100, seed=7)
    assert seen.y is not None
    real = seen.to_dense()
    y = torch.arange(2).repeat_interleave(per_class)
    x, mask = torch.ones(len(y), NODES, 1), torch.ones(len(y), NODES, dtype=torch.bool)
    logits = torch.full((len(y), NODES, NODES), 4.0 / NODES).logit() + 0.1 * torch.randn(len(y), NODES, NODES)
    logits.requires_grad_()
    sampler = DiscreteGraphs(seed=0)

    def score(graphs: af.GraphBatch, epochs: int) -> float:
        return evaluate(train_classifier("gin3-16", graphs, epochs=epochs), held_out)["accuracy"]

    def mean_score() -> float:
        """Of five draws from the logits as they are."""
        draws = [af.sample_dense_edges(logits.detach(), seed=1, step=step) for step in range(5)]
        return sum(score(af.GraphBatch.from_dense(x, drawn, mask, y), epochs) for drawn in draws) / len(draws)

    scores = {"all graphs": score(seen, max(epochs // 5, 1)), "start": mean_score()}
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(steps):
        model = DenseGIN()
        drawn = sampler.get_discrete_graphs(logits, inference=False)
        loss = torch.zeros(())
        for c in range(2):
            wanted = gradients(model, tuple(t[seen.y == c] for t in real), seen.y[seen.y == c], keep=False)
            found = gradients(model, (x[y == c], drawn[y == c], mask[y == c]), y[y == c], keep=True)
            for have, want in zip(found, wanted, strict=True):
                loss = loss + (have - want).square().sum() / want.square().sum().clamp(min=1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores["condensed"] = mean_score()
    return scores


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name}: {100 * accuracy:.1f} %")
