"""The unit of the loss: a steep teacher teaches what a flat one does, and its student answers as it does."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_student import SMALL, changed
from test_training import parity_graphs

from acgkd_fast.distill.objectives import distillation_loss
from acgkd_fast.distill.student import (
    _Lesson,
    distill_student,
    logit_unit,
    new_student,
    plain_student,
    pool_agreement,
    teacher_logits,
)
from acgkd_fast.errors import DataError
from acgkd_fast.teachers import as_teacher, train_classifier


@pytest.fixture(scope="module")
def teacher():
    return as_teacher(train_classifier("gcn3-16", parity_graphs(), epochs=15, seed=0))


@pytest.fixture(scope="module")
def pool():
    return parity_graphs(24, seed=5)


def test_logit_unit():
    logits = torch.tensor([[9.0, 1.0, 5.0], [0.0, 0.5, -3.0], [2.0, 8.0, 20.0]])
    assert logit_unit(logits, 2.0) == 2.0 and logit_unit(logits, 1.0) == 4.0
    assert logit_unit(logits, 0.0) == 1.0
    for nothing in (logits[:0], logits[:, :1], torch.ones(3, 2), torch.full((3, 2), torch.nan)):
        assert logit_unit(nothing, 2.0) == 1.0
    # A median near 0 does not blow up the graphs that the teacher is sure of.
    torch.testing.assert_close(logit_unit(torch.tensor([[0.0, 1e-7]] * 12 + [[0.0, 5.0]] * 8), 2.0), 0.25)


def steeper(teacher, factor):
    module = copy.deepcopy(teacher.module)
    with torch.no_grad():
        for parameter in module.classifier.parameters():
            parameter.mul_(factor)
    return as_teacher(module)


@pytest.mark.parametrize("part", ["plain", "reused", "another module"])
def test_a_steeper_teacher_teaches_the_same(teacher, pool, part):
    """Logits 64 times as large: the same losses, hence the same student, whose logits follow the teacher's unit."""
    settings = changed(epochs=2, reuse_classifier=part == "reused")
    losses, students = [[], []], []
    for seen, factor in zip(losses, (1.0, 64.0), strict=True):
        its = steeper(teacher, factor)
        student = "gcn3-8"
        if part == "another module":
            student = Scaled(new_student(its, student, 0, settings), factor)
        students.append(distill_student(its, pool, student, settings, progress=lambda _, v, s=seen: s.append(v)))
    assert losses[0] == losses[1]
    answers = [student(pool.x, pool.edges) for student in students]
    torch.testing.assert_close(64.0 * answers[0], answers[1])


class Scaled(torch.nn.Module):
    """A student whose classifier is nobody's business."""

    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x, edges):
        return self.factor * self.inner(x, edges)


def test_a_student_answers_in_its_teachers_unit(teacher, pool):
    its = steeper(teacher, 50.0)
    student = distill_student(its, pool, "gcn3-16", changed(epochs=60))
    ours, theirs = (logit_unit(teacher_logits(as_teacher(m), pool), 1.0) for m in (student, its))
    assert 0.5 < ours / theirs < 2.0
    assert pool_agreement(its, student, pool)["agreement"] > 0.9


def test_a_module_is_trained_from_where_it_is(teacher, pool):
    its = steeper(teacher, 50.0)
    student = distill_student(its, pool, "gcn3-8", SMALL)
    before = student(pool.x, pool.edges)
    again = distill_student(its, pool, student, changed(epochs=1, lr=1e-9))
    assert again is student
    torch.testing.assert_close(student(pool.x, pool.edges), before, rtol=1e-3, atol=1e-2)


def test_a_classifier_shared_with_the_teacher_stays(teacher, pool):
    its = steeper(teacher, 50.0)
    student = plain_student(its, "gcn3-16", 0)
    student.classifier = its.module.classifier
    before = {name: value.clone() for name, value in its.module.state_dict().items()}
    distill_student(its, pool, student, changed(epochs=1))
    assert all(torch.equal(value, before[name]) for name, value in its.module.state_dict().items())


def test_one_unit_for_all_epochs(teacher, pool):
    """Graphs of its own for every epoch: the first ones' unit, also where a later process goes on."""

    def drawn(epoch):
        return pool if epoch == 0 else pool.select(torch.arange(3 * epoch, 3 * epoch + 6))

    lesson = _Lesson(teacher, None, plain_student(teacher, "gcn3-8", 0), SMALL, 0, drawn, fresh=True)
    lesson.begin_epoch(2, drawn(2))
    expected = teacher_logits(teacher, drawn(2)) / logit_unit(teacher_logits(teacher, pool), SMALL.margin)
    torch.testing.assert_close(lesson._targets, expected)


def test_a_checkpoint_of_another_margin_is_refused(teacher, pool, tmp_path):
    path = tmp_path / "state"
    settings = changed(epochs=10)
    distill_student(teacher, pool, "gcn3-8", settings, checkpoint=path)
    with pytest.raises(DataError, match=r"training with margin 0\.0, got 2\.0"):
        distill_student(teacher, pool, "gcn3-8", dataclasses.replace(settings, margin=0.0), checkpoint=path)


def test_the_divergence_on_the_pool_is_in_the_unit_of_the_margin(teacher, pool):
    student, settings = plain_student(teacher, "gcn3-8", 0).eval(), changed(margin=3.0, temperature=1.5)
    unit = logit_unit(teacher_logits(teacher, pool), 3.0)
    ours, theirs = student(pool.x, pool.edges) / unit, teacher(pool) / unit
    found = pool_agreement(teacher, student, pool, settings=settings)["divergence"]
    assert found == pytest.approx(float(distillation_loss(ours, theirs, 1.5).detach()), rel=1e-5)
