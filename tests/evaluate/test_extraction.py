import numpy as np
import pytest
import torch
from torch import nn

from fastgessl import pipelines
from fastgessl.evaluate import Features, extraction
from fastgessl.evaluate.extraction import cached, digest_of
from fastgessl.evaluate.sources import subset

VIEW = pipelines.evaluation_view(4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def pictures(seed: int = 0) -> pipelines.ArrayImages:
    generator = np.random.default_rng(seed)
    return pipelines.ArrayImages(
        generator.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8), np.arange(10) % 3, ("a", "b", "c")
    )


class Extraction:
    """Features are the images' first pixels; counts what it was asked for, and can be interrupted."""

    def __init__(self, fails_at: int = 99) -> None:
        self.parts: list[int] = []
        self.fails_at = fails_at

    def __call__(self, part: pipelines.ArrayImages) -> tuple[Features, ...]:
        if len(self.parts) == self.fails_at:
            raise KeyboardInterrupt
        self.parts.append(len(part))
        first = torch.from_numpy(part.images[:, 0, 0].copy()).float()
        return Features(first, torch.from_numpy(part.labels), torch.arange(len(part))), Features(
            -first, None, torch.arange(len(part))
        )


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(extraction, "PART_IMAGES", 4)


def test_what_was_extracted_once_comes_back_to_the_last_digit(tmp_path, small_parts):
    first, second = Extraction(), Extraction()
    images = pictures()

    fresh = cached(tmp_path / "x", "key", images, first)
    again = cached(tmp_path / "x", "key", images, second)

    assert (first.parts, second.parts) == ([4, 4, 2], [])
    assert fresh[0].features.equal(torch.from_numpy(images.images[:, 0, 0].copy()).float())
    for view, kept in zip(fresh, again, strict=True):
        assert kept.features.equal(view.features) and kept.index.equal(torch.arange(10))
    assert again[0].labels.tolist() == images.labels.tolist()


def test_an_interrupted_extraction_continues_where_it_stopped(tmp_path, small_parts):
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "x", "key", pictures(), Extraction(fails_at=2))
    rest = Extraction()

    found = cached(tmp_path / "x", "key", pictures(), rest)

    assert rest.parts == [2]
    assert found[0].features.equal(Extraction()(pictures())[0].features)


@pytest.mark.parametrize(("key", "seed", "extracted"), [("another", 1, [4, 4, 2]), ("key", 0, [4])])
def test_parts_of_another_key_and_damaged_ones_are_extracted_again(
    tmp_path, small_parts, key, seed, extracted
):
    cached(tmp_path / "x", "key", pictures(), Extraction())
    (tmp_path / "x" / "000000004.safetensors").write_bytes(b"torn")
    again = Extraction()

    found = cached(tmp_path / "x", key, pictures(seed), again)

    assert again.parts == extracted
    assert found[0].features.equal(Extraction()(pictures(seed))[0].features)


def net(weight: float = 1.0, mean: float = 0.0) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.init.constant_(module[0].weight, weight)
    nn.init.zeros_(module[0].bias)
    nn.init.constant_(module[1].running_mean, mean)
    return module


def test_the_key_depends_on_weights_statistics_images_labels_view_and_settings():
    images = pictures()
    relabelled = pipelines.ArrayImages(images.images, images.labels[::-1].copy(), images.classes)
    other_view = pipelines.evaluation_view(4, mean=(0.4, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    keys = [
        digest_of(net(), images, [VIEW], 0),
        digest_of(net(1.0001), images, [VIEW], 0),
        digest_of(net(mean=0.1), images, [VIEW], 0),
        digest_of(net(), pictures(1), [VIEW], 0),
        digest_of(net(), relabelled, [VIEW], 0),
        digest_of(net(), images, [other_view], 0),
        digest_of(net(), images, [VIEW], 1),
    ]

    assert len(set(keys)) == len(keys)
    assert digest_of(net(), pictures(), [VIEW], 0) == keys[0]


@pytest.mark.parametrize("before", [b"one", None], ids=["changed", "gone"])
def test_the_key_of_image_files_follows_their_size_and_time(tmp_path, before):
    if before is not None:
        (tmp_path / "a.png").write_bytes(before)
    images = pipelines.FileImages((tmp_path / "a.png",))
    key = digest_of(net(), images, [VIEW])
    (tmp_path / "a.png").write_bytes(b"other")

    assert digest_of(net(), images, [VIEW]) != key


def test_a_subset_holds_the_chosen_images_and_labels(tmp_path):
    chosen = np.array([7, 2])
    files = pipelines.FileImages(tuple(tmp_path / f"{i}.png" for i in range(10)), np.arange(10), ())

    assert subset(files, chosen).paths == (tmp_path / "7.png", tmp_path / "2.png")
    assert subset(files, chosen).labels.tolist() == [7, 2]
    assert (subset(pictures(), chosen).images == pictures().images[chosen]).all()
