"""Other code bases' samplers and loops in small, beside the same with our shims: the ratios of docs/hosts.md.

The peers are the miniatures of ``tests/``, which the tests compare with the shims for equal results. They stand for the
hosts' own way of working (loops, dense matrices, Cartesian products), not for DGL or the hosts' exact code.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from host_loops import (
    DosCondHost,
    GFKDHost,
    PGEHost,
    StatisticsHook,
    StealHost,
    fedtad_host,
    gammagl_host,
    kidd_host,
    ogmm_host,
    torch_uniforms,
)
from synthesis_loops import DeepInversionHost, DenseGenerator, GenerativeHost, cmi_driver, dfad, meta_loop

import acgkd_fast as af
from acgkd_fast.hosts import doscond, fedtad, gammagl, gcond, gfkd, kidd, ogmm, pygip, stealgnn
from acgkd_fast.hosts.vision import OneBatch
from acgkd_fast.nn import build_model

# Graphs and nodes: DosCond's 50 per class of MUTAG, and of DD's mean size at 10 per class.
DENSE = {"100 x 18": (100, 18), "20 x 285": (20, 285)}


def stepped(sample: Any, graphs: int, nodes: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(graphs, nodes, nodes, generator=generator).requires_grad_()
    weight = torch.randn(graphs, nodes, nodes, generator=generator)

    def step() -> torch.Tensor:
        logits.grad = None
        (sample(logits) * weight).sum().backward()
        assert logits.grad is not None
        return logits.grad

    return step


@pytest.mark.parametrize("shape", DENSE)
def test_doscond(shape: str, contest: Any) -> None:
    ours, host = doscond.DiscreteGraphs(seed=0), DosCondHost(torch_uniforms)
    contest(
        {
            "ours": stepped(lambda a: ours.get_discrete_graphs(a, False), *DENSE[shape]),
            "host": stepped(lambda a: host.get_discrete_graphs(a, False), *DENSE[shape]),
        }
    )


@pytest.mark.parametrize("shape", DENSE)
def test_kidd(shape: str, contest: Any) -> None:
    ours, host = kidd.Discretizer(seed=0), kidd_host(torch_uniforms, 1.0)
    contest({"ours": stepped(ours, *DENSE[shape]), "host": stepped(host, *DENSE[shape])})


def test_gfkd(contest: Any) -> None:
    """One iteration at MUTAG's size: 131 graphs, features and structure."""
    torch.manual_seed(0)
    sizes = [10 + (7 * g) % 20 for g in range(131)]
    params = [torch.rand(n, n).logit() for n in sizes]
    features = [torch.randn(n, 7).requires_grad_() for n in sizes]
    targets = [g % 2 for g in range(131)]
    net = build_model("gcn5-64", 7, 2).eval().requires_grad_(False)
    hooks = [StatisticsHook(m) for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    mean, single = torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(reduction="none")
    inversion, host = gfkd.Inversion(seed=0), GFKDHost(lambda g, n: torch.rand(n, n))

    def ours() -> None:
        loss, _ = inversion.norm_loss(
            1, params, features, targets, mean, True, False, net, hooks, 0.01, 131, 0, 1, 1e-6
        )
        loss.backward()
        inversion.bernulli_fastgrad(params, features, targets, single, True, False, net, 131, 0, 1, hooks, 0.01)

    def theirs() -> None:
        loss, _ = host.norm_loss(params, features, targets, mean, net, hooks, 0.01, 1e-6)
        loss.backward()
        host.bernulli_fastgrad(params, features, targets, single, net, hooks, 0.01)

    contest({"ours": ours, "host": theirs})


def test_ogmm(contest: Any) -> None:
    """One call of the generator with its gradient, 32 graphs of 10 to 29 nodes."""
    generator = ogmm.GraphGenerator(32, 7, 2)

    def ours() -> None:
        sum(a.sum() for a in generator()[1]).backward()

    def theirs() -> None:
        sum(a.sum() for a in ogmm_host(generator, torch_uniforms)[1]).backward()

    contest({"ours": ours, "host": theirs})


def test_pygip(contest: Any) -> None:
    """A query graph of 500 nodes: networkx pair by pair, against a draw from 124,750 logits."""
    networkx = pytest.importorskip("networkx")
    generator = pygip.GraphGenerator(500, 64, 7, estimator="straight_through")

    def theirs() -> torch.Tensor:
        graph = networkx.erdos_renyi_graph(n=500, p=0.05)
        torch.randn(500, 64)
        return torch.tensor(list(graph.edges)).t()

    with torch.no_grad():
        contest({"ours": generator, "host": theirs})


@pytest.mark.parametrize("kind", stealgnn.GENERATOR_TYPES)
def test_stealgnn(kind: str, contest: Any) -> None:
    """A graph of 250 nodes through a two-layer surrogate, with the gradient; the host's structure gets none."""
    generators = {
        "ours": stealgnn.GraphGenerator(32, 250, 16, kind),
        "host": StealHost(32, 250, 16, kind),
    }
    layers = af.nn.GCNConv(16, 64), af.nn.GCNConv(64, 4)
    z = torch.randn(1, 32)

    def step(name: str) -> None:
        generator: Any = generators[name]
        if name == "ours":
            x, edges = generator.graph(z)
        else:
            x, matrix = generator(z)
            edges = matrix.nonzero().t()
        layers[1](torch.relu(layers[0](x, edges)), edges).square().mean().backward()

    contest({name: lambda n=name: step(n) for name in generators})


@pytest.mark.parametrize("shape", ["70 x 1433", "90 x 500"])
def test_gcond(shape: str, contest: Any) -> None:
    """One call with its gradient at the sizes of condensed Cora and Flickr."""
    nodes, features = (int(n) for n in shape.split(" x "))
    networks = {"ours": gcond.PGE(features, nodes), "host": PGEHost(features, nodes)}
    x, weight = torch.randn(nodes, features).requires_grad_(), torch.randn(nodes, nodes)
    contest({name: lambda n=network: (n(x) * weight).sum().backward() for name, network in networks.items()})


def test_fedtad(contest: Any) -> None:
    """One pseudo-graph of 100 nodes through a two-layer client, with the gradient; the host's topology gets none."""
    pytest.importorskip("torch_geometric")
    layers = af.nn.GCNConv(64, 64), af.nn.GCNConv(64, 7)
    features = torch.randn(100, 64).requires_grad_()

    def step(construct: Any) -> None:
        unit = torch.nn.functional.normalize(features, dim=1)
        x, edges = construct(features, unit @ unit.t())
        layers[1](torch.relu(layers[0](x, edges)), edges).square().mean().backward()

    def ours(x: torch.Tensor, similarity: torch.Tensor) -> Any:
        data = fedtad.construct_graph(x, similarity)
        return data.x, data.edge_index

    contest({"ours": lambda: step(ours), "host": lambda: step(lambda x, s: fedtad_host(x, s, 5))})


def test_gammagl(contest: Any) -> None:
    """A batch of 128 graphs of 40 nodes and 7 labels from logits through a GIN, with the gradient the host has not."""
    generator = gammagl.DFADGenerator([64, 128, 256], 32, 40, 7, 0.5)
    net = build_model("gin5-64", 7, 2).eval().requires_grad_(False)
    z = torch.randn(128, 32)

    def ours() -> None:
        for graphs in gammagl.data_construct(128, *generator(z)):
            net(graphs.x, graphs.edges).square().mean().backward()

    def forward_only() -> None:
        with torch.no_grad():
            for graphs in gammagl.data_construct(128, *generator(z)):
                net(graphs.x, graphs.edges.drop_zeros())

    def theirs() -> None:
        with torch.no_grad():
            for x, edge_index, batch in gammagl_host(128, *generator(z)):
                net(x, edge_index, None, batch)

    contest({"ours": ours, "ours, no gradient": forward_only, "host": theirs})


def graph_models() -> tuple[OneBatch, OneBatch]:
    torch.manual_seed(0)
    teacher = OneBatch(build_model("gcn5-64", 7, 2).eval().requires_grad_(False))
    return teacher, OneBatch(build_model("gcn3-32", 7, 2, dropout=0.0))


def test_cmi(contest: Any) -> None:
    """Two epochs of a generative driver on 64 graphs of 10 to 29 nodes; the host has dense relaxed matrices."""
    teacher, student = graph_models()
    losses = {"adv": 0.5, "bn": 0.1, "oh": 1.0}

    def ours() -> None:
        generator = af.Generator(7, batch_size=64, num_classes=2)
        own = copy.deepcopy(student)
        synthesizer = af.GraphSynthesizer(teacher, own, generator, iterations=5, degree=0.0, **losses)
        cmi_driver(synthesizer, own, teacher)

    def theirs() -> None:
        generator = DenseGenerator(af.Generator(7, batch_size=64, num_classes=2, estimator="relaxed"))
        own = copy.deepcopy(student)
        host = GenerativeHost(teacher, own, generator, iterations=5, batch_size=64, lr_g=1e-3, **losses)
        cmi_driver(host, own, teacher)
        for hook in host.hooks:
            hook.close()

    contest({"ours": ours, "host": theirs})


def test_fast_datafree(contest: Any) -> None:
    """Three rounds of FOMAML with two inner steps, on 64 graphs of 10 to 29 nodes."""
    teacher, _ = graph_models()
    contenders = {
        "ours": af.Generator(7, batch_size=64),
        "host": DenseGenerator(af.Generator(7, batch_size=64, estimator="relaxed")),
    }
    contest({name: lambda g=g: meta_loop(g.clone(), teacher, graphs=64) for name, g in contenders.items()})


def test_dfad(contest: Any) -> None:
    """Three rounds of DFAD on 64 graphs of 10 to 29 nodes: dense relaxed matrices against drawn edges."""
    teacher, student = graph_models()
    contenders = {
        "ours": af.Generator(7, batch_size=64),
        "ours, relaxed": af.Generator(7, batch_size=64, estimator="relaxed"),
        "host": DenseGenerator(af.Generator(7, batch_size=64, estimator="relaxed")),
    }
    contest(
        {
            name: lambda g=generator: dfad(g, teacher, copy.deepcopy(student), graphs=64)
            for name, generator in contenders.items()
        }
    )


def test_deep_inversion(contest: Any) -> None:
    """Ten steps on 64 graphs of 10 to 29 nodes from free inputs; the host has dense relaxed matrices."""
    teacher, student = graph_models()
    losses, rng = {"adv": 0.5, "bn": 0.1, "oh": 1.0}, torch.Generator().manual_seed(0)
    sizes = torch.arange(64) % 20 + 10
    mask = torch.arange(29) < sizes[:, None]

    def ours() -> None:
        options = {"engine": "learn", "iterations": 10, "synthesis_batch_size": 64}
        af.GraphSynthesizer(teacher, student, **options, **losses).synthesize()  # type: ignore[arg-type]

    def theirs() -> None:
        logits, features = torch.full((64, 29, 29), -2.0), torch.randn(64, 29, 7, generator=rng)
        start = logits.requires_grad_(), features.requires_grad_(), mask, torch.arange(64) % 2
        host = DeepInversionHost(
            teacher,
            student,
            iterations=10,
            rates=(0.1, 0.01),
            start=start,
            uniforms=lambda step: torch_uniforms(64, 29),
            **losses,
        )
        host.synthesize()
        for hook in host.hooks:
            hook.close()

    contest({"ours": ours, "host": theirs})
