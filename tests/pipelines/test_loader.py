"""The loader: epochs, ranks, exact resume, the choice of an engine."""

import subprocess
import sys
from itertools import chain, islice, repeat, zip_longest
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


@pytest.mark.parametrize("stop", range(7))
def test_resume_at_every_step_equals_the_uninterrupted_run(stop):
    whole = [batch for epoch in epochs(loader(), 3) for batch in epoch]
    source, resumed = loader(), loader()
    seen = [content(batch) for batch in islice(chain.from_iterable(repeat(source)), stop)]
    resumed.load_state_dict(source.state_dict())
    assert resumed.epoch == stop // 3
    while resumed.epoch < 3:
        seen += [content(batch) for batch in resumed]
    assert seen == whole


@pytest.mark.parametrize("left", [1, 3])
def test_a_loop_left_early_is_continued_in_training_and_repeated_in_evaluation(left):
    source, whole = loader(), [batch for epoch in epochs(loader(), 2) for batch in epoch]
    seen = [content(batch) for batch in islice(source, left)]
    while source.epoch < 2:
        seen += epochs(source, 1)[0]
    assert seen == whole
    evaluation, whole = loader(training=False), epochs(loader(training=False), 1)[0]
    assert [content(batch) for batch in islice(evaluation, left)] == whole[:left]
    assert epochs(evaluation, 2) == [whole, whole]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_together_see_what_one_process_sees(world_size, training):
    ranks = [loader(rank=rank, world_size=world_size, training=training) for rank in range(world_size)]
    for one, *shown in zip_longest(loader(training=training), *ranks):
        # A rank may have none of the last images that are evaluated.
        parts = [part for part in shown if part is not None]
        for number, view in enumerate(one.views):
            torch.testing.assert_close(
                torch.cat([part.views[number] for part in parts]), view, atol=1e-6, rtol=0
            )
        assert torch.cat([part.index for part in parts]).tolist() == one.index.tolist()


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 8), (8, 1), (2, 4)])
def test_a_run_resumes_at_every_step_on_another_number_of_ranks(before, after, step):
    whole = [index for epoch in epochs(loader(), 2) for batch in epoch for index in batch[1]]
    sources = [loader(rank=rank, world_size=before) for rank in range(before)]
    first = [iter(source) for source in sources]
    seen = [index for _ in range(step) for rank in first for index in next(rank).index.tolist()]
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


def test_an_evaluation_batch_may_be_larger_than_the_data():
    (batch,) = loader(batch_size=64, training=False, views=[evaluation_view(8, mean=HALF, std=HALF)])
    assert batch.index.tolist() == list(range(26)) and len(batch.views) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 27}, "batch size 27 is larger than the data set of 26 images"),
        ({"batch_size": 9, "world_size": 2}, "batch size 9 is no positive multiple of the 2 processes"),
        ({"batch_size": 0}, "batch size 0 is no positive multiple"),
        ({"rank": 2, "world_size": 2}, "found rank 2 of 2"),
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
def test_training_deals_out_whole_global_batches_without_repeats_whatever_the_ranks(world_size, data, epoch):
    size, batch_size, seed = data.draw(cases(True, world_size))
    batches = global_batches(size, batch_size, seed, world_size, True, epoch)
    assert all(len(part) == batch_size // world_size for batch in batches for part in batch)
    seen = np.concatenate([part for batch in batches for part in batch])
    assert len(set(seen.tolist())) == len(seen) == size - size % batch_size
    assert seen.min() >= 0 and seen.max() < size
    alone = global_batches(size, batch_size, seed, 1, True, epoch)
    assert seen.tolist() == [index for (batch,) in alone for index in batch]


@pytest.mark.parametrize("world_size", WORLDS)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_evaluation_covers_each_image_once_in_order(world_size, data):
    size, batch_size, seed = data.draw(cases(False, world_size))
    batches = global_batches(size, batch_size, seed, world_size, False)
    assert [index for batch in batches for part in batch for index in part] == list(range(size))
    last = [len(part) for part in batches[-1]]
    assert max(last) - min(last) <= 1
