"""One inversion step at the size of real data, beside PyTorch Geometric and padded dense matrices.

Steps of all contenders are timed in turn inside one run, on one thread, and their medians compared.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from step_peers import SHAPES, STEPS, check_agreement

pytest.importorskip("torch_geometric", reason="the peers need torch-geometric")
WARM_UP, ROUNDS = 3, 15


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
