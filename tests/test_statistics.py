"""BatchNorm statistics: what the probe collects, and the two distances against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import normal
from torch import nn

import acgkd_fast as af
from acgkd_fast.distill.statistics import BatchNormProbe, MomentsProbe, gaussian_divergence, running_stats_norm
from acgkd_fast.nn.models import build_model
from acgkd_fast.normalize import column_moments

WIDTHS = (4, 3)


class Unfused(nn.BatchNorm1d):
    """A plain layer in the place of a fused one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


class Teacher(nn.Module):
    def __init__(self, *, fail: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(2, WIDTHS[0]), nn.BatchNorm1d(WIDTHS[0]), nn.Linear(4, WIDTHS[1])
        self.inner = nn.Sequential(nn.BatchNorm1d(WIDTHS[1]), nn.Tanh())
        self.without_statistics = nn.BatchNorm1d(WIDTHS[1], track_running_stats=False)
        self.fail = fail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x))
        if self.fail:
            raise RuntimeError("halfway")
        return self.without_statistics(self.inner(self.second(hidden)))


def make_teacher(**options) -> Teacher:
    torch.manual_seed(0)
    teacher = Teacher(**options)
    for layer, seed in ((teacher.norm, 1), (teacher.inner[0], 2)):
        layer.running_mean.copy_(normal(layer.num_features, seed))
        layer.running_var.copy_(normal(layer.num_features, seed + 10).abs() + 0.1)
    return teacher.eval()


def hooks(module: nn.Module) -> int:
    return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in module.modules())


def test_probe_collects_inputs_in_call_order():
    teacher, x = make_teacher(), normal((6, 2), 3, torch.float32).requires_grad_()
    probe = BatchNormProbe(teacher)
    assert probe.num_layers == 2 and hooks(teacher) == 0
    with probe:
        out = teacher(x)
    assert [tuple(features.shape) for features in probe.inputs] == [(6, 4), (6, 3)]
    torch.testing.assert_close(probe.inputs[0], teacher.first(x))
    for (mean, variance), layer in zip(probe.running, (teacher.norm, teacher.inner[0]), strict=True):
        assert torch.equal(mean, layer.running_mean) and torch.equal(variance, layer.running_var)
    # The probe only listens: the output is what it is without, and gradients reach the input.
    torch.testing.assert_close(out, teacher(x))
    probe.inputs[1].sum().backward()
    assert x.grad.any()


def test_probe_keeps_collecting_until_reset():
    teacher, x = make_teacher(), normal((6, 2), 3, torch.float32)
    with BatchNormProbe(teacher) as probe:
        teacher(x)
        teacher(x)
        assert len(probe.inputs) == len(probe.running) == 4
        probe.reset()
        assert probe.inputs == [] and probe.running == []
        teacher(x)
        assert len(probe.inputs) == 2
    teacher(x)
    assert len(probe.inputs) == 2 and hooks(teacher) == 0


def test_probe_removes_its_hooks_after_an_error():
    teacher = make_teacher(fail=True)
    probe = BatchNormProbe(teacher)
    with pytest.raises(RuntimeError, match="halfway"), probe:
        assert hooks(teacher) == 2
        teacher(normal((6, 2), 3, torch.float32))
    assert hooks(teacher) == 0 and len(probe.inputs) == 1


def test_probe_cannot_be_opened_twice():
    """A second set of hooks would count every layer twice, and nobody would remove the first."""
    teacher = make_teacher()
    with BatchNormProbe(teacher) as probe:
        with pytest.raises(RuntimeError, match="already open"):
            probe.__enter__()
        assert hooks(teacher) == 2
    assert hooks(teacher) == 0
    with probe:
        assert hooks(teacher) == 2


def collected(rows: int = 12):
    inputs = [normal((rows, width), 20 + width).requires_grad_() for width in WIDTHS]
    running = [(normal(width, 30), normal(width, 40).abs() + 0.2) for width in WIDTHS]
    return inputs, running


def columns(features: torch.Tensor) -> list[tuple[float, float]]:
    """Mean and biased variance of every channel, in Python floats."""
    found = []
    for column in features.detach().T.tolist():
        mean = math.fsum(column) / len(column)
        found.append((mean, math.fsum((value - mean) ** 2 for value in column) / len(column)))
    return found


def test_running_stats_norm_against_its_formula():
    inputs, running = collected()
    expected = 0.0
    for features, (mean, variance) in zip(inputs, running, strict=True):
        both = columns(features)
        expected += math.dist([m for m, _ in both], mean.tolist()) + math.dist([v for _, v in both], variance.tolist())
    distance = running_stats_norm([column_moments(features) for features in inputs], running)
    assert distance.shape == () and distance.item() == pytest.approx(expected, rel=1e-12)
    distance.backward()
    assert all((features.grad != 0).all() for features in inputs)


def test_gaussian_divergence_against_its_formula():
    inputs, running = collected()
    terms = []
    for features, (mean, variance) in zip(inputs, running, strict=True):
        floor = 1e-3 * sum(variance.tolist()) / len(variance) + 1e-6
        for (m, v), n, w in zip(columns(features), mean.tolist(), variance.tolist(), strict=True):
            ratio = (v + floor) / (w + floor)
            terms.append((ratio - 1 - math.log(ratio) + (m - n) ** 2 / (w + floor)) / 2)
    divergence = gaussian_divergence([column_moments(features) for features in inputs], running)
    assert divergence.shape == () and divergence.item() == pytest.approx(sum(terms) / len(terms), rel=1e-10)
    divergence.backward()
    assert all((features.grad != 0).all() for features in inputs)


def own_statistics(inputs):
    return [(features.detach().mean(0), features.detach().var(0, correction=0)) for features in inputs]


@pytest.mark.parametrize("distance", [
    lambda inputs, running: running_stats_norm([column_moments(features) for features in inputs], running),
    lambda inputs, running: gaussian_divergence([column_moments(features) for features in inputs], running),
], ids=["norm", "divergence"])  # fmt: skip
def test_both_distances_are_zero_at_equality_and_positive_elsewhere(distance):
    inputs, _ = collected()
    running = own_statistics(inputs)
    assert distance(inputs, running).item() == pytest.approx(0.0, abs=1e-12)
    for layer in range(2):
        for part in range(2):
            for factor in (0.5, 1.01, 4.0):
                moved = [list(pair) for pair in running]
                moved[layer][part] = moved[layer][part] * factor
                assert distance(inputs, moved).item() > 1e-7


@pytest.mark.parametrize("constant", [0.0, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_constant_channel_stays_finite(constant, dtype):
    features = normal((9, 3), 1, dtype)
    features[:, 1] = constant
    features.requires_grad_()
    running = [(torch.zeros(3, dtype=dtype), torch.tensor([1.0, 0.5, 0.0], dtype=dtype))]
    divergence = gaussian_divergence([column_moments(features)], running)
    divergence.backward()
    assert divergence.isfinite() and divergence > 0
    assert features.grad.isfinite().all() and features.grad.any()


def test_moments_probe_agrees_with_the_inputs_fused_or_not():
    """Layers with a fused pass and plain ones, with the same values and gradients."""
    model = build_model("gin3-8", 4, 2)
    # The first block has no residual to pass on, so a plain layer fits there.
    model.blocks[0].norm = Unfused(8)
    model.blocks[0].forward = lambda x, edges, block=model.blocks[0]: block.norm(block.conv(x, edges))
    model.eval().requires_grad_(False)
    for seed, layer in enumerate(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)):
        layer.running_mean.copy_(normal(layer.num_features, seed, torch.float32))
    layout = af.PairLayout.complete([5, 7])
    edges = af.sample_edges(torch.zeros(layout.num_pairs), layout, seed=0)
    answers = []
    for probe in (BatchNormProbe(model), MomentsProbe(model)):
        x = normal((12, 4), 3, torch.float32).requires_grad_()
        with probe:
            out = model(x, edges)
        moments = probe.moments if isinstance(probe, MomentsProbe) else [column_moments(h) for h in probe.inputs]
        assert len(moments) == len(probe.running) == probe.num_layers == 4
        distance = running_stats_norm(moments, probe.running)
        distance.backward()
        answers.append((out.detach(), distance.detach(), x.grad, *(t.detach() for pair in moments for t in pair)))
    for expected, got in zip(*answers, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert hooks(model) == 0 and all(getattr(layer, "observer", None) is None for layer in model.modules())


def test_moments_probe_leaves_no_trace_and_cannot_be_doubled():
    model = build_model("gcn3-8", 4, 2).eval()
    layout = af.PairLayout.complete([5])
    edges = af.sample_edges(torch.zeros(layout.num_pairs), layout, seed=0)
    with pytest.raises(RuntimeError, match="another probe"), MomentsProbe(model), MomentsProbe(model):
        pass
    with pytest.raises(af.InputError, match="x: expected"), MomentsProbe(model):
        model.blocks[0].norm(torch.zeros(3))
    assert all(getattr(layer, "observer", None) is None for layer in model.modules())
    with MomentsProbe(model) as probe:
        model(torch.ones(5, 4), edges)
        assert len(probe.moments) == 2
        probe.reset()
        assert probe.moments == probe.running == []


def test_distances_need_a_layer():
    """A teacher without BatchNorm has no statistics to compare with."""
    for call in (running_stats_norm, gaussian_divergence):
        with pytest.raises(af.InputError, match=r"^running: expected at least one BatchNorm layer"):
            call([], [])
