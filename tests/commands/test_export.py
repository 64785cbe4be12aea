"""Exports load with the other library alone, in a process that never heard of us, with the same features."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from finished_run import train_tiny
from safetensors.torch import load_file, save_file

from fastgessl.config import Config, ModelConfig
from fastgessl.evaluate.subject import base_config, open_subject
from fastgessl.models import build_backbone

# Every exported folder of one library in one clean process: its start takes longer than the rest.
CLEAN = """
import importlib.util
import sys
import torch
for folder in sys.argv[1:]:
    specification = importlib.util.spec_from_file_location("load", f"{folder}/load.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    torch.save(module.load()(torch.load(f"{folder}/views.pt")).detach(), f"{folder}/features.pt")
    if folder.endswith("hub"):
        import timm
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        torch.save(model(torch.load(f"{folder}/views.pt")).detach(), f"{folder}/from_hub.pt")
foreign = ("fastgessl", "sklearn", "accelerate")
assert not [name for name in sys.modules if name.startswith(foreign)], "more than the named library"
"""
EXPORTS = {
    "timm": {
        "tiny": None,
        "narrow": {"name": "resnet18", "width": 0.5},
        "wide": {"name": "resnet18", "stem": "small", "dimension": 1024, "dimension_bottleneck": 64},
        "vit": {"name": "vit_tiny_patch16_224"},
        "vit_at_64": {"name": "vit_tiny_patch16_224"},
        "vit_hub": {"name": "vit_tiny_patch16_224"},
        "hub": {"name": "resnet18"},
        "wide_folder": {"name": "resnet18", "dimension": 600},
    },
    "torchvision": {
        "small": {"name": "resnet18", "stem": "small"},
        "bottleneck": {"name": "resnet50"},
        "wide": {"name": "resnet18", "dimension": 1024},
    },
}
HUB_FOLDERS = ("hub", "vit_hub", "wide_folder")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("exported") / "run")


def with_model(run: Path, folder: Path, **model: object) -> Path:
    """A copy of the run whose encoder is another network with random weights."""
    copied = Path(shutil.copytree(run, folder / "run"))
    config = base_config(str(run)).model_copy(update={"model": ModelConfig(**model)})
    (copied / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    torch.manual_seed(0)
    save_file(
        {name: value.contiguous() for name, value in build_backbone(config.model).state_dict().items()},
        copied / "encoder.safetensors",
    )
    return copied


def ours(run: Path, views: torch.Tensor) -> torch.Tensor:
    encoder = open_subject(str(run), base_config(str(run))).encoder.eval()
    with torch.no_grad():
        return encoder(views)


@pytest.mark.parametrize("library", list(EXPORTS))
def test_exported_folders_give_our_features_in_a_clean_process_with_that_library_alone(
    run, tmp_path, fastgessl, library
):
    kinds = {
        name: ("hub-folder" if name in HUB_FOLDERS else library, model)
        for name, model in EXPORTS[library].items()
    }
    expected = {}
    for name, (kind, model) in kinds.items():
        source = run if model is None else with_model(run, tmp_path / "of" / name, **model)
        side = 224 if name == "vit" else 64
        views = torch.randn(2, 3, side, side)
        assert fastgessl("export", source, "--to", kind, "--out", tmp_path / name).code == 0
        torch.save(views, tmp_path / name / "views.pt")
        expected[name] = ours(source, views)

    command = [sys.executable, "-c", CLEAN, *(str(tmp_path / name) for name in kinds)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert done.returncode == 0, done.stderr
    for name, features in expected.items():
        torch.testing.assert_close(
            torch.load(tmp_path / name / "features.pt"), features, rtol=1e-5, atol=1e-5
        )
    if library == "timm":
        for name in ("hub", "vit_hub"):
            torch.testing.assert_close(
                torch.load(tmp_path / name / "from_hub.pt"), expected[name], rtol=1e-5, atol=1e-5
            )
            assert "local-dir:" in (tmp_path / name / "README.md").read_text()
        # timm alone would not know of the further layers, and the card says so.
        assert "from load import load" in (tmp_path / "wide_folder" / "README.md").read_text()
        files = {"model.safetensors", "config.json", "README.md", "load.py"}
        assert files <= {path.name for path in (tmp_path / "hub").iterdir()}


def test_exported_weights_are_safetensors_that_say_what_they_are(run, tmp_path, fastgessl):
    assert fastgessl("export", run, "--to", "safetensors", "--out", tmp_path / "export").code == 0
    file = tmp_path / "export" / "model.safetensors"

    described = base_config(str(file))

    original = base_config(str(run))
    assert isinstance(described, Config) and described.model == original.model
    assert (described.views.size, described.views.mean, described.views.std) == (
        8,
        original.views.mean,
        original.views.std,
    )
    assert all(
        value.equal(load_file(run / "encoder.safetensors")[name]) for name, value in load_file(file).items()
    )
    assert not list((tmp_path / "export").glob("*.p*t*"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--to", "onnx"), "--to 'onnx' is unknown"),
        (("--to", "torchvision"), "torchvision has no resnet18 of width 0.125"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_exit_code_2(run, tmp_path, fastgessl, arguments, expected):
    outcome = fastgessl("export", run, *arguments, "--out", tmp_path / "export")

    assert outcome.code == 2 and expected in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "export").exists()


def test_a_run_without_weights_is_not_exported(run, tmp_path, fastgessl):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    (copied / "encoder.safetensors").unlink()

    outcome = fastgessl("export", copied, "--to", "timm")

    assert outcome.code == 2 and "has not been trained to its end" in outcome.err
