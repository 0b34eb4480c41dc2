"""Files that are either complete or absent: atomic writes, and tensors in safetensors form.

Tensors are never pickled: what a file holds cannot run code when it is read.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from .errors import DataError

_METADATA = "acgkd_fast"


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file that readers see whole or not at all. Missing parent folders are made.

    Raises:
        DataError: the file cannot be written (full disk, no permission, ...); one that was there
            before is left as it was, and nothing half-written stays behind.
    """
    path = Path(path)
    # In the same folder, because os.replace is atomic only inside one file system.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: expected to write {len(data)} bytes, got an error ({reason})") from error


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def existing_file(path: str | Path, expected: str) -> Path:
    """The path, if a file is there.

    Raises:
        DataError: nothing or a folder is there; `expected` says what the file should be.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected {expected}, got {'a folder' if path.is_dir() else 'no file'}")
    return path


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON metadata as one safetensors file, atomically.

    Args:
        path: the file.
        tensors: any devices and shapes; tensors that share memory are stored one by one.
        metadata: anything that JSON can hold.

    Raises:
        DataError: the file cannot be written.
    """
    stored: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    write_bytes(path, to_safetensors(stored, {_METADATA: json.dumps(metadata)}))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote; tensors arrive on the CPU.

    Raises:
        DataError: the file is missing, damaged, or not one of this package.
    """
    path = existing_file(path, "a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        metadata = json.loads(header[_METADATA])
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: expected a safetensors file, got one that does not read ({error})") from error
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: expected a file written by acgkd-fast, got one without its metadata") from error
    return tensors, metadata


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write nested dictionaries, lists and tuples of tensors, numbers, strings and None, atomically.

    Meant for the ``state_dict()`` of modules and optimizers: keys may be strings or ints, floats
    come back bit by bit.

    Raises:
        DataError: the file cannot be written.
        TypeError: a value of another type.
    """
    tensors: dict[str, torch.Tensor] = {}
    save_tensors(path, tensors, {"kind": "state", "state": _encode(state, tensors)})


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    Raises:
        DataError: the file is missing, damaged, or holds no state.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "state":
        raise DataError(f"{path}: expected a saved state, got a file of kind {metadata.get('kind')!r}")
    state: dict[str, Any] = _decode(metadata["state"], tensors)
    return state


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        # As pairs, because JSON keys are strings and an optimizer's are ints.
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_encode(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state: expected tensors, numbers, strings, lists and dictionaries, got {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
