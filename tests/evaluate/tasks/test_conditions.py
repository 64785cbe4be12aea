"""The idealised-representation theorem on constructed data whose equivalence classes are known.

C classes of images, each with many augmented views. An invariant task gives every class a label. A probe
learns a task from one view of each class and is judged on other views: where the three conditions hold every
task is solved, and breaking one condition alone breaks some.
"""

import itertools

import pytest
import torch

from fastgessl.config import UsageError
from fastgessl.evaluate import Features, SgdProtocol, fit_gradient_probe, fit_probe, measure_conditions
from fastgessl.evaluate.tasks.conditions import spanned_dimensions, within_share

CLASSES, VIEWS = 6, 12
# Every way to give six classes two labels, up to swapping them, and some with more labels.
TASKS = [labels for labels in itertools.product((0, 1), repeat=CLASSES) if labels[0] == 0 and sum(labels)]
TASKS += [(0, 1, 2, 0, 1, 2), (0, 1, 2, 3, 4, 5), (0, 0, 1, 1, 2, 2)]


def ideal(seed: int = 0) -> torch.Tensor:
    """(VIEWS, CLASSES, 5): the corners of a simplex in C − 1 = 5 dimensions, the same for every view."""
    centred = torch.eye(CLASSES) - 1 / CLASSES
    return (centred @ torch.linalg.svd(centred).Vh[: CLASSES - 1].T).expand(VIEWS, -1, -1)


def without_invariance() -> torch.Tensor:
    """The same corners, with a large part of each view that augmentation draws anew: wide enough and
    predictable, not invariant.
    """
    return torch.cat(
        [ideal(), 6 * torch.randn(VIEWS, CLASSES, 40, generator=torch.Generator().manual_seed(0))], dim=2
    )


def without_dimension() -> torch.Tensor:
    """Six points on a circle: invariant, each class cut off from the rest by a line, but two dimensions
    instead of five.
    """
    angles = torch.arange(CLASSES) * 2 * torch.pi / CLASSES
    return torch.stack([angles.cos(), angles.sin()], dim=1).expand(VIEWS, -1, -1)


def without_predictability() -> torch.Tensor:
    """Two classes in one place, in five dimensions: invariant and wide enough for five, but no probe tells
    these two apart.
    """
    merged = ideal().clone()
    merged[:, 1] = merged[:, 0]
    return merged


def accuracy(views: torch.Tensor, task: tuple[int, ...], hidden: int = 0) -> float:
    """A probe learns from the first view of each class; its accuracy on the other views."""
    labels = torch.tensor(task)
    train = Features(views[0].contiguous(), labels, torch.arange(CLASSES))
    # An MLP is given the six points over and over: it is a question of what it can represent, not of how many
    # steps it takes.
    probe = (
        fit_gradient_probe(repeated(train), SgdProtocol(hidden, epochs=60, rates=(0.1,)))
        if hidden
        else fit_probe(train, weight_decay=1e-3)
    )
    predicted = probe.classes[probe.log_probabilities(views[1:].flatten(0, 1).contiguous()).argmax(dim=1)]
    return (predicted == labels.repeat(VIEWS - 1)).double().mean().item()


def repeated(train: Features) -> Features:
    return Features(train.features.repeat(20, 1), train.labels.repeat(20), torch.arange(20 * len(train)))


def test_a_representation_that_meets_the_conditions_solves_every_invariant_task():
    measured = measure_conditions(ideal()[0], ideal()[1])

    ideally = {"variation": 0, "dimension": 5, "needed": 5, "predictability": 1, "classes": 6}
    assert measured == ideally
    assert all(accuracy(ideal(), task) == 1 for task in TASKS)
    assert all(accuracy(ideal(), task, hidden=32) == 1 for task in TASKS[::6])


def test_breaking_invariance_alone_breaks_some_task():
    views = without_invariance()
    measured = measure_conditions(views[0], views[1])

    assert measured["variation"] > 0.2 and measured["dimension"] >= measured["needed"]
    # The corners are still there: a linear probe on them alone solves every task, so nothing but invariance
    # is missing.
    assert all(accuracy(views[:, :, :5], task) == 1 for task in TASKS)
    assert min(accuracy(views, task) for task in TASKS) < 0.75


def test_breaking_the_dimension_alone_breaks_some_task_for_a_linear_probe_and_none_for_an_mlp():
    views = without_dimension()
    measured = measure_conditions(views[0], views[1])
    alternating = (0, 1, 0, 1, 0, 1)

    assert measured["variation"] == 0 and measured["predictability"] == 1
    assert measured["dimension"] == 2 < measured["needed"] == 5
    assert accuracy(views, alternating) < 0.9
    assert accuracy(views, alternating, hidden=64) == 1
    assert accuracy(views, (0, 0, 0, 1, 1, 1)) == 1


def test_breaking_predictability_alone_breaks_exactly_the_tasks_that_tell_the_merged_classes_apart():
    views = without_predictability()
    measured = measure_conditions(views[0], views[1])

    assert measured["variation"] == 0 and views.shape[2] == measured["needed"]
    assert measured["predictability"] == pytest.approx(5 / 6)
    for task in TASKS:
        assert (accuracy(views, task) == 1) == (task[0] == task[1])


def test_a_labelled_task_needs_as_many_dimensions_as_it_has_classes_less_one():
    views = ideal()

    assert measure_conditions(views[0], views[1], label_classes=3)["needed"] == 2


def test_the_share_within_is_the_variance_ratio_of_constructed_views():
    generator = torch.Generator().manual_seed(0)
    means, offset = 2 * torch.randn(20000, 3, generator=generator), torch.randn(20000, 3, generator=generator)

    # Views at mean ± offset: variance within 1, between 4.
    assert within_share(means + offset, means - offset) == pytest.approx(1 / 5, abs=0.01)
    assert within_share(torch.ones(4, 3), torch.ones(4, 3)) == 0


def test_spanned_dimensions_are_the_rank_about_the_mean():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(50, 4, generator=generator) @ torch.randn(4, 30, generator=generator) + 7

    assert spanned_dimensions(flat) == 4
    assert spanned_dimensions(torch.full((5, 3), 2.0)) == 0


def test_one_image_has_nothing_to_be_told_apart_from():
    with pytest.raises(UsageError, match="there is 1 image"):
        measure_conditions(torch.ones(1, 3), torch.ones(1, 3))
