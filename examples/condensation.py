"""Graph condensation by gradient matching (DosCond's loop) with this package's edge sampler.

    python examples/condensation.py

Here the data are at hand: many graphs become a few, whose edges are Binary Concrete variables. The score is that of a
model trained on these few, beside one trained on as few random ones of the originals.
"""

from __future__ import annotations

import torch

import acgkd_fast as af
from acgkd_fast.data import house_or_cycle, stratified_split
from acgkd_fast.hosts.doscond import DiscreteGraphs
from acgkd_fast.teachers import evaluate, train_classifier


class DenseGCN(torch.nn.Module):
    """Two GCN layers on padded graphs [G, n, n], mean readout; double backward goes through it."""

    def __init__(self, features: int, width: int = 32, classes: int = 2) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(features, width), torch.nn.Linear(width, width)])
        self.out = torch.nn.Linear(width, classes)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        looped = adjacency + torch.eye(adjacency.shape[1])
        scale = looped.sum(2, keepdim=True).rsqrt()
        for layer in self.layers:
            x = torch.relu(layer(scale * (looped @ (scale * x))))
        return self.out((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def gradients(model: DenseGCN, graphs: tuple[torch.Tensor, ...], y: torch.Tensor, keep: bool) -> list[torch.Tensor]:
    loss = torch.nn.functional.cross_entropy(model(*graphs), y)
    return list(torch.autograd.grad(loss, list(model.parameters()), create_graph=keep))


def main(num_graphs: int = 200, per_class: int = 10, steps: int = 150, epochs: int = 150) -> dict[str, float]:
    torch.manual_seed(0)
    data = house_or_cycle(num_graphs)
    assert data.graphs.y is not None
    seen, held_out = (data.graphs.select(part) for part in stratified_split(data.graphs.y, seed=0))
    assert seen.y is not None
    real = seen.to_dense()
    few = torch.cat([(seen.y == c).nonzero().squeeze(1)[:per_class] for c in range(2)])
    chosen = seen.select(few)
    x, adjacency, mask = chosen.to_dense()
    assert chosen.y is not None

    logits = (adjacency * 10 - 5).requires_grad_()
    sampler = DiscreteGraphs(seed=0)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(steps):
        model = DenseGCN(x.shape[-1])
        drawn = sampler.get_discrete_graphs(logits, inference=False) * mask[:, :, None] * mask[:, None, :]
        loss = torch.zeros(())
        for c in range(2):
            of_class, own = seen.y == c, chosen.y == c
            wanted = gradients(model, tuple(t[of_class] for t in real), seen.y[of_class], keep=False)
            found = gradients(model, (x[own], drawn[own], mask[own]), chosen.y[own], keep=True)
            for have, want in zip(found, wanted, strict=True):
                loss = loss + (have - want).square().sum() / want.square().sum().clamp(min=1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    hard = sampler.get_discrete_graphs(logits.detach(), inference=True) * mask[:, :, None] * mask[:, None, :]
    condensed = af.GraphBatch.from_dense(x, hard, mask, chosen.y)
    scores = {}
    for name, graphs in (("all graphs", seen), ("condensed", condensed), ("as few originals", chosen)):
        model = train_classifier("gcn3-32", graphs, epochs=epochs if graphs is not seen else epochs // 5)
        scores[name] = evaluate(model, held_out)["accuracy"]
    return scores


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name}: {100 * accuracy:.1f} %")
