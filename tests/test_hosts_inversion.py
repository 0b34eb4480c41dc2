"""DeepInversion, as CMI has it and as its own code is called: loops in small, before and after the swap."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from synthesis_helpers import PRIOR, make_teacher, registered, same
from synthesis_loops import DeepInversionHost, cmi_driver

import acgkd_fast as af
from acgkd_fast.checkpoints import load_graphs
from acgkd_fast.distill.inversion import LearnSettings
from acgkd_fast.errors import InputError
from acgkd_fast.hosts.deepinversion import DeepInversionClass
from acgkd_fast.hosts.vision import OneBatch
from acgkd_fast.nn import build_model
from acgkd_fast.philox import Stream

STEPS = 6
LOSSES = {"adv": 0.5, "bn": 0.7, "oh": 1.3}
LEARN = LearnSettings(steps=STEPS, estimator="relaxed", c_oh=0.0, c_degree=0.0)


def models():
    torch.manual_seed(3)
    student = build_model("gcn2-8", 3, 2, dropout=0.0)
    return OneBatch(make_teacher().requires_grad_(False)), OneBatch(student)


def padded_start(teacher, count):
    """The start of the synthesizer's first call with seed 0 as free inputs, and the uniforms of its steps."""
    graphs = af.start_graphs(af.as_teacher(teacher.model), PRIOR, count, seed=0)
    y = torch.arange(count) % 2
    pseudo = af.PseudoGraphs.from_graphs(af.GraphBatch(graphs.x, graphs.edges, y), feature_kind=PRIOR.feature_kind)
    sizes = torch.tensor(pseudo.layout.sizes)
    n = int(sizes.max())
    mask = torch.arange(n) < sizes[:, None]
    features = torch.zeros(count, n, 3)
    features[mask] = pseudo.features.detach()
    layout = pseudo.layout
    row, col = layout.pair_nodes()
    graph = torch.arange(count).repeat_interleave(sizes)[row]
    first = layout.node_ptr[graph]

    def matrices(pairs, elsewhere):
        dense = torch.full((count, n, n), elsewhere)
        dense[graph, row - first, col - first] = pairs
        dense[graph, col - first, row - first] = pairs
        return dense

    def uniforms(step):
        rng = torch.tensor([0, step])
        drawn = torch.ops.acgkd_fast.pair_uniforms(layout.table, rng, layout.kind, int(Stream.EDGE), layout.num_pairs)
        return matrices(drawn, 0.5)

    logits = matrices(pseudo.logits.detach(), 0.0)
    return (logits.requires_grad_(), features.requires_grad_(), mask, y), uniforms


def test_cmis_deep_inversion_learns_the_same_graphs_and_student():
    teacher, student = models()
    rates = LEARN.lr_structure, LEARN.lr_features
    start, uniforms = padded_start(teacher, 6)
    host = DeepInversionHost(teacher, student, iterations=STEPS, rates=rates, start=start, uniforms=uniforms, **LOSSES)
    wanted = cmi_driver(host, student, teacher, epochs=1)
    host_state = copy.deepcopy(student.state_dict())

    teacher, student = models()
    synthesizer = af.GraphSynthesizer(
        teacher,
        student,
        prior=PRIOR,
        engine="learn",
        learn=LEARN,
        synthesis_batch_size=6,
        sample_batch_size=6,
        **LOSSES,
    )
    assert cmi_driver(synthesizer, student, teacher, epochs=1) == pytest.approx(wanted, rel=1e-3)
    ours, theirs = synthesizer.data_pool.sample(6), host.pool
    assert sorted(ours.edges.rowptr.diff().tolist()) == sorted(theirs.edges.rowptr.diff().tolist())
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, host_state[name], rtol=1e-2, atol=1e-3)
    assert registered(host.teacher) and not registered(teacher)


def invert(folder, **options):
    settings = {"prior": PRIOR, "learn": LEARN, "seed": 4} | options
    return DeepInversionClass(bs=6, net_teacher=make_teacher(), final_data_path=folder, **settings)


def test_batches_are_written_and_learned_as_the_synthesizer_learns_them(tmp_path):
    teacher, student = models()
    inversion = invert(tmp_path, coefficients={"r_feature": 0.7, "main_loss_multiplier": 1.3, "adi_scale": 0.5})
    assert inversion.generate_batch(net_student=student.model) is None
    assert inversion.generate_batch(student.model, targets=torch.tensor([1, 1, 0])) is None
    synthesizer = af.GraphSynthesizer(
        teacher, student, prior=PRIOR, engine="learn", learn=LEARN, synthesis_batch_size=6, seed=4, **LOSSES
    )
    wanted = [synthesizer.synthesize(), synthesizer.synthesize(torch.tensor([1, 1, 0]))]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["batch_00000.safetensors", "batch_00001.safetensors"]
    for number, result in enumerate(wanted):
        written, _ = load_graphs(tmp_path / f"batch_{number:05d}.safetensors")
        same(written, result["synthetic"])
        assert torch.equal(written.y, result["synthetic"].y)
    same(inversion.graphs, wanted[1]["synthetic"])
    assert not registered(inversion.net_teacher)


def test_deep_inversion_goes_on_where_it_stopped(tmp_path):
    first = invert(tmp_path / "a")
    first.generate_batch()
    first.generate_batch()
    second = invert(tmp_path / "b")
    second.num_generations = 1
    second.generate_batch()
    same(second.graphs, first.graphs)


def test_coefficients(tmp_path):
    """The step size counts, and what has no meaning is named, unless it is 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inversion = invert(tmp_path, coefficients={"lr": 0.2, "tv_l2": 0.0})
    inversion.generate_batch()
    rate = LearnSettings(**{**vars(LEARN), "lr_structure": 0.2, "lr_features": 0.02})
    other = invert(tmp_path / "b", learn=rate)
    other.generate_batch()
    same(inversion.graphs, other.graphs)
    # The features' rate moves no hard feature in so few steps.
    assert inversion._options["learn"].rates_at(0) == pytest.approx([0.2, 0.02])
    with pytest.warns(RuntimeWarning, match="coefficients: first_bn_multiplier, l2 have no meaning"):
        invert(tmp_path, coefficients={"l2": 1e-5, "first_bn_multiplier": 10.0})
    with pytest.raises(InputError, match="net_teacher: expected"):
        DeepInversionClass()
    with pytest.raises(InputError, match="student: expected a model to disagree with"):
        invert(tmp_path, coefficients={"adi_scale": 1.0}).generate_batch()
