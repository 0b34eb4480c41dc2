"""The memory law of docs/step.md, in exact bytes on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import bench_memory
from bench_memory import Case, measure, peak_bytes

# Bytes per candidate pair (logit, gradient, two moments of Adam, and what the estimator adds), per stored entry
# (value, its gradient, column, pair number), and per node and channel of a layer (three saved floats).
LAW = {
    "sparse_straight_through": {"pair": 16, "entry": 20, "node_number": 12},
    "straight_through": {"pair": 20, "entry": 20, "node_number": 14},
    "relaxed": {"pair": 56, "node_number": 12},
}


@pytest.mark.parametrize("estimator", LAW)
def test_what_one_more_pair_entry_and_channel_cost(estimator):
    found = bench_memory.slopes(estimator)
    assert found.keys() == LAW[estimator].keys()
    for name, most in LAW[estimator].items():
        assert 0.9 * most < found[name] < 1.05 * most, (name, found)


@pytest.mark.parametrize("estimator", LAW)
@pytest.mark.parametrize("case", [{"nodes": 20, "graphs": 16}, {"nodes": 250}, {"nodes": 400, "xi": 0.1}], ids=str)
def test_a_step_stays_within_the_law(estimator, case):
    row = measure(Case(**case, estimator=estimator))
    law = LAW[estimator]
    # The layer at work holds up to six more arrays of node features than the layers at rest.
    amounts = row["pairs"] * law["pair"] + row["entries"] * law.get("entry", 0)
    amounts += row["node_numbers"] * law["node_number"] + 24 * row["node_numbers"] // row["depth"]
    total = row["held"] + row["step"]
    assert 0.5 * amounts < total < 1.05 * amounts, (total, amounts, row)
    again = measure(Case(**case, estimator=estimator))
    assert (again["held"], again["step"]) == (row["held"], row["step"])


def test_peaks_are_counted():
    def allocate():
        first = torch.zeros(1000, dtype=torch.uint8)
        del first
        second, third = torch.zeros(3000, dtype=torch.uint8), torch.zeros(500, dtype=torch.uint8)
        del second
        return third

    assert 3500 <= peak_bytes(allocate) <= 3800
