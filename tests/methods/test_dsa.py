import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from methods.dsa_ranks import BI_LEVEL, SETTINGS, step, toy, views
from rank_launch import launch
from tiny_run import TINY
from torch import nn
from toys import toy_method

from fastgessl.config import DsaConfig, GesslConfig, MethodConfig, UsageError
from fastgessl.methods import DSA, Method, RunFacts, build_method, dsa
from fastgessl.methods.dsa import inlier_weights
from fastgessl.objective import GeSSL, measure_sigma


def inlier_weights_by_lists(features, neighbours, good_paths):
    """Neighbour lists and loops, as the paper words it."""
    unit = features / features.norm(dim=1, keepdim=True)
    lists = [
        [j for j in (-(unit @ row)).argsort().tolist() if j != i][:neighbours] for i, row in enumerate(unit)
    ]
    weights = []
    for i, own in enumerate(lists):
        good = [j for j in own if sum(i in lists[further] for further in lists[j]) > good_paths]
        weights.append(len(good) / neighbours)
    return torch.tensor(weights, dtype=features.dtype)


def dsa_by_definition(method, out, helper):
    """(separation, prior distance), pair of images by pair of images, with every difference written out."""
    settings, first, second = method.config, method.difference_layer, method.score_layer
    weights = inlier_weights_by_lists((helper[0] + helper[1]) / 2, settings.neighbours, settings.good_paths)
    energies, distances = [], []
    for a, b in ((0, 0), (1, 1), (0, 1), (1, 0)):
        rows, columns = out.projections[a], out.projections[b]
        differences = rows[:, None] - columns
        scaled = differences / differences.abs().mean((0, 1))
        believed = torch.sigmoid(
            (torch.relu(scaled @ first.weight.T + first.bias) @ second.weight.T)[..., 0] + second.bias
        )
        prior = torch.empty_like(believed)
        total = 0.0
        for i in range(len(rows)):
            for j in range(len(columns)):
                prior[i, j] = torch.exp(-(helper[a, i] - helper[b, j]).norm() / settings.prior_temperature)
                if a == b and i == j:
                    prior[i, j] = torch.exp(
                        torch.tensor(-1e-3, dtype=prior.dtype) / settings.prior_temperature
                    )
                    continue
                apart = (rows[i] / rows[i].norm() - columns[j] / columns[j].norm()).norm()
                total = total + torch.exp(
                    weights[i] * apart * (2 * believed[i, j] - 1) / settings.temperature
                )
        energies.append(total / believed.numel())
        distances.append(torch.linalg.matrix_norm(believed - prior))
    return torch.log(1 + sum(energies) / 4), sum(distances) / 4


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_dsa_s_loss_and_gradients_are_those_of_the_definition(name):
    method = toy(name)
    out, targets = method(views()), method.targets(views())
    separation, prior = dsa_by_definition(method, out, targets.helper)
    expected = (
        method.method.loss(out, targets.method) + SETTINGS.weight * separation + SETTINGS.prior_weight * prior
    )
    found = method.loss(out, targets)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    terms = method.measures(out, targets)
    torch.testing.assert_close(terms["dsa_separation"], separation, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms["dsa_prior"], prior, rtol=1e-10, atol=0)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    slopes = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in (found, expected)]
    for ours, literal in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, literal, rtol=1e-8, atol=1e-11)


def test_dsa_s_two_mixed_blocks_compare_the_two_views():
    """The public code has z1 - z1 and z2 - z2 there: its mixed blocks do not see the other view change."""
    method = toy()
    out = method(views())
    moved = replace(out, projections=torch.stack([out.projections[0], out.projections[1].roll(1, 0)]))
    everyone = [
        method._believed(each, each.projections[0], each.projections[1], slice(None)) for each in (out, moved)
    ]
    torch.testing.assert_close(everyone[0].roll(1, 1), everyone[1])
    assert (everyone[0] - everyone[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("neighbours", "good_paths"), [(3, 0), (4, 1), (6, 3)])
def test_inlier_weights_are_those_of_neighbour_lists(neighbours, good_paths):
    torch.manual_seed(1)
    features = torch.randn(20, 5, dtype=torch.float64)
    found, expected = (
        inlier_weights(features, neighbours, good_paths),
        inlier_weights_by_lists(features, neighbours, good_paths),
    )
    torch.testing.assert_close(found, expected)
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize("images", [3, 4])
def test_images_too_few_for_the_neighbours_are_refused_by_a_task_of_any_size(images):
    """Of as many images as neighbours, an image would be a neighbour of its own."""
    with pytest.raises(
        UsageError, match=rf"dsa\.neighbours 4 are chosen among the images .* and there are {images}\."
    ):
        measure_sigma(toy(), BI_LEVEL, views(images=images))


def test_an_outlier_moves_nothing():
    torch.manual_seed(0)
    clusters = [
        centre + 0.1 * torch.randn(12, 4, dtype=torch.float64)
        for centre in 3 * torch.eye(4, dtype=torch.float64)[:2]
    ]
    outlier = torch.tensor([[-1.0, -1.0, 0.2, 0.1]], dtype=torch.float64)
    weights = inlier_weights(torch.cat([*clusters, outlier]), 5, 1)
    assert weights[-1] == 0 and weights[:-1].mean() > 0.5


def test_the_helper_follows_the_encoder_and_is_not_trained():
    method = toy()
    with torch.no_grad():
        method.backbone[1].weight.add_(1.0)
    before = method.helper[1].weight.clone()
    out, targets = method(views()), method.targets(views())
    method.loss(out, targets).backward()
    assert all(parameter.grad is None for parameter in method.helper.parameters())
    method.update_state([(out, targets)], 0)
    torch.testing.assert_close(
        method.helper[1].weight, 0.9 * before + 0.1 * method.backbone[1].weight.detach()
    )


def test_dsa_passes_on_every_function_of_a_method():
    functions = {name for name, value in vars(Method).items() if callable(value) and not name.startswith("_")}
    assert functions <= set(vars(DSA)) and {"settle", "frozen", "measures"} < functions


def test_a_regulated_swav_holds_its_prototypes_still_for_as_many_steps():
    method = toy("swav")
    assert [id(parameter) for parameter in method.frozen(1)] == [id(method.method.prototypes)] and not list(
        method.frozen(2)
    )


def test_a_regulated_barlow_has_the_curves_of_its_own_loss():
    method = toy("barlow")
    out, targets = method(views()), method.targets(views())
    terms = method.measures(out, targets)
    expected = method.method.loss(out, targets.method) / method.method.loss_scale
    torch.testing.assert_close(terms["invariance"] + terms["redundancy"], expected)


def test_smaller_views_do_not_move_the_regulator():
    # In evaluation mode, where views share no batch statistics.
    method, pair = toy("byol").eval(), views()
    plain, cropped = (
        method.measures(method(given), method.targets(given)) for given in (pair, [*pair, *views(1)])
    )
    assert all(torch.equal(value, cropped[key]) for key, value in plain.items())
    assert 0 < plain["dsa_inlier_weight"] < 1


def test_a_regulated_byol_still_moves_its_own_momentum_encoder():
    method, plain = toy("byol"), toy("byol").method
    for each in (method, plain):
        with torch.no_grad():
            each.backbone[1].weight.add_(1.0)
    out, targets = method(views()), method.targets(views())
    method.update_state([(out, targets)], 0)
    targets = plain.targets(views())
    plain.update_state([(plain(views()), targets)], 0)
    torch.testing.assert_close(method.method.momentum_backbone[1].weight, plain.momentum_backbone[1].weight)
    assert (method.method.momentum_backbone[1].weight - method.backbone[1].weight).abs().max() > 0.1


@pytest.mark.parametrize("name", ["simclr", "swav"])
@pytest.mark.parametrize("scope", ["all", "head"])
def test_dsa_under_exact_inner_steps_equals_central_differences(scope, name):
    settings = BI_LEVEL.model_copy(update={"scope": scope, "w_ssl": 0.0})
    method, unmoved = toy(name), toy(name)
    GeSSL(method, settings)(views()).loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in method.parameters() if p.requires_grad])
    torch.manual_seed(3)
    direction = torch.nn.functional.normalize(torch.randn_like(gradient), dim=0)
    # The helper, a copy of the unmoved encoder, and SwAV's codes are constants of the task.
    targets = unmoved.targets(views())
    targets = replace(
        targets, method=unmoved.method.settle(unmoved.method(views()).detached(), targets.method)
    )

    def sigma_of_moved(offset, teacher=None):
        """σ at θ + offset·direction, against the target of θ; literal inner steps on copies."""
        moved = toy(name)
        place = 0
        with torch.no_grad():
            for parameter in moved.parameters():
                if parameter.requires_grad:
                    parameter.add_(offset * direction[place : place + parameter.numel()].view_as(parameter))
                    place += parameter.numel()
        adapted = [
            (name, p)
            for name, p in moved.named_parameters()
            if p.requires_grad and (scope == "all" or ".backbone." not in name)
        ]

        def descend():
            slopes = torch.autograd.grad(moved.loss(moved(views()), targets), [p for _, p in adapted])
            with torch.no_grad():
                for (_, parameter), slope in zip(adapted, slopes, strict=True):
                    parameter.sub_(settings.inner_lr * slope)

        def log_pi():
            return torch.stack(
                [
                    (pi.query @ pi.key.T / pi.temperature).log_softmax(1)
                    for pi in moved.similarity(moved(views()), targets)
                ]
            )

        descend()
        student = log_pi()
        if teacher is None:
            descend()
            return log_pi().detach()
        return (teacher.exp() * (teacher - student)).sum(-1).mean().item()

    teacher, radius = sigma_of_moved(0.0), 1e-5
    expected = (sigma_of_moved(radius, teacher) - sigma_of_moved(-radius, teacher)) / (2 * radius)
    assert (gradient @ direction).item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return launch(Path(__file__).with_name("dsa_ranks.py"), 2, tmp_path_factory.mktemp("dsa"))


@pytest.mark.parametrize("name", ["simclr", "byol", "swav"])
def test_two_ranks_regulate_as_one_process_on_the_concatenated_batch(reports, name):
    method = toy(name, "global", images=16)
    together = [torch.cat(pair) for pair in zip(views(10), views(11), strict=True)]
    expected = step(method, GeSSL(method, GesslConfig()), together)
    for report in reports:
        torch.testing.assert_close(report[name]["gradient"], expected["gradient"], rtol=1e-9, atol=1e-12)
        for key in ("dsa_separation", "dsa_prior"):
            torch.testing.assert_close(
                report[name]["metrics"][key], expected["metrics"][key], rtol=1e-10, atol=0
            )
        for key, value in expected["state"].items():
            torch.testing.assert_close(report[name]["state"][key], value, rtol=1e-9, atol=1e-12)


def test_under_gessl_each_rank_s_images_are_a_task_of_their_own(reports):
    gradients = [
        step(method := toy(), GeSSL(method, BI_LEVEL), views(10 + rank))["gradient"] for rank in range(2)
    ]
    for report in reports:
        torch.testing.assert_close(report["tasks"]["gradient"], sum(gradients) / 2, rtol=1e-9, atol=1e-12)


def test_under_gessl_with_negatives_of_all_ranks_only_the_ssl_loss_sees_them(reports):
    together = [torch.cat(pair) for pair in zip(views(10), views(11), strict=True)]
    method = toy("simclr", "global", images=16).eval()
    ssl = step(method, GeSSL(method, GesslConfig()), together)["gradient"]
    alone = BI_LEVEL.model_copy(update={"w_ssl": 0.0})
    sigmas = [
        step(method := toy().eval(), GeSSL(method, alone), views(10 + rank))["gradient"] for rank in range(2)
    ]
    for report in reports:
        torch.testing.assert_close(report["across"]["gradient"], ssl + sum(sigmas) / 2, rtol=1e-9, atol=1e-12)


def test_neighbours_that_one_rank_s_inner_steps_do_not_have_are_refused_before_training(reports):
    for report in reports:
        assert report["refusals"]["plain"] == ""
        said = (
            r"dsa\.neighbours 4 are .* \(in GeSSL's inner steps those of one process\), and there are 4\. "
            r"Raise --train\.batch_size"
        )
        assert re.search(said, report["refusals"]["bi-level"])


@pytest.mark.parametrize("w_sigma", [0, 1])
def test_a_run_under_gessl_counts_the_images_of_one_process(fastgessl, tmp_path, monkeypatch, w_sigma):
    monkeypatch.setattr(dsa, "world_size", lambda: 2)
    options = (
        "--method.negatives",
        "global",
        "--gessl.w_sigma",
        w_sigma,
        "--train.batch_size",
        32,
        "--train.run_dir",
        tmp_path / "run",
    )
    outcome = fastgessl("train", "digits-simclr-dsa", *TINY, "--train.max_steps", 1, *options)
    if w_sigma:
        assert (
            outcome.code == 2
            and "those of one process), and there are 16. Raise --train.batch_size" in outcome.err
        )
    else:
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("settings", "images", "message"),
    [
        (SETTINGS.model_copy(update={"neighbours": 8}), 8, "there are 8. Raise --train.batch_size"),
        (DsaConfig(weight=1.0, neighbours=4, helper="resnett18"), 8, "Perhaps you meant"),
        (
            DsaConfig(weight=1.0, neighbours=4, helper="vit_tiny_patch16_224", helper_weights="none"),
            8,
            "does not take views of 2 pixels",
        ),
        (
            DsaConfig(weight=1.0, neighbours=4, helper="resnet18", helper_weights="nowhere.safetensors"),
            8,
            "there is no such file",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, images, message):
    with pytest.raises(UsageError, match=message):
        toy(settings=settings, images=images)


def test_a_method_that_projects_one_of_the_two_views_is_refused():
    """Of an asymmetric MoCo with smaller views, the second projection would be that of a smaller view."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    backbone.num_features = 6
    facts = RunFacts(images_per_forward=8, local_views=1)
    DSA(SETTINGS, toy_method("moco", facts, queue_length=16), facts, view_size=2)
    asymmetric = toy_method("moco", facts, queue_length=16, symmetric=False)
    with pytest.raises(
        UsageError, match=r"MoCo projects 1 of 2 with these settings\. Set --method\.moco\.symmetric True"
    ):
        DSA(SETTINGS, asymmetric, facts, view_size=2)


def test_a_supervised_method_and_a_single_view_are_refused():
    backbone = nn.Flatten()
    backbone.num_features = 12
    facts = RunFacts(images_per_forward=64, classes=3)
    supervised = build_method(MethodConfig(name="supervised"), backbone, facts)
    with pytest.raises(UsageError, match="this is Supervised with 2"):
        DSA(SETTINGS, supervised, facts, view_size=2)


def test_a_helper_trained_with_labels_is_warned_of_and_stays_as_it_is(tmp_path):
    import timm
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    settings = DsaConfig(weight=1.0, neighbours=4, helper="test_resnet", helper_weights=str(path))
    with pytest.warns(UserWarning, match="trained with labels"):
        method = toy(settings=settings)
    method.train()
    before = {name: value.clone() for name, value in method.helper.state_dict().items()}
    rows = [torch.randn(8, 3, 2, 2, dtype=torch.float64) for _ in range(2)]
    seen = method.targets(rows).helper
    assert seen.shape[:2] == (2, 8) and not method.helper.training
    torch.testing.assert_close(
        seen,
        torch.nn.functional.normalize(torch.stack([method.helper(view) for view in rows]), dim=-1).detach(),
    )
    assert all(torch.equal(before[name], value) for name, value in method.helper.state_dict().items())
