"""Nodes with twins: the graphs by hand, what teachers and students make of them, and when a run takes them."""

from __future__ import annotations

import json

import pytest
import torch
from run_helpers import make_teacher
from search_helpers import PlainTeacher
from test_perturbed import pairs, ring_graphs
from test_run import make_config

import acgkd_fast as af
from acgkd_fast.distill.run import Run
from acgkd_fast.distill.student import teacher_logits
from acgkd_fast.distill.student_pool import PoolChanges
from acgkd_fast.distill.twins import tells_twins, twinned_pool, with_twins
from acgkd_fast.errors import InputError
from acgkd_fast.graphs import EdgeSample, GraphBatch
from acgkd_fast.nn.models import build_model


def settled(arch: str, width: int = 5) -> af.Teacher:
    """A random teacher with running statistics that normalise something."""
    torch.manual_seed(1)
    model = build_model(arch, width, 2)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2.0)
    return af.as_teacher(model.eval())


def wild_graphs(count: int = 30) -> GraphBatch:
    """Random graphs with features of their own, isolated nodes and some edges of other weights."""
    torch.manual_seed(2)
    sizes = torch.randint(1, 12, (count,))
    ptr = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    graph = torch.arange(count).repeat_interleave(sizes)
    row, col = ((graph[:, None] == graph) & (torch.rand(len(graph), len(graph)) < 0.3)).triu(1).nonzero().T
    weight = torch.rand(len(row)) + 0.5
    both = torch.stack([torch.cat([row, col]), torch.cat([col, row])])
    edges = EdgeSample.from_edge_index(both, ptr, weight.repeat(2), symmetric=True)
    return GraphBatch(torch.randn(len(graph), 5), edges, graph.new_zeros(count))


def dense(graphs: GraphBatch) -> torch.Tensor:
    edge_index, weight = graphs.to_edge_index()
    matrix = torch.zeros(graphs.num_nodes, graphs.num_nodes)
    matrix[edge_index[0], edge_index[1]] = weight
    return matrix


def test_twins_by_hand():
    """A path 0-1-2 and a lone node 3; 1 and 3 get twins."""
    edges = EdgeSample.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), torch.tensor([0, 3, 4]))
    graphs = GraphBatch(torch.arange(4.0)[:, None], edges, torch.tensor([1, 0]))
    found = with_twins(graphs, torch.tensor([False, True, False, True]))
    assert found.x.flatten().tolist() == [0, 1, 1, 2, 3, 3] and found.ptr.tolist() == [0, 4, 6]
    assert pairs(found) == {(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (4, 5)}
    assert found.y.tolist() == [1, 0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_twins_against_a_matrix(share):
    """Copies of rows and columns, and a 1 between the two of a pair."""
    graphs = wild_graphs()
    chosen = torch.rand(graphs.num_nodes) < share
    found = with_twins(graphs, chosen)
    source = torch.arange(graphs.num_nodes).repeat_interleave(1 + chosen.long())
    expected = dense(graphs)[source][:, source]
    expected[(source[:, None] == source) & ~torch.eye(len(source), dtype=torch.bool)] = 1.0
    assert torch.equal(dense(found), expected) and torch.equal(found.x, graphs.x[source])
    assert torch.equal(found.sizes, torch.bincount(graphs.batch()[source], minlength=graphs.num_graphs))
    assert found.edges.symmetric


def test_a_gcn_computes_as_before_if_all_have_twins():
    graphs = wild_graphs()
    everyone = torch.ones(graphs.num_nodes, dtype=torch.bool)
    for arch, tells in (("gcn3-32", False), ("gin3-32", True)):
        teacher = settled(arch)
        before = teacher.module.node_features(graphs.x, graphs.edges)
        doubled = with_twins(graphs, everyone)
        after = teacher.module.node_features(doubled.x, doubled.edges)
        same = torch.allclose(after, before.repeat_interleave(2, 0), rtol=1e-4, atol=1e-4)
        assert same != tells and tells_twins(teacher.module, teacher, graphs) == tells


def test_without_batch_norm_nothing_says_that_a_density_is_hidden():
    graphs = ring_graphs(count=3, width=PlainTeacher.num_features)
    assert tells_twins(PlainTeacher(), af.as_teacher(PlainTeacher()), graphs)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_share_of_nodes_has_twins_and_every_graph_its_own(share):
    graphs = ring_graphs(count=200, size=50)
    pool = twinned_pool(graphs, share, seed=3)
    for epoch in (0, 5):
        found = pool(epoch)
        first, second = found.select(torch.arange(200)), found.select(torch.arange(200, 400))
        assert torch.equal(first.x, graphs.x) and pairs(first) == pairs(graphs)
        grown = (second.sizes - graphs.sizes) / graphs.sizes
        # Some graphs happen to have none.
        none = (1 - (1 - share) ** 51) / (51 * share)
        assert abs(float((grown == 0.0).double().mean()) - none) < 4 * (none * (1 - none) / 200) ** 0.5
        # The variance of a uniform probability, and of 50 draws with it.
        spread = share**2 / 12 + (share / 2 - share**2 / 3) / 50
        assert abs(float(grown.mean()) - share / 2) < 4 * (spread / 200) ** 0.5
        assert grown.max() > 0.8 * share
        assert torch.equal(found.y, torch.cat([graphs.y, graphs.y]))


def test_epochs_differ_and_repeat():
    graphs = ring_graphs()
    one, again, other = (af.twinned_pool(graphs, 0.5, seed=seed) for seed in (1, 1, 2))
    assert pairs(one(0)) == pairs(again(0))
    assert pairs(one(0)) != pairs(one(1)) and pairs(one(0)) != pairs(other(0))
    assert af.twinned_pool(graphs, 0.0) is graphs


def test_who_gets_a_twin_does_not_hang_on_what_is_perturbed():
    graphs = ring_graphs(count=400)
    numbered = GraphBatch(torch.arange(graphs.num_nodes)[:, None].double(), graphs.edges)
    for epoch in (0, 5):
        changed = (af.perturbed_pool(graphs, 0.4, seed=1)(epoch).x != graphs.x).any(1)
        chosen = twinned_pool(numbered, 0.3, seed=1)(epoch).x.flatten().long().bincount() == 3
        assert 0.1 < chosen.double().mean() < 0.2
        assert abs(float(changed[chosen].double().mean() - changed[~chosen].double().mean())) < 0.03
        per_graph = torch.stack([flags.view(400, -1).double().mean(1) for flags in (chosen, changed)])
        assert abs(float(torch.corrcoef(per_graph)[0, 1])) < 0.2


def test_bad_arguments_are_named():
    graphs = ring_graphs(count=2)
    for share in (-0.1, 1.1, "much", float("nan")):
        with pytest.raises(InputError, match="share: expected a number in"):
            twinned_pool(graphs, share)
        with pytest.raises(InputError, match="twins: expected None or a number in"):
            make_config(twins=share)
    with pytest.raises(InputError, match="seed: expected"):
        twinned_pool(graphs, 0.1, seed=-1)
    loop = EdgeSample.from_edge_index(torch.tensor([[0, 0, 1], [0, 1, 0]]), torch.tensor([0, 2]))
    loops = GraphBatch(torch.ones(2, 1), loop)
    with pytest.raises(InputError, match="pool: expected no self-loops"):
        twinned_pool(loops, 0.5)
    with pytest.raises(InputError, match="graphs: expected no self-loops"):
        twinned_pool(lambda _: loops, 0.5)(0)


def test_twins_are_for_students_that_see_a_density_which_their_teacher_does_not():
    graphs, config = wild_graphs().select(torch.arange(5)), make_config(perturbation=None)
    graphs = GraphBatch(graphs.x, graphs.edges.with_value(torch.ones_like(graphs.edges.value), symmetric=True))

    def has_twins(teacher, student, config, **given):
        return PoolChanges.decided(teacher, graphs, config, student, **given).twins

    gcn, gin = settled("gcn3-32"), settled("gin3-32")
    assert has_twins(gcn, "gin3-16", config) == 0.3
    assert not has_twins(gcn, "gcn3-16", config)
    assert not has_twins(gin, "gin3-16", config) and not has_twins(gin, "gcn3-16", config)
    assert not has_twins(gcn, "gin3-16", make_config(perturbation=None, **{"prior.feature_kind": "degree"}))
    assert not has_twins(gcn, "gin3-16", config, constrained=True)
    assert not has_twins(gcn, "gin3-16", make_config(perturbation=0.0))
    assert not has_twins(gcn, "gin3-16", make_config(twins=0.0))
    assert has_twins(gin, "gcn3-16", make_config(perturbation=0.0, twins=0.5)) == 0.5
    both = PoolChanges(perturbation=0.2, twins=0.5)
    assert both.pool(graphs, 3)(1).num_nodes == twinned_pool(graphs, 0.5, seed=3)(1).num_nodes
    assert PoolChanges(0.0, 0.0).pool(graphs, 3) is graphs


def test_a_student_learns_that_density_does_not_matter():
    """GIN students of a GCN teacher, on graphs all of whose nodes have twins."""
    teacher = settled("gcn3-32")
    pool = af.random_pool(teacher, af.GraphPrior(8, 12, mean_degree=2.5, feature_kind="one-hot"), 60, seed=0)
    fresh = af.random_pool(teacher, af.GraphPrior(8, 12, mean_degree=2.5, feature_kind="one-hot"), 60, seed=1)
    dense_ones = with_twins(fresh, torch.ones(fresh.num_nodes, dtype=torch.bool))
    settings = af.StudentSettings(epochs=15, reuse_classifier=False, feature_weight=0.0)
    theirs, error = teacher_logits(teacher, dense_ones), {}
    for name, graphs in (("as it is", pool), ("twins", twinned_pool(pool, 1.0))):
        students = (af.distill_student(teacher, graphs, "gin3-32", settings, seed=seed) for seed in range(3))
        answers = torch.stack([teacher_logits(af.as_teacher(student), dense_ones) for student in students])
        error[name] = float((answers - theirs).square().mean())
    assert error["twins"] < 0.5 * error["as it is"]


def test_a_run_teaches_a_pool_with_twins(tmp_path):
    saved = []
    for name, twins in (("with", None), ("without", 0.0)):
        run = Run(tmp_path / name, make_teacher(), make_config(twins=twins, perturbation=0.1), student="gin3-8")
        run.execute()
        saved.append((tmp_path / name / "student.safetensors").read_bytes())
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        (changes,) = [line for line in lines if line["stage"] == "changes"]
        expected = 0.3 if twins is None else 0.0
        assert (changes["perturbation"], changes["twins"]) == (0.1, expected)
        report = (tmp_path / name / "report.html").read_text()
        assert f"and of a node to get a twin in a second copy</td><td>{expected:.4g}</td>" in report
    assert saved[0] != saved[1]
    same = [
        Run(tmp_path / f"{twins}", make_teacher(), make_config(twins=twins, perturbation=0.1)) for twins in (None, 0.0)
    ]
    students = [run.teach("student", run._pool(run.make_graphs()), 0).state_dict() for run in same]
    assert all(torch.equal(one, two) for one, two in zip(students[0].values(), students[1].values(), strict=True))
