"""The random stream against the published answers and against an independent version."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import philox_words, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

import acgkd_fast as af
from acgkd_fast import philox

ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32-10: counter, key (low word, high word), answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

words = st.integers(0, ONES)
seeds = st.integers(-(2**63), 2**64 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    seed = key[0] | key[1] << 32
    assert tuple(philox.words_numpy(np.array(counter, dtype=np.uint32), seed)) == answer
    assert tuple(philox.words_torch(torch.tensor(counter), seed).tolist()) == answer
    assert tuple(philox_words(counter, seed)) == answer


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(words, words, words, words), min_size=1, max_size=5), seeds)
def test_numpy_torch_and_device_seeds_agree(counters, seed):
    expected = [philox_words(counter, seed) for counter in counters]
    from_numpy = philox.words_numpy(np.array(counters, dtype=np.uint64), seed)
    assert from_numpy.dtype == np.uint32 and from_numpy.tolist() == expected
    counter = torch.tensor(counters)
    signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    for key in (seed, signed, signed.reshape(1)):
        drawn = philox.words_torch(counter, key)
        assert drawn.dtype == torch.int64 and drawn.tolist() == expected


def test_one_counter_keeps_its_shape_with_a_tensor_key():
    counter = torch.tensor([1, 2, 3, 4])
    assert philox.words_torch(counter, torch.tensor([5])).shape == (4,)


@pytest.mark.parametrize("seed", [-1, -(2**63), -12345])
def test_negative_seeds_count_as_their_bit_pattern(seed):
    assert philox.split_seed(seed) == philox.split_seed(seed + 2**64)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, True, "1", None])
def test_bad_seeds_are_named(seed):
    with pytest.raises(af.InputError, match=r"^seed: expected an integer in"):
        philox.words_torch(torch.zeros(4, dtype=torch.int64), seed)


@pytest.mark.parametrize(
    ("word", "exact"),
    [(0, 2.0**-24), (511, 2.0**-24), (512, 3 * 2.0**-24), (2**31, 0.5 + 2.0**-24), (ONES, 1 - 2.0**-24)],
)
def test_uniforms_are_exact_and_never_0_or_1(word, exact):
    for dtype in (torch.float32, torch.float64):
        value = philox.uniform_from_words(torch.tensor([word]), dtype)
        assert value.dtype == dtype and value.item() == exact
        assert 0.0 < value.item() < 1.0
        # Mirroring and the logistic transform stay finite, which the edges rely on.
        assert (1 - value).item() == 1 - exact and torch.logit(value).isfinite()


def test_float32_and_float64_uniforms_agree_exactly():
    drawn = philox.words_torch(torch.arange(4000).reshape(-1, 4), 99)
    single, double = (philox.uniform_from_words(drawn, dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(single.double(), double)


def test_streams_have_their_frozen_tags():
    assert [(stream.name, int(stream)) for stream in philox.Stream] == [
        ("EDGE", 0),
        ("ABSENT", 1),
        ("INIT", 2),
        ("PROPOSAL", 3),
        ("LATENT", 4),
        ("SHUFFLE", 5),
    ]


FROZEN_LAYOUT = af.PairLayout.complete([3, 1, 4], graph_ids=[7, 0, ONES])
# word >> 9 of each pair; a change here changes every stored experiment.
FROZEN = {
    (123456789, 5, philox.Stream.EDGE): [
        1085063,
        5653905,
        5677347,
        7757997,
        4744195,
        5591749,
        3623029,
        1658387,
        3303042,
    ],
    (-1, ONES, philox.Stream.ABSENT): [5993971, 2298117, 4556435, 2748788, 4131586, 4494851, 2415242, 5790766, 3200513],
}


@pytest.mark.parametrize(("seed", "step", "stream"), FROZEN)
def test_frozen_uniforms_of_a_layout(seed, step, stream):
    drawn = FROZEN_LAYOUT.uniforms(seed=seed, step=step, stream=stream)
    assert ((drawn.double() * 2**23) - 0.5).tolist() == FROZEN[seed, step, stream]
    by_hand = [uniform(FROZEN_LAYOUT, pair, seed, step, int(stream)) for pair in range(FROZEN_LAYOUT.num_pairs)]
    assert drawn.tolist() == by_hand
    on_device = FROZEN_LAYOUT.uniforms(seed=torch.tensor([seed]), step=torch.tensor(step), stream=stream)
    assert torch.equal(drawn, on_device)
