"""Students in front of their teacher's classifier: shapes, parts of other people's teachers, files, sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_training import parity_graphs
from torch import nn

from acgkd_fast.checkpoints import load_model, save_model
from acgkd_fast.distill.projector import (
    ForeignHead,
    equal_size_arch,
    parameter_counts,
    projected_student,
    teacher_parts,
)
from acgkd_fast.distill.student import StudentSettings, distill_student, new_student
from acgkd_fast.errors import DataError, InputError
from acgkd_fast.files import load_tensors, save_tensors
from acgkd_fast.nn import GCNConv, GraphClassifier, ProjectedClassifier, build_model
from acgkd_fast.propagate import readout
from acgkd_fast.teachers import as_teacher, evaluate

KINDS = ["gat", "linear"]


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return as_teacher(build_model("gcn3-16", 3, 2, readout="mean"))


@pytest.fixture
def graphs():
    return parity_graphs(10)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_blocks_projector_readout_and_the_teachers_classifier(teacher, graphs, kind):
    student = projected_student(teacher, "gin3-8", 0, projector=kind).eval()
    h = graphs.x
    for block in student.blocks:
        h = block(h, graphs.edges)
    assert h.shape == (graphs.num_nodes, 8)
    raised = student.projector(h, graphs.edges)
    assert raised.shape == (graphs.num_nodes, 16)
    expected = teacher.module.classifier(readout(raised, graphs.ptr, "mean"))
    torch.testing.assert_close(student(graphs.x, graphs.edges), expected)
    edge_index, weight = graphs.to_edge_index()
    torch.testing.assert_close(student(graphs.x, edge_index, weight, graphs.batch()), expected)
    if kind == "linear":
        torch.testing.assert_close(raised, student.projector.linear(h))
    else:
        assert (raised >= 0).all()


def test_a_projector_that_is_the_identity_turns_the_teacher_into_its_own_student(teacher, graphs):
    student = projected_student(teacher, "gcn3-16", 0, projector="none")
    student.blocks.load_state_dict(teacher.module.blocks.state_dict())
    torch.testing.assert_close(student.eval()(graphs.x, graphs.edges), teacher(graphs))


def test_options_of_the_attention(teacher, graphs):
    student = projected_student(teacher, "gcn3-8", 0, heads=4, layers=2, relu=False).eval()
    first, second = student.projector.convs
    assert (first.in_channels, first.out_channels, first.heads) == (8, 4, 4)
    assert (second.in_channels, second.out_channels, second.heads) == (16, 4, 4)
    assert len(student.projector.norms) == 1
    h = student.node_features(graphs.x, graphs.edges)
    assert h.shape == (graphs.num_nodes, 16) and (h < 0).any()
    assert len(projected_student(teacher, "gcn3-8", 0, layers=2).projector.norms) == 2


def test_the_seed_alone_initialises(teacher, graphs):
    torch.manual_seed(5)
    first = projected_student(teacher, "gcn3-8", 7).state_dict()
    second = projected_student(teacher, "gcn3-8", 7).state_dict()
    other = projected_student(teacher, "gcn3-8", 8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.conv.lin.weight"], other["blocks.0.conv.lin.weight"])
    assert not torch.equal(first["projector.convs.0.lin.weight"], other["projector.convs.0.lin.weight"])


def test_the_head_is_a_frozen_copy(teacher):
    student = projected_student(teacher, "gcn3-8", 0).train()
    assert not student.head.training and student.blocks.training
    ours, theirs = student.head.classifier.weight, teacher.module.classifier.weight
    assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr() and not ours.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": "none"}, "projector: expected 'gat' or 'linear' .* width 8 .* width 16, got 'none'"),
        ({"projector": "mlp"}, "projector: expected one of"),
        ({"heads": 3}, "projector_heads: expected a divisor of the teacher's width 16, got 3"),
        ({"layers": 0}, "projector_layers: expected at least 1"),
    ],
)
def test_projectors_that_cannot_be(teacher, options, message):
    with pytest.raises(InputError, match=message):
        projected_student(teacher, "gcn3-8", 0, **options)


# Files


@pytest.mark.parametrize("options", [{"projector": "linear"}, {"projector": "gat", "heads": 2, "layers": 2}])
def test_a_saved_student_needs_no_teacher(tmp_path, teacher, graphs, options):
    student = projected_student(teacher, "gcn3-8", 0, dropout=0.2, **options)
    student.train()(graphs.x, graphs.edges)
    student.eval()
    path = tmp_path / "student.safetensors"
    save_model(path, student, {"note": "mine"})
    loaded, metadata = load_model(path)
    assert isinstance(loaded, ProjectedClassifier) and metadata["note"] == "mine"
    assert torch.equal(loaded(graphs.x, graphs.edges), student(graphs.x, graphs.edges))
    assert loaded.dropout.p == 0.2 and not any(p.requires_grad for p in loaded.head.parameters())
    assert evaluate(loaded, graphs) == evaluate(student, graphs)
    # It can teach in its turn.
    torch.testing.assert_close(as_teacher(loaded)(graphs), student(graphs.x, graphs.edges))
    tensors, metadata = load_tensors(path)
    metadata["projector"]["kind"] = "mlp"
    save_tensors(path, tensors, metadata)
    with pytest.raises(DataError, match="description of a model, got a damaged one"):
        load_model(path)


# Sizes


def test_parameter_counts(teacher):
    student = projected_student(teacher, "gcn3-8", 0)
    plain = build_model("gcn3-8", 3, 2)
    attention = 8 * 16 + 2 * 16 + 16 + 2 * 16
    blocks = count(plain) - count(plain.classifier)
    expected = {"teacher": count(teacher.module), "projector": attention, "reused_classifier": 16 * 2 + 2}
    expected |= {"student": blocks + attention + 34, "trained": blocks + attention}
    assert parameter_counts(teacher, student) == expected
    alone = parameter_counts(teacher, plain)
    assert alone["student"] == alone["trained"] == count(plain) and alone["projector"] == 0


@pytest.mark.parametrize("arch", ["gcn3-8", "gin4-8"])
def test_a_plain_student_of_equal_size(arch):
    def size(width):
        return count(build_model(f"{arch[:4]}-{width}", 5, 3))

    for parameters in (1, 700, 5000, size(37)):
        found = equal_size_arch(arch, 5, 3, parameters)
        width = int(found.split("-")[1])
        assert found.startswith(arch[:4]) and width >= 1
        neighbours = [abs(size(w) - parameters) for w in (width - 1, width + 1) if w >= 1]
        assert abs(size(width) - parameters) <= min(neighbours)
    assert equal_size_arch(arch, 5, 3, size(37)).endswith("-37")


# Other people's teachers


class Theirs(nn.Module):
    """Two layers, mean readout, two linear layers: its head is more than ours."""

    def __init__(self):
        super().__init__()
        self.first, self.second = GCNConv(3, 6), GCNConv(6, 6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))

    def node_features(self, x, edge_index, edge_weight=None):
        return self.second(self.first(x, edge_index, edge_weight).relu(), edge_index, edge_weight)

    def classify(self, h, batch):
        graphs = int(batch.max()) + 1
        pooled = torch.zeros(graphs, 6).index_add(0, batch, h) / batch.bincount()[:, None]
        return self.head(pooled)

    def forward(self, x, edge_index, batch, edge_weight=None):
        return self.classify(self.node_features(x, edge_index, edge_weight), batch)


def test_a_teacher_that_exposes_its_parts(graphs):
    torch.manual_seed(0)
    module = Theirs().eval()
    module.head[1].running_mean.normal_()
    teacher = as_teacher(module, num_features=3)
    parts = teacher_parts(teacher)
    assert parts.width == 6 and parts.head_parameters == count(module.head)
    torch.testing.assert_close(parts.head(parts.embed(graphs), graphs.ptr), teacher(graphs))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    settings = StudentSettings(epochs=3, reuse_classifier=True, projector_relu=False, feature_weight=1.0)
    student = distill_student(teacher, graphs, "gcn3-4", settings)
    assert isinstance(student.head, ForeignHead) and not module.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(name.startswith("head") for name in student.state_dict())
    sizes = parameter_counts(teacher, student)
    assert sizes["reused_classifier"] == count(module.head) and sizes["trained"] == count(student)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_student_with_a_foreign_head_is_not_saved_by_halves(tmp_path, graphs):
    teacher = as_teacher(Theirs(), num_features=3)
    with pytest.raises(InputError, match="got ProjectedClassifier with the head of another module"):
        save_model(tmp_path / "a", projected_student(teacher, "gcn3-4", 0))


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = GCNConv(3, 2)

    def forward(self, x, edge_index, batch):
        return readout(self.conv(x, edge_index), torch.tensor([0, *batch.bincount().cumsum(0)]))


class Wrong(Theirs):
    def forward(self, x, edge_index, batch, edge_weight=None):
        return super().forward(x, edge_index, batch, edge_weight) + 1


class Broken(Theirs):
    broken = False

    def node_features(self, x, edge_index, edge_weight=None):
        if self.broken:
            raise RuntimeError("no\nsuch thing")
        return super().node_features(x, edge_index, edge_weight)


def test_who_reuses_the_classifier_unless_told(teacher, graphs):
    quick = StudentSettings(epochs=1)
    taught = distill_student(teacher, graphs, "gcn3-4", quick)
    assert isinstance(taught, ProjectedClassifier) and taught.projector.kind == "gat"
    decided = quick.decided(teacher)
    assert decided.reuse_classifier and decided.feature_weight == 1.0 and decided.decided(teacher) == decided
    again = distill_student(teacher, graphs, "gcn3-4", decided)
    assert all(torch.equal(a, b) for a, b in zip(taught.parameters(), again.parameters(), strict=True))

    # Heads that the student could not hold itself, students that cannot take one, and who does not want it.
    theirs, adapted = (
        as_teacher(Theirs(), num_features=3),
        as_teacher(teacher.module, 3, call=lambda m, g: m(g.x, g.edges)),
    )
    for other in (theirs, adapted):
        assert isinstance(distill_student(other, graphs, "gcn3-4", quick), GraphClassifier)
    mine = build_model("gcn3-8", 3, 2)
    assert distill_student(teacher, graphs, mine, quick) is mine
    plain = dataclasses.replace(quick, reuse_classifier=False)
    assert isinstance(distill_student(teacher, graphs, "gcn3-4", plain), GraphClassifier)
    assert plain.decided(teacher).feature_weight == 0.0
    with pytest.raises(InputError, match="feature_weight: expected 0 without reuse_classifier"):
        distill_student(theirs, graphs, "gcn3-4", dataclasses.replace(quick, feature_weight=0.5))


def test_teachers_that_cannot_be_taken_apart(teacher, graphs):
    cure = "give it node_features.* or set student.reuse_classifier to false"
    with pytest.raises(InputError, match=f"Opaque to expose node features and head, got .*; {cure}"):
        teacher_parts(as_teacher(Opaque(), num_features=3))
    with pytest.raises(InputError, match=f"to be the answer of Wrong, got logits that differ by 1; {cure}"):
        teacher_parts(as_teacher(Wrong(), num_features=3))
    broken = as_teacher(Broken(), num_features=3)
    broken.module.broken = True
    with pytest.raises(InputError, match=f"Broken to run on two small graphs, got RuntimeError: no such thing; {cure}"):
        teacher_parts(broken)
    settings = StudentSettings(reuse_classifier=True)
    with pytest.raises(InputError, match="student: expected an architecture by name or a ProjectedClassifier"):
        distill_student(teacher, graphs, build_model("gcn3-8", 3, 2), settings)
    adapted = as_teacher(build_model("gcn3-8", 3, 2), 3, call=lambda module, g: module(g.x, g.edges) * 2)
    with pytest.raises(InputError, match="to be the answer"):
        teacher_parts(adapted)
    assert new_student(teacher, "gcn3-8", 0, settings).head_width == 16
