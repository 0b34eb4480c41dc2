"""Files of GFKD, DosCond and PyTorch Geometric: round trips, the forms that the originals write, damaged files."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from helpers import normal, random_edges
from hypothesis import given, settings
from hypothesis import strategies as st

import acgkd_fast as af
from acgkd_fast.checkpoints import load_gfkd_checkpoint, save_gfkd_checkpoint, save_graphs
from acgkd_fast.errors import DataError, InputError
from acgkd_fast.formats import doscond, gfkd
from acgkd_fast.nn import build_model


def labelled(sizes=(4, 1, 5), symmetric=False, seed=0, features=3):
    edges, _ = random_edges(list(sizes), symmetric=symmetric, seed=seed, dtype=torch.float32)
    edges = edges.with_value(torch.ones_like(edges.value), symmetric=symmetric)
    kinds = torch.from_numpy(np.random.default_rng(seed).integers(features, size=sum(sizes)))
    x = torch.nn.functional.one_hot(kinds, features).float()
    return af.GraphBatch(x, edges, torch.arange(len(sizes)) % 2)


def same_graphs(found, wanted):
    assert torch.equal(found.x, wanted.x) and torch.equal(found.y, wanted.y) and torch.equal(found.ptr, wanted.ptr)
    assert torch.equal(found.edges.to_dense()[0], wanted.edges.to_dense()[0])


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400, text
    return text


# GFKD's text.


def gfkd_text(graphs):
    """What GFKD's own writer makes of matrices: numpy's print of the neighbours, wrapped lines joined again."""
    dense, _ = graphs.edges.to_dense()
    lines = [str(graphs.num_graphs)]
    for g, n in enumerate(graphs.sizes.tolist()):
        lines.append(f"{n} {int(graphs.y[g])}")
        first = int(graphs.ptr[g])
        for j in range(n):
            # Their row sends, our row receives.
            neighbours = dense[g, :n, j].nonzero().flatten().numpy()
            text = str(neighbours)[1:-1] if len(neighbours) else str(neighbours)
            lines.append(f"{int(graphs.x[first + j].argmax())} {len(neighbours)} {text}".replace("\n", " "))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("symmetric", [False, True])
def test_gfkds_own_text_is_read(tmp_path, symmetric):
    graphs = labelled((12, 1, 40), symmetric)
    text = gfkd_text(graphs)
    assert "[]" in text
    (tmp_path / "fake.txt").write_text(text)
    same_graphs(gfkd.read_fake_graphs(tmp_path / "fake.txt", 3), graphs)


@given(st.lists(st.integers(1, 7), max_size=4), st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_fake_graphs_round_trip(tmp_path_factory, sizes, seed):
    path = tmp_path_factory.mktemp("text") / "fake.txt"
    graphs = labelled(sizes, seed=seed)
    gfkd.write_fake_graphs(path, graphs)
    same_graphs(gfkd.read_fake_graphs(path, 3), graphs)


def test_written_text_is_what_gfkd_reads(tmp_path):
    edges = af.EdgeSample.from_edge_index(torch.tensor([[0, 0, 2], [2, 1, 1]]), torch.tensor([0, 3]))
    graphs = af.GraphBatch(torch.eye(3)[[1, 0, 2]], edges, torch.tensor([1]))
    gfkd.write_fake_graphs(tmp_path / "a", graphs)
    assert (tmp_path / "a").read_text() == "1\n3 1\n1 2 1 2\n0 0 []\n2 1 1\n"


def test_absent_pairs_of_a_sample_are_not_written(tmp_path):
    layout = af.PairLayout.complete([6, 6])
    options = {"estimator": "sparse_straight_through", "absent_rate": 1.0}
    edges = af.sample_edges(torch.zeros(layout.num_pairs), layout, seed=0, **options)
    assert (edges.value == 0).any()
    graphs = af.GraphBatch(torch.eye(4)[torch.arange(12) % 4], edges, torch.tensor([0, 1]))
    gfkd.write_fake_graphs(tmp_path / "a", graphs)
    same_graphs(gfkd.read_fake_graphs(tmp_path / "a", 4), graphs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the number of graphs, got 'the end"),
        ("x\n", "line 1: expected the number of graphs, got 'x'"),
        ("1\n2\n", "line 2: expected 'nodes label' of a graph, got '2'"),
        ("1\n0 1\n", "line 2: expected at least one node"),
        ("1\n1 0\n", "line 3: expected 'label degree neighbours...' of a node, got 'the end"),
        ("1\n1 0\n3\n", "line 3: expected 'label degree neighbours...' of a node, got '3'"),
        ("1\n2 0\n0 1 1\n0 2 0\n", "line 4: expected a label from 0 and 2 neighbours"),
        ("1\n2 0\n0 1 2\n0 0 []\n", "line 3: expected neighbours in 0..1"),
        ("1\n2 0\n0 1 1\n0 1 zero\n", "line 4: expected 'label degree"),
        ("1\n1 0\n-1 0\n", "line 3: expected a label from 0"),
        ("1\n1 0\n0 0 []\n7\n", "line 4: expected the end of the file, got '7'"),
        ("1\n1 0\n5 0 []\n", "expected node labels below 3, got 5"),
        (b"\xff\xfe\x00", "expected text"),
    ],
)
def test_damaged_text_is_named(tmp_path, text, message):
    (tmp_path / "a").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        gfkd.read_fake_graphs(tmp_path / "a", 3)
    assert "a" in one_line(caught)


def test_graphs_that_the_text_cannot_hold_are_refused(tmp_path):
    graphs = labelled()
    weighted = af.GraphBatch(graphs.x, graphs.edges.with_value(graphs.edges.value * 0.5), graphs.y)
    loops = af.EdgeSample.from_edge_index(torch.tensor([[0], [0]]), torch.tensor([0, 1]))
    cases = {
        "labels y": af.GraphBatch(graphs.x, graphs.edges),
        "one-hot": af.GraphBatch(graphs.x * 0.5, graphs.edges, graphs.y),
        "edge values 0 or 1": weighted,
        "no self-loops": af.GraphBatch(torch.ones(1, 1), loops, torch.tensor([0])),
    }
    for message, bad in cases.items():
        with pytest.raises(InputError, match=message):
            gfkd.write_fake_graphs(tmp_path / "a", bad)
    assert os.listdir(tmp_path) == []


# GFKD's lists of parameters.


@pytest.mark.parametrize("legacy", [False, True])
def test_gfkd_parameters_round_trip(tmp_path, legacy):
    logits = [normal((n, n), n, torch.float32) for n in (3, 1, 5)]
    rows = [normal((n, 4), 10 + n, torch.float32).requires_grad_() for n in (3, 1, 5)]
    paths = tmp_path / "stru.pt", tmp_path / "feat.pt"
    for path, value in zip(paths, (logits, rows), strict=True):
        torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    found = gfkd.read_parameters(*paths)
    for have, want in zip((*found[0], *found[1]), (*logits, *rows), strict=True):
        assert torch.equal(have, want) and not have.requires_grad
    pseudo = gfkd.to_pseudo_graphs(*found, torch.tensor([0, 1, 0]))
    # An edge j -> k of theirs is our row k, column j.
    pair = pseudo.layout.pair_index(torch.tensor(1), torch.tensor(2))
    assert pseudo.logits[pair] == logits[0][2, 1]
    gfkd.write_parameters(*paths, pseudo)
    again = gfkd.read_parameters(*paths)
    for have, want in zip(again[0], logits, strict=True):
        off = ~torch.eye(len(want), dtype=torch.bool)
        assert torch.equal(have[off], want[off]) and not have.diagonal().any()
    assert all(torch.equal(have, want) for have, want in zip(again[1], rows, strict=True))


def test_undirected_pseudo_graphs_are_no_gfkd_parameters(tmp_path):
    start = labelled(symmetric=True)
    pseudo = af.PseudoGraphs.from_graphs(start, feature_kind="one-hot")
    with pytest.raises(InputError, match="complete directed layout"):
        gfkd.write_parameters(tmp_path / "a", tmp_path / "b", pseudo)


@pytest.mark.parametrize(
    ("structure", "features", "message"),
    [
        ({"a": 1}, [torch.zeros(2, 3)], "expected a list of matrices, got dict"),
        ([torch.zeros(2)], [torch.zeros(2, 3)], "expected a list of matrices"),
        ([torch.zeros(2, 3)], [torch.zeros(2, 3)], "square matrices"),
        ([torch.zeros(2, 2)], [torch.zeros(3, 3)], "square matrices as large"),
        ([torch.zeros(2, 2)], [torch.full((2, 3), torch.nan)], "finite"),
        ([torch.zeros(2, 2, dtype=torch.int64)], [torch.zeros(2, 3)], "floating-point"),
        ([], [], "at least one matrix"),
        ([torch.zeros(2, 2)] * 2, [torch.zeros(2, 3), torch.zeros(2, 4)], "one width"),
    ],
)
def test_damaged_parameters_are_named(tmp_path, structure, features, message):
    torch.save(structure, tmp_path / "stru")
    torch.save(features, tmp_path / "feat")
    with pytest.raises(DataError, match=message) as caught:
        gfkd.read_parameters(tmp_path / "stru", tmp_path / "feat")
    one_line(caught)


# GFKD's checkpoints.


@pytest.mark.parametrize("arch", ["gcn4-8", "gin3-8"])
def test_gfkd_checkpoints_round_trip(tmp_path, arch):
    torch.manual_seed(0)
    model = build_model(arch, 7, 2).eval()
    save_gfkd_checkpoint(tmp_path / "ckpt", model, {"epoch": 3, "accuracy": 0.5})
    loaded, facts = load_gfkd_checkpoint(tmp_path / "ckpt", arch)
    assert facts == {"epoch": 3, "accuracy": 0.5}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    names = torch.load(tmp_path / "ckpt", weights_only=True)["model"]
    if arch.startswith("gcn"):
        assert names["gcnlayers.1.weight"].shape == (8, 8) and names["gcnlayers.0.weight"].shape == (7, 8)
    else:
        assert {"ginlayers.0.eps", "ginlayers.1.apply_func.mlp.norm_list.0.running_var"} <= set(names)
    assert "linears_prediction.bias" in names


@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8"])
def test_orders_and_self_loops_of_gfkd(tmp_path, arch):
    torch.manual_seed(0)
    model = build_model(arch, 3, 2).eval()
    save_gfkd_checkpoint(tmp_path / "ckpt", model)
    graphs = labelled(symmetric=True)
    loaded, _ = load_gfkd_checkpoint(tmp_path / "ckpt", arch, feature_order=[2, 0, 1], class_order=[1, 0])
    theirs = torch.zeros_like(graphs.x)
    theirs[:, [2, 0, 1]] = graphs.x
    torch.testing.assert_close(loaded(graphs.x, graphs.edges), model(theirs, graphs.edges)[:, [1, 0]])

    looped, _ = load_gfkd_checkpoint(tmp_path / "ckpt", arch, self_loops=True)
    edge_index, _ = graphs.to_edge_index()
    with_loops = torch.cat([edge_index, torch.arange(10).expand(2, -1)], 1)
    wanted = model(graphs.x, with_loops, None, graphs.batch())
    torch.testing.assert_close(looped(graphs.x, graphs.edges), wanted, rtol=1e-4, atol=1e-5)
    for bad in ([0, 1], [0, 1, 1], [0, 1, 3]):
        with pytest.raises(InputError, match="feature_order: expected each of"):
            load_gfkd_checkpoint(tmp_path / "ckpt", arch, feature_order=bad)


# DosCond.


def test_condensed_graphs_round_trip(tmp_path):
    logits, features = normal((3, 4, 4), 0, torch.float32), normal((3, 4, 2), 1, torch.float32)
    torch.save([logits.requires_grad_(), features.requires_grad_()], tmp_path / "theirs.pt")
    found = doscond.read_condensed(tmp_path / "theirs.pt")
    doscond.write_condensed(tmp_path / "ours.pt", *found)
    again = doscond.read_condensed(tmp_path / "ours.pt")
    for have, want in zip((*found, *again), (logits, features) * 2, strict=True):
        assert torch.equal(have, want) and not have.requires_grad
    graphs = doscond.to_graphs(*found, torch.tensor([0, 0, 1]))
    wanted = (((logits + logits.mT) / 2 > 0) & ~torch.eye(4, dtype=torch.bool)).float()
    assert torch.equal(graphs.edges.to_dense()[0], wanted) and graphs.edges.symmetric
    with pytest.raises(InputError, match="logits: expected a tensor of shape"):
        doscond.write_condensed(tmp_path / "a", logits[:2], features)


def test_graphs_by_class_round_trip(tmp_path):
    data = pytest.importorskip("torch_geometric.data", reason="DosCond's own writer is PyTorch Geometric's collate")
    graphs = labelled((4, 1, 5, 3), seed=3)
    order = torch.tensor([0, 2, 1, 3])
    items = graphs.select(order).to_pyg().to_data_list()
    memory = {}
    for label in (0, 1):
        collated, slices = data.InMemoryDataset.collate([item for item in items if int(item.y) == label])
        memory[label] = ({"x": collated.x, "edge_index": collated.edge_index, "y": collated.y}, slices)
    torch.save(memory, tmp_path / "theirs.pt")
    same_graphs(doscond.read_memory(tmp_path / "theirs.pt"), graphs.select(order))
    doscond.write_memory(tmp_path / "ours.pt", graphs)
    same_graphs(doscond.read_memory(tmp_path / "ours.pt"), graphs.select(order))
    ours = torch.load(tmp_path / "ours.pt", weights_only=True)
    for label in (0, 1):
        for name in ("x", "edge_index", "y"):
            assert torch.equal(ours[label][0][name].sort()[0], memory[label][0][name].sort()[0])
            assert torch.equal(ours[label][1][name], memory[label][1][name])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(2, 3, 3)], "expected .logits"),
        ([torch.zeros(2, 3, 3), torch.zeros(2, 4, 3)], "expected .logits"),
        ([torch.zeros(2, 3, 3), torch.full((2, 3, 1), torch.inf)], "finite"),
        (3, "expected .logits"),
    ],
)
def test_damaged_condensed_graphs_are_named(tmp_path, value, message):
    torch.save(value, tmp_path / "a")
    with pytest.raises(DataError, match=message) as caught:
        doscond.read_condensed(tmp_path / "a")
    one_line(caught)
    with pytest.raises(DataError) as caught:
        doscond.read_memory(tmp_path / "a")
    one_line(caught)


class Payload:
    def __reduce__(self):
        return os.getcwd, ()


def test_no_file_runs_what_it_holds_and_none_is_half_written(tmp_path, monkeypatch):
    torch.save([Payload(), Payload()], tmp_path / "a")
    for read in (doscond.read_condensed, doscond.read_memory, lambda p: gfkd.read_parameters(p, p)):
        with pytest.raises(DataError, match="plain tensors"):
            read(tmp_path / "a")
        with pytest.raises(DataError, match="got no file"):
            read(tmp_path / "absent")
    before = (tmp_path / "a").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    graphs = labelled()
    for write in (gfkd.write_fake_graphs, doscond.write_memory):
        with pytest.raises(DataError, match="No space left"):
            write(tmp_path / "a", graphs)
    assert (tmp_path / "a").read_bytes() == before and os.listdir(tmp_path) == ["a"]


# PyTorch Geometric.


def test_a_run_folder_is_a_data_set(tmp_path):
    pytest.importorskip("torch_geometric")
    from torch_geometric.loader import DataLoader

    from acgkd_fast.formats.pyg import PseudoGraphDataset

    graphs = labelled((4, 1, 5, 3), symmetric=True)
    save_graphs(tmp_path / "pseudo_graphs.safetensors", graphs)
    dataset = PseudoGraphDataset(tmp_path)
    assert len(dataset) == 4 and dataset.num_classes == 2 and dataset.num_features == 3
    assert set(dataset[0].keys()) == {"x", "edge_index", "y", "num_nodes"}
    (batch,) = DataLoader(dataset, batch_size=4)
    same_graphs(af.GraphBatch.from_pyg(batch), graphs)
    same_graphs(af.GraphBatch.from_pyg(list(dataset[[2, 0]])), graphs.select([2, 0]))
    big = PseudoGraphDataset(graphs, pre_filter=lambda item: item.num_nodes > 3)
    assert [item.num_nodes for item in big] == [4, 5]
    halves = af.GraphBatch(graphs.x, graphs.edges.with_value(graphs.edges.value / 2), graphs.y)
    assert PseudoGraphDataset(halves)[0].edge_weight.eq(0.5).all()
    with pytest.raises(DataError, match="got no file"):
        PseudoGraphDataset(tmp_path / "nothing")
