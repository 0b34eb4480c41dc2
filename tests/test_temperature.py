"""The adversarial temperature: bounds, schedule, and the sign of its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from acgkd_fast.distill.objectives import distillation_divergence
from acgkd_fast.distill.temperature import (
    AdversarialTemperature,
    AdversarySettings,
    reversal_strength,
    reverse_gradient,
)
from acgkd_fast.errors import InputError


def logits(seed=0, count=6, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return [4 * torch.randn(count, classes, generator=generator) for _ in range(2)]


def test_reversal_keeps_the_value_and_turns_the_gradient():
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    y = reverse_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.tensor([2.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [-0.5, -1.0]


@pytest.mark.parametrize("ramp", ["cosine", "linear"])
def test_the_strength_grows_as_ctkd_says(ramp):
    settings = AdversarySettings("global", strength=2.0, ramp_epochs=4, ramp=ramp)
    got = [reversal_strength(settings, epoch) for epoch in range(6)]
    ramps = {
        "cosine": [2 * 0.5 * (1 - math.cos(math.pi * e / 4)) for e in range(5)] + [2.0],
        "linear": [0.0, 0.5, 1.0, 1.5, 2.0, 2.0],
    }
    assert got == pytest.approx(ramps[ramp])
    assert reversal_strength(AdversarySettings("global", ramp_epochs=0), 0) == 1.0


@pytest.mark.parametrize("mode", ["global", "graph"])
def test_every_parameter_climbs_the_loss(mode):
    """The gradient is minus the strength times the gradient of the loss: descent raises the loss."""
    student, teacher = logits()
    adversary = AdversarialTemperature(AdversarySettings(mode, ramp_epochs=0, strength=0.5), 2.0, 3, seed=0)
    plain = AdversarialTemperature(AdversarySettings(mode, ramp_epochs=0, strength=1.0), 2.0, 3, seed=0)

    def loss(module, sign=1.0):
        return sign * distillation_divergence(student, teacher, module(student, teacher, 0)).mean()

    reversed_gradients = torch.autograd.grad(loss(adversary), list(adversary.parameters()))
    true_gradients = torch.autograd.grad(loss(plain, -1.0), list(plain.parameters()))
    for ours, true in zip(reversed_gradients, true_gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, -0.5 * true)
    before = float(loss(adversary).detach())
    with torch.no_grad():
        for parameter, gradient in zip(adversary.parameters(), reversed_gradients, strict=True):
            parameter -= 1e-3 * gradient
    assert float(loss(adversary).detach()) > before


@pytest.mark.parametrize("mode", ["global", "graph"])
def test_bounds_and_start(mode):
    student, teacher = logits()
    settings = AdversarySettings(mode, low=1.0, high=5.0)
    adversary = AdversarialTemperature(settings, 2.0, 3, seed=0)
    value = adversary(student, teacher, 0)
    assert value.shape == (6, 1)
    if mode == "global":
        torch.testing.assert_close(value, torch.full((6, 1), 2.0))
    else:
        assert value.unique().numel() == 6
        again = AdversarialTemperature(settings, 2.0, 3, seed=0)
        assert torch.equal(again(student, teacher, 0), value)
        assert not torch.equal(AdversarialTemperature(settings, 2.0, 3, seed=1)(student, teacher, 0), value)
    for extreme in (-1e4, 1e4):
        with torch.no_grad():
            adversary.theta.fill_(extreme)
        inside = adversary(1e6 * student, teacher, 0)
        assert ((inside >= 1.0) & (inside <= 5.0)).all()


def test_no_gradient_reaches_the_logits():
    student, teacher = (part.requires_grad_() for part in logits())
    adversary = AdversarialTemperature(AdversarySettings("graph"), 2.0, 3, seed=0)
    adversary(student, teacher, 5).sum().backward()
    assert student.grad is None and teacher.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "class"}, "mode: expected one of"),
        ({"ramp": "step"}, "ramp: expected one of"),
        ({"low": 0.0}, "low, high: expected 0 < low < high"),
        ({"low": 5.0, "high": 5.0}, "low, high: expected 0 < low < high"),
        ({"high": math.inf}, "low, high"),
        ({"strength": -1.0}, "strength: expected a number of 0 or more"),
        ({"ramp_epochs": 1.5}, "ramp_epochs: expected a whole number"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        AdversarySettings(**options)


def test_a_start_on_the_bound_is_refused():
    with pytest.raises(InputError, match="temperature: expected a start between"):
        AdversarialTemperature(AdversarySettings("global"), 1.0, 2, seed=0)
