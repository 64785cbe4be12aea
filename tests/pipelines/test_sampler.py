"""The sampler's promises, for any size, batch and number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgessl.pipelines import DataError
from fastgessl.pipelines.sampler import Sampling, epoch_order

WORLDS = range(1, 9)


@st.composite
def cases(draw, training, world_size):
    batch_size = world_size * draw(st.integers(1, 6))
    size = draw(st.integers(batch_size if training else 1, 150))
    return size, batch_size, draw(st.integers(0, 2**40))


def global_batches(size, batch_size, seed, world_size, training, epoch=0):
    """[[the indices of rank 0, of rank 1, ...] of every global batch]"""
    ranks = [Sampling(size, batch_size, seed, rank, world_size, training) for rank in range(world_size)]
    return [[sampling.indices(epoch, step) for sampling in ranks] for step in range(ranks[0].batches)]


@pytest.mark.parametrize("world_size", WORLDS)
@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(0, 5))
def test_training_repeats_nothing_and_drops_only_the_last_partial_global_batch(world_size, data, epoch):
    size, batch_size, seed = data.draw(cases(True, world_size))
    batches = global_batches(size, batch_size, seed, world_size, True, epoch)
    seen = np.concatenate([part for batch in batches for part in batch])
    assert all(len(part) == batch_size // world_size for batch in batches for part in batch)
    assert len(set(seen.tolist())) == len(seen) == size - size % batch_size
    assert seen.min() >= 0 and seen.max() < size


@pytest.mark.parametrize("world_size", WORLDS)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_evaluation_covers_each_image_once_in_order(world_size, data):
    size, batch_size, seed = data.draw(cases(False, world_size))
    batches = global_batches(size, batch_size, seed, world_size, False)
    assert [index for batch in batches for part in batch for index in part] == list(range(size))
    last = [len(part) for part in batches[-1]]
    assert max(last) - min(last) <= 1


@pytest.mark.parametrize("world_size", WORLDS)
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(world_size, data):
    size, batch_size, seed = data.draw(cases(True, world_size))
    ranks = global_batches(size, batch_size, seed, world_size, True)
    alone = global_batches(size, batch_size, seed, 1, True)
    for parts, (whole,) in zip(ranks, alone, strict=True):
        assert np.concatenate(parts).tolist() == whole.tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(50)) for order in orders)


def test_every_image_is_equally_likely_at_every_place():
    stats = pytest.importorskip("scipy.stats")
    orders = np.stack([epoch_order(8, 0, epoch) for epoch in range(2000)])
    for place in range(8):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=8)).pvalue > 1e-3
    # Successive images are independent too: all 56 ordered pairs are equally likely.
    pairs = np.bincount(orders[:, 0] * 8 + orders[:, 1], minlength=64).reshape(8, 8)
    assert stats.chisquare(pairs[~np.eye(8, dtype=bool)]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0, 0, 1, True), "holds no images"),
        ((3, 4, 0, 0, 1, True), "batch size 4 is larger than the data set of 3 images"),
        ((9, 4, 0, 0, 3, True), "batch size 4 is no positive multiple of the 3 processes"),
        ((9, 0, 0, 0, 1, True), "batch size 0 is no positive multiple"),
        ((9, 4, 0, 2, 2, True), "found rank 2 of 2"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        Sampling(*arguments)
