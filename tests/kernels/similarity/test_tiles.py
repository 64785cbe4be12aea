"""The table that a launch takes its tile from: where it is found, and what is refused."""

import json
import os

import pytest
import torch

pytest.importorskip("triton")

from fastgessl.kernels.similarity import tiles
from fastgessl.kernels.similarity.tiles import ENVIRONMENT, INTERPRETED, Entry, Tile, table_path, tile_for

TILE = Tile(16, 32, 4, 1, 128)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No table read yet, none named, an empty cache folder."""
    monkeypatch.setattr(tiles, "_in_use", {})
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def table(**change):
    entry = Entry("moments_kernel", 256, teacher=False, float32=True)._asdict()
    return {"device": "interpreter", "tiles": [{"entry": entry, "tile": TILE._asdict() | change}]}


def found(features=200, dtype=torch.float32):
    return tile_for("moments_kernel", torch.zeros(1, dtype=dtype), features, False)


def test_without_a_table_the_shipped_tile_is_taken():
    assert found() == INTERPRETED


@pytest.mark.parametrize("named", [False, True], ids=["in the cache folder", "named"])
def test_a_table_serves_its_kernel_width_and_dtype_alone(named, monkeypatch, tmp_path):
    if named:
        monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "tiles.json"))
    path = table_path(torch.device("cpu"))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table()))
    assert found() == TILE
    assert found(features=300) == found(dtype=torch.float16) == INTERPRETED


def test_a_home_folder_that_may_not_be_searched_holds_no_table(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed"))
    (tmp_path / "closed").mkdir(mode=0o000)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may search every folder
    try:
        with pytest.raises(PermissionError):
            os.stat(table_path(torch.device("cpu")))
        assert found() == INTERPRETED
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o700)


BAD = {
    "no JSON": ("{", "Expecting property name"),
    "another device": (
        {"device": "nvidia-h200", "tiles": []},
        "measured on 'nvidia-h200', this device is 'interpreter'",
    ),
    "no tiles": ({"device": "interpreter"}, "KeyError: 'tiles'"),
    "a list": ([], "TypeError"),
    "another field": (table(width=3), "unexpected keyword argument 'width'"),
    "no whole number": (table(warps=4.5), r"whole numbers above 0, found Tile\(.*warps=4.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_refused_with_its_file_and_the_remedy(name, monkeypatch, tmp_path):
    content, message = BAD[name]
    (tmp_path / "tiles.json").write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "tiles.json"))
    with pytest.raises(ValueError, match=rf"tile table .*tiles\.json: .*{message}.*Delete it"):
        found()


def test_a_named_table_that_is_missing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match=r"FASTGESSL_TILES names .*absent\.json, which is no file"):
        found()
