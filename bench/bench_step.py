"""One inversion step at the size of real data, beside PyTorch Geometric and padded dense matrices.

Steps of all contenders are timed in turn inside one run, on one thread, and their medians compared.
"""

from __future__ import annotations

import pytest
from conftest import Contest
from step_peers import SHAPES, STEPS, check_agreement

pytest.importorskip("torch_geometric", reason="the peers need torch-geometric")


@pytest.mark.parametrize("name", SHAPES)
def test_step(name: str, contest: Contest) -> None:
    shape = SHAPES[name]
    check_agreement(shape)
    steps = {label: make(shape) for label, make in STEPS.items()}
    low, high = shape.sizes
    contest(
        steps,
        least=7,
        shape=f"{name}, {shape.num_graphs} x {low}..{high}, density {shape.density}",
        operator="inversion step",
    )
