"""Training that resumes exactly, and the teachers of the studies."""

from __future__ import annotations

import os

import pytest
import torch
from real_data import data_root  # noqa: F401
from test_teachers import hard_graphs

import acgkd_fast as af
from acgkd_fast import training
from acgkd_fast.data import gfkd_split, house_or_cycle, load_dataset
from acgkd_fast.errors import DataError, InputError
from acgkd_fast.nn import build_model
from acgkd_fast.teachers import default_epochs, evaluate, train_classifier


def parity_graphs(count=40, seed=0):
    """Graphs whose feature sum tells the class: learnt in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    sizes = torch.randint(3, 8, (count,), generator=generator)
    ptr = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    x = torch.rand(int(ptr[-1]), 3, generator=generator)
    x[:, 0] += y.repeat_interleave(sizes)
    ring = torch.arange(int(ptr[-1]))
    following = torch.where(torch.isin(ring + 1, ptr), ring, ring + 1)
    edge_index = torch.stack([torch.cat([ring, following]), torch.cat([following, ring])])
    edge_index = edge_index[:, edge_index[0] != edge_index[1]]
    return af.GraphBatch(x, af.EdgeSample.from_edge_index(edge_index, ptr), y)


def weights(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


@pytest.mark.parametrize("arch", ["gcn3-16", "gin3-16"])
def test_training_learns_and_repeats_itself(arch):
    graphs = parity_graphs()
    losses = []
    state = torch.random.get_rng_state()
    model = train_classifier(
        arch, graphs, epochs=30, seed=1, progress=lambda epoch, v: losses.append((epoch, v["loss"]))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [epoch for epoch, _ in losses] == list(range(1, 31))
    scores = evaluate(model, graphs)
    assert scores["accuracy"] == 1.0 and scores["loss"] < 0.2 and not model.training
    torch.manual_seed(99)
    assert torch.equal(weights(train_classifier(arch, graphs, epochs=30, seed=1)), weights(model))
    assert not torch.equal(weights(train_classifier(arch, graphs, epochs=30, seed=2)), weights(model))


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 13, 20, 25])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, stop_at):
    graphs, path = parity_graphs(), tmp_path / "state"
    whole = train_classifier("gin3-8", graphs, epochs=25, seed=3, weight_decay=1e-3)

    def stop(epoch, _):
        if epoch == stop_at:
            raise Stop

    with pytest.raises(Stop):
        train_classifier("gin3-8", graphs, epochs=25, seed=3, weight_decay=1e-3, progress=stop, checkpoint=path)
    epochs = []
    resumed = train_classifier(
        "gin3-8", graphs, epochs=25, seed=3, weight_decay=1e-3, progress=lambda e, _: epochs.append(e), checkpoint=path
    )
    # A state is written after every tenth epoch, when its progress has been told.
    assert epochs[0] == 10 * ((stop_at - 1) // 10) + 1
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    graphs, path = parity_graphs(), tmp_path / "state"
    settings = {"epochs": 20, "seed": 3, "lr": 0.01}
    train_classifier("gcn3-8", graphs, **settings, checkpoint=path)
    cases = {
        "epochs 30, got 20": ("gcn3-8", graphs, settings | {"epochs": 30}),
        "seed 4, got 3": ("gcn3-8", graphs, settings | {"seed": 4}),
        "lr 0.02, got 0.01": ("gcn3-8", graphs, settings | {"lr": 0.02}),
        "arch gin3-8, got gcn3-8": ("gin3-8", graphs, settings),
        "graphs .*, got": ("gcn3-8", parity_graphs(seed=1), settings),
    }
    for message, (arch, data, options) in cases.items():
        with pytest.raises(DataError, match=message):
            train_classifier(arch, data, **options, checkpoint=path)
    path.write_text("damaged")
    with pytest.raises(DataError, match="does not read"):
        train_classifier("gcn3-8", graphs, **settings, checkpoint=path)
    assert os.listdir(tmp_path) == ["state"]


def single_nodes(count):
    edges = af.EdgeSample.from_edge_index(torch.empty(2, 0, dtype=torch.int64), torch.arange(count + 1))
    return af.GraphBatch(torch.rand(count, 2), edges, torch.arange(count) % 2)


@pytest.mark.parametrize(("count", "batch_size"), [(2, 1), (5, 1), (5, 2), (5, 4), (33, 32)])
def test_a_batch_of_one_node_joins_its_neighbour(count, batch_size):
    """BatchNorm refuses one row; every graph still takes part in every epoch."""
    model = train_classifier("gcn2-4", single_nodes(count), epochs=2, batch_size=batch_size)
    assert weights(model).isfinite().all()
    for sizes in (torch.ones(count, dtype=torch.int64), (torch.arange(count) + 1) % 3):
        batches = training.shuffled_batches(sizes, batch_size, 0, 1)
        assert sorted(torch.cat(batches).tolist()) == list(range(count))
        assert all(int(sizes[batch].sum()) >= 2 for batch in batches)


def test_mini_batches_are_shuffled_anew_every_epoch():
    sizes = torch.full((10,), 4)
    first, second = (training.shuffled_batches(sizes, 4, 7, epoch) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert torch.equal(torch.cat(first), torch.cat(training.shuffled_batches(sizes, 4, 7, 0)))


@pytest.mark.parametrize(
    ("graphs", "options", "message"),
    [
        (af.GraphBatch(torch.zeros(13, 4), hard_graphs().edges), {}, "expected at least one graph with labels"),
        (hard_graphs(classes=3), {"num_classes": 2}, "graphs: expected labels below 2, got 2"),
        (hard_graphs(width=5), {"model": build_model("gcn2-4", 4, 2)}, "graphs: expected features of width 4"),
        (hard_graphs(), {"epochs": -1}, "epochs"),
        (hard_graphs(), {"lr": 0.0}, "lr"),
        (hard_graphs(), {"batch_size": 0}, "batch_size"),
        (hard_graphs(), {"seed": -1}, "seed"),
        (hard_graphs(), {"model": "resnet"}, "arch"),
        (single_nodes(1), {}, "at least 2 nodes in all, got 1"),
    ],
)
def test_trainings_that_cannot_be_are_named(graphs, options, message):
    model = options.pop("model", "gcn2-4")
    with pytest.raises(InputError, match=message):
        train_classifier(model, graphs, **{"epochs": 1} | options)


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    train_classifier("gcn2-4", parity_graphs(8), epochs=3, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_default_epochs_are_about_1500_steps():
    assert [default_epochs(n) for n in (10, 131, 420, 5000)] == [300, 300, 114, 30]


# The teachers of the studies, with default settings.


@pytest.mark.slow
def test_house_or_cycle_teacher_knows_the_structure():
    pytest.importorskip("torch_geometric")
    graphs = house_or_cycle().graphs
    train, test = gfkd_split(600)
    model = train_classifier("gcn5-64", graphs.select(train))
    assert evaluate(model, graphs.select(test))["accuracy"] >= 0.97


@pytest.mark.slow
def test_mutag_teacher_beats_the_majority(data_root, tmp_path):  # noqa: F811
    pytest.importorskip("torch_geometric")
    graphs = load_dataset("MUTAG", data_root, cache_dir=tmp_path).graphs
    train, test = gfkd_split(188)
    model = train_classifier("gcn5-64", graphs.select(train))
    scores = evaluate(model, graphs.select(test))
    assert scores["num_graphs"] == 57 and scores["accuracy"] > scores["majority"] + 0.05
