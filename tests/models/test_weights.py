import pytest
import torch
from safetensors.torch import save_file

from fastgessl.config import ModelConfig, UsageError
from fastgessl.models import build_backbone, load_weights

SMALL = ModelConfig(stem="small", width=0.125)


@pytest.fixture
def run(tmp_path):
    """What a finished run leaves of its encoder."""
    torch.manual_seed(7)
    save_file(build_backbone(SMALL).state_dict(), tmp_path / "encoder.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["", "encoder.safetensors"])
def test_a_run_and_a_file_give_their_weights(run, name):
    torch.manual_seed(7)
    expected = build_backbone(SMALL).state_dict()
    backbone = build_backbone(SMALL)
    assert not torch.equal(backbone.conv1.weight, expected["conv1.weight"])
    load_weights(backbone, "resnet18", str(run / name), "model.weights")
    assert all(torch.equal(value, expected[key]) for key, value in backbone.state_dict().items())


def test_timm_s_weights_are_asked_of_timm(monkeypatch):
    import timm

    made = timm.create_model("resnet18", num_classes=0)
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)) or made)
    backbone = torch.nn.Module()
    backbone.load_state_dict = lambda state: asked.append(state)
    backbone.state_dict = made.state_dict
    load_weights(backbone, "resnet18", "pretrained", "model.weights")
    assert (
        asked[0] == ("resnet18", {"pretrained": True, "num_classes": 0})
        and asked[1].keys() == made.state_dict().keys()
    )


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_published_file_with_a_classifier_gives_its_encoder(tmp_path, name):
    import timm

    published = timm.create_model(name)
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    encoder = timm.create_model(name, num_classes=0)
    load_weights(encoder, name, str(tmp_path / "model.safetensors"), "model.weights")
    assert all(torch.equal(value, published.state_dict()[key]) for key, value in encoder.state_dict().items())
    with pytest.raises(
        UsageError,
        match=r"are not known such as fc\.bias" if name == "resnet18" else "are not known such as head",
    ):
        load_weights(encoder, "linear", str(tmp_path / "model.safetensors"), "model.weights")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            ModelConfig(stem="imagenet", width=0.125),
            r"1 have another shape such as conv1.weight, 8x3x3x3 where 8x3x7x7",
        ),
        (
            ModelConfig(name="resnet34", stem="small", width=0.125),
            "are missing such as layer1.2.conv1.weight",
        ),
        (
            ModelConfig(stem="small", width=0.125, dimension=128),
            "are missing such as layer4.2.layers.0.weight",
        ),
    ],
)
def test_weights_of_another_architecture_are_refused_with_what_does_not_fit(run, model, expected):
    with pytest.raises(UsageError, match=expected) as caught:
        load_weights(build_backbone(model), model.name, str(run), "model.weights")
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_exist_or_cannot_be_read_are_refused(tmp_path):
    backbone = build_backbone(SMALL)
    with pytest.raises(UsageError, match=r"no encoder.safetensors in that folder"):
        load_weights(backbone, "resnet18", str(tmp_path), "model.weights")
    with pytest.raises(UsageError, match="there is no such file"):
        load_weights(backbone, "resnet18", "pretrianed", "model.weights")
    (tmp_path / "encoder.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(UsageError, match="cannot be read as safetensors"):
        load_weights(backbone, "resnet18", str(tmp_path), "model.weights")


def test_timm_s_weights_without_a_network_are_refused_with_a_way_out(monkeypatch):
    import timm

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UsageError, match=r"cannot be fetched \(OSError: no route to host\)"):
        load_weights(torch.nn.Linear(2, 2), "resnet18", "pretrained", "model.weights")
