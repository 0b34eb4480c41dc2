"""Find the places where a piece of work waits for the device: such work cannot become a CUDA graph."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import _library

_TORCH = str(Path(torch.__file__).parent)
# Their result, or its shape, is known on the host only once the device has computed it.
_READERS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "_linalg_check_errors",
}


class HostReadError(RuntimeError):
    """Some work read a number from the device, or one of a shape that only the device knows."""


class NoHostReads(TorchDispatchMode):
    """Refuse whatever would make the host wait for the device, on any device, so also in a test on the CPU.

    >>> with NoHostReads():
    ...     loss.backward()

    Refused are reads of values (``item``, ``bool``, ``equal``), shapes that depend on values (``nonzero``, boolean
    indices, ``repeat_interleave`` without ``output_size``, `sample_edges` without ``capacity``), and copies
    between devices. What a kernel does inside is not seen; on CUDA ``torch.cuda.set_sync_debug_mode`` does that.

    Raises:
        HostReadError: naming the operator and the line that called it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _reads(func, args, kwargs):
            raise HostReadError(f"{func.name()} waits for the device, called by {_caller()}")
        return func(*args, **kwargs)


def _reads(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = func.name().split("::", 1)[-1].split(".", 1)[0]
    if func.namespace == _library.NAMESPACE:
        return name in ("sample_edges", "sample_factor_edges") and args[-1] < 0
    check = _CONDITIONAL.get(name)
    return name in _READERS or (check is not None and check(args, kwargs))


def _repeats_of_unknown_sum(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tensor = isinstance(args[-1], torch.Tensor)
    return tensor and kwargs.get("output_size") is None


def _boolean_index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _leaves_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    target = kwargs.get("device")
    return target is not None and torch.device(target).type != args[0].device.type


def _other_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args[0].device.type != args[1].device.type)


_CONDITIONAL: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], bool]] = {
    "repeat_interleave": _repeats_of_unknown_sum,
    "index": _boolean_index,
    "index_put": _boolean_index,
    "index_put_": _boolean_index,
    "_index_put_impl_": _boolean_index,
    "_to_copy": _leaves_device,
    "copy_": _other_device,
}


def _caller() -> str:
    """The innermost line outside torch and this file."""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(_TORCH):
            return f"{file}:{line} ({frame.f_code.co_name})"
    return "an unknown line"
