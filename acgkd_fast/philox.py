"""The random stream: Philox4x32-10 over explicit 32-bit counter words.

A draw is addressed, never stepped through: key = the 64-bit seed, counter words =
(pair index inside its graph // 4, graph id, step, stream tag), lane = pair index % 4. It
therefore does not depend on batch order, tiling, device or launch shape, and a backward pass
regenerates the noise that its forward pass used. The C++ and Triton kernels produce the same
words; golden vectors are frozen in ``tests/test_philox.py``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch

from .errors import check, is_integer

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

# Both work in int64, so one body of code serves numpy and torch.
Words = TypeVar("Words", np.ndarray, torch.Tensor)


class Stream(IntEnum):
    """Fourth counter word: what a draw is for, so that no two uses share noise."""

    EDGE = 0
    ABSENT = 1
    INIT = 2
    PROPOSAL = 3
    LATENT = 4
    SHUFFLE = 5


def _rounds(counter: list[Words], key: tuple[Any, Any]) -> list[Words]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low0, high0 = _multiply(c0, MULTIPLIERS[0])
        low1, high1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & _MASK, (k1 + KEY_STEPS[1]) & _MASK
    return [c0, c1, c2, c3]


def _multiply(word: Words, factor: int) -> tuple[Words, Words]:
    """Low and high half of the 64-bit product, by 16-bit parts so that int64 never overflows."""
    low_part = (word & 0xFFFF) * factor
    high_part = (word >> 16) * factor + (low_part >> 16)
    return ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF), high_part >> 16


def check_word(name: str, value: Any, low: int, high: int) -> None:
    """Check an integer in low..high-1 that becomes a counter or key word."""
    check(is_integer(value) and low <= value < high, name, f"an integer in {low}..{high - 1}", value)


def split_seed(seed: int) -> tuple[int, int]:
    """Low and high 32-bit key words of a seed; negative seeds count as their 64-bit pattern."""
    check_word("seed", seed, -(2**63), 2**64)
    return int(seed) & _MASK, (int(seed) >> 32) & _MASK


def words_numpy(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 in numpy.

    Args:
        counter: counter words, integer array of shape [..., 4], each in 0..2^32-1.
        seed: 64-bit key.

    Returns:
        uint32 array of the same shape: the four output words of each counter.
    """
    parts = [counter[..., i].astype(np.int64) for i in range(4)]
    return np.stack(_rounds(parts, split_seed(seed)), axis=-1).astype(np.uint32)


def words_torch(counter: torch.Tensor, key: torch.Tensor | int) -> torch.Tensor:
    """Philox4x32-10 in torch, on any device.

    Args:
        counter: int64 tensor of shape [..., 4] holding 32-bit words.
        key: 64-bit seed, an int or a one-element int64 tensor (no host read in that case).

    Returns:
        int64 tensor of the same shape with values in 0..2^32-1.
    """
    key_words: tuple[Any, Any]
    if isinstance(key, torch.Tensor):
        key = key.reshape(())
        key_words = (key & _MASK, (key >> 32) & _MASK)
    else:
        key_words = split_seed(key)
    return torch.stack(_rounds(list(counter.unbind(-1)), key_words), dim=-1)


def uniform_from_words(words: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Map words to ((word >> 9) + 0.5) * 2^-23: exact in float32, never 0 and never 1."""
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def graph_uniforms(
    graph_ids: torch.Tensor, step: torch.Tensor, count: int, *, stream: Stream, seed: int
) -> torch.Tensor:
    """`count` uniforms for each (graph, step), in float64, so that ``floor(u * n)`` is exact everywhere.

    Args:
        graph_ids: int64, ids in 0..2^32-1.
        step: int64 of a shape that broadcasts with `graph_ids`, in 0..2^32-1.
        count: uniforms wanted; uniform k is lane k % 4 of counter word k // 4.
        stream: what the draw is for.
        seed: 64-bit key.

    Returns:
        float64 [..., count] in (0, 1).
    """
    word = torch.arange((count + 3) // 4, device=graph_ids.device)
    shape = (*torch.broadcast_shapes(graph_ids.shape, step.shape), word.numel())
    parts = (word, graph_ids.unsqueeze(-1), step.unsqueeze(-1), word.new_full((), int(stream)))
    counter = torch.stack([part.expand(shape) for part in parts], dim=-1)
    return uniform_from_words(words_torch(counter, seed).flatten(-2)[..., :count], torch.float64)
