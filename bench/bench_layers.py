"""Layers and whole models of PyTorch Geometric before and after `accelerate`, on batches of three shapes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch

import acgkd_fast as af

pyg = pytest.importorskip("torch_geometric.nn")
from torch_geometric.nn.models import GAT, GCN, GIN, GraphSAGE  # noqa: E402

# Graphs per batch, mean nodes and undirected edges of a graph as in the TU data sets, and a batch size for them.
SHAPES = {"MUTAG": (128, 18, 20), "COLLAB": (32, 74, 2458), "REDDIT-B": (16, 430, 498)}
WIDTH = 64
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "GCN": lambda: GCN(WIDTH, WIDTH, 3),
    "GIN": lambda: GIN(WIDTH, WIDTH, 3, norm="batch_norm"),
    "GraphSAGE": lambda: GraphSAGE(WIDTH, WIDTH, 3),
    "GAT": lambda: GAT(WIDTH, WIDTH, 3, heads=4),
    "GINE": lambda: pyg.GINEConv(torch.nn.Linear(WIDTH, WIDTH)),
    "SumAggregation": pyg.SumAggregation,
    "MeanAggregation": pyg.MeanAggregation,
}


@functools.cache
def batch(shape: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(edge index, graph of each node, nodes): random graphs of sizes around the mean."""
    count, mean, edges = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    parts, first = [], 0
    sizes = [max(3, mean // 2 + (mean * g) // count) for g in range(count)]
    for n in sizes:
        ends = torch.randint(n, (2, max(1, edges * n // mean)), generator=generator)
        ends = ends[:, ends[0] != ends[1]]
        parts.append(torch.unique(torch.cat([ends, ends.flip(0)], 1), dim=1) + first)
        first += n
    graph = torch.arange(count).repeat_interleave(torch.tensor(sizes))
    return torch.cat(parts, 1), graph, first


@pytest.mark.parametrize("fresh", [False, True], ids=["same-batch", "new-batch"])
@pytest.mark.parametrize("backward", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_accelerate(shape, model, backward, fresh, contest):
    """A new batch has to be sorted; one that was seen has been. Both cost PyTorch Geometric the same."""
    if fresh and model in ("GINE", "SumAggregation", "MeanAggregation"):
        pytest.skip("nothing but the model's layers sorts")
    edge_index, graph, nodes = batch(shape)
    torch.manual_seed(0)
    x = torch.randn(nodes, WIDTH, requires_grad=backward)
    before = MODELS[model]()
    after = af.accelerate(copy.deepcopy(before))
    rest: tuple[torch.Tensor, ...] = ()
    if model == "GINE":
        rest = (torch.randn(edge_index.shape[1], WIDTH),)
    leaves = [x, *before.parameters()], [x, *after.parameters()]

    def run(module: torch.nn.Module, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
        where = graph if "Aggregation" in model else (edge_index.clone() if fresh else edge_index)
        with torch.set_grad_enabled(backward):
            out = module(x, where, *rest)
            return [out, *torch.autograd.grad(out.sum(), wanted)] if backward else [out]

    for got, expected in zip(run(after, leaves[1]), run(before, leaves[0]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    contest(
        {"accelerated": lambda: run(after, leaves[1]), "torch-geometric": lambda: run(before, leaves[0])},
        operator=f"accelerate {model}",
        nodes=nodes,
        edges=edge_index.shape[1],
        width=WIDTH,
    )
