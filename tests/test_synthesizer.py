"""Hooks and synthesizer: values, return styles, the adversarial term, nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from host_loops import StatisticsHook
from synthesis_helpers import PRIOR, make_generator, make_teacher, registered, same, some_graphs

import acgkd_fast as af
from acgkd_fast.distill.statistics import running_stats_norm
from acgkd_fast.errors import InputError
from acgkd_fast.hosts.hooks import BatchNormHooks
from acgkd_fast.nn import build_model
from acgkd_fast.synthesizer import kl_divergence

pytestmark = pytest.mark.filterwarnings("ignore:k. expected at most:RuntimeWarning")


# Hooks.


@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8"])
def test_hooks_give_what_gfkds_hooks_give(arch):
    model, graphs = make_teacher(arch), some_graphs()
    x = graphs.x.clone().requires_grad_()
    theirs = [StatisticsHook(m) for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    model(x, graphs.edges)
    wanted = [hook.r_feature for hook in theirs]
    for hook in theirs:
        hook.close()
    with BatchNormHooks(model) as hooks:
        model(x, graphs.edges)
        torch.testing.assert_close([hook.r_feature for hook in hooks], wanted)
        torch.testing.assert_close(hooks.loss(), sum(wanted))
        (ours,) = torch.autograd.grad(hooks.loss(), x, retain_graph=True)
        (other,) = torch.autograd.grad(sum(wanted), x)
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)
        assert len(hooks) == len(wanted) and hooks[0].module is next(
            m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)
        )


def test_hooks_leave_nothing_behind():
    model, graphs = make_teacher(), some_graphs()
    hooks = BatchNormHooks(model)
    assert not registered(model)
    with pytest.raises(RuntimeError, match="stop"), hooks:
        model(graphs.x, graphs.edges)
        assert registered(model)
        raise RuntimeError("stop")
    assert not registered(model)
    with pytest.raises(InputError, match="r_feature: expected a forward pass"):
        _ = hooks[0].r_feature
    with hooks:
        with pytest.raises(InputError, match="r_feature"):
            _ = hooks[0].r_feature
        for _ in range(3):
            model(graphs.x, graphs.edges)
        assert len(hooks._probe.moments) == len(hooks)
        hooks[1].remove()
        assert not registered(model)
        hooks[0].close()
    assert float(BatchNormHooks(torch.nn.Linear(2, 2)).loss()) == 0.0


def test_momentum_of_the_statistics():
    model = make_teacher()
    rate, layer = 0.7, model.blocks[0].norm
    with BatchNormHooks(model, rate) as hooks:
        kept = None
        for seed in (1, 2, 3):
            graphs = some_graphs(seed=seed)
            model(graphs.x, graphs.edges)
            now = hooks.moments_of(layer)
            mixed = now if kept is None else [(1 - rate) * a + rate * b for a, b in zip(now, kept, strict=True)]
            running = [(layer.running_mean, layer.running_var)]
            torch.testing.assert_close(hooks[0].r_feature, running_stats_norm([mixed], running))
            kept = now if kept is None else [rate * b + (1 - rate) * a for a, b in zip(now, kept, strict=True)]
            hooks[0].update_mmt()
            torch.testing.assert_close(list(hooks[0].mmt), list(kept))


# Synthesizer.


def make_synthesizer(engine, **options):
    generator = make_generator() if engine == "generator" else None
    options = {"prior": PRIOR, "engine": engine, "iterations": 6, "synthesis_batch_size": 8} | options
    return af.GraphSynthesizer(make_teacher(), options.pop("student", None), generator, **options)


@pytest.mark.parametrize("engine", ["learn", "refine", "both", "generator"])
@pytest.mark.parametrize("adv", [0.0, 1.0])
def test_every_engine_makes_graphs(engine, adv):
    student = build_model("gin3-8", 3, 2).train()
    before = copy.deepcopy(student.state_dict())
    student.classifier.bias.requires_grad_(False)
    synthesizer = make_synthesizer(engine, student=student, adv=adv)
    result = synthesizer.synthesize()
    assert set(result) == {"synthetic"} and result["synthetic"].num_graphs == 8
    assert torch.equal(result["synthetic"].y, torch.tensor([0, 1] * 4))
    assert len(synthesizer.data_pool) == 8
    batch = synthesizer.sample(5)
    assert batch.num_graphs == 5 and not batch.x.requires_grad and not batch.edges.value.requires_grad
    assert synthesizer.sample().num_graphs == 64
    assert student.training and student.blocks[0].norm.weight.requires_grad
    assert not student.classifier.bias.requires_grad
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not registered(synthesizer.teacher.module)
    same(make_synthesizer(engine, student=student, adv=adv).synthesize()["synthetic"], result["synthetic"])


@pytest.mark.parametrize("engine", ["learn", "refine", "generator"])
def test_targets_are_met(engine):
    synthesizer = make_synthesizer(engine)
    targets = torch.tensor([1, 1, 0, 1, 1])
    assert torch.equal(synthesizer.synthesize(targets)["synthetic"].y, targets)
    with pytest.raises(InputError, match=r"targets: expected labels in 0..1, got"):
        synthesizer.synthesize(torch.tensor([2]))
    with pytest.raises(InputError, match="targets: expected dtype int64"):
        synthesizer.synthesize(torch.tensor([0.0]))


def test_return_styles_of_the_hosts():
    timed = make_synthesizer("refine", returns="timed").synthesize()
    assert len(timed) == 2 and isinstance(timed[1], float) and timed[1] > 0
    result, seconds, cost, one_hot = make_synthesizer("refine", returns="nayer").synthesize()
    graphs = result["synthetic"]
    wanted = torch.nn.functional.cross_entropy(make_teacher()(graphs.x, graphs.edges), graphs.y)
    assert one_hot == pytest.approx(wanted.item(), rel=1e-4) and cost > 0 and seconds > 0
    same(timed[0]["synthetic"], graphs)
    kamal = make_synthesizer("refine", returns="kamal")
    result, seconds = kamal.synthesize()
    same(result["synthetic"], graphs)
    batch, sampled = kamal.sample(3)
    assert batch.num_graphs == 3 and 0 < sampled < 60 and seconds > 0


def test_batches_are_converted_for_the_host():
    pytest.importorskip("torch_geometric")
    from torch_geometric.data import Batch

    synthesizer = make_synthesizer("refine", convert=af.GraphBatch.to_pyg)
    assert isinstance(synthesizer.synthesize()["synthetic"], Batch)
    assert isinstance(synthesizer.sample(3), Batch) and isinstance(synthesizer.data_pool.graphs, af.GraphBatch)


@pytest.mark.parametrize("engine", ["refine", "generator"])
def test_longer_synthesis_is_more_convincing(engine):
    # The weights of the losses are those of the call, not of the engine's defaults.
    options = {"synthesis_batch_size": 16, "bn": 0.0, "oh": 1.0, "returns": "nayer", "degree": 0.1}
    short = make_synthesizer(engine, iterations=1, **options).synthesize()
    long = make_synthesizer(engine, iterations=150, lr_g=3e-3, **options).synthesize()
    assert long[3] < 0.85 * short[3]


@pytest.mark.parametrize("engine", ["learn", "refine", "generator"])
def test_the_adversarial_term_finds_disagreement(engine):
    """Against an untrained student, with the labels' own weight small."""
    torch.manual_seed(1)
    student, teacher = build_model("gcn2-8", 3, 2).eval(), make_teacher()

    def disagreement(adv):
        options = {"iterations": 80, "synthesis_batch_size": 24, "bn": 0.0, "oh": 0.3, "lr_g": 3e-3}
        graphs = make_synthesizer(engine, student=student, adv=adv, **options).synthesize()["synthetic"]
        with torch.no_grad():
            s, t = student(graphs.x, graphs.edges), teacher(graphs.x, graphs.edges)
        if engine != "refine":
            return kl_divergence(s, t).mean()
        # The search seeks labels that the teacher sees and the student does not.
        margin = (t - s).gather(1, graphs.y[:, None]) - (t - s).gather(1, 1 - graphs.y[:, None])
        return margin.mean()

    assert disagreement(1.0) > 1.05 * disagreement(0.0)


def test_progress_and_another_generator():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_generator(num_classes=None, batch_size=8)

        def forward(self, z):
            return self.inner(z)

    seen = []
    synthesizer = af.GraphSynthesizer(
        make_teacher(),
        generator=Fixed(),
        nz=32,
        iterations=3,
        progress=lambda step, values: seen.append((step, values)),
    )
    synthesizer.synthesize(torch.tensor([0, 1]))
    assert [step for step, _ in seen] == [3] and {"loss", "batch_norm", "cross_entropy"} <= set(seen[0][1])
    assert synthesizer.sample(4).num_graphs == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "gan"}, "engine: expected one of learn"),
        ({"engine": "refine", "returns": "tuple"}, "returns: expected one of dict"),
        ({"engine": "generator"}, "generator: expected one, or none"),
        ({"engine": "refine", "adv": 1.0}, "student: expected a model to disagree with"),
        ({"engine": "refine", "adv": -1.0}, "adv: expected 0 or more"),
        ({"engine": "learn", "oh": 0.0}, "oh: expected a number above 0"),
        ({"engine": "refine", "criterion": "cosine"}, "criterion: expected one of kl"),
        ({"engine": "refine", "iterations": 0}, "iterations: expected at least 1"),
        ({"engine": "refine", "sample_batch_size": 0}, "sample_batch_size: expected at least 1"),
        ({"generator": torch.nn.Linear(2, 2)}, "nz: expected the width of z"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, message):
    with pytest.raises(InputError, match=message):
        af.GraphSynthesizer(make_teacher(), **options)


def test_sampling_before_synthesis_says_so():
    with pytest.raises(InputError, match="data_pool: expected at least one graph"):
        make_synthesizer("refine").sample()


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["learn", "refine", "both", "generator"])
def test_engines_on_cuda(engine):
    generator = make_generator().cuda() if engine == "generator" else None
    student = build_model("gcn2-8", 3, 2).cuda()
    synthesizer = af.GraphSynthesizer(
        make_teacher().cuda(), student, generator, prior=PRIOR, engine=engine, iterations=6, adv=0.5
    )
    graphs = synthesizer.synthesize(torch.tensor([0, 1, 1, 0]))["synthetic"]
    batch = synthesizer.sample(3)
    assert graphs.x.is_cuda and batch.edges.col.is_cuda and batch.num_graphs == 3
    assert synthesizer.data_pool.sample(2, balance=True).y.is_cuda
