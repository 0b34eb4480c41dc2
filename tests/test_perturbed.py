"""Pools perturbed anew in every epoch: simple graphs, the promised shares, the same bits for the same epoch."""

from __future__ import annotations

import json

import pytest
import torch
from run_helpers import make_teacher
from test_run import make_config
from test_training import parity_graphs

import acgkd_fast as af
from acgkd_fast.distill.edge_lists import EdgeLists
from acgkd_fast.distill.run import Run
from acgkd_fast.errors import InputError
from acgkd_fast.graphs import EdgeSample, GraphBatch


def one_hot(labels, width):
    return torch.nn.functional.one_hot(labels, width).float()


def ring_graphs(count=40, size=25, width=5):
    """Rings, so that an edge more or less shows, with as many of each label."""
    node = torch.arange(count * size)
    after = node - node % size + (node + 1) % size
    edges = torch.stack([torch.cat([node, after]), torch.cat([after, node])])
    ptr = torch.arange(0, count * size + 1, size)
    return GraphBatch(one_hot(node % width, width), EdgeSample.from_edge_index(edges, ptr), node[:count] % 2)


def pairs(graphs):
    edge_index, _ = graphs.to_edge_index()
    return {(a, b) for a, b in edge_index.T.tolist() if a < b}


@pytest.mark.parametrize("share", [0.04, 0.3, 0.9])
def test_a_share_of_edges_and_features_changes(share):
    graphs = ring_graphs(count=400)
    pool = af.perturbed_pool(graphs, share, seed=3)
    for epoch in (0, 7):
        found = pool(epoch)
        EdgeLists.from_edges(found.edges)
        assert torch.equal(found.sizes, graphs.sizes) and found.y is None
        assert found.edges.symmetric
        before, after = pairs(graphs), pairs(found)
        moved = len(before - after) / len(before)
        # Every graph has its own probability, half of the largest on the average; then come the hits.
        mean, deviation = share / 2, (share**2 / 12 / 400 + share / 2 / len(before)) ** 0.5
        # A new end is the old partner, or the node itself, or at the end of another edge, about once in eight times.
        assert 0.85 * mean - 4 * deviation < moved < mean + 4 * deviation
        assert 0.97 * len(before) <= len(after) <= len(before)
        relabelled = (found.x != graphs.x).any(1).double().mean()
        assert abs(float(relabelled) - 0.8 * mean) < 4 * deviation
        assert (found.x.sum(1) == 1).all()


def test_every_graph_has_a_probability_of_its_own():
    """One for its edges and its nodes, from 0 to the share, drawn anew in every epoch."""
    size, count, share = 200, 60, 0.8
    graphs = ring_graphs(count, size)
    pool = af.perturbed_pool(graphs, share, seed=0)
    found = []
    for epoch in (0, 1):
        after = pool(epoch)
        lost = torch.zeros(count)
        for low, _ in pairs(graphs) - pairs(after):
            lost[low // size] += 1 / size
        # A fifth of the rows drawn from the pool are equal to those that they replace.
        changed = (after.x != graphs.x).any(1).view(count, size).double().mean(1) / 0.8
        assert torch.corrcoef(torch.stack([lost.double(), changed]))[0, 1] > 0.95
        assert changed.min() < 0.1 * share and changed.max() > 0.9 * share
        assert abs(float(changed.median()) - share / 2) < 0.15
        found.append(changed)
    assert abs(float(torch.corrcoef(torch.stack(found))[0, 1])) < 0.4


def test_epochs_differ_and_repeat():
    graphs = ring_graphs()
    one, again, other = (af.perturbed_pool(graphs, 0.1, seed=seed) for seed in (1, 1, 2))
    assert pairs(one(0)) == pairs(again(0)) and torch.equal(one(0).x, again(0).x)
    assert pairs(one(0)) != pairs(one(1)) and pairs(one(0)) != pairs(other(0))
    assert af.perturbed_pool(graphs, 0.0) is graphs


def test_either_end_of_an_edge_moves():
    """A path of three nodes among many lone ones: each end of both edges is the one that goes."""
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    graphs = GraphBatch(torch.ones(50, 1), EdgeSample.from_edge_index(edges, torch.tensor([0, 50])))
    found = {pair for epoch in range(40) for pair in pairs(af.perturbed_pool(graphs, 0.5)(epoch))}
    assert {node for pair in found for node in pair if min(pair) <= 2 < max(pair)} >= {0, 1, 2}


@pytest.mark.parametrize("case", ["no edges", "complete", "single nodes", "nothing"])
def test_graphs_with_nothing_to_move(case):
    size = {"no edges": 4, "complete": 4, "single nodes": 1, "nothing": 0}[case]
    ptr = torch.arange(0, 3 * size + 1, size) if size else torch.zeros(1, dtype=torch.int64)
    nodes = torch.arange(int(ptr[-1]))
    row, col = torch.cartesian_prod(nodes, nodes).T if case == "complete" else torch.zeros(2, 0, dtype=torch.int64)
    inside = (row != col) & (row // max(size, 1) == col // max(size, 1))
    edges = EdgeSample.from_edge_index(torch.stack([row, col])[:, inside], ptr)
    graphs = GraphBatch(torch.rand(len(nodes), 3), edges)
    found = af.perturbed_pool(graphs, 0.9, seed=0)(0)
    assert pairs(found) == pairs(graphs) and found.x.shape == graphs.x.shape
    assert all(any(torch.equal(row, other) for other in graphs.x) for row in found.x)


def test_precision_stays():
    graphs = ring_graphs(count=3)
    double = GraphBatch(graphs.x.double(), graphs.edges.with_value(graphs.edges.value.double(), symmetric=True))
    found = af.perturbed_pool(double, 0.2)(0)
    assert found.x.dtype == found.edges.value.dtype == torch.float64


def test_bad_arguments_are_named():
    graphs = ring_graphs(count=2)
    for share in (-0.1, 1.0, "much", float("nan")):
        with pytest.raises(InputError, match="share: expected a number in"):
            af.perturbed_pool(graphs, share)
    with pytest.raises(InputError, match="seed: expected a number in"):
        af.perturbed_pool(graphs, 0.1, seed=-1)
    weighted = GraphBatch(graphs.x, graphs.edges.with_value(graphs.edges.value * 0.5, symmetric=True))
    directed = EdgeSample.from_edge_index(torch.tensor([[0, 1], [1, 2]]), graphs.ptr)
    looped = EdgeSample.from_edge_index(torch.tensor([[0, 1, 2], [1, 0, 2]]), graphs.ptr)
    for bad in (weighted, GraphBatch(graphs.x, directed), GraphBatch(graphs.x, looped)):
        with pytest.raises(InputError, match=r"edges: expected simple undirected graphs \(both directions.*weight 1"):
            af.perturbed_pool(bad, 0.1)


def test_a_student_that_knows_its_pool_by_heart_learns_more_from_perturbed_graphs():
    """The teacher's answer on graphs that the student has not seen, after a pool that is far too small."""
    teacher = af.as_teacher(make_teacher())
    few = parity_graphs(6, seed=1)
    few = GraphBatch(one_hot(torch.arange(few.num_nodes) % teacher.num_features, teacher.num_features), few.edges)
    settings = af.StudentSettings(epochs=60, batch_size=4)
    many = af.perturbed_pool(ring_graphs(60, 8, teacher.num_features), 0.5, seed=5)(0)
    loss = {}
    for name, pool in (("as it is", few), ("perturbed", af.perturbed_pool(few, 0.3, seed=0))):
        student = af.distill_student(teacher, pool, "gcn3-16", settings)
        with torch.no_grad():
            answers = [torch.log_softmax(model(many.x, many.edges), -1) for model in (student, teacher.module)]
        loss[name] = float(torch.nn.functional.kl_div(*answers, log_target=True, reduction="batchmean"))
    assert loss["perturbed"] < loss["as it is"]


def test_a_run_teaches_a_perturbed_pool(tmp_path):
    losses = {}
    for share in (0.0, 0.4):
        folder = tmp_path / str(share)
        run = Run(folder, make_teacher(), make_config(perturbation=share))
        run.execute()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[share] = [line["loss"] for line in lines if line["stage"] == "student-0"]
    assert losses[0.0] != losses[0.4] and len(losses[0.0]) == len(losses[0.4])
    with pytest.raises(InputError, match="perturbation: expected None or a number in"):
        make_config(perturbation=1.0)


def test_pools_of_bounded_searches_stay_as_they_are(tmp_path):
    """Perturbed graphs would not keep to what the user asked of the search."""
    assert make_config().pool_perturbation() == 0.2
    assert make_config().pool_perturbation(constrained=True) == 0.0
    for bound in ({"refine.keep_degrees": True}, {"refine.max_degree": 4}):
        assert make_config(**bound).pool_perturbation() == 0.0
        assert make_config(perturbation=0.1, **bound).pool_perturbation() == 0.1
    graphs = ring_graphs(count=3, width=make_teacher().num_features)
    for name, constraint, kept in (("free", None, False), ("bounded", lambda pool: torch.ones(3), True)):
        pool = Run(tmp_path / name, make_teacher(), make_config(), constraint=constraint)._pool(graphs)
        assert (pool is graphs) == kept
