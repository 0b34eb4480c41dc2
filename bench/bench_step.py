"""One inversion step at the size of real data, beside PyTorch Geometric and padded dense matrices.

Steps of all contenders are timed in turn inside one run, on one thread, and their medians compared.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from step_peers import SHAPES, STEPS, DenseTeacher, PyGTeacher, Shape, make_pseudo_graphs, make_teacher

from acgkd_fast.graphs import GraphBatch

pytest.importorskip("torch_geometric", reason="the peers need torch-geometric")
WARM_UP, ROUNDS = 3, 15


def check_agreement(shape: Shape) -> None:
    """All three networks give the same logits and gradients on the same drawn graph."""
    pseudo, teacher = make_pseudo_graphs(shape), make_teacher(shape)
    edges = pseudo.harden(seed=0).edges
    weight = edges.value.clone().requires_grad_()
    x = pseudo.soft_features().detach()
    weighted = edges.with_value(weight)
    batch = GraphBatch(x, weighted)
    edge_index, edge_weight = batch.to_edge_index()
    ours = teacher(x, weighted)
    dense_x, adjacency, mask = batch.to_dense()
    answers = {
        "ours": ours,
        "PyG": PyGTeacher(teacher)(x, edge_index, edge_weight, batch.batch()),
        "dense": DenseTeacher(teacher)(dense_x, adjacency, mask),
    }
    expected, expected_grad = answers["ours"], None
    for name, logits in answers.items():
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")
        (grad,) = torch.autograd.grad(logits.square().sum(), weight, retain_graph=True)
        expected_grad = grad if expected_grad is None else expected_grad
        scale = expected_grad.abs().max()
        torch.testing.assert_close(grad / scale, expected_grad / scale, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_step(name: str, benchmark: Any) -> None:
    shape = SHAPES[name]
    torch.set_num_threads(1)
    check_agreement(shape)
    steps = {label: make(shape) for label, make in STEPS.items()}
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    for round_number in range(WARM_UP + ROUNDS):
        for label, step in steps.items():
            start = time.perf_counter()
            loss = step()
            elapsed = time.perf_counter() - start
            assert torch.isfinite(loss), label
            if round_number >= WARM_UP:
                seconds[label].append(elapsed)
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    sparse, _all_candidates, *peers = medians
    best_peer = min(peers, key=lambda label: medians[label])
    benchmark.extra_info.update(
        {
            "shape": name,
            "threads": 1,
            "median_ms": {label: 1e3 * median for label, median in medians.items()},
            "best_peer": best_peer,
            "best_peer_over_ours": {
                label: medians[best_peer] / medians[label] for label in medians if label not in peers
            },
        }
    )
    benchmark.pedantic(steps[sparse], rounds=3, warmup_rounds=0)
