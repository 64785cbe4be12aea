import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastgessl import pipelines
from fastgessl.evaluate import extract_features
from fastgessl.evaluate.subject import base_config, open_subject


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "photos" / ("cat" if number < 3 else "dög & <b>")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    return tmp_path / "photos"


def test_embed_writes_features_with_names_labels_and_classes(finished_run, photos, tmp_path, fastgessl):
    outcome = fastgessl("embed", finished_run, photos, "--out", tmp_path / "out.npz")

    assert outcome.code == 0, outcome.err
    with np.load(tmp_path / "out.npz", allow_pickle=False) as written:
        assert written["files"].tolist() == [f"cat/{n}.png" for n in range(3)] + [
            f"dög & <b>/{n}.png" for n in range(3, 6)
        ]
        assert written["features"].dtype == np.float32 and written["labels"].tolist() == [0, 0, 0, 1, 1, 1]
        assert written["classes"].tolist() == ["cat", "dög & <b>"]
        features = torch.from_numpy(written["features"])
    config = base_config(str(finished_run))
    encoder = open_subject(str(finished_run), config).encoder
    view = pipelines.evaluation_view(config.views.size, mean=config.views.mean, std=config.views.std)
    loader = pipelines.build(pipelines.open_images("folder", photos), [view], batch_size=2, training=False)
    torch.testing.assert_close(
        features, extract_features(encoder, loader, "cpu").features, rtol=1e-4, atol=1e-5
    )


def test_both_splits_of_an_npz_are_embedded(finished_run, tmp_path, fastgessl):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", train_x=pixels[:5], test_x=pixels[5:])

    assert fastgessl("embed", finished_run, tmp_path / "data.npz", "--out", tmp_path / "out.npz").code == 0

    with np.load(tmp_path / "out.npz", allow_pickle=False) as written:
        assert written["files"].tolist() == [
            *(f"train/{n}" for n in range(5)),
            *(f"test/{n}" for n in range(4)),
        ]
        assert written["features"].shape == (9, 64) and "labels" not in written


def test_names_and_labels_stay_with_their_features_where_a_file_is_skipped(
    finished_run, photos, tmp_path, fastgessl
):
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert fastgessl("embed", run, photos, "--out", tmp_path / "whole.npz").code == 0
    (photos / "cat" / "1.png").write_bytes(b"broken")

    with pytest.warns(UserWarning, match="1.png"):
        outcome = fastgessl("embed", run, photos, "--out", tmp_path / "out.npz", "--data.bad_files", "skip")

    assert outcome.code == 0 and outcome.out.startswith("5 images"), outcome.err
    rest = [0, 2, 3, 4, 5]
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["features"], whole["features"][rest], rtol=1e-4, atol=1e-5)
        assert found["files"].tolist() == whole["files"][rest].tolist()
        assert found["labels"].tolist() == whole["labels"][rest].tolist()
    assert (run / "bad_files.txt").read_text().splitlines() == [str(photos / "cat" / "1.png")]


@pytest.mark.filterwarnings("ignore:data.bad_files skip")
def test_a_folder_of_bad_files_alone_is_one_line_and_exit_code_2(finished_run, photos, tmp_path, fastgessl):
    for file in photos.rglob("*.png"):
        file.write_bytes(b"broken")
    run = shutil.copytree(finished_run, tmp_path / "run")

    outcome = fastgessl("embed", run, photos, "--out", tmp_path / "out.npz", "--data.bad_files", "skip")

    assert outcome.code == 2 and "not one image could be read" in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize(("path", "expected"), [("nowhere", "does not exist"), ("empty", "holds no images")])
def test_a_folder_without_images_is_one_line_and_exit_code_2(
    finished_run, tmp_path, fastgessl, path, expected
):
    (tmp_path / "empty").mkdir()

    outcome = fastgessl("embed", finished_run, tmp_path / path, "--out", tmp_path / "out.npz")

    assert outcome.code == 2 and expected in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()
