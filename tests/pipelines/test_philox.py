"""Philox against the published vectors, and the uniform numbers against their distribution."""

import numpy as np
import pytest

from fastgessl.pipelines.philox import key_of, philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert " ".join(f"{word:08x}" for word in philox(counter, key)) == expected


def test_uniforms_are_uniform_and_independent():
    stats = pytest.importorskip("scipy.stats")
    numbers = uniforms(np.arange(4000), stream=1, blocks=range(2), key=key_of(0, 0)).reshape(4000, 8)
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(numbers.T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
    assert numbers.min() > 0 and numbers.max() < 1


def test_seeds_and_epochs_beyond_a_word_have_keys_of_their_own():
    # As bare words of 32 bits, zeros behind them left out, each of these lines is one and the same.
    words = (
        [(5, 3), (5 + 3 * 2**32, 0)],
        [(2**32, 5), (0, 1 + 5 * 2**32)],
        [(7, 0), (7, 2**32)],
        [(2**64, 1), (0, 2**96)],
    )
    for alike in words:
        assert len({key_of(seed, epoch) for seed, epoch in alike}) == len(alike)


def test_keys_of_a_seed_and_an_epoch_of_one_word_stay_what_they_were():
    # numpy's SeedSequence of both, recorded: other keys are other views in a resumed run.
    assert key_of(0, 0) == (2968811710, 3677149159)
    assert key_of(3, 4) == tuple(
        int(word) for word in np.random.SeedSequence((3, 4)).generate_state(2, np.uint32)
    )


def test_seed_epoch_stream_block_and_sample_each_change_the_numbers():
    def first(index=5, stream=0, block=0, seed=3, epoch=4):
        return uniforms(np.array([index]), stream, range(block, block + 1), key_of(seed, epoch)).tobytes()

    # 5 + 2**32 differs from 5 in the second counter word only; a seed may be larger than a key word.
    varied = {
        first(),
        first(index=6),
        first(index=5 + 2**32),
        first(stream=1),
        first(block=1),
        first(seed=2**70),
        first(epoch=5),
        first(seed=4, epoch=3),
    }
    assert len(varied) == 8
