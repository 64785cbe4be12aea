"""A helper network brings its run's architecture along, and labels behind its weights are found where they
are written.
"""

import warnings

import pytest
import torch
from safetensors.torch import save_file

from fastgessl import runs
from fastgessl.config import Config, MethodConfig, ModelConfig, UsageError
from fastgessl.models import build_backbone
from fastgessl.models.frozen import frozen_network, label_free

SMALL = ModelConfig(stem="small", width=0.125)


def finished_run(folder, method="byol", model=SMALL):
    runs.create(folder, Config(method=MethodConfig(name=method), model=model), {})
    torch.manual_seed(1)
    backbone = build_backbone(model).eval()
    save_file(backbone.state_dict(), folder / "encoder.safetensors")
    return backbone


@pytest.mark.parametrize("file", ["", "encoder.safetensors"])
def test_a_run_s_encoder_helps_with_its_own_stem_and_width_and_without_a_warning(tmp_path, file):
    backbone, views = finished_run(tmp_path), torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        helper = frozen_network("resnet18", str(tmp_path / file), 16)
    assert torch.equal(helper(views), backbone(views))
    assert not helper.training and not any(parameter.requires_grad for parameter in helper.parameters())


def test_a_run_of_another_network_is_refused_with_its_name(tmp_path):
    finished_run(tmp_path)
    with pytest.raises(UsageError, match=r"Set --dsa\.helper resnet18"):
        frozen_network("resnet50", str(tmp_path), 16)


@pytest.mark.parametrize(
    ("method", "started_from", "expected"),
    [
        ("byol", "none", True),
        ("supervised", "none", False),
        ("byol", "pretrained", False),
        ("byol", "elsewhere/resnet18_dino.safetensors", True),
    ],
)
def test_whether_a_run_saw_labels_is_read_from_its_configuration_and_not_from_its_folder(
    tmp_path, method, started_from, expected
):
    folder = tmp_path / ("mae" if method == "supervised" else "trained")
    runs.create(folder, Config(method=MethodConfig(name=method), model=ModelConfig(weights=started_from)), {})
    assert label_free("resnet18", str(folder)) is expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("dino/resnet50_a1.safetensors", False),
        ("weights/resnet50.dino-ft.safetensors", False),
        ("ft/resnet50.dino.safetensors", True),
        ("resnet50_moco.safetensors", True),
    ],
)
def test_a_file_is_judged_by_its_own_name_and_not_by_its_folders(path, expected):
    assert label_free("resnet50", path) is expected
