"""What every launch needs: the size of a grid, and the right device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from acgkd_fast.errors import check

LARGEST_INT32 = 2**31 - 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def num_programs(a: int, b: int, d: int, c: int, *, pairs: int, nodes: int, graphs: int) -> int:
    """Programs of a batch: ``layout.first_program`` one past the last graph."""
    return (a * pairs + b * nodes) // d + c * graphs


def check_contiguous(operator: str, **tensors: torch.Tensor | None) -> None:
    """Kernels index rows by their length; a strided view would be read wrongly without a word."""
    for name, tensor in tensors.items():
        check(tensor is None or tensor.is_contiguous(), f"{operator}: {name}", "a contiguous tensor", tensor)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def warps(nvidia: int, amd: int) -> int:
    """Warps per program; AMD's hold 64 threads, so the same tile may need fewer."""
    return amd if torch.version.hip else nvidia
