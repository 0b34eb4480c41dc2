"""Raw calls of native operators with arguments that could make them read or write out of bounds."""

from __future__ import annotations

import pytest
import torch

import acgkd_fast.linear
import acgkd_fast.propagate  # noqa: F401  declares the operators
from acgkd_fast import PairLayout, build_info

pytestmark = pytest.mark.skipif(not build_info()["loaded"], reason="the native extension is not built")

STRETCH = (-0.1, 1.1, 0.25)
LAYOUT = PairLayout.complete([3, 2])
RNG, TEMPERATURE = torch.tensor([1, 0]), torch.ones(1, dtype=torch.float64)
LOGITS = torch.zeros(4)
GOOD = (LOGITS, LAYOUT.table, RNG, TEMPERATURE, 0, 2, 0, *STRETCH, 5, -1)
ROWPTR, COL = torch.tensor([0, 1, 2, 2, 2, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
X, VALUE = torch.ones(5, 3), torch.ones(2)
TIED = (ROWPTR, COL, None, None, None)


def swapped(arguments: tuple, position: int, value) -> tuple:
    return (*arguments[:position], value, *arguments[position + 1 :])


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("sample_edges", swapped(GOOD, 0, torch.zeros(5)), r"logits: expected .* \(4\), got .* \(5\)"),
        ("sample_edges", swapped(GOOD, 0, torch.zeros(8)[::2]), "logits: .* got a non-contiguous"),
        ("sample_edges", swapped(GOOD, 0, torch.zeros(4, dtype=torch.half)), "expected float32, float64 or bfloat16"),
        ("sample_edges", swapped(GOOD, 1, LAYOUT.table.int()), "table: expected a contiguous Long"),
        ("sample_edges", swapped(GOOD, 1, LAYOUT.table + 1), "table: expected the offsets of a PairLayout"),
        ("sample_edges", swapped(GOOD, 2, torch.zeros(3, dtype=torch.int64)), r"rng: expected .* \(2\)"),
        ("sample_edges", swapped(GOOD, 3, torch.zeros(1)), "temperature: expected a contiguous Double"),
        ("sample_edges", swapped(GOOD, 4, 2), "table: expected the offsets"),
        ("sample_edges", swapped(GOOD, 4, 9), "kind 0..3"),
        ("sample_edges", swapped(GOOD, 5, 6), "estimator: expected 0..5, got 6"),
        ("sample_edges", swapped(GOOD, 6, 2), "noise: expected 0 or 1, got 2"),
        ("sample_edges", swapped(GOOD, 10, 6), "num_nodes: expected 5, got 6"),
        (
            "sample_edges_backward",
            (VALUE, ROWPTR, COL, torch.tensor([0, 4]), *GOOD[:10]),
            r"pair: expected values in 0\.\.3, got 4",
        ),
        (
            "sample_edges_backward",
            (VALUE, ROWPTR, COL, torch.tensor([0]), *GOOD[:10]),
            r"pair: expected .* \(2\), got .* \(1\)",
        ),
        ("candidate_port", (LOGITS[:3], LAYOUT.table, RNG, TEMPERATURE, 0, 0), r"logits: expected .* \(4\)"),
        (
            "candidate_port_backward",
            (LOGITS.double(), LOGITS, LAYOUT.table, RNG, TEMPERATURE, 0, 0),
            "grad_port: expected a contiguous Float .* got a Double",
        ),
        ("candidate_gradient", (X, X[:, :2], X[:, 0], LAYOUT.table, 0, 4), r"right: expected .* \(5, 3\)"),
        ("candidate_gradient", (X, X, torch.ones(5), LAYOUT.table, 0, 3), "num_pairs: expected 4, got 3"),
        ("candidate_backward", (X.double(), X, X[:, 0], *GOOD[:5], 0), "left: expected a contiguous Float"),
        (
            "sample_factor_edges",
            (X, torch.zeros(1), LAYOUT.table, RNG, TEMPERATURE, 2, 0, 0.1, 4, -1),
            r"bias: expected .* \(2\), got .* \(1\)",
        ),
        (
            "sample_factor_edges",
            (X, torch.zeros(2), LAYOUT.table, RNG, TEMPERATURE, 0, 0, 0.1, 4, -1),
            "estimator: expected 2 or 3, got 0",
        ),
        ("pair_uniforms", (LAYOUT.table, RNG, 0, 6, 4), "stream: expected 0..5, got 6"),
        ("gcn_propagate", (X[:4], VALUE, None, None, *TIED, True, 0), r"rowptr: expected .* \(5\), got .* \(6\)"),
        ("gcn_propagate", (X, VALUE.double(), None, None, *TIED, True, 0), "value: expected a contiguous Float"),
        ("gcn_propagate", (X, VALUE, None, None, ROWPTR + 1, *TIED[1:], True, 0), "rowptr: expected offsets that rise"),
        ("gcn_propagate", (X, VALUE, None, None, ROWPTR, COL + 4, *TIED[2:], True, 0), r"col: expected .* 0\.\.4"),
        ("gcn_propagate", (X, VALUE, None, None, ROWPTR, COL - 1, *TIED[2:], True, 0), r"col: expected .* got -1"),
        ("gcn_propagate", (X, VALUE, None, None, ROWPTR, COL, ROWPTR, None, None, True, 0), "all or none of them"),
        ("gin_propagate", (X, VALUE, torch.ones(2), None, None, *TIED, 0), "eps: expected a cpu tensor with one"),
        (
            "gin_propagate_backward",
            (X, X, VALUE, torch.ones(1), ROWPTR, COL, ROWPTR, COL, COL + 1),
            r"t_edge: expected values in 0\.\.1, got 2",
        ),
        (
            "gcn_propagate_backward",
            (X, X, X, VALUE, torch.ones(5, dtype=torch.float64), *TIED, True),
            "scale: expected a contiguous Float",
        ),
        ("gat_propagate", (X, X[:, :2], X[:, :2], VALUE, *TIED, 0.2, True), "source: expected a contiguous Float"),
        (
            "gat_propagate",
            (X, torch.ones(5, 2), torch.ones(5, 2), VALUE, *TIED, 0.2, True),
            "source: expected a number of heads that divides 3, got 2",
        ),
        ("gat_propagate", (X, torch.ones(5, 0), torch.ones(5, 0), VALUE, *TIED, 0.2, True), "divides 3, got 0"),
        ("gat_propagate", (X, X, torch.ones(5, 1), VALUE, *TIED, 0.2, True), r"target: expected .* \(5, 3\)"),
        (
            "gat_propagate_backward",
            (X[:4], X, X, X, VALUE, X, X, X, *TIED, 0.2, True),
            r"grad_out: expected .* \(5, 3\), got .* \(4, 3\)",
        ),
        (
            "gat_propagate_backward",
            (X, X, X, X, VALUE, X, X, X.double(), *TIED, 0.2, True),
            "total: expected a contiguous Float",
        ),
        ("readout", (X, torch.tensor([0, 6]), 0), "ptr: expected offsets that rise from 0 to 5"),
        ("readout", (X, torch.tensor([0, 4, 2, 5]), 0), "ptr: expected offsets that rise from 0 to 5"),
        ("readout", (X, torch.tensor([0, 5]), 3), "mode: expected 0, 1 or 2, got 3"),
        ("readout_backward", (X, COL[:0].reshape(0, 3), torch.tensor([0, 5]), 0, 5), r"grad_out: .* \(1, any\)"),
    ],
)
def test_raw_calls_with_bad_arguments_are_refused(name, arguments, text):
    with pytest.raises(RuntimeError, match=text):
        getattr(torch.ops.acgkd_fast, name)(*arguments)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(4, 15)}, r"x: expected .* \(any, 16\), got a Float cpu tensor of shape \(4, 15\)"),
        ({"x": torch.zeros(4, 16).double()}, "x: expected a contiguous Float"),
        ({"x": torch.zeros(16, 4).t()}, "x: .* got a non-contiguous"),
        (
            {"weight": torch.zeros(17, 16), "bias": torch.zeros(17)},
            "weight: expected outputs .* of 16, got 17",
        ),
        ({"weight": torch.zeros(16)}, "weight: expected a contiguous Float"),
        ({"bias": torch.zeros(15)}, r"bias: expected .* \(16\)"),
    ],
)
def test_bad_rows_or_weights(change, text):
    arguments = {"x": torch.zeros(4, 16), "weight": torch.zeros(16, 16), "bias": torch.zeros(16), **change}
    with pytest.raises(RuntimeError, match=text):
        torch.ops.acgkd_fast.frozen_linear(*arguments.values(), False)
