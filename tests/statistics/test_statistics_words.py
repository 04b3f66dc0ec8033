"""Philox4x32-10 words as the contract keys them: balance and independence of bits, and the avalanche of one
input bit.
"""

from __future__ import annotations

import bit_checks
import numpy as np
from noise_samples import SEED, group_words, philox
from numpy.typing import NDArray
from thresholds import Check, Judge

TAGS = {"Gaussian": 1, "Rademacher": 2, "rounding": 3, "derived": 4}
NUM_ROWS = 1 << 16
NUM_INPUTS = 1 << 13


def walk(name: str) -> NDArray[np.uint32]:
    """Words [2^16, 4] along one coordinate of the noise, the others held."""
    index = np.arange(NUM_ROWS, dtype=np.uint64)
    counters = np.zeros((NUM_ROWS, 4), dtype=np.uint32)
    keys = np.zeros((NUM_ROWS, 2), dtype=np.uint32)
    counters[:, 3] = TAGS["Gaussian"]
    column = {"groups": counters[:, 0], "groups 2^32 apart": counters[:, 2], "streams": counters[:, 1]}
    column |= {"seeds": keys[:, 0], "seeds 2^32 apart": keys[:, 1]}
    column[name][:] = index
    return philox(counters, keys)


def test_bits_along_every_coordinate(judge: Judge) -> None:
    """Counting up in one word, from all zeros: the least random input there is."""
    checks: list[Check] = []
    for name in ("groups", "groups 2^32 apart", "streams", "seeds", "seeds 2^32 apart"):
        checks += bit_checks.bit_columns(name, bit_checks.bits_of(walk(name)))
    judge("bits along each coordinate", checks)


def test_tags_separate_words(judge: Judge) -> None:
    """Words of one seed, stream and group under the four tags: all bits of one against all of another."""
    groups = np.arange(NUM_ROWS, dtype=np.uint64)
    bits = {name: bit_checks.bits_of(group_words(SEED, 0, groups, tag)) for name, tag in TAGS.items()}
    names = list(TAGS)
    checks: list[Check] = []
    for i, name in enumerate(names):
        for other in names[:i]:
            checks += bit_checks.bit_columns(f"{other}, {name}", bits[other], bits[name])
    judge("bits under unlike tags", checks)


def flipped_inputs(
    counters: NDArray[np.uint32], keys: NDArray[np.uint32], words: slice
) -> NDArray[np.uint32]:
    """Outputs [bits, n, 4] with each bit of some of the six input words (counter, then key) flipped in
    turn.
    """
    inputs = np.concatenate([counters, keys], axis=1)
    outputs = []
    for word in range(6)[words]:
        for bit in range(32):
            changed = inputs.copy()
            changed[:, word] ^= np.uint32(1 << bit)
            outputs.append(philox(changed[:, :4], changed[:, 4:]))
    return np.stack(outputs)


def test_one_input_bit_changes_half_of_the_output(judge: Judge) -> None:
    """All 128 counter and 64 key bits. Inputs as the noise uses them: small groups and streams, tag 1, keys
    at random.
    """
    random = np.random.default_rng(11)
    counters = np.zeros((NUM_INPUTS, 4), dtype=np.uint32)
    counters[:, 0] = np.arange(NUM_INPUTS)
    counters[:, 1] = random.integers(0, 512, NUM_INPUTS)
    counters[:, 3] = TAGS["Gaussian"]
    keys = random.integers(0, 2**32, (NUM_INPUTS, 2), dtype=np.uint32)
    words = philox(counters, keys)
    checks: list[Check] = []
    for name, part in (
        ("group low, stream", slice(0, 2)),
        ("group high, tag", slice(2, 4)),
        ("seed", slice(4, 6)),
    ):
        for check in bit_checks.avalanche(words, flipped_inputs(counters, keys, part)):
            checks.append(Check(f"{name}: {check.label}", check.sigmas))
    judge("avalanche of 192 input bits", checks)
