"""One iteration of GFKD: as published (graphs built node by node), vectorised, and by our learner."""

from __future__ import annotations

import pytest
from conftest import Contest
from step_peers import SHAPES, Shape

pytest.importorskip("torch_geometric", reason="the peers need torch-geometric")
from gfkd_peers import check_agreement, in_one_tensor, learner, published

# Sizes alone matter: GFKD starts from probabilities that are uniform in (0, 1), half of all pairs.
SIZES = {"MUTAG": SHAPES["MUTAG"], "PROTEINS": Shape("PROTEINS", 64, (30, 48), 0.5)}


@pytest.mark.parametrize("name", SIZES)
def test_iteration(name: str, contest: Contest) -> None:
    shape = SIZES[name]
    check_agreement(shape)
    ours, path_wise = learner(shape), learner(shape, "sparse_straight_through")
    contest(
        {
            "ours": ours.advance,
            "GFKD vectorised": in_one_tensor(shape),
            "GFKD node by node, as published": published(shape),
            "ours, sparse straight-through": path_wise.advance,
        },
        least=3,
        shape=f"{name}, {shape.num_graphs} x {shape.sizes[0]}..{shape.sizes[1]}, probabilities uniform in (0, 1)",
        operator="GFKD iteration",
        pairs=ours.pseudo_graphs.layout.num_pairs,
    )
