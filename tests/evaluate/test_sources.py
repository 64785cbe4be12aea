import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgessl.config import UsageError
from fastgessl.evaluate.sources import draw_labelled, hold_out, require_labels


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.floats(0, 0.9), st.integers(0, 5))
def test_hold_out_parts_the_rows_and_takes_its_fraction_of_each_class_but_never_all(labels, fraction, seed):
    labels = torch.tensor(labels)

    kept, held = hold_out(labels, fraction, generator(seed))

    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    for label in labels.unique():
        members = int((labels == label).sum())
        taken = int((labels[held] == label).sum())
        assert taken < members
        assert abs(taken - fraction * members) <= 0.5 or taken == members - 1


def test_hold_out_repeats_with_the_seed_and_changes_with_it():
    labels = torch.arange(100) % 4

    assert hold_out(labels, 0.2, generator(1))[1].equal(hold_out(labels, 0.2, generator(1))[1])
    assert not hold_out(labels, 0.2, generator(1))[1].equal(hold_out(labels, 0.2, generator(2))[1])


def test_draw_labelled_takes_distinct_images_of_each_class_and_new_ones_the_next_time():
    labels = torch.randint(0, 5, (200,), generator=generator())
    stream = generator()

    first, second = draw_labelled(labels, 6, stream), draw_labelled(labels, 6, stream)

    assert labels[first].bincount().tolist() == [6] * 5
    assert len(first.unique()) == 30
    assert not first.sort().values.equal(second.sort().values)


def test_draw_labelled_refuses_a_class_with_too_few_images():
    with pytest.raises(
        UsageError,
        match=r"labels_per_class is 3, but class 7 has only 2 training images\. Choose .* 2 or less",
    ):
        draw_labelled(torch.tensor([1, 1, 1, 7, 7]), 3, generator())


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (None, [0, 1], "the training images have no labels"),
        ([0, 1], None, "the test images have no labels"),
        ([3, 3, 3], [3], "all 3 training images are of class 3"),
        ([0, 1], [0, 5, 6], r"2 classes of the test images \(labels 5, 6\) have no training image"),
        ([0, 1], [], "there is no test split"),
    ],
)
def test_labels_that_allow_no_classifier_are_refused_with_the_task_and_the_reason(train, test, message):
    as_tensor = [
        None if labels is None else torch.tensor(labels, dtype=torch.int64) for labels in (train, test)
    ]

    with pytest.raises(UsageError, match=f"Task linear: {message}"):
        require_labels("linear", *as_tensor)
