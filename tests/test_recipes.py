"""Recipes compose, say where their numbers come from, and refuse what makes no sense."""

import itertools

import pytest
import yaml

from fastgessl.config import Config, UsageError
from fastgessl.recipes import backbones, load, names, parts


@pytest.mark.parametrize("name", names())
def test_every_recipe_is_a_valid_configuration(name):
    recipe = load(name)
    assert recipe.config.recipe == name
    assert set(recipe.sources) <= set(Config().options())


@pytest.mark.parametrize(
    ("name", "steps", "scope", "every"),
    [("-gessl", 0, "all", 2), ("-gessl-head", 1, "head", 1), ("-gessl-exact", 1, "all", 1)],
)
def test_presets_set_what_they_say(name, steps, scope, every):
    gessl = load(f"digits-simclr{name}").config.gessl
    assert (gessl.inner_steps, gessl.scope, gessl.every, gessl.w_sigma > 0) == (steps, scope, every, True)
    assert load("digits-simclr").config.gessl.w_sigma == load("digits-simclr").config.dsa.weight == 0


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("imagenet-simclr-gessl-resnet18", "imagenet-simclr-resnet18-gessl"),
        ("digits-byol-dsa-gessl-head", "digits-byol-gessl-head-dsa"),
    ],
)
def test_backbone_regulator_and_preset_come_in_any_order(name, other):
    first, second = load(name).config, load(other).config
    assert first.model_copy(update={"recipe": ""}) == second.model_copy(update={"recipe": ""})
    assert first.gessl.w_sigma > 0
    assert (first.model.name == "resnet18", first.dsa.weight > 0) == (True, "dsa" in name)


def test_later_parts_win():
    data, method = parts("data")["digits"]["config"], parts("methods")["simclr"]
    assert method["config"]["optim"]["name"] != method["per_data"]["digits"]["config"]["optim"]["name"]
    config = load("digits-simclr").config
    assert config.optim.name == method["per_data"]["digits"]["config"]["optim"]["name"]
    assert config.views.size == data["views"]["size"]


def test_a_backbone_has_numbers_of_its_own_on_one_data_set_whether_named_or_the_default(monkeypatch):
    special = parts("methods")["mocov3"]["per_backbone"]["vit_small_patch16_224"]["config"]
    plain, named = load("imagenet-mocov3").config, load("imagenet-mocov3-vit_small_patch16_224").config
    monkeypatch.setitem(parts("data")["imagenet"]["config"]["model"], "name", "vit_small_patch16_224")
    default = load("imagenet-mocov3").config
    assert plain.optim.name == "lars" and plain.train.batch_size == 4096
    for config in (named, default):
        assert config.optim == plain.optim.model_copy(update=special["optim"])
        assert (config.schedule.warmup_epochs, config.train.epochs, config.train.batch_size) == (
            40,
            300,
            4096,
        )


@pytest.mark.parametrize(("method", "rate", "decay"), [("dino", 5e-4, 0.04), ("mocov3", 1.5e-4, 0.1)])
def test_a_transformer_has_its_own_numbers_on_every_data_set(method, rate, decay):
    for data in ("imagenet", "imagenet100"):
        optim = load(f"{data}-{method}-vit_small_patch16_224").config.optim
        assert (optim.name, optim.base_lr, optim.weight_decay) == ("adamw", rate, decay)
    assert load(f"imagenet100-{method}-vit_small_patch16_224").config.train.epochs == 400


@pytest.mark.parametrize("data", ["imagenet", "imagenet100"])
@pytest.mark.parametrize("method", [name for name in parts("methods") if name not in ("dino", "mocov3")])
def test_a_transformer_is_not_offered_with_numbers_of_a_resnet(data, method):
    assert "vit_small_patch16_224" not in backbones(data, method)
    with pytest.raises(UsageError, match=f"{data}-{method} has numbers for resnet"):
        load(f"{data}-{method}-vit_small_patch16_224")


def test_no_two_parts_are_twins():
    for kind in ("data", "methods", "gessl"):
        for (first, one), (second, two) in itertools.combinations(parts(kind).items(), 2):
            assert one["config"] != two["config"], f"{first} and {second}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits-simlcr", "digits-simclr"),
        ("digits-simclr-gesl", "gessl"),
        ("digits-simclr-gessl-fasst", "fast"),
        ("digits", "digits-"),
        ("digits-simclr-resnet50", "--model.name"),
        ("digits-simclr-gessl-gessl", "unknown part"),
        ("nowhere.yaml", "no recipe file"),
    ],
)
def test_a_wrong_name_is_refused_with_a_way_out(name, expected):
    with pytest.raises(UsageError, match=expected):
        load(name)


def test_a_printed_configuration_loads_as_the_same(tmp_path):
    config = load("digits-byol-gessl-exact").config
    path = tmp_path / "custom.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load(str(path)).config == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {batch_sise: 3}", "train.batch_size"),
        ("train: {batch_size: -3}", "found -3"),
        ("train: {batch_size: 3.5}", "found 3.5"),
        ("- a", "mapping"),
        ("train: [", "YAML"),
        ("gessl: {w_ssl: 0}", "nothing to train"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=expected) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def test_every_option_has_a_help_text():
    pending = [Config]
    while pending:
        for name, field in pending.pop().model_fields.items():
            assert field.description, name
            pending += [field.annotation] if hasattr(field.annotation, "model_fields") else []


@pytest.mark.parametrize(
    ("name", "length", "rate", "momentum"),
    [
        ("imagenet-byol", 100, 0.45, 0.99),
        ("imagenet-byol-200ep", 200, 0.45, 0.99),
        ("imagenet-byol-400ep", 400, 0.3, 0.99),
        ("imagenet-byol-1000ep-gessl-head", 1000, 0.2, 0.996),
        ("imagenet-mocov3-resnet50-300ep", 300, 0.3, 0.99),
        ("imagenet-mocov3-1000ep", 1000, 0.3, 0.996),
        # A transformer has settings of its own, whatever the length.
        ("imagenet-mocov3-300ep-vit_small_patch16_224", 300, 1.5e-4, 0.99),
    ],
)
def test_a_length_in_the_name_brings_what_was_published_for_it(name, length, rate, momentum):
    config = load(name).config
    assert (config.train.epochs, config.optim.base_lr, config.method.momentum_start) == (
        length,
        rate,
        momentum,
    )


def test_barlow_twins_biases_learn_at_their_published_rate():
    """LARS leaves biases and norms alone, and the loss's scale sets their rate: 0.0048 beside 0.2 (Zbontar et
    al. 2021, section 2.2).
    """
    config = load("imagenet-barlow").config
    assert (config.optim.name, config.optim.base_lr, config.optim.weight_decay) == ("lars", 0.2, 1.5e-6)
    assert config.optim.base_lr * config.method.barlow.loss_scale == pytest.approx(0.0048)


@pytest.mark.parametrize(
    ("data", "width"), [("cifar10", 2048), ("imagenet100", 2048), ("folder", 2048), ("imagenet", 8192)]
)
def test_barlow_twins_projector_has_three_layers_as_published(data, width):
    method = load(f"{data}-barlow").config.method
    assert (method.barlow.projector_layers, method.projector_hidden, method.projector_out) == (
        3,
        width,
        width,
    )


@pytest.mark.parametrize("kind", ["data", "methods", "regulators", "gessl"])
def test_parts_hold_only_keys_that_are_read(kind):
    for part in parts(kind).values():
        assert set(part) <= {"about", "backbones", "config", "source", "per_data", "per_backbone"}
        for special in (*part.get("per_data", {}).values(), *part.get("per_backbone", {}).values()):
            assert set(special) <= {"config", "source", "per_backbone", "per_epochs"}
