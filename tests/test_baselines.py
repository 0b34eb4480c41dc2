"""Baselines: what they promise, and that what should train does train."""

from __future__ import annotations

import pytest
import torch

import acgkd_fast as af
from acgkd_fast.baselines import (
    DFADSettings,
    GFKDSettings,
    balanced_random_pool,
    dfad,
    gfkd_graphs,
    inverted_features,
    random_pools,
)
from acgkd_fast.baselines.dfad import DFADGenerator
from acgkd_fast.distill.student import new_student, teacher_logits
from acgkd_fast.graphs import GraphBatch
from acgkd_fast.nn.models import build_model

PRIOR = af.GraphPrior(min_nodes=5, max_nodes=8)


def make_teacher(seed: int = 0, num_features: int = 4) -> af.Teacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model("gcn3-8", num_features, 3)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return af.as_teacher(model.eval())


def assert_simple(graphs: GraphBatch, *, symmetric: bool) -> None:
    _, adjacency, _ = graphs.to_dense()
    assert torch.equal(adjacency, (adjacency != 0).to(adjacency.dtype))
    assert not adjacency.diagonal(dim1=1, dim2=2).any()
    assert torch.equal(adjacency, adjacency.transpose(1, 2)) == symmetric


def test_random_pools_are_new_every_epoch_and_repeat_from_a_seed():
    draw, again = (random_pools(make_teacher(), PRIOR, 6, seed=3) for _ in range(2))
    first, second = draw(0), draw(1)
    assert torch.equal(first.edges.col, again(0).edges.col) and torch.equal(first.x, again(0).x)
    assert first.edges.col.shape != second.edges.col.shape or not torch.equal(first.edges.col, second.edges.col)


def test_balanced_pool_has_the_teachers_answers_in_equal_numbers():
    teacher = make_teacher(1)
    with torch.no_grad():
        # Otherwise this teacher gives one class to every graph.
        answers = teacher_logits(teacher, af.random_pool(teacher, PRIOR, 200, seed=9))
        teacher.module.classifier.bias -= answers.mean(0)
    pool = balanced_random_pool(teacher, PRIOR, 31, seed=0)
    assert torch.equal(teacher_logits(teacher, pool).argmax(1), pool.y)
    assert pool.y.bincount().tolist() == [11, 10, 10]


def test_balanced_pool_keeps_what_it_finds_of_a_class_the_teacher_never_gives():
    teacher = make_teacher(1)
    with torch.no_grad():
        teacher.module.classifier.bias[2] = -1e6
    pool = balanced_random_pool(teacher, PRIOR, 9, seed=0)
    assert pool.y.bincount(minlength=3)[2] == 0 and 0 < pool.num_graphs <= 6
    assert torch.equal(teacher_logits(teacher, pool).argmax(1), pool.y)


def loss_of(teacher: af.Teacher, graphs: GraphBatch) -> float:
    return float(torch.nn.functional.cross_entropy(teacher_logits(teacher, graphs), graphs.y))


@pytest.mark.parametrize("kind", ["one-hot", "continuous"])
def test_inverted_features_lower_the_loss_and_keep_the_structure(kind):
    teacher = make_teacher()
    prior = af.GraphPrior(min_nodes=5, max_nodes=8, feature_kind=kind)
    before, after = (inverted_features(teacher, prior, 30, steps=steps, c_bn=0.0, seed=2) for steps in (0, 80))
    assert torch.equal(before.edges.col, after.edges.col) and torch.equal(before.edges.rowptr, after.edges.rowptr)
    assert loss_of(teacher, after) < loss_of(teacher, before)
    if kind == "one-hot":
        assert torch.equal(after.x.sum(1), torch.ones(after.num_nodes)) and set(after.x.unique().tolist()) == {0.0, 1.0}


def test_constant_features_are_left_alone():
    teacher = make_teacher(num_features=1)
    prior = af.GraphPrior(min_nodes=5, max_nodes=8, feature_kind="constant")
    assert torch.equal(inverted_features(teacher, prior, 4, seed=0).x.unique(), torch.ones(1))


@pytest.mark.parametrize("directed", [True, False])
def test_gfkd_lowers_its_loss_on_hard_graphs(directed):
    teacher = make_teacher()
    seen: list[dict[str, float]] = []
    settings = GFKDSettings(steps=200, lr_features=0.1, directed=directed)
    graphs = gfkd_graphs(teacher, PRIOR, 20, settings, seed=1, progress=lambda _, values: seen.append(values))
    assert seen[-1]["best"] < seen[0]["loss"] and seen[-1]["best"] <= seen[-1]["loss"]
    assert_simple(graphs, symmetric=not directed)
    start = gfkd_graphs(teacher, PRIOR, 20, GFKDSettings(steps=1, directed=directed), seed=1)
    assert loss_of(teacher, graphs) < loss_of(teacher, start)
    # Structure moved too, not features alone.
    assert graphs.edges.num_edges != start.edges.num_edges or not torch.equal(graphs.edges.col, start.edges.col)


def test_gfkd_repeats_its_bits():
    one, two = (gfkd_graphs(make_teacher(), PRIOR, 5, GFKDSettings(steps=5), seed=4) for _ in range(2))
    assert torch.equal(one.x, two.x) and torch.equal(one.edges.col, two.edges.col)


@pytest.mark.parametrize("kind, width", [("one-hot", 4), ("continuous", 4), ("constant", 1)])
def test_every_parameter_of_the_generator_gets_a_gradient(kind, width):
    """Public generators cut it at threshold and argmax."""
    teacher = make_teacher(num_features=width)
    torch.manual_seed(0)
    generator = DFADGenerator(6, width, kind, mean_degree=2.0, dropout=0.0)
    student = new_student(teacher, "gcn3-8", 0)
    graphs = generator(torch.randn(16, 32), seed=0, step=0)
    gap = torch.nn.functional.l1_loss(teacher(graphs).softmax(-1), student(graphs.x, graphs.edges).softmax(-1))
    gap.backward()
    unused = {"nodes.weight", "nodes.bias"} if kind == "constant" else set()
    for name, parameter in generator.named_parameters():
        got = parameter.grad is not None and bool(parameter.grad.any())
        assert got == (name not in unused), name
    assert_simple(graphs, symmetric=True)


def test_the_generator_finds_disagreement():
    """With the student held still, generator steps alone must widen the gap."""
    teacher, gaps = make_teacher(), []
    settings = DFADSettings(epochs=1, student_steps=1, generator_steps=60, batch_size=32)
    for lr in (1e-9, 5e-3):
        seen: list[float] = []
        tuned = DFADSettings(**{**settings.__dict__, "lr": lr})
        dfad(teacher, PRIOR, "gcn3-8", tuned, seed=0, progress=lambda _, values, s=seen: s.append(values["generator"]))
        gaps.append(-seen[-1])
    assert gaps[1] > gaps[0]


def test_dfad_student_learns_and_repeats():
    teacher, seen = make_teacher(), []
    settings = DFADSettings(epochs=15, batch_size=32)
    student, _ = dfad(
        teacher, PRIOR, "gcn3-8", settings, seed=0, progress=lambda _, values: seen.append(values["student"])
    )
    assert min(seen[-5:]) < seen[0]
    again, _ = dfad(teacher, PRIOR, "gcn3-8", settings, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_dfad_refuses_a_teacher_without_edge_weights():
    class Unweighted(torch.nn.Module):
        num_features, num_classes = 4, 3

        def forward(self, x, edge_index, batch):
            return x.new_zeros(int(batch.max()) + 1, 3)

    teacher = af.as_teacher(Unweighted(), num_features=4, num_classes=3)
    with pytest.raises(af.InputError, match="teacher: expected a module that takes edge weights"):
        dfad(teacher, PRIOR)
