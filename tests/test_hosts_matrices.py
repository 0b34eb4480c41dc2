"""GCond, FedTAD and GammaGL's DFAD: hosts that cut dense matrices into graphs, in small, before and after the swap."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from helpers import dense_gcn, normal
from host_loops import PGEHost, fedtad_host, gammagl_host
from torch import nn

import acgkd_fast as af
from acgkd_fast.errors import InputError
from acgkd_fast.hosts import fedtad, gammagl, gcond
from acgkd_fast.nn import build_model

NODES, FEATURES = 7, 4


def pair_of_networks(seed=0):
    torch.manual_seed(seed)
    host = PGEHost(FEATURES, NODES, 8)
    ours = gcond.PGE(FEATURES, NODES, 8)
    assert list(ours.state_dict()) == list(host.state_dict())
    ours.load_state_dict(host.state_dict())
    return host, ours


def condense(network, steps=8):
    """GCond's outer loop: match gradients on a real graph; features and network take turns."""
    x, y = normal((NODES, FEATURES), 1, torch.float32).requires_grad_(), torch.arange(NODES) % 2
    real_x, real = normal((12, FEATURES), 2, torch.float32), (normal((12, 12), 3, torch.float32) > 0.5).float()
    real_y = torch.arange(12) % 2
    to_x, to_network = torch.optim.Adam([x], lr=0.05), torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        weight = normal((FEATURES, 2), 10 + step, torch.float32).requires_grad_()

        def gradient(adjacency, x, y, weight=weight, **options):
            out = dense_gcn(adjacency, x @ weight)
            return torch.autograd.grad(nn.functional.cross_entropy(out, y), weight, **options)[0]

        wanted = gradient(torch.maximum(real, real.T), real_x, real_y)
        loss = (gradient(network(x), x, y, create_graph=True) - wanted).square().sum()
        to_x.zero_grad()
        to_network.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in network.parameters()) and network.layers[0].weight.grad.any()
        (to_network if step % 3 < 2 else to_x).step()
        losses.append(loss.item())
    return losses, network.inference(x)


def test_gcond_condenses_the_same_graph():
    host, ours = pair_of_networks()
    wanted, graph = condense(host)
    found, mine = condense(ours)
    assert found == pytest.approx(wanted, rel=1e-3)
    torch.testing.assert_close(mine, graph, rtol=1e-3, atol=1e-4)
    # Biases in front of BatchNorm have no gradient but rounding, which Adam blows up to steps of its own.
    for name, tensor in host.state_dict().items():
        if not name.endswith("bias") or name == "layers.2.bias":
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-2, atol=2e-3, msg=name)
    assert not mine.requires_grad and not mine.diagonal().any() and torch.equal(mine, mine.T)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nlayers", [2, 3, 4])
def test_gconds_network_has_the_hosts_values_and_gradients(training, nlayers):
    torch.manual_seed(0)
    host, ours = PGEHost(FEATURES, NODES, 5, nlayers).double(), gcond.PGE(FEATURES, NODES, 5, nlayers).double()
    ours.load_state_dict(host.state_dict())
    weight, results = normal((NODES, NODES), 1), []
    for network in (host.train(training), ours.train(training)):
        x = normal((NODES, FEATURES), 2).requires_grad_()
        out = network(x)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [x, *network.parameters()])])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)
    for name, tensor in host.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_gconds_drawn_graph():
    _, ours = pair_of_networks()
    x = normal((NODES, FEATURES), 3, torch.float32).requires_grad_()
    with torch.no_grad():
        wanted = ours.eval()(x)
        counts = sum(ours.graph(x).to_dense()[0][0] for _ in range(600)) / 600
    off = ~torch.eye(NODES, dtype=torch.bool)
    assert ours.calls == 600 and ((counts - wanted)[off].abs() < 4.5 * (0.25 / 600) ** 0.5).all()
    layer = af.nn.GCNConv(FEATURES, 2)
    grads = torch.autograd.grad(layer(x.detach(), ours.graph(x)).square().sum(), [x, *ours.layers.parameters()])
    assert all(grad.any() for grad in grads)
    ours.reset_parameters()
    assert not torch.equal(ours.eval()(x), wanted)


def test_gcond_takes_the_hosts_arguments():
    widths = {"cora": 128, "arxiv": 256, "flickr": 256, "reddit": 256}
    for dataset, width in widths.items():
        args = types.SimpleNamespace(dataset=dataset, reduction_rate=0.05)
        assert gcond.PGE(3, 4, device="cpu", args=args).layers[0].out_features == width
    sparse = types.SimpleNamespace(dataset="reddit", reduction_rate=0.01)
    network = gcond.PGE(3, 4, nlayers=5, args=sparse)
    assert network.layers[0].out_features == 128 and len(network.layers) == 3
    with pytest.raises(InputError, match="nlayers: expected at least 2"):
        gcond.PGE(3, 4, nlayers=1)
    with pytest.raises(InputError, match="x: expected a tensor of shape"):
        gcond.PGE(3, 4)(torch.zeros(5, 3))


class NodeNet(nn.Module):
    """A client's classifier, called on the data as OpenFGL's models are."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = af.nn.GCNConv(FEATURES, 8), af.nn.GCNConv(8, 2)

    def forward(self, data):
        return self.second(torch.relu(self.first(data.x, data.edge_index)), data.edge_index)


class ConditionalGenerator(nn.Module):
    def __init__(self, noise=3):
        super().__init__()
        torch.manual_seed(5)
        self.embedding, self.layers = nn.Embedding(2, 2), nn.Sequential(nn.Linear(noise + 2, 16), nn.Tanh())
        self.nodes_layer = nn.Linear(16, FEATURES)

    def forward(self, z, c):
        return self.nodes_layer(self.layers(torch.cat([self.embedding(c), z], 1)))


def federate(construct, rounds=3, nodes=20, distil_steps=5):
    """FedTAD's server: the generator seeks where global and local models differ, the global model follows."""
    clients, server, generator = [NodeNet(1).eval(), NodeNet(2).eval()], NodeNet(3), ConditionalGenerator()
    reliability = torch.tensor([[0.7, 0.2], [0.3, 0.8]])
    to_server = torch.optim.Adam(server.parameters(), lr=1e-2)
    to_generator = torch.optim.Adam(generator.parameters(), lr=1e-2)
    rng, c = torch.Generator().manual_seed(0), torch.arange(nodes) % 2
    losses, structure = [], []

    def graph(z):
        features = generator(z, c)
        unit = nn.functional.normalize(features, dim=1)
        similarity = unit @ unit.T
        if similarity.requires_grad:
            similarity.retain_grad()
        return features, similarity, construct(features, similarity)

    for _ in range(rounds):
        z = torch.randn(nodes, 3, generator=rng)
        features, similarity, data = graph(z)
        loss = torch.exp(-torch.cdist(z, z, 1).mean() * torch.cdist(features, features, 1).mean())
        for client, weight in zip(clients, reliability, strict=True):
            local, together = client(data), server(data)
            for k in range(2):
                loss = loss + weight[k] * nn.functional.cross_entropy(local[c == k], c[c == k])
                loss = loss - weight[k] * (together - local.detach())[c == k].abs().mean()
        to_generator.zero_grad()
        loss.backward()
        structure.append(similarity.grad is not None and bool(similarity.grad.any()))
        to_generator.step()
        with torch.no_grad():
            _, _, data = graph(z)
        for _ in range(distil_steps):
            gap = sum(
                weight[k] * (server(data) - client(data).detach())[c == k].abs().mean()
                for client, weight in zip(clients, reliability, strict=True)
                for k in range(2)
            )
            to_server.zero_grad()
            gap.backward()
            to_server.step()
            losses.append(gap.item())
        losses.append(loss.item())
    return losses, structure, server


def host_graph(features, similarity):
    x, edge_index = fedtad_host(features, similarity.detach(), 5)
    return types.SimpleNamespace(x=x, edge_index=edge_index)


def test_fedtad_distils_the_same_model_and_then_learns_its_topology():
    pytest.importorskip("torch_geometric")
    wanted, had, host = federate(host_graph)
    found, _, mine = federate(lambda x, similarity: fedtad.construct_graph(x, similarity.detach()))
    assert found == pytest.approx(wanted, rel=1e-3)
    for a, b in zip(mine.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    learned, have, _ = federate(fedtad.construct_graph)
    assert not any(had) and all(have) and learned[0] != pytest.approx(wanted[-1])


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_fedtads_edges(k, cosine):
    pytest.importorskip("torch_geometric")
    features = normal((9, 5), 0, torch.float32)
    unit = nn.functional.normalize(features, dim=1)
    other = normal((9, 9), 2, torch.float32)
    # In the second matrix a node need not be its own best neighbour.
    similarity = (unit @ unit.T if cosine else other + other.T).requires_grad_()
    data = fedtad.construct_graph(features, similarity, k)
    _, edge_index = fedtad_host(features, similarity, k)
    wanted = torch.zeros(9, 9)
    wanted[edge_index[1], edge_index[0]] = 1.0
    assert torch.equal(data.edge_index.to_dense()[0][0], wanted) and data.x is features and data.num_nodes == 9
    weight = normal((9, 9), 1, torch.float32)
    (grad,) = torch.autograd.grad((data.edge_index.to_dense()[0][0] * weight).sum(), similarity)
    # Of absent pairs too, and none where a self-loop is always there.
    last = similarity.detach().sort(1, descending=True).values[:, k - 1]
    soft = torch.sigmoid((similarity.detach() - torch.minimum(last[:, None], last)) / 0.1)
    slope = (soft * (1 - soft) / 0.1).fill_diagonal_(0.0)
    torch.testing.assert_close(grad, slope * weight, rtol=1e-4, atol=1e-6)


def test_fedtad_with_an_accelerated_model():
    pyg = pytest.importorskip("torch_geometric.nn")
    features = normal((9, FEATURES), 0, torch.float32).requires_grad_()
    similarity = (features @ features.T).detach().requires_grad_()
    model = af.accelerate(pyg.GCNConv(FEATURES, 2))
    data = fedtad.construct_graph(features, similarity, 3)
    x, edge_index = fedtad_host(features, similarity, 3)
    out = model(data.x, data.edge_index)
    torch.testing.assert_close(out, model(x, edge_index), rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert similarity.grad.any()
    with pytest.raises(InputError, match="k: expected 1 to 9"):
        fedtad.construct_graph(features, similarity, 10)
    with pytest.raises(InputError, match="adj_logits: expected a tensor of shape"):
        fedtad.construct_graph(features, similarity[:4], 3)
    with pytest.raises(InputError, match="slope: expected a number above 0"):
        fedtad.construct_graph(features, similarity, 3, slope=0.0)


def gammagl_models():
    torch.manual_seed(1)
    return build_model("gin3-8", 3, 2).eval(), build_model("gcn3-8", 3, 2, dropout=0.0)


def play(make_batches, call, train_generator, rounds=2, student_steps=5, batch=6):
    """GammaGL's loop: five student steps on the L1 distance of logits, one generator step on that of softmaxes."""
    teacher, student = gammagl_models()
    torch.manual_seed(2)
    generator = gammagl.DFADGenerator([16, 8], 4, 5, 3, 0.0)
    nn.init.normal_(generator.nodes_layer.weight, std=2.0)
    to_student, to_generator = (torch.optim.Adam(m.parameters(), lr=5e-3) for m in (student, generator))
    rng, losses, gradients = torch.Generator().manual_seed(0), [], []
    for _ in range(rounds):
        student.train()
        for _ in range(student_steps):
            with torch.no_grad():
                batches = list(make_batches(batch, *generator(torch.randn(batch, 4, generator=rng))))
            for data in batches:
                loss = nn.functional.l1_loss(call(student, data), call(teacher, data).detach())
                to_student.zero_grad()
                loss.backward()
                to_student.step()
                losses.append(loss.item())
        student.eval()
        for data in make_batches(batch, *generator(torch.randn(batch, 4, generator=rng))):
            loss = -nn.functional.l1_loss(call(student, data).softmax(1), call(teacher, data).softmax(1))
            # The student's parameters are part of the loss too; the question is what reaches the generator.
            grads = torch.autograd.grad(loss, list(generator.parameters()), allow_unused=True)
            gradients.append([grad is not None and bool(grad.any()) for grad in grads])
            if train_generator:
                for parameter, grad in zip(generator.parameters(), grads, strict=True):
                    parameter.grad = grad
                to_generator.step()
            losses.append(loss.item())
    return losses, gradients, student


def test_gammagls_student_learns_the_same_and_the_generator_learns_at_all():
    host = (gammagl_host, lambda model, data: model(data[0], data[1], None, data[2]))
    ours = (gammagl.data_construct, lambda model, data: model(data.x, data.edges))
    wanted, had, host_student = play(*host, train_generator=False)
    found, have, student = play(*ours, train_generator=False)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    for a, b in zip(student.parameters(), host_student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert not any(any(step) for step in had) and all(all(step) for step in have)
    trained, _, _ = play(*ours, train_generator=True)
    assert trained[: 5 + 1] == found[: 5 + 1] and trained[6:] != found[6:]


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_gammagls_batches(batch_size):
    generator, z = gammagl.DFADGenerator([6, 7], 4, 5, 3, 0.5).eval(), normal((5, 4), 0, torch.float32)
    adjacency, nodes = generator(z)
    first, second = (layer for layer in generator.layer_list if isinstance(layer, nn.Linear))
    wanted = generator.nodes_layer(torch.tanh(second(torch.tanh(first(z))))).view(5, 5, 3)
    torch.testing.assert_close(nodes, wanted)
    torch.testing.assert_close(adjacency, wanted @ wanted.mT)
    adjacency, nodes = (4.0 * adjacency).detach().requires_grad_(), nodes.detach().requires_grad_()
    batches = gammagl.data_construct(batch_size, adjacency, nodes)
    hosts = list(gammagl_host(batch_size, adjacency.detach(), nodes.detach()))
    assert [b.num_graphs for b in batches] == [len(b[0]) // 5 for b in hosts]
    for mine, (x, edge_index, batch) in zip(batches, hosts, strict=True):
        assert torch.equal(mine.x, x) and torch.equal(mine.batch(), batch)
        kept = mine.edges.drop_zeros()
        listed = af.EdgeSample.from_edge_index(edge_index.flip(0), mine.ptr)
        assert torch.equal(kept.rowptr, listed.rowptr) and torch.equal(kept.col, listed.col)
        (grad,) = torch.autograd.grad(mine.edges.value.sum(), adjacency, retain_graph=True)
        seen = grad.flatten(1).any(1)
        weight = normal(mine.x.shape, 1, torch.float32)
        (grad_nodes,) = torch.autograd.grad((mine.x * weight).sum(), nodes, retain_graph=True)
        assert torch.equal(grad_nodes.flatten(1).any(1), seen)
        assert int(seen.sum()) == mine.num_graphs and grad[seen].all()
    with pytest.raises(InputError, match="edges_logits: expected a tensor of shape"):
        gammagl.data_construct(2, adjacency[:, :4], nodes)
    assert copy.deepcopy(generator).num_vertices == 5
