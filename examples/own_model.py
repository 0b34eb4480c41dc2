"""Distil a classifier written with torch-geometric, as somebody else would have trained it.

    python examples/own_model.py

Needs the extra `pyg`. The teacher knows nothing of this package; the data it is trained on here are
made on the spot and used for nothing but training and measuring it.
"""

from __future__ import annotations

import torch
from torch_geometric.nn import GINConv, global_add_pool

import acgkd_fast as af
from acgkd_fast.data import house_or_cycle, stratified_split
from acgkd_fast.teachers import evaluate


class MyGIN(torch.nn.Module):
    """Two GIN layers with BatchNorm, called as (x, edge_index, batch)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(
            GINConv(torch.nn.Sequential(torch.nn.Linear(before, width), torch.nn.ReLU(), torch.nn.Linear(width, width)))
            for before in (1, width)
        )
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(width) for _ in range(2))
        self.out = torch.nn.Linear(width, 2)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x, edge_index)))
        return self.out(global_add_pool(x, batch))


def train(model: MyGIN, graphs: af.GraphBatch, epochs: int) -> MyGIN:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    edge_index, _ = graphs.to_edge_index()
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(graphs.x, edge_index, graphs.batch()), graphs.y)
        loss.backward()
        optimizer.step()
    return model


def main(num_graphs: int = 300, epochs: int = 150, pool_size: int = 200, steps: int = 600) -> dict[str, float]:
    torch.manual_seed(0)
    data = house_or_cycle(num_graphs)
    assert data.graphs.y is not None
    seen, held_out = (data.graphs.select(part) for part in stratified_split(data.graphs.y, seed=0))
    model = train(MyGIN(), seen, epochs)

    # From here on no data: the job on your own model.
    teacher = af.as_teacher(model)
    prior = af.GraphPrior(min_nodes=20, max_nodes=30, mean_degree=2.05, feature_kind="constant")
    start = af.start_graphs(teacher, prior, pool_size, seed=0)
    pool = af.refine(start, teacher, steps=steps, seed=0).graphs
    student = af.distill_student(teacher, pool, "gin3-32")

    return {name: evaluate(net, held_out)["accuracy"] for name, net in (("teacher", model), ("student", student))}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name}: {100 * accuracy:.1f} %")
