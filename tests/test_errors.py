"""Messages for bad input: one line, with the argument, what was expected and what came."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import acgkd_fast as af
from acgkd_fast import errors


def message(call, *args, **kwargs) -> str:
    with pytest.raises(af.InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_input_errors_are_value_errors():
    assert issubclass(af.InputError, ValueError)
    assert issubclass(af.DataError, af.InputError)


def test_describe_tensor_gives_dtype_shape_and_device():
    assert errors.describe(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bfloat16 tensor of shape (2, 3) on cpu"


@pytest.mark.parametrize("value", [np.zeros((40, 40)), [torch.zeros(30, 30)], "a\n" * 200, {"k": list(range(1000))}])
def test_describe_is_one_short_line(value):
    text = errors.describe(value)
    assert "\n" not in text and len(text) <= 80


def test_check_passes_and_fails():
    errors.check(True, "n", "a number", "x")
    assert message(errors.check, False, "n", "a number", "x") == "n: expected a number, got 'x'"


def test_check_choice_lists_the_choices():
    errors.check_choice("mode", "sum", ("sum", "mean"))
    assert message(errors.check_choice, "mode", "median", ("sum", "mean")) == (
        "mode: expected one of sum, mean, got 'median'"
    )


@pytest.mark.parametrize(
    ("value", "limits", "expected"),
    [
        ([1.0], {}, "x: expected a torch.Tensor, got [1.0]"),
        (torch.zeros(2, 3), {"shape": (None,)}, "x: expected a tensor of shape (any)"),
        (torch.zeros(2, 3), {"shape": (None, 4)}, "x: expected a tensor of shape (any, 4)"),
        (torch.zeros(2), {"dtypes": (torch.int64, torch.float64)}, "x: expected dtype int64 or float64, got float32"),
        (torch.zeros(2, device="meta"), {"device": torch.device("cpu")}, "x: expected a tensor on cpu, got float32"),
    ],
)
def test_check_tensor(value, limits, expected):
    text = message(errors.check_tensor, "x", value, **limits)
    assert text.startswith(expected) and "\n" not in text


def test_check_tensor_accepts_what_fits():
    errors.check_tensor("x", torch.zeros(2, 3), shape=(None, 3), dtypes=(torch.float32,), device=torch.device("cpu"))


@pytest.mark.parametrize("value", [1, np.int32(1), np.uint8(0)])
def test_whole_numbers_are_numbers(value):
    assert errors.is_integer(value) and errors.is_number(value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), float("nan")])
def test_fractions_are_numbers_only(value):
    assert errors.is_number(value) and not errors.is_integer(value)


@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, np.complex64(1), [1], torch.tensor(1)])
def test_other_things_are_no_numbers(value):
    assert not errors.is_number(value) and not errors.is_integer(value)
