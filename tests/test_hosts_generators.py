"""The generators of PyGIP and of the STEALGNN reimplementation: same arguments, and a structure that trains."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from host_loops import StealHost
from torch import nn

import acgkd_fast as af
from acgkd_fast.errors import InputError
from acgkd_fast.hosts import pygip, stealgnn


class Net(nn.Module):
    """A node classifier as extraction code has them, made of our layers."""

    def __init__(self, features=5, classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = af.nn.GCNConv(features, 8), af.nn.GCNConv(8, classes)

    def forward(self, x, edges, weight=None):
        return self.second(torch.relu(self.first(x, edges, weight)), edges, weight)


def pair_of_generators(kind, seed=0, nodes=9):
    torch.manual_seed(seed)
    host = StealHost(4, nodes, 5, kind, 0.3)
    ours = stealgnn.GraphGenerator(4, nodes, 5, kind, 0.3)
    ours.load_state_dict(host.state_dict())
    return host, ours


# With two nodes the rows of "full_param" sum to less than 1.
@pytest.mark.parametrize("nodes", [2, 9])
@pytest.mark.parametrize("kind", stealgnn.GENERATOR_TYPES)
def test_stealgnn_gives_the_hosts_features_and_matrix(kind, nodes):
    host, ours = pair_of_generators(kind, nodes=nodes)
    for seed in range(3):
        z = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
        for mine, other in zip(ours(z), host(z), strict=True):
            torch.testing.assert_close(mine, other)
        adj = host(z)[1]
        assert torch.equal(ours.adj_to_edge_index(ours(z)[1]), adj.nonzero().t())


def test_stealgnns_cut_has_a_gradient_and_the_hosts_has_none():
    host, ours = pair_of_generators("cosine")
    z, weight = torch.randn(1, 4), torch.randn(9, 9)
    assert not host(z)[1].requires_grad
    grads = torch.autograd.grad((ours(z)[1] * weight).sum(), list(ours.parameters()))
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("kind", stealgnn.GENERATOR_TYPES)
def test_stealgnns_edges_alone_carry_a_gradient(kind):
    _, ours = pair_of_generators(kind)
    x, edges = ours.graph(torch.randn(1, 4, generator=torch.Generator().manual_seed(1)))
    structure = ours.feature_gen if kind == "cosine" else ours.structure_gen
    grads = torch.autograd.grad(Net()(x.detach(), edges).square().sum(), list(structure.parameters()))
    assert all(grad.any() for grad in grads)


def steal(generator, query, steps=4, surrogate_steps=3):
    """Type I's loop: the generator seeks disagreement, the surrogate learns the victim's labels."""
    victim, surrogate = Net(seed=1).eval(), Net(seed=2)
    to_surrogate = torch.optim.Adam(surrogate.parameters(), lr=0.01)
    to_generator = torch.optim.Adam(generator.parameters(), lr=1e-3)
    rng, losses, structure = torch.Generator().manual_seed(0), [], []
    for _ in range(steps):
        to_generator.zero_grad()
        x, edges = query(generator, torch.randn(1, 4, generator=rng))
        loss = -nn.functional.cross_entropy(surrogate(x, edges), victim(x, edges).argmax(1))
        loss.backward()
        structure.append([p.grad is not None and bool(p.grad.any()) for p in generator.parameters()])
        to_generator.step()
        for _ in range(surrogate_steps):
            to_surrogate.zero_grad()
            with torch.no_grad():
                x, edges = query(generator, torch.randn(1, 4, generator=rng))
                labels = victim(x, edges).argmax(1)
            loss = nn.functional.cross_entropy(surrogate(x, edges), labels)
            loss.backward()
            to_surrogate.step()
            losses.append(loss.item())
    return losses, structure


def host_query(generator, z):
    x, adj = generator(z)
    return x, adj.nonzero().t()


def test_the_theft_goes_as_before_while_the_generator_rests():
    host, ours = pair_of_generators("cosine")
    for generator in (host, ours):
        generator.requires_grad_(False)
    results = []
    for generator, query in ((host, host_query), (ours, lambda g, z: g.graph(z))):
        victim, surrogate = Net(seed=1).eval(), Net(seed=2)
        optimizer, rng = torch.optim.Adam(surrogate.parameters(), lr=0.01), torch.Generator().manual_seed(0)
        losses = []
        for _ in range(8):
            x, edges = query(generator, torch.randn(1, 4, generator=rng))
            loss = nn.functional.cross_entropy(surrogate(x, edges), victim(x, edges).argmax(1).detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.parametrize("kind", stealgnn.GENERATOR_TYPES)
def test_stealgnns_structure_trains(kind):
    host, ours = pair_of_generators(kind)
    _, had = steal(host, host_query)
    _, have = steal(ours, lambda generator, z: generator.graph(z))
    assert all(all(step) for step in have)
    if kind == "full_param":
        names = [name for name, _ in host.named_parameters()]
        for step in had:
            assert not any(found for name, found in zip(names, step, strict=True) if name.startswith("structure"))


def test_stealgnn_draws_with_the_networks_probability():
    _, ours = pair_of_generators("full_param")
    z = torch.randn(1, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, adj = StealHost.forward(pair_of_generators("full_param")[0], z)
        wanted = ours._probability(z)
        counts = sum(_dense(ours.graph(z)[1]) for _ in range(400)) / 400
    off = ~torch.eye(9, dtype=torch.bool)
    assert adj[off].gt(0).all() and ours.calls == 400
    assert ((counts - wanted)[off].abs() < 4.5 * (wanted * (1 - wanted) / 400)[off].sqrt()).all()


def _dense(edges):
    return edges.to_dense()[0][0]


def fake_dgl():
    """The few functions of DGL that the export calls, recording what they get."""

    class Graph:
        def __init__(self, ends, num_nodes):
            self.ends, self.num_nodes, self.ndata, self.edata = ends, num_nodes, {}, {}

        def set_batch_num_nodes(self, sizes):
            self.batch_nodes = sizes

        def set_batch_num_edges(self, counts):
            self.batch_edges = counts

    module = types.ModuleType("dgl")
    module.graph = lambda ends, num_nodes: Graph(ends, num_nodes)
    return module


def test_dgl_export(monkeypatch):
    monkeypatch.setitem(sys.modules, "dgl", fake_dgl())
    layout = af.PairLayout.complete([3, 1, 4])
    edges = af.sample_edges(torch.ones(layout.num_pairs, requires_grad=True), layout, seed=0)
    graphs = af.GraphBatch(torch.randn(8, 2), edges)
    graph = graphs.to_dgl()
    edge_index, weight = graphs.to_edge_index()
    assert torch.equal(torch.stack(graph.ends), edge_index) and graph.num_nodes == 8
    assert torch.equal(graph.edata["weight"], weight) and graph.edata["weight"].requires_grad
    assert torch.equal(graph.ndata["attr"], graphs.x)
    assert graph.batch_nodes.tolist() == [3, 1, 4]
    per_graph = [int((graphs.batch()[edge_index[0]] == g).sum()) for g in range(3)]
    assert graph.batch_edges.tolist() == per_graph


def test_the_export_runs_in_dgl():
    dgl = pytest.importorskip("dgl")
    layout = af.PairLayout.complete([5, 1, 7])
    logits = torch.zeros(layout.num_pairs, requires_grad=True)
    graphs = af.GraphBatch(torch.randn(13, 4), af.sample_edges(logits, layout, seed=0))
    graph = graphs.to_dgl()
    assert [part.num_nodes() for part in dgl.unbatch(graph)] == [5, 1, 7]
    layer = dgl.nn.GraphConv(4, 3, norm="none", allow_zero_in_degree=True)
    out = layer(graph, graph.ndata["attr"], edge_weight=graph.edata["weight"])
    wanted = af.gin_propagate(graphs.x @ layer.weight, graphs.edges, eps=-1.0) + layer.bias
    torch.testing.assert_close(out, wanted)
    (grad,) = torch.autograd.grad(out.sum(), logits)
    assert grad.any()

    generator = pygip.GraphGenerator(30, 4, 2)
    graph, x = generator.generate()
    layer(graph, x, edge_weight=graph.edata["weight"]).square().sum().backward()
    assert generator.logits.grad.any() and generator.features.grad.any()


def test_without_dgl_there_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "dgl", None)
    with pytest.raises(InputError, match="to_dgl: expected DGL to be installed"):
        pygip.GraphGenerator(5, 2, 2).generate()


def test_pygip_starts_as_an_erdos_renyi_graph():
    generator = pygip.GraphGenerator(200, 6, 3, estimator="straight_through", seed=1)
    graphs = generator()
    pairs = 200 * 199 / 2
    edges = graphs.edges.num_edges / 2
    assert abs(edges - 0.05 * pairs) < 4 * (0.05 * 0.95 * pairs) ** 0.5
    assert graphs.x.shape == (200, 6) and abs(float(graphs.x.detach().std()) - 1) < 0.1
    assert not torch.equal(graphs.edges.col, generator().edges.col)
    few = pygip.GraphGenerator(200, 6, 3, xi=0.2)
    assert few.logits.numel() < 0.25 * pairs
    assert torch.sigmoid(few.logits).sum().item() == pytest.approx(0.05 * pairs, rel=1e-3)


def extract(query, generator=None, steps=30):
    """PyGIP's Type I: a surrogate learns the victim's softened answers on the query graph."""
    victim, surrogate = Net(seed=1).eval(), Net(seed=2)
    optimizer = torch.optim.Adam(surrogate.parameters(), lr=0.01)
    to_generator = None if generator is None else torch.optim.Adam(generator.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        x, edges = query()
        answers = surrogate(x, edges).log_softmax(1)
        loss = nn.functional.kl_div(answers, victim(x, edges).softmax(1), reduction="batchmean")
        optimizer.zero_grad()
        if to_generator is not None:
            to_generator.zero_grad()
        loss.backward()
        optimizer.step()
        if to_generator is not None and step % 5 == 0:
            assert generator.logits.grad.any() and generator.features.grad.any()
            for parameter in generator.parameters():
                parameter.grad.neg_()
            to_generator.step()
        losses.append(loss.item())
    return losses


def test_pygips_attack_runs_on_one_fixed_query_as_before():
    generator = pygip.GraphGenerator(20, 5, 3, estimator="straight_through", seed=4)
    graphs = generator().detach()
    edge_index, _ = graphs.to_edge_index()
    host = extract(lambda: (graphs.x, edge_index))
    ours = extract(lambda: (graphs.x, graphs.edges))
    assert ours == pytest.approx(host, rel=1e-4)


def test_pygips_structure_trains_against_the_surrogate():
    generator = pygip.GraphGenerator(20, 5, 3, seed=4)
    before = generator.logits.detach().clone()

    def query():
        graphs = generator()
        return graphs.x, graphs.edges

    extract(query, generator)
    assert (generator.logits.detach() - before).abs().max() > 1e-3
