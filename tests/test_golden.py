"""Thirty steps of every method, plain and under every preset, with and without DSA, follow the stored curves.

`python tests/test_golden.py` writes them again. Do so only for a change that is meant to alter training, and
say in its commit why. `python tests/test_golden.py FILE` writes FILE, or compares with it bit for bit if it
is there: the proof, on one machine, that a change alters nothing.
"""

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_run import read_lines

ASSET = Path(__file__).with_name("golden.json")
STEPS = 30
METHODS = ("simclr", "moco", "mocov3", "byol", "barlow", "swav", "dino", "cissl", "dissl", "supervised")
PRESETS = ("", "-gessl-fast", "-gessl-head", "-gessl-exact")
RECIPES = [
    f"digits-{method}{dsa}{preset}"
    for method in METHODS
    for dsa in ("", "-dsa")
    if (method, dsa) != ("supervised", "-dsa")
    for preset in (PRESETS if method != "supervised" else PRESETS[:1])
]
CURVES = ("loss", "loss_ssl", "loss_dsa", "sigma", "delta_loss", "gradient_norm")
OPTIONS = {
    "data.name": "npz",
    "views.size": 8,
    "model.name": "test_resnet",
    "model.stem": "imagenet",
    "model.width": 1,
    "method.projector_hidden": 32,
    "method.projector_out": 16,
    "dsa.neighbours": 4,
    "train.batch_size": 16,
    "train.max_steps": STEPS,
    "train.checkpoint_every": STEPS,
    "train.device": "cpu",
    "train.precision": "fp32",
    "evaluate.tasks": "geometry",
    "log.every": 1,
}
"""A step of milliseconds, and every one of them written down."""


def write_images(path: Path) -> Path:
    """96 smooth pictures of 12 pixels in four classes, the same on every machine."""
    random = np.random.RandomState(0)
    corners = random.randint(0, 256, (96, 2, 2, 3)).astype(np.float64)
    along = np.linspace(0, 1, 12)
    across = np.stack([1 - along, along], 1)
    pictures = np.einsum("yi,xj,nijc->nyxc", across, across, corners)
    np.savez(path, train_x=pictures.astype(np.uint8), train_y=np.arange(96) % 4)
    return path


def trajectory(fastgessl: Any, recipe: str, images: Path, run: Path) -> dict[str, Any]:
    """Losses and gradient norms of every step, and a digest of the encoder's weights at the end."""
    options = OPTIONS | {"data.root": images, "train.run_dir": run}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    outcome = fastgessl("train", recipe, *words, "--log.trackers")
    assert outcome.code == 0, outcome.err
    lines = read_lines(run / "metrics.jsonl")
    assert len(lines) == STEPS
    weights = load_file(run / "encoder.safetensors")
    digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
    curves = {
        name: [line.get(name) for line in lines] for name in CURVES if any(name in line for line in lines)
    }
    return curves | {"weights": digest}


def in_turn() -> list[Any]:
    """Every recipe; the suite takes one of each method, the rest are slow: 3 seconds each."""
    chosen = {
        [name for name in RECIPES if name.split("-")[1] == method][turn % 4]
        for turn, method in enumerate(METHODS[:-1])
    }
    return [
        recipe if recipe in chosen else pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES
    ]


@pytest.fixture(scope="module")
def stored() -> dict[str, dict[str, Any]]:
    return json.loads(ASSET.read_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("golden") / "images.npz")


@pytest.mark.parametrize("recipe", in_turn())
def test_recipe_follows_its_stored_curve(recipe, fastgessl, stored, images, tmp_path):
    found = trajectory(fastgessl, recipe, images, tmp_path / "run")
    for name in CURVES:
        assert (name in found) == (name in stored[recipe])
        for step, (value, expected) in enumerate(
            zip(found.get(name, []), stored[recipe].get(name, []), strict=True)
        ):
            assert value == (None if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-6)), (
                name,
                step,
            )


def shortened(curves: dict[str, Any]) -> dict[str, list[float | None]]:
    """Six digits are enough for the comparison, and the digest holds on one machine alone."""
    return {
        name: [None if value is None else float(f"{value:.6g}") for value in curve]
        for name, curve in curves.items()
        if name != "weights"
    }


def _main(target: Path, recipes: Sequence[str]) -> None:
    """Write the curves of `recipes` to `target`, or compare with it to the bit."""
    from finished_run import in_this_process

    def quiet(*arguments: object) -> Any:
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            return in_this_process(arguments, lambda: (out.getvalue(), err.getvalue()))

    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "images.npz")
        found = {recipe: trajectory(quiet, recipe, images, Path(folder) / recipe) for recipe in recipes}
    if target == ASSET or not target.exists():
        rows = found if target != ASSET else {recipe: shortened(curves) for recipe, curves in found.items()}
        target.write_text(
            "{\n" + ",\n".join(f'"{name}": {json.dumps(row)}' for name, row in rows.items()) + "\n}\n"
        )
        return
    expected = json.loads(target.read_text())
    changed = [recipe for recipe in recipes if found[recipe] != expected[recipe]]
    sys.exit(f"changed: {', '.join(changed)}" if changed else 0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSET, sys.argv[2:] or RECIPES)
