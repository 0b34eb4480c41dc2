"""The examples run, in small."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore:k. expected at most:RuntimeWarning")
def test_own_model():
    pytest.importorskip("torch_geometric", reason="the example's teacher is written with torch-geometric")
    spec = importlib.util.spec_from_file_location("own_model", EXAMPLES / "own_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scores = module.main(num_graphs=40, epochs=5, pool_size=20, steps=20)
    assert set(scores) == {"teacher", "student"}
    assert all(0.0 <= score <= 1.0 for score in scores.values())
