"""Atomic files, saved models and graphs, and the checkpoints that GFKD published."""

from __future__ import annotations

import errno
import math
import os
import pathlib

import numpy as np
import pytest
import torch
from helpers import dense, normal, random_edges
from torch import nn

import acgkd_fast as af
from acgkd_fast import files
from acgkd_fast.checkpoints import load_gfkd_checkpoint, load_graphs, load_model, save_graphs, save_model
from acgkd_fast.errors import DataError, InputError
from acgkd_fast.nn import build_model


def make_graphs(labels=True, dtype=torch.float32):
    edges, _ = random_edges([4, 1, 5], symmetric=True, seed=0, dtype=dtype)
    edges = edges.with_value(edges.value.detach(), symmetric=True)
    return af.GraphBatch(normal((10, 3), 0, dtype), edges, torch.tensor([0, 2, 1]) if labels else None)


def randomise(model, seed=0):
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            if tensor.is_floating_point():
                tensor.copy_(normal(tensor.shape, seed + number, torch.float32).abs() + 0.1)
            else:
                tensor.fill_(number)
    return model


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400, text
    return text


# Files.


def test_a_file_is_replaced_whole_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    files.write_text(path, "one\n")
    files.write_text(path, "två\n")
    assert path.read_text(encoding="utf-8") == "två\n"
    assert os.listdir(path.parent) == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_gives_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "model.safetensors"
    save_model(path, build_model("gcn2-4", 3, 2))
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        save_model(path, build_model("gcn3-8", 3, 2))
    assert str(path) in one_line(caught)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_device_that_is_really_full(tmp_path, monkeypatch):
    opened = pathlib.Path.open
    monkeypatch.setattr(pathlib.Path, "open", lambda self, mode="r": opened(pathlib.Path("/dev/full"), "wb"))
    with pytest.raises(DataError, match="No space left on device"):
        files.write_bytes(tmp_path / "x", b"0" * 100_000)


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a", "text")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(DataError, match="expected to write") as caught:
        files.write_text(tmp_path / "a" / "b", "text")
    one_line(caught)


def test_state_comes_back_bit_by_bit(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "tensors": [shared, shared[2:], torch.zeros(0, 3), torch.tensor(3), torch.randn(2, 3).t()],
        "int keys": {0: {"step": torch.tensor(7.0)}, 12: None},
        "numbers": (0.1, -1, True, math.inf, "text"),
    }
    files.save_state(tmp_path / "state", state)
    back = files.load_state(tmp_path / "state")
    assert back["numbers"] == state["numbers"] and isinstance(back["numbers"], tuple)
    assert list(back["int keys"]) == [0, 12] and back["int keys"][12] is None
    assert float(back["int keys"][0]["step"]) == 7.0
    for have, want in zip(back["tensors"], state["tensors"], strict=True):
        assert torch.equal(have, want) and have.dtype == want.dtype
    with pytest.raises(TypeError, match="got set"):
        files.save_state(tmp_path / "state", {"a": {1, 2}})


def test_files_of_other_kinds_are_named(tmp_path):
    save_model(tmp_path / "model", build_model("gcn2-4", 3, 2))
    save_graphs(tmp_path / "graphs", make_graphs())
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut").write_bytes((tmp_path / "model").read_bytes()[:-10])
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    cases = {
        "absent": "got no file",
        ".": "got a folder",
        "text": "does not read",
        "cut": "does not read",
        "pickle": "does not read",
        "foreign": "without its metadata",
        "graphs": "expected a file of kind 'model', got kind 'graphs'",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            load_model(tmp_path / name)
        one_line(caught)
    with pytest.raises(DataError, match="expected a file of kind 'graphs', got kind 'model'"):
        load_graphs(tmp_path / "model")
    with pytest.raises(DataError, match="expected a saved state"):
        files.load_state(tmp_path / "model")


# Models.


@pytest.mark.parametrize("arch", ["gcn5-64", "gin3-32"])
def test_model_round_trip(tmp_path, arch):
    model = randomise(build_model(arch, 7, 3, readout="mean", dropout=0.25)).eval()
    path = tmp_path / "teacher.safetensors"
    save_model(path, model, {"feature_kind": "one-hot", "training": {"epochs": 3, "lr": 0.01}})
    loaded, metadata = load_model(str(path))
    assert not loaded.training and loaded.dropout.p == 0.25
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    graphs = make_graphs()
    x = normal((10, 7), 1, torch.float32)
    assert torch.equal(loaded(x, graphs.edges), model(x, graphs.edges))
    assert metadata["feature_kind"] == "one-hot" and metadata["training"] == {"epochs": 3, "lr": 0.01}
    assert [metadata[k] for k in ("arch", "num_features", "num_classes", "readout")] == [arch, 7, 3, "mean"]
    assert metadata["versions"]["torch"] == torch.__version__


def resave(path, change, metadata=None):
    """Write a saved file again after `change` has been at its tensors."""
    tensors, old = files.load_tensors(path)
    change(tensors)
    files.save_tensors(path, tensors, old | (metadata or {}))


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda t: t["blocks.1.conv.bias"].fill_(math.nan), {}, "in tensor blocks.1.conv.bias, got NaN or infinity"),
        (lambda t: t["blocks.0.norm.running_var"].fill_(math.inf), {}, "blocks.0.norm.running_var"),
        (lambda t: t.pop("classifier.bias"), {}, r"tensor classifier.bias of shape \(2,\), got none"),
        (
            lambda t: t.update({"classifier.weight": torch.zeros(2, 9)}),
            {},
            r"tensor classifier.weight of shape \(2, 8\), got shape \(2, 9\)",
        ),
        (lambda t: t.update(more=torch.zeros(1)), {}, "got more too"),
        (lambda t: None, {"num_features": 4}, r"blocks.0.conv.lin.weight of shape \(8, 4\), got shape \(8, 3\)"),
        (lambda t: None, {"arch": "gat3-8"}, "description of a model"),
        (lambda t: None, {"num_classes": None}, "description of a model"),
    ],
)
def test_damaged_models_are_named(tmp_path, change, metadata, message):
    path = tmp_path / "model"
    save_model(path, build_model("gcn3-8", 3, 2))
    resave(path, change, metadata)
    with pytest.raises(DataError, match=message) as caught:
        load_model(path)
    assert str(path) in one_line(caught)


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"model: expected a GraphClassifier or a ProjectedClassifier .*, got Linear"):
        save_model(tmp_path / "a", nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"extra: .* got arch"):
        save_model(tmp_path / "a", build_model("gcn2-4", 3, 2), {"arch": "gin"})
    assert os.listdir(tmp_path) == []


# Graphs.


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_graphs_round_trip(tmp_path, labels, dtype):
    graphs = make_graphs(labels, dtype)
    save_graphs(tmp_path / "graphs", graphs, {"feature_kind": "continuous"})
    loaded, metadata = load_graphs(tmp_path / "graphs")
    assert metadata["feature_kind"] == "continuous"
    assert torch.equal(loaded.x, graphs.x) and loaded.x.dtype == dtype
    for name in ("rowptr", "col", "value", "ptr"):
        assert torch.equal(getattr(loaded.edges, name), getattr(graphs.edges, name)), name
    assert loaded.edges.symmetric
    assert (loaded.y is None) if not labels else torch.equal(loaded.y, graphs.y)


def test_drawn_graphs_are_saved_without_their_capacity(tmp_path):
    layout = af.PairLayout.complete([4, 6])
    edges = af.sample_edges(torch.zeros(layout.num_pairs, requires_grad=True), layout, seed=0, capacity=100)
    save_graphs(tmp_path / "graphs", af.GraphBatch(torch.zeros(10, 2), edges))
    loaded, _ = load_graphs(tmp_path / "graphs")
    assert loaded.edges.col.numel() == edges.num_edges < 100
    assert torch.equal(dense(loaded.edges), dense(edges.to("cpu")))


def set_item(name, position, value):
    def change(tensors):
        tensors[name][position] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("col"), "expected tensor col of torch.int32 and 1 dimensions, got none"),
        (
            lambda t: t.update(x=t["x"].long()),
            "expected tensor x of torch.float32 and 2 dimensions, got shape .* of torch.int64",
        ),
        (lambda t: t.update(rowptr=t["rowptr"].long()), "expected tensor rowptr of torch.int32"),
        (lambda t: t.update(x=t["x"][1:].clone()), "one batch of graphs"),
        (lambda t: t.update(y=t["y"].float()), "one batch of graphs"),
        (lambda t: t.update(value=t["value"][1:].clone()), "edges with a value"),
        (set_item("rowptr", -1, 2), "expected rowptr to ascend"),
        (set_item("rowptr", 1, 99), "expected rowptr to ascend"),
        (set_item("ptr", -1, 11), "expected ptr to ascend from 0 to 10"),
        (set_item("ptr", 0, -1), "expected ptr to ascend"),
        (set_item("col", 0, 9), "both ends in one graph"),
        (set_item("col", 0, -1), "both ends in one graph"),
        (set_item("x", 0, math.nan), "tensor x, got NaN"),
        (set_item("value", 0, math.inf), "tensor value, got NaN"),
    ],
)
def test_damaged_graphs_are_named(tmp_path, change, message):
    save_graphs(tmp_path / "graphs", make_graphs())
    resave(tmp_path / "graphs", change)
    with pytest.raises(DataError, match=message) as caught:
        load_graphs(tmp_path / "graphs")
    one_line(caught)


# GFKD.


def gfkd_state(kind, features=7, width=8, depth=3, classes=2, gin_norms="norm_list", outer="norm"):
    """A state dict with the names of the public code, from parts of its shapes."""
    state = {}

    def add_norm(prefix):
        state.update(
            {f"{prefix}.{name}": tensor for name, tensor in randomise(nn.BatchNorm1d(width)).state_dict().items()}
        )

    for i in range(depth):
        before = features if i == 0 else width
        if kind == "gcn":
            state[f"gcnlayers.{i}.weight"] = normal((before, width), i, torch.float32)
            state[f"gcnlayers.{i}.bias"] = normal(width, 50 + i, torch.float32)
            add_norm(f"norms.{i}")
        else:
            prefix = f"ginlayers.{i}.apply_func"
            state[f"ginlayers.{i}.eps"] = torch.tensor([0.0])
            for j, inner in enumerate((before, width)):
                state[f"{prefix}.mlp.linears.{j}.weight"] = normal((width, inner), 10 * i + j, torch.float32)
                state[f"{prefix}.mlp.linears.{j}.bias"] = normal(width, 70 + i + j, torch.float32)
            add_norm(f"{prefix}.mlp.{gin_norms}.0")
            add_norm(f"{prefix}.{outer}")
    state["linears_prediction.weight"] = normal((classes, width), 90, torch.float32)
    state["linears_prediction.bias"] = normal(classes, 91, torch.float32)
    return state


def by_hand(state, kind, x, adjacency):
    """Logits of one graph, straight from the public names, in eval mode."""

    def norm(h, prefix):
        mean, var, weight, bias = (state[f"{prefix}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return (h - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(h, prefix):
        return h @ state[f"{prefix}.weight"].t() + state[f"{prefix}.bias"]

    for i in range(3):
        if kind == "gcn":
            full = adjacency + torch.eye(len(x))
            scale = full.sum(1) ** -0.5
            h = scale[:, None] * full * scale @ x @ state[f"gcnlayers.{i}.weight"] + state[f"gcnlayers.{i}.bias"]
            h = norm(h, f"norms.{i}").relu()
        else:
            prefix = f"ginlayers.{i}.apply_func"
            h = norm(linear(x + adjacency @ x, f"{prefix}.mlp.linears.0"), f"{prefix}.mlp.norm_list.0").relu()
            h = norm(linear(h, f"{prefix}.mlp.linears.1"), f"{prefix}.norm").relu()
        x = h if i == 0 else h + x
    return linear(x.sum(0), "linears_prediction")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["gcn", "gin"])
def test_gfkd_checkpoints_load_and_give_their_answers(tmp_path, kind, legacy):
    state = gfkd_state(kind)
    path = tmp_path / "teacher.pt"
    torch.save({"epoch": 296, "model": state, "accuracy": 0.8947}, path, _use_new_zipfile_serialization=not legacy)
    model, facts = load_gfkd_checkpoint(path, f"{kind}4-8")
    assert facts == {"epoch": 296, "accuracy": 0.8947} and not model.training
    edges, _ = random_edges([6], symmetric=True, seed=4, dtype=torch.float32)
    edges = edges.with_value(torch.ones_like(edges.value).detach(), symmetric=True)
    x = normal((6, 7), 5, torch.float32)
    torch.testing.assert_close(model(x, edges)[0], by_hand(state, kind, x, dense(edges)), rtol=1e-4, atol=1e-4)


def test_gfkd_checkpoints_under_other_names(tmp_path):
    path = tmp_path / "teacher.pt"
    torch.save({"model": gfkd_state("gin"), "accuracy": np.float64(0.5)}, path)
    first, facts = load_gfkd_checkpoint(path, "gin4-8")
    assert facts == {"accuracy": 0.5}
    state = gfkd_state("gin", gin_norms="batch_norms", outer="bn")
    torch.save({f"module.{name}": tensor for name, tensor in state.items() if "num_batches" not in name}, path)
    second, facts = load_gfkd_checkpoint(path, "gin4-8")
    assert facts == {}
    for name, tensor in first.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(second.state_dict()[name], tensor), name


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_gfkd_checkpoints_that_are_none_are_named(tmp_path):
    path = tmp_path / "teacher.pt"

    def fails(value, message, arch="gcn4-8"):
        torch.save(value, path)
        with pytest.raises(DataError, match=message) as caught:
            load_gfkd_checkpoint(path, arch)
        assert str(path) in one_line(caught)

    state = gfkd_state("gcn")
    fails({"model": state, "extra": Payload(str(tmp_path / "ran"))}, "plain tensors")
    assert not (tmp_path / "ran").exists()
    fails([1, 2], "expected a dictionary of tensors, got list")
    fails({"epoch": 3}, "expected a state dict")
    fails({"weight": torch.zeros(2)}, "expected the tensors of a gcn4-8 of GFKD, got weight")
    fails(state, r"expected width 64 \(gcn4-64\), got width 8", arch="gcn4-64")
    fails(state, "blocks.3.conv.bias of shape .* got none", arch="gcn5-8")
    fails(state, "got blocks.2.* too", arch="gcn3-8")
    fails(state, "expected the tensors of a gin4-8", arch="gin4-8")
    fails(state | {"norms.1.bias": torch.full((8,), math.nan)}, "in tensor blocks.1.norm.bias, got NaN or infinity")
    fails(state | {"gcnlayers.1.weight": torch.zeros(8, 9)}, r"blocks.1.conv.lin.weight of shape \(8, 8\), got")
    path.write_text("hello")
    with pytest.raises(DataError, match="does not read"):
        load_gfkd_checkpoint(path, "gcn4-8")
    with pytest.raises(DataError, match="got no file"):
        load_gfkd_checkpoint(tmp_path / "absent", "gcn4-8")
    with pytest.raises(InputError, match="arch"):
        load_gfkd_checkpoint(path, "resnet")
