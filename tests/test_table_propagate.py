"""The CPU table of message passing: each size is measured or has a reason, runs resume, the page renders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
pytest.importorskip("torch_geometric", reason="the peers need torch-geometric")


@pytest.fixture(scope="module")
def table():
    sys.path.insert(0, str(BENCH))
    try:
        import table_propagate
    finally:
        sys.path.remove(str(BENCH))
    return table_propagate


def test_every_size_is_measured_or_has_a_reason(table):
    everything = list(table.sizes())
    assert len(everything) == len({size for size, _ in everything}) == 3 * 5 * 4 * 3
    for size, why in everything:
        small = size.entries <= table.MAX_ENTRIES and size.entries * size.width <= table.MAX_MESSAGES
        assert (why is None) == (
            small
            and size.entries >= size.nodes * size.batch
            and size.nodes * size.batch * size.width <= table.MAX_FEATURES
        )


def test_measures_and_renders_one_size(table):
    size = next(size for size, why in table.sizes() if why is None)
    layers, _ = table.available(size.width, table.CPU, compile_naive=False)
    row = table.measure(size, layers)
    assert row["best_peer_over_ours"] > 0 and row["best_peer"] != table.OURS
    assert all("median_us" in peer or "refused" in peer for peer in row["peers"].values())
    assert row["peers"]["torch CSR"]["median_us"] > 0
    text = table.render({"rows": [row]})
    assert f"{row['best_peer_over_ours']:.1f}" in text and text.count("\n") == 2


def test_a_wrong_peer_is_refused(table):
    size = next(size for size, why in table.sizes() if why is None)
    layers, _ = table.available(size.width, table.CPU, compile_naive=False)
    row = table.measure(size, {table.OURS: layers[table.OURS], "torch CSR": layers["torch CSR"], "dense bmm": wrong})
    assert row["peers"]["dense bmm"]["refused"] == "disagrees with float64"
    assert row["best_peer"] == "torch CSR"


def wrong(x, edges, value):
    return 2.0 * x + value.sum()


def test_finished_sizes_are_skipped(table, tmp_path):
    out = tmp_path / "table.json"
    rows = [table.asdict(size) for size, why in table.sizes() if why is None]
    out.write_text(json.dumps({"rows": rows}))
    command = [sys.executable, str(BENCH / "table_propagate.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "" and json.loads(out.read_text())["rows"] == rows
