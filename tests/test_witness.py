"""What a pool says about itself, against the figures of the search and against counting."""

from __future__ import annotations

import pytest
import torch
from search_helpers import PlainTeacher, make_graphs, make_teacher

import acgkd_fast as af
from acgkd_fast.distill.witness import pool_size, pool_witness
from acgkd_fast.teachers import as_teacher

pytestmark = pytest.mark.filterwarnings("ignore:k. expected at most:RuntimeWarning")


def test_the_witness_is_what_the_search_reports():
    teacher = make_teacher()
    result = af.refine(make_graphs(seed=1), teacher, steps=5)
    said = pool_witness(teacher, result.graphs)
    assert said == {"k": result.k, "cross_entropy": result.cross_entropy, "agreement": result.agreement}


def test_no_k_without_batch_norm():
    said = pool_witness(as_teacher(PlainTeacher()), make_graphs(seed=1))
    assert set(said) == {"cross_entropy", "agreement"}


def test_sizes_are_counted():
    triangle_and_node = torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]])
    edges = af.EdgeSample.from_edge_index(triangle_and_node, torch.tensor([0, 3, 4]), symmetric=True)
    graphs = af.GraphBatch(torch.ones(4, 1), edges)
    said = pool_size(graphs, af.PairLayout.complete([3, 1]))
    peak = said.pop("peak_memory_mib")
    counted = {"graphs": 2, "nodes": 4, "edges": 3, "mean_degree": 1.5, "density": 1.0, "candidates": 3}
    assert said == counted and 1.0 < peak < 2**20
    assert pool_size(graphs, None)["candidates"] == 0
