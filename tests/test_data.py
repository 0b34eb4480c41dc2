"""Data sets from files, data sets made on the spot, and splits."""

from __future__ import annotations

import os
import re
import shutil
import socket
import zipfile

import networkx
import numpy as np
import pytest
import torch
from real_data import data_root  # noqa: F401

import acgkd_fast as af
from acgkd_fast import data
from acgkd_fast.data import degree_features, gfkd_split, house_or_cycle, load_dataset, stratified_split
from acgkd_fast.errors import DataError, InputError

# Three graphs: a labelled path 0-1-2, a lone node, one edge with a self-loop in the file.
TEXTS = {
    "A": "1, 2\n2, 1\n2, 3\n3, 2\n5, 6\n6, 5\n6, 6\n",
    "graph_indicator": "1\n1\n1\n2\n3\n3\n",
    "graph_labels": "5\n-1\n5\n",
    "node_labels": "3\n5\n3\n5\n4\n4\n",
    "node_attributes": "0.5\n1.5\n2.5\n3.5\n4.5\n5.5\n",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Every test has its own cache, and none may open a connection."""
    monkeypatch.setenv("ACGKD_FAST_CACHE", str(tmp_path / "cache"))

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_tu(folder, parts, name="TINY", texts=TEXTS):
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        (folder / f"{name}_{part}.txt").write_text(texts[part])


BASE = ("A", "graph_indicator", "graph_labels")


def listing(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


@pytest.mark.parametrize("place", ["TINY/raw", "TUDataset/TINY/raw", "TINY", "zip", "TUDataset/zip"])
def test_every_layout_of_the_files_reads_the_same(tmp_path, place):
    pytest.importorskip("torch_geometric")
    root = tmp_path / "root"
    if place.endswith("zip"):
        folder = root / place.removesuffix("zip")
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "TINY.zip", "w", zipfile.ZIP_LZMA) as packed:
            for part in (*BASE, "node_labels"):
                packed.writestr(f"TINY/TINY_{part}.txt", TEXTS[part])
            packed.writestr("../outside/TINY_readme.txt", "no")
    else:
        write_tu(root / place, (*BASE, "node_labels"))
    before = listing(root)
    dataset = load_dataset("TINY", root)
    assert listing(root) == before and not (tmp_path / "outside").exists()
    graphs = dataset.graphs
    assert graphs.sizes.tolist() == [3, 1, 2] and graphs.y.tolist() == [1, 0, 1]
    assert graphs.x.argmax(1).tolist() == [0, 2, 0, 2, 1, 1] and graphs.x.sum(1).tolist() == [1.0] * 6
    assert sorted(map(tuple, graphs.to_edge_index()[0].t().tolist())) == [
        (0, 1),
        (1, 0),
        (1, 2),
        (2, 1),
        (4, 5),
        (5, 4),
    ]
    assert graphs.edges.symmetric and graphs.edges.value.tolist() == [1.0] * 6
    assert (dataset.name, dataset.num_classes, dataset.num_features, dataset.feature_kind) == ("TINY", 2, 3, "one-hot")


def test_features_follow_what_the_files_hold(tmp_path):
    pytest.importorskip("torch_geometric")
    write_tu(tmp_path / "TINY", (*BASE, "node_attributes"))
    attributes = load_dataset("TINY", tmp_path)
    assert attributes.feature_kind == "continuous"
    assert attributes.graphs.x.flatten().tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]

    write_tu(tmp_path / "TINY", ("node_labels",))
    assert load_dataset("TINY", tmp_path).feature_kind == "one-hot"

    (tmp_path / "TINY" / "TINY_node_labels.txt").unlink()
    (tmp_path / "TINY" / "TINY_node_attributes.txt").unlink()
    degrees = load_dataset("TINY", tmp_path)
    assert degrees.feature_kind == "degree" and degrees.num_features == 3
    assert degrees.graphs.x.argmax(1).tolist() == [1, 2, 1, 0, 1, 1]
    assert load_dataset("TINY", tmp_path, degrees_from=[2]).num_features == 2
    wide = load_dataset("TINY", tmp_path, max_degree=9)
    assert wide.num_features == 10 and wide.graphs.x.argmax(1).tolist() == [1, 2, 1, 0, 1, 1]


def test_the_last_degree_bucket_holds_all_above():
    star = torch.tensor([[0] * 70 + list(range(1, 71)), list(range(1, 71)) + [0] * 70])
    edges = af.EdgeSample.from_edge_index(star, torch.tensor([0, 71, 72]))
    x = degree_features(edges, 63)
    assert x.shape == (72, 64) and x.sum().item() == 72
    assert x.argmax(1).tolist() == [63] + [1] * 70 + [0]
    with pytest.raises(InputError, match="max_degree: expected 0 or more"):
        degree_features(edges, -1)


def test_the_cache_serves_without_torch_geometric_and_sees_new_files(tmp_path, monkeypatch):
    pytest.importorskip("torch_geometric")
    write_tu(tmp_path / "TINY", (*BASE, "node_labels"))
    first = load_dataset("TINY", tmp_path)
    assert [name for name in os.listdir(tmp_path / "cache") if name != "TUDataset"] == []

    def unwanted(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(data, "_read_tu", unwanted)
        assert torch.equal(load_dataset("TINY", tmp_path).graphs.x, first.graphs.x)
        # A copy in another place is not taken for this one.
        shutil.copytree(tmp_path / "TINY", tmp_path / "other" / "TINY")
        with pytest.raises(AssertionError, match="read again"):
            load_dataset("TINY", tmp_path / "other")
    write_tu(tmp_path / "TINY", BASE, texts=TEXTS | {"graph_labels": "0\n1\n2\n"})
    assert load_dataset("TINY", tmp_path).num_classes == 3
    elsewhere = tmp_path / "elsewhere"
    load_dataset("TINY", tmp_path, cache_dir=elsewhere)
    assert len(os.listdir(elsewhere / "TUDataset")) == 1


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    pytest.importorskip("torch_geometric")

    def fails(message, name="TINY", root=tmp_path):
        with pytest.raises(DataError, match=message) as caught:
            load_dataset(name, root)
        text = str(caught.value)
        assert "\n" not in text and len(text) < 400, text
        reading = tmp_path / "cache"
        assert not reading.exists() or not [n for n in os.listdir(reading) if n.startswith("reading-")]

    fails(rf"TINY/raw/TINY_A.txt .* or TINY.zip in {re.escape(str(tmp_path))} .* got neither")
    fails("expected the name of a TUDataset", name="../TINY")
    fails("got neither", root=tmp_path / "absent")
    write_tu(tmp_path / "TINY", ("A", "graph_indicator"))
    fails("got neither")
    write_tu(tmp_path / "TINY", BASE, texts=TEXTS | {"A": "1, x\n"})
    fails("do not parse")
    write_tu(tmp_path / "TINY", BASE, texts=TEXTS | {"graph_indicator": "1\n"})
    fails("do not parse")
    # torch-geometric loses the graphs without edges at the end.
    cut = TEXTS | {"graph_indicator": "1\n1\n1\n2\n2\n3\n", "A": "1, 2\n2, 1\n4, 5\n5, 4\n"}
    write_tu(tmp_path / "TINY", BASE, texts=cut)
    fails("expected 3 graphs, got the first 2")
    shutil.rmtree(tmp_path / "TINY")
    (tmp_path / "TINY.zip").write_text("hello")
    fails("do not parse")
    with zipfile.ZipFile(tmp_path / "TINY.zip", "w") as packed:
        packed.writestr("TINY/TINY_A.txt", TEXTS["A"])
    fails("expected TINY_graph_indicator.txt in")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    pytest.importorskip("torch_geometric")
    write_tu(tmp_path / "TINY", BASE)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="expected to unpack into"):
        load_dataset("TINY", tmp_path, cache_dir=tmp_path / "file" / "cache")


def test_without_torch_geometric_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_geometric", None)
    write_tu(tmp_path / "TINY", BASE)
    with pytest.raises(DataError, match="TINY: expected torch-geometric to be installed"):
        load_dataset("TINY", tmp_path)
    with pytest.raises(DataError, match="house_or_cycle: expected torch-geometric to be installed"):
        house_or_cycle(4)


# Figures published for the data sets, and counted in their files.
STATISTICS = {
    "MUTAG": (188, 7, 7442, [63, 125], "one-hot"),
    "PTC_MR": (344, 18, 10108, [192, 152], "one-hot"),
    "PROTEINS": (1113, 3, 162088, [663, 450], "one-hot"),
    "IMDB-BINARY": (1000, 64, 193062, [500, 500], "degree"),
    "REDDIT-BINARY": (2000, 64, 1991016, [1000, 1000], "degree"),
}


@pytest.mark.parametrize(
    "name", ["MUTAG", "PTC_MR", *(pytest.param(n, marks=pytest.mark.slow) for n in list(STATISTICS)[2:])]
)
def test_real_data_sets_have_their_published_statistics(data_root, name):  # noqa: F811
    pytest.importorskip("torch_geometric")
    dataset = load_dataset(name, data_root)
    graphs, (count, width, edges, classes, kind) = dataset.graphs, STATISTICS[name]
    assert graphs.num_graphs == count and graphs.x.shape[1] == width and graphs.edges.num_edges == edges
    assert graphs.y.bincount().tolist() == classes and dataset.feature_kind == kind
    assert graphs.edges.symmetric and not graphs.edges.has_self_loops()
    assert torch.equal(graphs.x.sum(1), torch.ones(graphs.num_nodes))


# Splits.


def test_gfkd_split_is_numpys_shuffle_of_the_positions():
    train, test = gfkd_split(188)
    assert (len(train), len(test)) == (131, 57)
    np.random.seed(29)
    positions = list(range(188))
    np.random.shuffle(positions)
    assert train.tolist() + test.tolist() == positions
    assert gfkd_split(188, seed=30)[0].tolist() != train.tolist()
    assert [len(part) for part in gfkd_split(1)] == [0, 1]


def test_splits_leave_the_global_streams_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    expected = np.random.rand(), torch.rand(1)
    np.random.seed(0)
    torch.manual_seed(0)
    gfkd_split(10)
    stratified_split(torch.arange(10) % 2, 0)
    assert (np.random.rand(), torch.rand(1)) == expected


def test_stratified_split_keeps_the_shares():
    y = torch.tensor([0] * 50 + [1] * 20 + [2] * 2 + [3])
    train, test = stratified_split(y, seed=3)
    assert sorted(train.tolist() + test.tolist()) == list(range(73))
    assert y[train].bincount(minlength=4).tolist() == [35, 14, 1, 1]
    assert y[test].bincount(minlength=4).tolist() == [15, 6, 1, 0]
    assert train.tolist() == stratified_split(y, seed=3)[0].tolist() != stratified_split(y, seed=4)[0].tolist()
    # Classes come mixed, as mini-batches in this order should.
    assert y[train].tolist() != sorted(y[train].tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gfkd_split(0), "num_graphs"),
        (lambda: gfkd_split(5, fraction=1.0), "fraction"),
        (lambda: stratified_split(torch.zeros(3), 0), "y: expected dtype int64"),
        (lambda: stratified_split(torch.zeros(3).long(), 0, fraction=0.0), "fraction"),
        (lambda: house_or_cycle(1), "num_graphs"),
        (lambda: house_or_cycle(4, num_nodes=6), "num_nodes: expected at least 7"),
    ],
)
def test_bad_numbers_are_named(call, message):
    pytest.importorskip("torch_geometric")
    with pytest.raises(InputError, match=message):
        call()


# House or cycle.


@pytest.mark.parametrize("num_nodes", [7, 25])
def test_house_or_cycle_is_a_tree_with_one_motif(num_nodes):
    pytest.importorskip("torch_geometric")
    dataset = house_or_cycle(41, seed=1, num_nodes=num_nodes)
    graphs = dataset.graphs
    assert graphs.y.bincount().tolist() in ([20, 21], [21, 20])
    assert (graphs.x == 1).all() and graphs.x.shape == (41 * num_nodes, 1)
    assert (dataset.feature_kind, dataset.num_classes, dataset.num_features) == ("constant", 2, 1)
    assert graphs.edges.symmetric
    for number in range(41):
        one = graphs.select([number])
        graph = networkx.Graph(one.to_edge_index()[0].t().tolist())
        house = int(one.y) == 0
        assert one.num_nodes == num_nodes == graph.number_of_nodes() and networkx.is_connected(graph)
        assert graph.number_of_edges() == num_nodes + house and one.edges.num_edges == 2 * (num_nodes + house)
        core = networkx.k_core(graph, 2)
        motif = networkx.house_graph() if house else networkx.cycle_graph(5)
        assert networkx.is_isomorphic(core, motif)
        # The motif hangs on one bridge, so the rest is one tree.
        rest = graph.subgraph(set(graph) - set(core))
        assert networkx.is_tree(rest)


def test_house_or_cycle_trees_attach_by_degree():
    """A Barabasi-Albert tree of three nodes is a path; of four, a star in half the cases: (2/4)."""
    random = np.random.default_rng(0)
    trees = data._random_trees(20_000, 4, random)
    centre = [np.bincount(tree.ravel(), minlength=4).max() for tree in trees]
    share = np.mean(np.array(centre) == 3)
    assert abs(share - 0.5) < 5 * (0.25 / 20_000) ** 0.5


def test_house_or_cycle_is_reproducible_and_permuted():
    pytest.importorskip("torch_geometric")
    np.random.seed(0)
    torch.manual_seed(0)
    expected = np.random.rand(), torch.rand(1)
    np.random.seed(0)
    torch.manual_seed(0)
    first = house_or_cycle(40, seed=7).graphs
    assert (np.random.rand(), torch.rand(1)) == expected
    again, other = house_or_cycle(40, seed=7).graphs, house_or_cycle(40, seed=8).graphs
    assert torch.equal(first.edges.col, again.edges.col) and torch.equal(first.y, again.y)
    assert first.edges.col.tolist() != other.edges.col.tolist()
    # Neither the classes nor the motif's nodes sit in fixed places.
    assert first.y.tolist() != [0, 1] * 20
    cores = [
        frozenset(networkx.k_core(networkx.Graph(first.select([g]).to_edge_index()[0].t().tolist()), 2))
        for g in range(40)
    ]
    assert len(set(cores)) > 35
