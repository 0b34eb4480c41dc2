"""The student's training: losses against their formulas, what learns and what stays, exact resumption."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from test_training import parity_graphs, weights

from acgkd_fast.distill import student as student_module
from acgkd_fast.distill.curriculum import CurriculumSettings
from acgkd_fast.distill.objectives import distillation_divergence, distillation_loss, feature_distance
from acgkd_fast.distill.projector import teacher_parts
from acgkd_fast.distill.student import (
    StudentSettings,
    _Lesson,
    distill_student,
    logit_unit,
    new_student,
    pool_agreement,
    teacher_logits,
)
from acgkd_fast.distill.temperature import AdversarySettings
from acgkd_fast.errors import InputError
from acgkd_fast.graphs import GraphBatch
from acgkd_fast.nn import build_model
from acgkd_fast.teachers import as_teacher, train_classifier
from acgkd_fast.training import recalibrate_batch_norm

SMALL = StudentSettings(epochs=4, batch_size=8, reuse_classifier=False)


@pytest.fixture(scope="module")
def teacher():
    return as_teacher(train_classifier("gcn3-16", parity_graphs(), epochs=15, seed=0))


@pytest.fixture(scope="module")
def pool():
    return parity_graphs(24, seed=5)


def changed(**options):
    return dataclasses.replace(SMALL, **options)


FULL = changed(
    reuse_classifier=True,
    feature_weight=0.5,
    mse_weight=0.1,
    curriculum=CurriculumSettings("disagreement", weights="soft"),
    adversary=AdversarySettings("graph", ramp_epochs=2),
    dropout=0.3,
)


# Terms of the loss


def test_divergence_of_each_graph():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    temperature = torch.tensor([[1.0], [2.0], [3.0], [0.5]], dtype=torch.float64)
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    expected = temperature[:, 0] ** 2 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(distillation_divergence(student, teacher, temperature), expected)
    torch.testing.assert_close(
        distillation_loss(student, teacher, 2.0), distillation_divergence(student, teacher, 2.0).mean()
    )


def test_feature_distance():
    student = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    ptr = torch.tensor([0, 2, 2, 3])
    zero = torch.zeros(3, 2)
    assert feature_distance(student, zero, ptr, "node").tolist() == [0.25, 0.0, 12.5]
    # The mean over the nodes of the first graph is (0.5, 0).
    assert feature_distance(student, zero, ptr, "graph").tolist() == [0.125, 0.0, 12.5]
    with pytest.raises(InputError, match="feature_level: expected one of node, graph"):
        feature_distance(student, zero, ptr, "edge")


@pytest.mark.parametrize("level, margin", [("node", 0.0), ("graph", 1.5)])
def test_the_loss_is_the_weighted_sum_of_its_terms(teacher, pool, level, margin):
    weights = {"kl_weight": 0.7, "mse_weight": 0.2, "feature_weight": 0.4}
    settings = changed(reuse_classifier=True, feature_level=level, temperature=3.0, margin=margin, **weights)
    student = new_student(teacher, "gcn3-8", 0, settings)
    lesson = _Lesson(teacher, teacher_parts(teacher), student, settings, 0, pool, fresh=False)
    assert lesson.begin_epoch(0, pool) is None
    positions = torch.tensor([3, 0, 7])
    graphs = pool.select(positions)
    student.eval()
    unit = logit_unit(teacher_logits(teacher, pool), margin)
    # A reused classifier answers in the teacher's unit, in which its features are compared too.
    answer, target = student(graphs.x, graphs.edges) / unit, teacher(graphs) / unit
    h, wanted = student.node_features(graphs.x, graphs.edges), teacher.module.node_features(graphs.x, graphs.edges)
    kl = 9 * torch.nn.functional.kl_div((answer / 3).log_softmax(1), (target / 3).softmax(1), reduction="batchmean")
    ptr = graphs.ptr.tolist()
    spans = [slice(a, b) for a, b in itertools.pairwise(ptr)]
    if level == "node":
        distance = sum((h[span] - wanted[span]).square().mean() for span in spans) / 3
    else:
        distance = sum((h[span].mean(0) - wanted[span].mean(0)).square().mean() for span in spans) / 3
    expected = 0.7 * kl + 0.2 * (answer - target).square().mean() + 0.4 * distance
    torch.testing.assert_close(lesson.loss(graphs, positions), expected)


def test_the_teacher_is_asked_once_for_equal_graphs_and_anew_for_others(teacher, pool, monkeypatch):
    asked = []
    parts = teacher_parts(teacher)
    counted = dataclasses.replace(parts, embed=lambda graphs: asked.append(graphs) or parts.embed(graphs))
    monkeypatch.setattr(student_module, "teacher_parts", lambda _: counted)
    settings = changed(epochs=3, batch_size=4, reuse_classifier=True, feature_weight=1.0)
    distill_student(teacher, pool, "gcn3-8", settings)
    assert len(asked) == 1
    asked.clear()
    distill_student(teacher, lambda epoch: pool.select(torch.arange(epoch + 4)), "gcn3-8", settings)
    assert [graphs.num_graphs for graphs in asked] == [4, 5, 6]


@pytest.mark.parametrize("fresh", [True, False])
def test_self_paced_weights_multiply_the_losses(teacher, pool, fresh):
    settings = changed(curriculum=CurriculumSettings("disagreement", weights="soft", start_share=0.5))
    student = new_student(teacher, "gcn3-8", 0, settings)
    lesson = _Lesson(teacher, None, student, settings, 0, pool, fresh=fresh)
    visited = lesson.begin_epoch(0, pool)
    assert 0 < len(visited) < pool.num_graphs and lesson.measure()["share"] == len(visited) / pool.num_graphs
    assert student.training
    graphs = pool.select(visited)
    student.eval()
    unit = logit_unit(teacher_logits(teacher, pool), settings.margin)
    answer = student(graphs.x, graphs.edges) / (1.0 if fresh else unit)
    divergence = distillation_divergence(answer, teacher(graphs) / unit, 2.0)
    loss = lesson.loss(graphs, visited)
    weight = lesson._weights[visited]
    torch.testing.assert_close(loss, (weight * divergence).mean())
    for label in (0, 1):
        mine = graphs.y == label
        easy_first = divergence[mine].argsort()
        assert (weight[mine][easy_first].diff() <= 1e-6).all()


# What learns, what stays


def test_every_learnable_part_gets_gradients_and_the_frozen_ones_stay(teacher, pool):
    before = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
    student = new_student(teacher, "gcn3-8", 0, FULL)
    lesson = _Lesson(teacher, teacher_parts(teacher), student, FULL, 0, pool, fresh=False)
    lesson.begin_epoch(1, pool)
    positions = torch.arange(24)
    lesson.loss(pool, positions).backward()
    learnable = [*student.blocks.named_parameters(), *student.projector.named_parameters()]
    learnable += list(lesson.adversary.named_parameters())
    for name, parameter in learnable:
        # A bias before BatchNorm shifts what is then centred.
        if not name.endswith("conv.bias") and name != "convs.0.bias":
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in student.head.parameters())
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    distill_student(teacher, pool, student, FULL)
    for name, tensor in student.state_dict().items():
        if name.startswith("head."):
            assert torch.equal(tensor, start[name])
        elif name.endswith("weight"):
            assert not torch.equal(tensor, start[name]), name
    for name, tensor in teacher.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("mode", ["global", "graph"])
def test_the_temperature_climbs_from_its_start(teacher, pool, mode):
    settings = changed(epochs=12, adversary=AdversarySettings(mode, low=1.0, high=9.0, ramp_epochs=2))
    seen = []
    distill_student(teacher, pool, "gcn3-8", settings, progress=lambda _, values: seen.append(values["temperature"]))
    assert all(1.0 <= value <= 9.0 for value in seen)
    # A higher temperature makes temperature^2 KL larger here, and the adversary finds that out.
    assert seen[-1] > seen[0] + 0.1
    if mode == "global":
        assert seen[0] == pytest.approx(2.0)


def test_a_curriculum_visits_easy_graphs_first(teacher, pool):
    visited = []
    settings = changed(epochs=8, curriculum=CurriculumSettings("teacher_loss", start_share=0.25, full_at=0.5))
    distill_student(teacher, pool, "gcn3-8", settings, progress=lambda _, values: visited.append(values["share"]))
    assert visited == pytest.approx([6 / 24, 12 / 24, 16 / 24, 20 / 24, 1, 1, 1, 1])
    student = new_student(teacher, "gcn3-8", 0)
    lesson = _Lesson(teacher, None, student, settings, 0, pool, fresh=False)
    first = lesson.begin_epoch(0, pool)
    losses = torch.nn.functional.cross_entropy(teacher_logits(teacher, pool), pool.y, reduction="none")
    for label in (0, 1):
        mine = (pool.y == label).nonzero().squeeze(1)
        easy = set(mine[losses[mine].argsort(stable=True)[:3]].tolist())
        assert easy == set(first.tolist()) & set(mine.tolist())
    # Without labels the teacher's own answers take their place.
    unlabelled = GraphBatch(pool.x, pool.edges)
    assert len(_Lesson(teacher, None, student, settings, 0, pool, fresh=False).begin_epoch(0, unlabelled)) >= 6


@pytest.mark.parametrize("difficulty", ["edges", "nodes", "degree"])
def test_structural_curricula_need_no_teacher(teacher, pool, difficulty):
    settings = changed(curriculum=CurriculumSettings(difficulty))
    lesson = _Lesson(teacher, None, new_student(teacher, "gcn3-8", 0), settings, 0, pool, fresh=False)
    assert 6 <= len(lesson.begin_epoch(0, pool)) < 24


# Exactness


class Stop(Exception):
    pass


@pytest.mark.parametrize("settings", [SMALL, FULL], ids=["plain", "everything"])
def test_an_interrupted_student_ends_with_the_same_weights(tmp_path, teacher, pool, settings):
    settings = dataclasses.replace(settings, epochs=23)
    whole = distill_student(teacher, pool, "gcn3-8", settings, seed=3)

    def stop(epoch, _):
        if epoch == 17:
            raise Stop

    path = tmp_path / "state"
    with pytest.raises(Stop):
        distill_student(teacher, pool, "gcn3-8", settings, seed=3, progress=stop, checkpoint=path)
    figures = []
    resumed = distill_student(
        teacher, pool, "gcn3-8", settings, seed=3, progress=lambda e, v: figures.append((e, v)), checkpoint=path
    )
    assert figures[0][0] == 11
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    again = []
    distill_student(teacher, pool, "gcn3-8", settings, seed=3, progress=lambda e, v: again.append((e, v)))
    assert again[10:] == figures


def test_pools_drawn_anew(teacher, pool):
    def draw(epoch):
        return pool.select([(g + epoch) % 24 for g in range(20)])

    settings = changed(curriculum=CurriculumSettings("disagreement"))
    first, second = (distill_student(teacher, draw, "gcn3-8", settings, seed=1) for _ in range(2))
    assert torch.equal(weights(first), weights(second))
    fixed = distill_student(teacher, draw(0), "gcn3-8", settings, seed=1)
    assert not torch.equal(weights(first), weights(fixed))


# Steps and statistics


def test_clipping_shortens_long_gradients_alone(teacher, pool):
    def student(clip):
        return weights(distill_student(teacher, pool, "gcn3-8", changed(clip_norm=clip), seed=0))

    assert torch.equal(student(1e9), student(0.0))
    assert not torch.equal(student(1e-3), student(0.0))


def test_recalibrated_statistics_are_those_of_the_whole_pool(pool):
    torch.manual_seed(0)
    model = build_model("gcn3-8", 3, 2).eval()
    inputs = []
    first = model.blocks[0].norm
    handle = first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    recalibrate_batch_norm(model, pool, lambda graphs: model(graphs.x, graphs.edges))
    handle.remove()
    torch.testing.assert_close(first.running_mean, inputs[0].mean(0))
    torch.testing.assert_close(first.running_var, inputs[0].var(0))
    assert first.momentum == 0.1 and not model.training and not first.training
    frozen = build_model("gcn3-8", 3, 2).eval().requires_grad_(False)
    before = weights(frozen)
    recalibrate_batch_norm(frozen, pool, lambda graphs: frozen(graphs.x, graphs.edges))
    assert torch.equal(weights(frozen), before)


def test_pool_agreement(teacher, pool):
    perfect = pool_agreement(teacher, teacher.module, pool)
    assert perfect["agreement"] == 1.0 and perfect["divergence"] == pytest.approx(0.0, abs=1e-6)

    class Other(torch.nn.Module):
        def forward(self, x, edges):
            return -teacher.module(x, edges)

    opposite = pool_agreement(teacher, Other(), pool)
    assert opposite["agreement"] == 0.0 and opposite["divergence"] > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected a whole number, at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr: expected a number above 0"),
        ({"clip_norm": -1.0}, "clip_norm: expected a number of 0 or more"),
        ({"mse_weight": float("nan")}, "mse_weight"),
        ({"margin": -1.0}, "margin: expected a number of 0 or more"),
        ({"kl_weight": 0.0, "reuse_classifier": False}, "one of them above 0"),
        ({"kl_weight": 0.0, "feature_weight": 0.0}, "one of them above 0"),
        ({"reuse_classifier": 1}, "reuse_classifier: expected None, True or False"),
        ({"feature_level": "edge"}, "feature_level: expected one of"),
        ({"feature_weight": 1.0, "reuse_classifier": False}, "feature_weight: expected 0 without reuse_classifier"),
        ({"projector_heads": 0}, "projector_heads"),
        ({"curriculum": "edges"}, "curriculum: expected its settings"),
        (
            {"kl_weight": 0.0, "mse_weight": 1.0, "adversary": AdversarySettings("global")},
            "kl_weight: expected a number above 0 beside an adversary",
        ),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        StudentSettings(**options)
