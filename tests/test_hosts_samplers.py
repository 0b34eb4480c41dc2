"""DosCond, KiDD, GFKD and OGMM: their loops in small, with their own sampler and with ours."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import dense_gcn, normal
from host_loops import (
    DosCondHost,
    GFKDHost,
    StatisticsHook,
    Uniforms,
    kidd_host,
    ogmm_host,
    symmetric_logistic,
    torch_uniforms,
)

import acgkd_fast as af
from acgkd_fast.errors import InputError
from acgkd_fast.hosts import doscond, gfkd, kidd, ogmm
from acgkd_fast.hosts.hooks import BatchNormHooks
from acgkd_fast.nn import build_model


def dense_network(weight, x, adjacency):
    """Two dense GCN layers and a mean readout on graphs [G, n, n], as condensation code has them."""
    hidden = torch.stack([torch.relu(dense_gcn(a, h @ weight[0])) for a, h in zip(adjacency, x, strict=True)])
    return (hidden @ weight[1]).mean(1)


def condense(sampler, steps=12, graphs=4, nodes=6):
    """DosCond's outer loop: match the gradients of real graphs, move logits and features."""
    logits = normal((graphs, nodes, nodes), 0, torch.float32).requires_grad_()
    x = normal((graphs, nodes, 3), 1, torch.float32).requires_grad_()
    y = torch.arange(graphs) % 2
    real = (normal((graphs, nodes, nodes), 2, torch.float32) > 0.5).float()
    real = torch.maximum(real, real.mT)
    real_x = normal((graphs, nodes, 3), 3, torch.float32)
    optimizer = torch.optim.Adam([logits, x], lr=0.1)
    losses = []
    for step in range(steps):
        weight = [normal(shape, 10 + step, torch.float32).requires_grad_() for shape in ((3, 5), (5, 2))]
        adjacency = sampler.get_discrete_graphs(logits, inference=False)
        wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(dense_network(weight, real_x, real), y), weight)
        found = torch.autograd.grad(
            torch.nn.functional.cross_entropy(dense_network(weight, x, adjacency), y), weight, create_graph=True
        )
        loss = sum((f - w).square().sum() for f, w in zip(found, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        assert logits.grad[:, ~torch.eye(nodes, dtype=torch.bool)].any()
        optimizer.step()
        losses.append(loss.item())
    return logits.detach(), losses, sampler.get_discrete_graphs(logits.detach(), inference=True)


def test_doscond_condenses_the_same_graphs():
    ours, our_losses, our_graphs = condense(doscond.DiscreteGraphs(seed=5))
    host, host_losses, host_graphs = condense(DosCondHost(Uniforms(5)))
    torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(host_losses), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours, host, rtol=1e-2, atol=1e-3)
    assert torch.equal(our_graphs, host_graphs) and our_graphs.any()
    assert our_losses[-1] < our_losses[0]


def test_doscond_anneals_over_the_first_200_calls():
    sampler, host = doscond.DiscreteGraphs(seed=1), DosCondHost(Uniforms(1))
    logits = normal((2, 4, 4), 0)
    for call in (0, 1, 100, 199, 200, 500):
        sampler.cnt = host.cnt = host.uniforms.calls = call
        torch.testing.assert_close(
            sampler.get_discrete_graphs(logits, False), host.get_discrete_graphs(logits, False), rtol=1e-5, atol=1e-6
        )
        assert sampler.cnt == call + 1
    sampler.get_discrete_graphs(logits, True)
    assert sampler.cnt == 501


def test_doscond_without_averaging_keeps_the_logits():
    logits = normal((2, 4, 4), 0)
    drawn = doscond.DiscreteGraphs(seed=1, symmetrise=False).get_discrete_graphs(logits, False)
    noise = symmetric_logistic(Uniforms(1), logits)
    wanted = torch.sigmoid(logits + noise) * (1 - torch.eye(4))
    torch.testing.assert_close(drawn, wanted, rtol=1e-5, atol=1e-6)


def test_doscond_draws_have_the_same_law_as_torchs():
    logits = torch.full((4000, 3, 3), 0.7)
    ours = doscond.DiscreteGraphs(seed=2).get_discrete_graphs(logits, False)[:, 0, 1]
    torch.manual_seed(0)
    host = DosCondHost(torch_uniforms).get_discrete_graphs(logits, False)[:, 0, 1]
    distance = (ours.sort()[0] - host.sort()[0]).abs().max()
    # Two samples of 4000: the largest gap of the quantile functions, whose slope is at most about 5 here.
    assert float(distance) < 5 * 1.63 * (2 / 4000) ** 0.5


def ridge_distil(discretize, steps=10):
    """KiDD's loop: kernel ridge regression from synthetic to real graphs, logits clamped to [0, 1]."""
    nodes, y = 5, torch.eye(2).repeat(3, 1)
    logits = torch.rand(6, nodes, nodes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = normal((6, nodes, 3), 1, torch.float32)
    real = torch.stack([dense_gcn(torch.ones(nodes, nodes) * (g % 2), x[g]).sum(0) for g in range(6)])
    optimizer = torch.optim.Adam([logits], lr=0.05)
    losses = []
    for epoch in range(steps):
        adjacency = discretize(logits, train=True, epoch=epoch)
        synthetic = torch.stack([(a @ h).sum(0) for a, h in zip(adjacency, x, strict=True)])
        kernel = synthetic @ synthetic.T
        prediction = real @ synthetic.T @ torch.linalg.solve(kernel + 1e-1 * torch.eye(6), y)
        loss = (prediction - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert logits.grad.ne(0).all()
        optimizer.step()
        logits.data.clamp_(0, 1)
        losses.append(loss.item())
    return logits.detach(), losses


def test_kidd_distils_the_same_graphs():
    ours, our_losses = ridge_distil(kidd.Discretizer(seed=4, tau=1.0))
    host, host_losses = ridge_distil(kidd_host(Uniforms(4, self_loops=True), 1.0))
    torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(host_losses), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours, host, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("epoch", [0, 50, 200, 700])
def test_kidd_formula(epoch):
    logits = normal((3, 5, 5), 0)
    ours, host = kidd.Discretizer(seed=9, tau=2.0), kidd_host(Uniforms(9, self_loops=True), 2.0)
    for _ in range(2):
        torch.testing.assert_close(ours(logits, True, epoch), host(logits, True, epoch), rtol=1e-5, atol=1e-6)
    assert ours.calls == 2
    torch.testing.assert_close(ours(logits), host(logits), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours(logits, train=False), host(logits, train=False).double())
    assert ours(logits, True, 0).diagonal(dim1=1, dim2=2).all()
    assert not kidd.Discretizer(seed=9, self_loops=False)(logits).diagonal(dim1=1, dim2=2).any()


SIZES = (7, 4, 9, 5)


def gfkd_start(seed=0):
    rng = torch.Generator().manual_seed(seed)
    params = [torch.rand(n, n, generator=rng).logit() for n in SIZES]
    features = [torch.randn(n, 3, generator=rng).requires_grad_() for n in SIZES]
    return params, features, [0, 1, 1, 0]


def gfkd_uniforms(seed):
    """What `gfkd.Inversion` draws, one graph at a time: u of graph `g` is that of id g; the diagonal has 1/2."""
    from acgkd_fast.edges.dense import dense_uniforms

    calls = {}

    def uniforms(g, n):
        step = calls[g] = calls.get(g, -1) + 1
        rng = torch.tensor([seed, step])
        # An entry (j, k) of theirs is an edge j -> k, so row k of ours.
        return dense_uniforms(1, n, rng, directed=True, graph_ids=(g,))[0].T

    return uniforms


@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8"])
def test_gfkd_inverts_to_the_same_graphs(arch):
    torch.manual_seed(0)
    net = build_model(arch, 3, 2).eval()
    for block in net.blocks:
        torch.nn.init.uniform_(block.norm.running_var, 0.5, 2.0)
    # GFKD adds a self-loop to every node of the graphs; a GCN layer of ours does so by itself.
    host_net = copy.deepcopy(net)
    if arch.startswith("gin"):

        def with_loops(x, edge_index, weight, batch):
            loops = torch.arange(len(x)).expand(2, -1)
            return net(x, torch.cat([edge_index, loops], 1), weight, batch)

        host_net = with_loops

    def run(step_functions):
        params, features, targets = gfkd_start()
        norm_loss, fastgrad = step_functions
        stru, feat = torch.optim.Adam(params, lr=1.0), torch.optim.Adam(features, lr=0.01)
        losses = []
        for _ in range(5):
            feat.zero_grad()
            loss, structures = norm_loss(params, features, targets)
            loss.backward()
            feat.step()
            for theta, grad in zip(params, fastgrad(params, features, targets), strict=True):
                theta.grad = grad
            stru.step()
            losses.append(loss.item())
        return params, features, structures, losses

    mean, single = torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(reduction="none")

    def ours():
        inversion, hooks = gfkd.Inversion(seed=3), [StatisticsHook(m) for m in norms(net)]
        rest = (True, False, net)
        result = run(
            (
                lambda p, f, t: inversion.norm_loss(1, p, f, t, mean, *rest, hooks, 0.01, len(p), 0, 1, 0.1),
                lambda p, f, t: inversion.bernulli_fastgrad(p, f, t, single, *rest, len(p), 0, 1, hooks, 0.01),
            )
        )
        for hook in hooks:
            hook.close()
        return result

    def theirs():
        host = GFKDHost(gfkd_uniforms(3))
        hooks = [StatisticsHook(m) for m in norms(net if arch.startswith("gin") else host_net)]
        result = run(
            (
                lambda p, f, t: host.norm_loss(p, f, t, mean, host_net, hooks, 0.01, 0.1),
                lambda p, f, t: host.bernulli_fastgrad(p, f, t, single, host_net, hooks, 0.01),
            )
        )
        for hook in hooks:
            hook.close()
        return result

    found, wanted = ours(), theirs()
    assert found[3] == pytest.approx(wanted[3], rel=1e-4)
    for mine, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    for mine, other in zip(found[2], wanted[2], strict=True):
        assert torch.equal(mine, other) and mine.dtype == torch.int32
    # Off the diagonal, which both leave out of the graphs.
    for mine, other, start in zip(found[0], wanted[0], gfkd_start()[0], strict=True):
        off = ~torch.eye(len(mine), dtype=torch.bool)
        torch.testing.assert_close(mine[off], other[off], rtol=1e-3, atol=1e-3)
        assert (mine - start)[off].ne(0).any()
    assert not any(m._forward_hooks for m in net.modules())


def norms(net):
    return [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d)]


def test_gfkd_arm_pair():
    params, _, _ = gfkd_start()
    inversion = gfkd.Inversion(seed=6)
    first, second, noise = inversion.generate_b(params)
    host = GFKDHost(gfkd_uniforms(6)).generate_b(params)
    for mine, other in zip((first, second, noise), host, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a, b)
    assert inversion.step == 1
    again = inversion.generate_b(params)[2]
    assert not torch.equal(again[0], noise[0])
    assert [m.dtype for m in (first[0], second[0], noise[0])] == [torch.int32, torch.int32, torch.float32]
    cut = gfkd.threshold_sample([torch.tensor([[0.0, -1e-6], [1e-6, 3.0]])])
    assert torch.equal(cut[0], torch.tensor([[1, 0], [1, 1]], dtype=torch.int32))


def test_gfkd_says_what_does_not_fit():
    params, features, targets = gfkd_start()
    net = build_model("gcn3-8", 3, 2)
    inversion = gfkd.Inversion(seed=0)
    rest = (False, net, [], 0.0, 4, 0, 1, 0.0)
    with pytest.raises(InputError, match="self_loop: expected True"):
        inversion.norm_loss(1, params, features, targets, torch.nn.CrossEntropyLoss(), False, *rest)
    with pytest.raises(InputError, match="feature_paras: expected as many rows"):
        inversion.norm_loss(1, params, features[::-1], targets, torch.nn.CrossEntropyLoss(), True, *rest)
    with pytest.raises(InputError, match="params: expected a tensor of shape"):
        gfkd.Inversion(seed=0).generate_b([torch.zeros(2, 3)])


@pytest.mark.parametrize("symmetric", [False, True])
def test_ogmm_generates_the_same_graphs(symmetric):
    generator = ogmm.GraphGenerator(5, 4, 2, min_nodes=3, max_nodes=7, cut=0.5, symmetric=symmetric, seed=8)
    with torch.no_grad():
        generator.last.weight.mul_(8.0)
    uniforms = Uniforms(8, directed=not symmetric, self_loops=True)
    for _ in range(2):
        labels, matrices, features = generator()
        host_labels, host_matrices, host_features = ogmm_host(generator, uniforms)
        assert torch.equal(labels, host_labels)
        for found, wanted in (*zip(matrices, host_matrices, strict=True), *zip(features, host_features, strict=True)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        weight = [normal(m.shape, 3, torch.float32) for m in matrices]
        parameters = list(generator.parameters())
        mine, other = (
            torch.autograd.grad(sum((m * w).sum() for m, w in zip(ms, weight, strict=True)), parameters)
            for ms in (matrices, host_matrices)
        )
        for a, b, name in zip(mine, other, [n for n, _ in generator.named_parameters()], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
            assert a.any(), name


def test_ogmm_batch_holds_the_same_draw():
    generator = ogmm.GraphGenerator(4, 3, 2, min_nodes=2, max_nodes=6, cut=0.5, seed=1)
    labels, matrices, features = generator()
    generator.calls = 0
    graphs = generator.graphs()
    other = ogmm.as_batch(matrices, features, labels)
    for batch in (graphs, other):
        assert torch.equal(batch.y, labels) and batch.sizes.tolist() == list(generator.sizes)
        dense, _ = batch.edges.to_dense()
        for g, matrix in enumerate(matrices):
            n = len(matrix)
            assert torch.equal(dense[g, :n, :n].T, matrix)
        (grad,) = torch.autograd.grad(batch.edges.value.sum(), generator.first.weight, retain_graph=True)
        assert grad.any()
    assert torch.equal(graphs.x, other.x)


def test_ogmm_trains_its_structure():
    torch.manual_seed(0)
    teacher = af.as_teacher(build_model("gcn3-8", 3, 2))
    generator = ogmm.GraphGenerator(6, 3, 2, min_nodes=4, max_nodes=6, cut=0.5, seed=2)
    torch.nn.functional.cross_entropy(teacher(generator.graphs()), generator.labels).backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def merge_source(generator, generate, statistics, steps=5):
    """OGMM's inversion of one source model: cross-entropy and BatchNorm statistics, a fresh draw per step."""
    torch.manual_seed(0)
    net = build_model("gcn3-8", 4, 2).eval().requires_grad_(False)
    for block in net.blocks:
        torch.nn.init.uniform_(block.norm.running_var, 0.5, 2.0)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    losses, before = [], generator.last.weight.detach().clone()
    for _ in range(steps):
        graphs = generate()
        loss = statistics(net, lambda graphs=graphs: net(graphs.x, graphs.edges), graphs.y)
        optimizer.zero_grad()
        loss.backward()
        assert generator.first.weight.grad.any() and generator.features.grad.any()
        optimizer.step()
        losses.append(loss.item())
    assert not torch.equal(generator.last.weight, before)
    return losses, sum(len(m._forward_hooks) for m in net.modules())


def test_ogmm_inverts_its_source_as_before():
    def make():
        generator = ogmm.GraphGenerator(5, 4, 2, min_nodes=3, max_nodes=7, cut=0.5, seed=8)
        with torch.no_grad():
            generator.last.weight.mul_(8.0)
        return generator

    def leaking(net, answer, y):
        hooks = [StatisticsHook(m) for m in norms(net)]
        return torch.nn.functional.cross_entropy(answer(), y) + 0.1 * sum(h.r_feature for h in hooks)

    def scoped(net, answer, y):
        with BatchNormHooks(net) as hooks:
            return torch.nn.functional.cross_entropy(answer(), y) + 0.1 * hooks.loss()

    ours, host, uniforms = make(), make(), Uniforms(8, directed=True, self_loops=True)

    def host_batch():
        labels, matrices, features = ogmm_host(host, uniforms)
        return ogmm.as_batch(matrices, features, labels)

    wanted, leaked = merge_source(host, host_batch, leaking)
    found, left = merge_source(ours, ours.graphs, scoped)
    assert found == pytest.approx(wanted, rel=1e-3)
    for mine, other in zip(ours.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)
    assert leaked == 10 and left == 0
