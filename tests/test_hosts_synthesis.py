"""CMI, KamalEngine, Fast-Datafree, NAYER and DFAD: their loops in small, before and after the swap."""

from __future__ import annotations

import copy

import pytest
import torch
from synthesis_helpers import PRIOR, make_generator, make_teacher, registered
from synthesis_loops import DenseGenerator, GenerativeHost, cmi_driver, dfad, meta_loop

import acgkd_fast as af
from acgkd_fast.errors import InputError
from acgkd_fast.hosts.vision import OneBatch
from acgkd_fast.nn import build_model

pytestmark = pytest.mark.filterwarnings("ignore:k. expected at most:RuntimeWarning")
LOSSES = {"adv": 0.5, "bn": 0.7, "oh": 1.3}


def models():
    torch.manual_seed(3)
    student = build_model("gcn2-8", 3, 2, dropout=0.0)
    return OneBatch(make_teacher().requires_grad_(False)), OneBatch(student)


def test_cmi_teaches_the_same_student():
    teacher, student = models()
    host = GenerativeHost(teacher, student, make_generator(), iterations=4, batch_size=6, lr_g=1e-2, **LOSSES)
    wanted = cmi_driver(host, student, teacher)
    host_state = copy.deepcopy(student.state_dict())

    teacher, student = models()
    synthesizer = af.GraphSynthesizer(
        teacher,
        student,
        make_generator(),
        iterations=4,
        synthesis_batch_size=6,
        sample_batch_size=6,
        lr_g=1e-2,
        degree=0.0,
        **LOSSES,
    )
    assert cmi_driver(synthesizer, student, teacher) == pytest.approx(wanted, rel=1e-3)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, host_state[name], rtol=1e-2, atol=1e-3)
    # The host's hooks stay on the teacher; ours are gone.
    assert registered(host.teacher) and not registered(teacher)
    assert synthesizer.generator.nodes.weight.grad.any()


@pytest.mark.parametrize(
    ("returns", "unpack"),
    [
        ("dict", lambda result: result),
        ("timed", lambda result: result[0]),
        ("nayer", lambda result: result[0] if len(result) == 4 else None),
    ],
)
@pytest.mark.parametrize("engine", ["refine", "learn"])
def test_every_drivers_arity(returns, unpack, engine):
    teacher, student = models()
    synthesizer = af.GraphSynthesizer(
        teacher,
        student,
        prior=PRIOR,
        engine=engine,
        iterations=5,
        synthesis_batch_size=6,
        sample_batch_size=4,
        returns=returns,
        adv=0.5,
    )
    losses = cmi_driver(synthesizer, student, teacher, unpack=unpack)
    assert len(losses) == 6 and all(torch.isfinite(torch.tensor(losses)))
    assert len(synthesizer.data_pool) == 12


def test_a_pyg_driver():
    pytest.importorskip("torch_geometric")
    teacher, student = models()
    options = {"prior": PRIOR, "iterations": 3, "synthesis_batch_size": 6, "sample_batch_size": 4}
    plain = af.GraphSynthesizer(teacher, **options)
    as_pyg = af.GraphSynthesizer(teacher, convert=af.GraphBatch.to_pyg, **options)
    start = copy.deepcopy(student.state_dict())
    wanted = cmi_driver(plain, student, teacher)
    student.load_state_dict(start)

    class PyGDriver:
        synthesize, sample = as_pyg.synthesize, as_pyg.sample

    # A PyG batch has .detach() and .to() of its own.
    assert cmi_driver(PyGDriver, student, teacher) == pytest.approx(wanted, rel=1e-4)


def relaxed_generator():
    return make_generator(num_classes=None, estimator="relaxed", hard_features=False)


def test_fast_datafree_meta_learns_the_same_generator():
    teacher, _ = models()
    ours, host = relaxed_generator(), DenseGenerator(relaxed_generator())
    found, wanted = meta_loop(ours, teacher), meta_loop(host, teacher)
    assert found == pytest.approx(wanted, rel=1e-3)
    for mine, other in zip(ours.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)
    # The clone alone counts up; the original has not drawn.
    assert int(ours.calls) == 0


def test_dfad_plays_the_same_game():
    teacher, student = models()
    other = copy.deepcopy(student)
    ours, host = relaxed_generator(), DenseGenerator(relaxed_generator())
    start = copy.deepcopy(ours.state_dict())
    found, wanted = dfad(ours, teacher, student), dfad(host, teacher, other)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    for mine, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)
    for name, parameter in ours.named_parameters():
        assert parameter.grad.any() and not torch.equal(parameter, start[name]), name


def test_one_batch_models():
    teacher, student = models()
    graphs = make_generator()()
    logits, features = teacher(graphs, return_features=True)
    torch.testing.assert_close(logits, teacher(graphs))
    assert features.shape == (6, 8)
    torch.testing.assert_close(teacher.model.classifier(features), logits)
    twin = copy.deepcopy(teacher)
    with torch.no_grad():
        twin.model.classifier.bias.add_(1.0)
    torch.testing.assert_close(twin(graphs), logits + 1.0)
    torch.testing.assert_close(twin(graphs, return_features=True)[1], features)
    assert not registered(teacher) and len(list(student.parameters())) == len(list(student.model.parameters()))
    with pytest.raises(InputError, match="feature_layer"):
        OneBatch(Bare())
    chosen = OneBatch(teacher.model, teacher.model.blocks[0].norm)
    assert chosen(graphs, return_features=True)[1].shape == (graphs.num_nodes, 8)


class Bare(torch.nn.Module):
    def forward(self, x, edges):
        return x


def test_one_batch_takes_pyg_batches():
    pytest.importorskip("torch_geometric")
    teacher, _ = models()
    graphs = make_generator()().detach()
    torch.testing.assert_close(teacher(graphs.to_pyg()), teacher(graphs), rtol=1e-4, atol=1e-5)
