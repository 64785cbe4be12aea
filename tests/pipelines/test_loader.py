"""The loader: epochs, ranks, exact resume, the choice of an engine."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgessl.pipelines
from fastgessl.pipelines import (
    ArrayImages,
    DataError,
    FileImages,
    build,
    choose_engine,
    evaluation_view,
    view_preset,
)
from fastgessl.pipelines.engines.resident import ResidentEngine
from fastgessl.pipelines.loader import Sampling

HALF = (0.5, 0.5, 0.5)
VIEWS = view_preset("byol", 8, mean=HALF, std=HALF)
IMAGES = ArrayImages(
    np.random.default_rng(0).integers(0, 256, (26, 9, 7, 3), dtype=np.uint8),
    np.arange(26, dtype=np.int64) % 5,
    tuple("abcde"),
)


def loader(images=IMAGES, views=VIEWS, **options):
    return build(images, views, **({"batch_size": 8, "seed": 3} | options))


def content(batch):
    """What a batch holds, to the last bit."""
    return [view.numpy().tobytes() for view in batch.views], batch.index.tolist(), batch.label.tolist()


def epochs(source, count):
    return [[content(batch) for batch in source] for _ in range(count)]


def test_a_batch_is_float32_channels_last_with_index_and_label():
    batch = next(iter(loader()))
    assert [view.shape for view in batch.views] == [(8, 3, 8, 8)] * 2
    assert all(
        view.dtype == torch.float32 and view.is_contiguous(memory_format=torch.channels_last)
        for view in batch.views
    )
    assert batch.index.dtype == batch.label.dtype == torch.int64 and (batch.label == batch.index % 5).all()
    assert next(iter(loader(ArrayImages(IMAGES.images)))).label is None


def test_an_epoch_drops_the_partial_batch_and_the_next_has_another_order():
    source = loader()
    assert len(source) == 3 and source.epoch == 0
    first, second = epochs(source, 2)
    assert source.epoch == 2 and len(first) == len(second) == 3
    order = [[index for batch in epoch for index in batch[1]] for epoch in (first, second)]
    assert len(set(order[0])) == 24 and order[0] != order[1]
    assert epochs(loader(), 2) == [first, second]
    assert epochs(loader(seed=4), 1) != [first]


def test_repeated_views_of_an_image_differ():
    views = view_preset("simclr", 8, mean=HALF, std=HALF)
    batch = next(iter(loader(views=views)))
    assert len(batch.views) == 2 and not torch.equal(*batch.views)


@pytest.mark.parametrize("stop", range(7))
def test_resume_at_every_step_equals_the_uninterrupted_run(stop):
    whole = [batch for epoch in epochs(loader(), 3) for batch in epoch]
    source, seen = loader(), []
    state = source.state_dict()
    while len(seen) < stop:
        for batch in source:
            seen.append(content(batch))
            state = source.state_dict()
            if len(seen) == stop:
                break
    resumed = loader()
    resumed.load_state_dict(state)
    assert resumed.epoch == stop // 3
    while resumed.epoch < 3:
        seen += [content(batch) for batch in resumed]
    assert seen == whole


def test_a_loop_left_early_is_continued_in_training_and_repeated_in_evaluation():
    source = loader()
    whole = epochs(loader(), 2)
    first = content(next(iter(source)))
    assert [first, *epochs(source, 1)[0]] == whole[0] and epochs(source, 1) == [whole[1]]
    evaluation = loader(training=False)
    first = content(next(iter(evaluation)))
    assert (
        epochs(evaluation, 2)[0][0] == first
        and epochs(evaluation, 1)[0] == epochs(loader(training=False), 1)[0]
    )


def test_a_loop_left_at_its_last_batch_goes_on_with_the_next_epoch():
    source = loader()
    for number, _ in enumerate(source):
        if number == 2:
            break
    assert source.state_dict()["epoch"] == 1 and source.state_dict()["iteration"] == 0
    assert epochs(source, 1) == [epochs(loader(), 2)[1]]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_together_see_what_one_process_sees(world_size):
    ranks = [loader(rank=rank, world_size=world_size) for rank in range(world_size)]
    for one, *parts in zip(loader(), *ranks, strict=True):
        for number, view in enumerate(one.views):
            torch.testing.assert_close(
                torch.cat([part.views[number] for part in parts]), view, atol=1e-6, rtol=0
            )
        assert torch.cat([part.index for part in parts]).tolist() == one.index.tolist()


def test_a_run_resumes_on_another_number_of_ranks():
    one = loader()
    next(iter(one))
    ranks = [loader(rank=rank, world_size=4) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(one.state_dict())
    for whole, *parts in zip(one, *ranks, strict=True):
        assert torch.cat([part.index for part in parts]).tolist() == whole.index.tolist()
        torch.testing.assert_close(
            torch.cat([part.views[1] for part in parts]), whole.views[1], atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 8), (8, 1), (2, 4)])
def test_a_run_resumes_at_every_step_on_another_number_of_ranks(before, after, step):
    whole = [index for epoch in epochs(loader(), 2) for batch in epoch for index in batch[1]]
    seen, state = [], loader().state_dict()
    if step:
        sources = [loader(rank=rank, world_size=before) for rank in range(before)]
        first = [iter(source) for source in sources]
        seen = [index for _ in range(min(step, 3)) for rank in first for index in next(rank).index.tolist()]
        state = sources[0].state_dict()
        assert all(source.state_dict() == state for source in sources)
    resumed = [loader(rank=rank, world_size=after) for rank in range(after)]
    for rank in resumed:
        rank.load_state_dict(state)
    while resumed[0].epoch < 2:
        seen += [
            index for parts in zip(*resumed, strict=True) for part in parts for index in part.index.tolist()
        ]
    assert seen == whole


def test_an_engine_reads_ahead_from_one_epoch_into_the_next(monkeypatch):
    streams = []
    views = ResidentEngine.views
    monkeypatch.setattr(
        ResidentEngine, "views", lambda engine, requests: streams.append(1) or views(engine, requests)
    )
    source = loader()
    assert [epochs(source, 1)[0] for _ in range(3)] == epochs(loader(), 3)
    assert len(streams) == 2
    evaluation = loader(training=False)
    epochs(evaluation, 3)
    assert len(streams) == 5


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_evaluation_shows_every_image_once_and_the_same_views_each_time(world_size):
    ranks = [
        loader(rank=rank, world_size=world_size, training=False, views=VIEWS) for rank in range(world_size)
    ]
    for _ in range(2):
        seen = [[content(batch) for batch in rank] for rank in ranks]
        assert [len(batches) for batches in seen] == [len(rank) for rank in ranks]
        assert sorted(index for batches in seen for batch in batches for index in batch[1]) == list(range(26))
    assert seen == [[content(batch) for batch in rank] for rank in ranks]


def test_an_evaluation_batch_may_be_larger_than_the_data():
    (batch,) = loader(batch_size=64, training=False, views=[evaluation_view(8, mean=HALF, std=HALF)])
    assert batch.index.tolist() == list(range(26)) and len(batch.views) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 27}, "batch size 27 is larger than the data set of 26 images"),
        ({"batch_size": 9, "world_size": 2}, "batch size 9 is no positive multiple of the 2 processes"),
        ({"images": ArrayImages(IMAGES.images[:0])}, "holds no images"),
        ({"views": []}, "no view is asked for"),
        (
            {"views": view_preset("simclr", 96, mean=HALF, std=HALF)},
            "views.size 96 is more than 8 times the images' 9 pixels. Choose at most 72",
        ),
        ({"engine": "dahli"}, "data.engine 'dahli' is unknown. Choose auto, resident, dali, torchvision"),
        ({"engine": "resident", "resident_limit": 1e-9}, "more than data.resident_limit 1e-09 GiB"),
        (
            {"images": FileImages((None,) * 9), "engine": "resident"},
            "resident needs an array data set, found image files",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        loader(**options)


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"batch_size": 4}, {"images": ArrayImages(IMAGES.images[:25])}]
)
def test_a_state_of_another_run_is_refused(change):
    with pytest.raises(DataError, match="Resume with the same data, batch size and seed"):
        loader(**change).load_state_dict(loader().state_dict())


def test_auto_takes_resident_for_arrays_that_fit_and_dali_for_files(monkeypatch):
    assert choose_engine(IMAGES) == (
        "resident",
        "26 images take 4.58e-06 GiB of cpu memory, within data.resident_limit 16 GiB",
    )
    monkeypatch.setitem(sys.modules, "nvidia.dali", ModuleType("nvidia.dali"))
    assert (
        choose_engine(IMAGES, resident_limit=1e-9)[0] == "dali"
        and choose_engine(FileImages((None,)))[0] == "dali"
    )
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    name, reason = choose_engine(FileImages((None,)))
    assert name == "torchvision" and "DALI does not import (import of nvidia.dali halted" in reason
    with pytest.raises(DataError, match=r"data.engine dali does not import \(import of nvidia.dali halted"):
        loader(engine="dali")


def test_the_package_is_light_and_goes_by_one_name():
    heavy = ("nvidia.dali", "torchvision", "PIL", "sklearn", "timm")
    script = f"import sys, fastgessl.pipelines; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
    outside = Path(fastgessl.pipelines.__file__).resolve().parents[1]
    found = subprocess.run(
        [sys.executable, "-c", "import pipelines"], capture_output=True, text=True, cwd=outside
    )
    assert found.returncode == 1 and "Write `import fastgessl.pipelines`" in found.stderr


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
