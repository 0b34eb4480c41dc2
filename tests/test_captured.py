"""The static step: the plain step's bits whatever the capacity, no look at the device, and clear refusals."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch

from acgkd_fast.distill import captured, inversion
from acgkd_fast.distill.captured import NotCapturableError, StaticStep, stepper
from acgkd_fast.distill.inversion import Learner, LearnSettings, learn
from acgkd_fast.edges import sample_edges
from acgkd_fast.errors import InputError
from acgkd_fast.host_reads import HostReadError, NoHostReads
from acgkd_fast.layout import PairLayout
from acgkd_fast.nn.models import build_model
from acgkd_fast.pseudo_graphs import PseudoGraphs
from acgkd_fast.teachers import as_teacher

WIDTH = 5
CASES = [
    (estimator, noise)
    for estimator in ("relaxed", "hard_concrete", "straight_through", "sparse_straight_through")
    for noise in ("logistic", "gumbel")
]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def make_pseudo_graphs(device="cpu", noise="logistic", sizes=(7, 1, 12, 20), directed=False, feature_kind="one-hot"):
    generator = torch.Generator().manual_seed(3)
    layout = PairLayout.complete(sizes, directed=directed, device=device)
    logits = torch.randn(layout.num_pairs, generator=generator) - 1.5
    features = torch.randn(layout.num_nodes, WIDTH, generator=generator)
    labels = torch.arange(len(sizes), device=device) % 2
    return PseudoGraphs(logits.to(device), features.to(device), labels, layout, feature_kind=feature_kind, noise=noise)


def make_teacher(arch="gcn3-16", device="cpu"):
    torch.manual_seed(1)
    model = build_model(arch, WIDTH, 2)
    graphs = make_pseudo_graphs(sizes=(9, 14)).harden(seed=3)
    model(graphs.x, graphs.edges)
    return as_teacher(model.to(device))


def make_settings(estimator="sparse_straight_through", **options):
    # The target pulls the density up, so that draws outgrow what was enough before.
    options = {"steps": 12, "lr_structure": 0.2, "lr_decay_steps": 5, "temperature": 2.0, **options}
    return LearnSettings(estimator=estimator, final_temperature=0.5, target_degree=6.0, c_degree=2.0, **options)


def state_of(learner):
    """Everything that a run leaves behind, as one list of tensors."""
    moments = [t for state in learner.optimizer.state.values() for t in state.values()]
    return [*learner.pseudo_graphs.state_dict().values(), *moments]


def same_bits(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


@pytest.fixture
def prepared(monkeypatch):
    """Buffers that grow to no more than is needed, so that they overflow again and again; counts the repairs."""
    repairs = []
    prepare = StaticStep._prepare

    def count(self):
        repairs.append(self.capacity)
        prepare(self)

    monkeypatch.setattr(captured, "room_for", lambda edges: edges)
    monkeypatch.setattr(StaticStep, "_prepare", count)
    return repairs


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("arch", ["gcn3-16", "gin3-16"])
@pytest.mark.parametrize(("estimator", "noise"), CASES)
def test_bits_of_the_plain_step_under_overflow(estimator, noise, arch, device, prepared):
    teacher, settings = make_teacher(arch, device), make_settings(estimator)
    plain = Learner(teacher, make_pseudo_graphs(device, noise), settings, seed=2**63 + 5)
    plain_terms = [plain.advance() for _ in range(12)]

    learner = Learner(teacher, make_pseudo_graphs(device, noise), settings, seed=2**63 + 5)
    step = StaticStep(learner, capacity=3)
    for stop in (4, 5, 12):
        terms = step.advance(stop - learner.step)
        assert learner.step == stop
        assert terms.keys() == plain_terms[stop - 1].keys()
        same_bits(list(terms.values()), list(plain_terms[stop - 1].values()))
    # The first capacity is refused by the first draw; sparse samples outgrow the next ones too.
    wanted = {"sparse_straight_through": 3, "straight_through": 3}.get(estimator, 2)
    assert len(prepared) >= wanted, prepared
    same_bits(state_of(learner), state_of(plain))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("feature_kind", ["continuous", "constant"])
def test_directed_layouts_and_other_features(feature_kind, device):
    options = {"directed": True, "feature_kind": feature_kind, "device": device}
    teacher, settings = make_teacher(device=device), make_settings("straight_through")
    plain = Learner(teacher, make_pseudo_graphs(**options), settings)
    for _ in range(6):
        plain.advance()
    learner = Learner(teacher, make_pseudo_graphs(**options), settings)
    StaticStep(learner, capacity=1).advance(6)
    same_bits(state_of(learner), state_of(plain))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_saved_state_goes_on_with_the_same_bits_in_either_kind_of_step(device):
    teacher, settings = make_teacher(device=device), make_settings()
    whole = learn(teacher, make_pseudo_graphs(device), settings, seed=4, capture=False)

    def fresh():
        return Learner(teacher, make_pseudo_graphs(device), settings, seed=4)

    first = fresh()
    StaticStep(first).advance(5)
    saved = copy.deepcopy(first.state_dict())
    # Plain numbers, or a file could not hold the step sizes and a plain step would go on with a buffer.
    assert all(isinstance(group["lr"], float) for group in saved["optimizer"]["param_groups"])
    second = fresh()
    second.advance()
    resumed = StaticStep(second, capacity=0)
    second.load_state_dict(saved)
    resumed.advance(3)
    while second.step < settings.steps:
        second.advance()
    same_bits(list(second.pseudo_graphs.state_dict().values()), list(whole.state_dict().values()))


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 2e-6), (6, 6e-4)])
def test_large_problems_whose_plain_step_has_sparse_gradients(steps, tolerance, monkeypatch):
    """Their Adam is another kernel than the static step's and rounds elsewhere, by an ulp or two in a step.

    Later steps divide a gradient that nearly cancels by its own size; they are held to a thousandth of the way that
    six steps of 0.1 can go.
    """
    monkeypatch.setattr(inversion, "_MANY_PAIRS", 1)
    settings = LearnSettings(steps=6, c_degree=0.0)
    plain = Learner(make_teacher(), make_pseudo_graphs(), settings)
    assert type(plain.optimizer) is not torch.optim.Adam
    for _ in range(steps):
        plain.advance()
    learner = Learner(make_teacher(), make_pseudo_graphs(), settings)
    StaticStep(learner, capacity=3).advance(steps)
    for got, want in zip(state_of(learner), state_of(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=0.0, atol=tolerance)


def test_an_overflow_stops_the_run_before_it_changes_anything(monkeypatch):
    """What the device does between a draw that does not fit and the host's next look."""
    learner = Learner(make_teacher(), make_pseudo_graphs(), make_settings())
    step = StaticStep(learner)
    step.advance(3)
    before = [t.clone() for t in state_of(learner)]
    step._capacity = 2
    step._limit.fill_(2)
    step._rng[1] = 3
    step._run(4)
    assert int(step._rng[1]) == 3 and int(step._needed) > 2
    same_bits(state_of(learner), before)


@pytest.mark.parametrize(("estimator", "noise"), CASES)
def test_no_step_looks_at_the_device(estimator, noise):
    learner = Learner(make_teacher("gin3-16"), make_pseudo_graphs(noise=noise), make_settings(estimator))
    step = StaticStep(learner)
    with NoHostReads(), step._optimizer_on_device():
        for _ in range(3):
            step._step()
    assert int(step._rng[1]) == 3
    # The same test on a step that does look: the plain one, whose draw has an exact length.
    with pytest.raises(HostReadError, match=r"sample_edges waits for the device, called by"), NoHostReads():
        learner.advance()


def test_host_reads_are_found_and_other_work_is_not():
    x, flags = torch.arange(6.0), torch.tensor([True, False] * 3)
    layout = PairLayout.complete([4])
    reads = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x.sum() > 3),
        "tolist": lambda: [float(v) for v in x],
        "nonzero": lambda: x.nonzero(),
        "where": lambda: torch.where(flags),
        "boolean index": lambda: x[flags],
        "boolean assignment": lambda: x.index_put_((flags,), torch.ones(3)),
        "masked_select": lambda: x.masked_select(flags),
        "unique": lambda: x.unique(),
        "repeat_interleave": lambda: x.repeat_interleave(torch.tensor([1] * 6)),
        "equal": lambda: torch.equal(x, x),
        "bincount": lambda: x.long().bincount(),
        "copy": lambda: x.to("meta"),
        "draw": lambda: sample_edges(torch.zeros(6), layout, seed=0),
    }
    for name, read in reads.items():
        with pytest.raises(HostReadError), NoHostReads():
            read()
            pytest.fail(name)
    with NoHostReads():
        x[torch.tensor([1, 2])].cumsum(0)
        x[2:] = 0.0
        x.repeat_interleave(torch.tensor([1] * 6), output_size=6)
        torch.where(flags, x, 0.0)
        sample_edges(torch.zeros(6), layout, seed=0, capacity=12)


class Curious(torch.nn.Module):
    """A user's module that looks at a value while it runs."""

    def __init__(self):
        super().__init__()
        self.model = build_model("gcn3-16", WIDTH, 2)

    def forward(self, x, edges):
        if bool(x.mean() > 1e6):
            raise ValueError("absurd features")
        return self.model(x, edges)


def test_teachers_and_estimators_that_cannot_be_captured(monkeypatch):
    teacher = as_teacher(Curious(), num_features=WIDTH)
    reasons = {
        r"_local_scalar_dense waits for the device, called by .*test_captured\.py:\d+ \(forward\)": Learner(
            teacher, make_pseudo_graphs(), make_settings()
        ),
        "estimator 'arm' moves the structure": Learner(make_teacher(), make_pseudo_graphs(), make_settings("arm")),
    }
    for reason, learner in reasons.items():
        before = copy.deepcopy(learner.pseudo_graphs.state_dict())
        with pytest.raises(NotCapturableError, match=reason):
            StaticStep(learner)
        with pytest.raises(InputError, match=f"capture: .*{reason}"):
            stepper(learner, capture=True)
        same_bits(list(learner.pseudo_graphs.state_dict().values()), list(before.values()))
        # As on CUDA, where None asks for a capture.
        monkeypatch.setattr(captured, "captures_by_default", lambda device: True)
        with pytest.warns(RuntimeWarning, match=f"without a CUDA graph, .*{reason}"):
            advance = stepper(learner)
        monkeypatch.undo()
        assert advance(2)["loss"].isfinite() and learner.step == 2


def test_learn_takes_the_step_that_is_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr(captured, "StaticStep", lambda learner: made.append(1) or StaticStep(learner))
    teacher, settings, seen = make_teacher(), make_settings(), {}

    def run(capture):
        steps = []
        found = learn(
            teacher,
            make_pseudo_graphs(),
            settings,
            seed=8,
            capture=capture,
            report_every=5,
            progress=lambda step, terms: steps.append((step, terms)),
        )
        return found, steps

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = {capture: run(capture) for capture in (None, False, True)}
    assert made == [1]
    assert [step for step, _ in seen[None][1]] == [5, 10, 12]
    for capture in (False, True):
        same_bits(list(seen[capture][0].state_dict().values()), list(seen[None][0].state_dict().values()))
        assert seen[capture][1] == seen[None][1]
    learn(teacher, make_pseudo_graphs(), make_settings(steps=0), capture=True)


def test_bad_input():
    learner = Learner(make_teacher(), make_pseudo_graphs(), make_settings())
    step = StaticStep(learner)
    assert 0 < step.capacity <= 2 * learner.pseudo_graphs.layout.num_pairs
    for steps in (0, -1, 13):
        with pytest.raises(InputError, match=r"steps: expected 1\.\.12"):
            step.advance(steps)
    with pytest.raises(InputError, match="capacity"):
        StaticStep(learner, capacity=-1)
    with pytest.raises(InputError, match="report_every"):
        learn(make_teacher(), make_pseudo_graphs(), make_settings(), report_every=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("estimator", "noise"), CASES)
def test_replay_equals_the_eager_static_step_and_never_synchronises(estimator, noise):
    """Not yet run on a GPU."""
    teacher, settings = make_teacher("gcn5-64", "cuda"), make_settings(estimator, steps=40)
    states = []
    for graph in (True, True, False):
        learner = Learner(teacher, make_pseudo_graphs("cuda", noise, sizes=(20,) * 32), settings, seed=1)
        step = StaticStep(learner, graph=graph)
        assert (step._graph is not None) == graph
        step.advance(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step._run(8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert int(step._rng[1]) == 9
        learner.step = 9
        step.advance(31)
        states.append([t.clone() for t in state_of(learner)])
    same_bits(states[0], states[1])
    same_bits(states[0], states[2])


@pytest.mark.gpu
def test_a_teacher_that_looks_at_the_device_falls_back_with_a_notice():
    """Not yet run on a GPU."""
    teacher = as_teacher(Curious().cuda(), num_features=WIDTH)
    pseudo, settings = make_pseudo_graphs("cuda"), make_settings(steps=3)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        captured_or_plain = learn(teacher, pseudo, settings)
    plain = learn(teacher, make_pseudo_graphs("cuda"), settings, capture=False)
    same_bits(list(captured_or_plain.state_dict().values()), list(plain.state_dict().values()))


def documented_loop():
    """The code blocks of docs/step.md: a loop of one's own, and its capture."""
    page = (Path(__file__).parents[1] / "docs" / "step.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    return blocks


def test_the_documented_loop_never_looks_at_the_device():
    names = {}
    loop = documented_loop()[0].replace("torch.cuda.is_available()", "False")
    exec(loop, names)
    before = names["logits"].detach().clone()
    names["step"]()
    with NoHostReads():
        for _ in range(3):
            names["step"]()
    assert int(names["number"]) == 4 and 0 < int(names["largest"]) <= names["capacity"]
    assert (names["logits"] != before).any()


@pytest.mark.gpu
def test_the_documented_loop_is_captured():
    """Not yet run on a GPU."""
    names = {}
    for block in documented_loop():
        exec(block, names)
    assert int(names["number"]) == 103 and names["loss"].isfinite()
