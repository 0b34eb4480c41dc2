"""Files of ``torch.save`` that hold tensors, containers and numbers, and nothing that could run."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..files import existing_file, write_bytes


def load_pickle(path: str | Path, expected: str) -> Any:
    """Read a legacy or zip file of ``torch.save`` with ``weights_only=True``; tensors arrive on the CPU.

    Args:
        path: the file.
        expected: what it should be, for the error message.

    Raises:
        DataError: no file, a damaged one, or one with other objects than tensors, containers, strings and numbers.
    """
    path = existing_file(path, expected)
    # An accuracy is often saved as a numpy number, which is harmless but not among torch's safe types.
    scalar: Any = np.float64(0).__reduce__()[0]
    known: list[Any] = [np.dtype, *(type(np.dtype(code)) for code in "fdilq"), defaultdict, dict]
    known += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise DataError(f"{path}: expected {expected} with plain tensors, got one that does not read ({reason})") from (
            error
        )


def save_pickle(path: str | Path, value: Any) -> None:
    """Write what ``torch.load(..., weights_only=True)`` reads, atomically.

    Raises:
        DataError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())
