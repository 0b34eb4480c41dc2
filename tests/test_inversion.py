"""The learning stage: everything learnable moves, the loss falls, and a resumed run is the same run."""

from __future__ import annotations

import copy

import pytest
import torch

import acgkd_fast as af
from acgkd_fast.distill.inversion import Learner, LearnSettings, learn
from acgkd_fast.distill.objectives import degree_term, distillation_loss, one_hot_entropy
from acgkd_fast.errors import InputError
from acgkd_fast.layout import PairLayout
from acgkd_fast.nn.models import build_model
from acgkd_fast.pseudo_graphs import FEATURE_KINDS, PseudoGraphs, edge_logit, edge_probability
from acgkd_fast.teachers import as_teacher

ESTIMATORS = ("relaxed", "hard_concrete", "straight_through", "sparse_straight_through", "arm")
WIDTH = 4


@pytest.fixture(scope="module", params=["gcn3-16", "gin3-16"])
def teacher(request):
    torch.manual_seed(0)
    model = build_model(request.param, WIDTH, 2)
    # One pass in training mode gives BatchNorm statistics to aim at.
    graphs = make_pseudo_graphs(seed=9).harden(seed=3)
    model(graphs.x, graphs.edges)
    return as_teacher(model)


def make_pseudo_graphs(seed=0, feature_kind="one-hot", noise="logistic", sizes=(6, 9, 1, 5)):
    generator = torch.Generator().manual_seed(seed)
    layout = PairLayout.complete(sizes)
    logits = torch.randn(layout.num_pairs, generator=generator) - 0.5
    features = torch.randn(layout.num_nodes, WIDTH, generator=generator)
    labels = torch.arange(len(sizes)) % 2
    return PseudoGraphs(logits, features, labels, layout, feature_kind=feature_kind, noise=noise)


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_learnable_input_moves_and_the_loss_falls(teacher, estimator, noise):
    if estimator == "arm" and noise == "gumbel":
        pytest.skip("the ARM identity needs logistic noise")
    pseudo = make_pseudo_graphs(noise=noise)
    before = {name: parameter.detach().clone() for name, parameter in pseudo.named_parameters()}
    settings = LearnSettings(steps=80, estimator=estimator, lr_structure=0.05, lr_features=0.05, c_degree=0.0)
    losses = []
    learn(teacher, pseudo, settings, seed=1, progress=lambda _, terms: losses.append(terms["loss"]), report_every=1)

    assert before.keys() == {"logits", "features"}
    for name, parameter in pseudo.named_parameters():
        moved = (parameter - before[name]).abs()
        assert torch.isfinite(parameter).all()
        if name == "features" or estimator in ("relaxed", "straight_through", "arm"):
            assert (moved > 0).all(), f"{name}: {int((moved == 0).sum())} entries never moved"
        else:
            assert (moved > 0).float().mean() > 0.5, name
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < first, (first, last)


def test_the_teacher_stays_as_it_was(teacher):
    before = copy.deepcopy(teacher.module.state_dict())
    learn(teacher, make_pseudo_graphs(), LearnSettings(steps=3))
    for name, tensor in teacher.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


def test_resumed_run_has_the_same_bits(teacher):
    settings = LearnSettings(steps=12, temperature=2.0, final_temperature=0.5)
    whole = learn(teacher, make_pseudo_graphs(), settings, seed=5)

    first = Learner(teacher, make_pseudo_graphs(), settings, seed=5)
    for _ in range(7):
        first.advance()
    second = Learner(teacher, make_pseudo_graphs(seed=77), settings, seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    while second.step < settings.steps:
        second.advance()
    assert torch.equal(second.pseudo_graphs.logits, whole.logits)
    assert torch.equal(second.pseudo_graphs.features, whole.features)


def test_degree_term_brings_the_density_to_its_target(teacher):
    pseudo = make_pseudo_graphs(sizes=(12, 15, 9))
    learn(teacher, pseudo, LearnSettings(steps=150, c_degree=5.0, target_degree=2.0))
    assert (pseudo.expected_degree() - 2.0).abs().max() < 0.6


@pytest.mark.parametrize("feature_kind", FEATURE_KINDS)
def test_feature_kinds(teacher, feature_kind):
    pseudo = make_pseudo_graphs(feature_kind=feature_kind)
    learnable = {name for name, _ in pseudo.named_parameters()}
    assert ("features" in learnable) == (feature_kind != "constant")
    learn(teacher, pseudo, LearnSettings(steps=2))
    hard = pseudo.harden(seed=0)
    if feature_kind in ("one-hot", "degree"):
        assert torch.equal(hard.x.sum(1), torch.ones(hard.num_nodes))
        assert ((hard.x == 0) | (hard.x == 1)).all()
    assert not hard.x.requires_grad
    assert ((hard.edges.value == 1) | (hard.edges.value == 0)).all()


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_edge_probability_inverts_edge_logit(noise):
    probability = torch.tensor([1e-4, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    torch.testing.assert_close(edge_probability(edge_logit(probability, noise), noise), probability)


@pytest.mark.parametrize("xi", [1.0, 0.4])
@pytest.mark.parametrize("directed", [False, True])
def test_starting_from_graphs_keeps_their_edges_likely(xi, directed):
    graphs = make_pseudo_graphs(sizes=(8, 11)).harden(seed=2)
    pseudo = PseudoGraphs.from_graphs(graphs, feature_kind="one-hot", xi=xi, directed=directed, extra_degree=0.2)
    pair = pseudo.layout.pair_index(graphs.edges.row(), graphs.edges.col.long())
    probability = pseudo.edge_probability().detach()
    held = torch.zeros_like(probability, dtype=torch.bool)
    held[pair[pair >= 0]] = True
    torch.testing.assert_close(probability[held], torch.full_like(probability[held], 0.9))
    assert (probability[~held] < 0.2).all()
    if xi == 1.0:
        assert (pair >= 0).all()
        assert torch.equal(pseudo.hard_features(), graphs.x)


def test_bad_input(teacher):
    with pytest.raises(InputError, match="features: expected width 4"):
        Learner(teacher, PseudoGraphs(torch.zeros(1), torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64),
                                      PairLayout.complete([2]), feature_kind="one-hot"), LearnSettings())  # fmt: skip
    wrong = make_pseudo_graphs()
    wrong.y[0] = 7
    with pytest.raises(InputError, match=r"y: expected labels in 0\.\.1"):
        Learner(teacher, wrong, LearnSettings())
    for change in (
        {"steps": -1},
        {"temperature": 0.0},
        {"estimator": "magic"},
        {"bn_term": "none"},
        {"lr_features": 0.0},
    ):
        with pytest.raises(InputError, match=next(iter(change)).split("_features")[0]):
            LearnSettings(**change)


def test_a_teacher_without_edge_weights_cannot_be_learned_from():
    class Unweighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(WIDTH, 2)

        def forward(self, x, edge_index, batch):
            return torch.zeros(int(batch.max()) + 1, 2).index_add(0, batch, self.lin(x))

    unweighted = as_teacher(Unweighted(), num_features=WIDTH)
    with pytest.raises(InputError, match="edge weights"):
        Learner(unweighted, make_pseudo_graphs(), LearnSettings())
    with pytest.warns(RuntimeWarning, match="no BatchNorm layer"):
        learn(unweighted, make_pseudo_graphs(), LearnSettings(steps=2, estimator="arm"))


def test_objectives_against_their_formulas():
    x = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(one_hot_entropy(x), torch.log(torch.tensor(2.0)) / 2)
    torch.testing.assert_close(degree_term(torch.tensor([1.0, 4.0]), 2.0), torch.log(torch.tensor(2.0)) ** 2)
    student, target = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 2.0]])
    p, q = (target / 3).softmax(-1), (student / 3).softmax(-1)
    torch.testing.assert_close(distillation_loss(student, target, 3.0), 9 * (p * (p / q).log()).sum())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_expected_degree_against_its_formula(device):
    sizes = (6, 1, 30, 2)
    pseudo = make_pseudo_graphs(sizes=sizes).to(device)
    pseudo.layout = pseudo.layout.to(device)
    probability = torch.sigmoid(pseudo.logits.detach().cpu().double())
    degree = torch.stack(
        [2 * part.sum() / n for part, n in zip(probability.split(pseudo.layout.pairs_per_graph), sizes, strict=True)]
    )
    torch.testing.assert_close(pseudo.expected_degree().detach().cpu().double(), degree, rtol=1e-5, atol=1e-6)
    weight = torch.tensor([1.0, 2.0, -1.0, 3.0])
    (grad,) = torch.autograd.grad((pseudo.expected_degree() * weight.to(device)).sum(), pseudo.logits)
    share = (2 * weight.double() / torch.tensor(sizes)).repeat_interleave(torch.tensor(pseudo.layout.pairs_per_graph))
    torch.testing.assert_close(grad.cpu().double(), share * probability * (1 - probability), rtol=1e-5, atol=1e-6)
    # What CUDA takes in place of segment_reduce.
    sums = af.readout(pseudo.edge_probability()[:, None], pseudo.layout.pair_ptr).squeeze(1)
    expected = degree * torch.tensor(sizes) / 2
    torch.testing.assert_close(sums.detach().cpu().double(), expected, rtol=1e-5, atol=1e-6)
