"""Operator of the optimiser step: schema and fake."""

from __future__ import annotations

from .._library import define
from . import reference

ADAM_STEP = define(
    "adam_step_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? index, Tensor grad, float lr,"
    " float beta1, float beta2, float eps, int step) -> ()",
    reference.adam_step,
    lambda *_: None,
)
