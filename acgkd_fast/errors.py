"""Errors for bad input, and the few checks that every public function shares.

Messages name the argument, say what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch


class InputError(ValueError):
    """A value that the caller passed cannot be used; the message is one line."""


class DataError(InputError):
    """A file is missing, corrupt or not of the form that was asked for."""


def describe(value: Any) -> str:
    """Short text for an error message: shape and dtype of a tensor, else the value."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def fail(name: str, expected: str, got: Any) -> InputError:
    """The error to raise when argument `name` is not as expected."""
    return InputError(f"{name}: expected {expected}, got {describe(got)}")


def check(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise fail(name, expected, got)


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number of Python's or numpy's; a bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number of Python's or numpy's; a bool is none."""
    return is_integer(value) or isinstance(value, (float, np.floating))


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    known = tuple(choices)
    check(value in known, name, "one of " + ", ".join(known), value)


def check_tensor(
    name: str,
    value: Any,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Check type, shape (None matches any extent), dtype and device of a tensor argument."""
    check(isinstance(value, torch.Tensor), name, "a torch.Tensor", value)
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            want is None or want == have for want, have in zip(shape, value.shape, strict=True)
        )
        # Texts are put together after a failure only: a forward pass makes dozens of these checks.
        if not fits:
            wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
            raise fail(name, f"a tensor of shape {wanted}", value)
    if dtypes is not None and value.dtype not in dtypes:
        raise fail(name, f"dtype {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}", value)
    if device is not None and value.device != device:
        raise fail(name, f"a tensor on {device}", value)
