import pytest
import torch
from programs.dsa_ranks import BI_LEVEL, SETTINGS, report, step, toy, views
from rank_launch import launch
from smooth_toys import LiteralObjective, assert_slopes_agree, gradients
from tiny_run import TINY
from torch import nn
from toys import assert_same_loss, toy_images, toy_method, unit

from fastgessl.config import DsaConfig, GesslConfig, UsageError
from fastgessl.methods import DSA, Method, RunFacts, dsa
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


@pytest.mark.parametrize("name", ["simclr", "byol", "barlow"])
def test_dsa_s_loss_gradients_and_curves_are_those_of_the_definition(name):
    method = toy(name)
    out, targets = method(views()), method.targets(views())
    separation, prior = dsa_by_definition(method, out, targets.helper)
    expected = (
        method.method.loss(out, targets.method) + SETTINGS.weight * separation + SETTINGS.prior_weight * prior
    )
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert_same_loss(method.loss(out, targets), expected, trained, rtol=1e-10, slopes=(1e-8, 1e-11))
    terms = method.measures(out, targets)
    terms.pop("dsa_inlier_weight")
    own = method.method.measures(out, targets.method) | {"dsa_separation": separation, "dsa_prior": prior}
    torch.testing.assert_close(terms, own, rtol=1e-10, atol=0)


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
    said = rf"dsa\.neighbours 4 are chosen among the images .* and there are {images}\."
    with pytest.raises(UsageError, match=said):
        measure_sigma(toy(), BI_LEVEL, toy_images(images=images))


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


def test_smaller_views_do_not_move_the_regulator():
    # In evaluation mode, where views share no batch statistics.
    method, pair = toy("byol").eval(), views()
    plain, cropped = (
        method.measures(method(given), method.targets(given)) for given in (pair, views(count=4))
    )
    assert all(torch.equal(value, cropped[key]) for key, value in plain.items())
    assert 0 < plain["dsa_inlier_weight"] < 1


def test_a_regulated_byol_still_moves_its_own_momentum_encoder():
    method = toy("byol")
    nn.init.zeros_(method.backbone[1].weight)
    before = method.method.momentum_backbone[1].weight.clone()
    method.update_state([(method(views()), method.targets(views()))], 0)
    share = method.method.momentum[0]
    torch.testing.assert_close(method.method.momentum_backbone[1].weight, share * before)


@pytest.mark.parametrize("name", ["simclr", "swav"])
@pytest.mark.parametrize("scope", ["all", "head"])
def test_dsa_under_exact_inner_steps_equals_central_differences(scope, name):
    method, settings = toy(name), BI_LEVEL.model_copy(update={"scope": scope, "w_ssl": 0.0})
    # The helper, a copy of the unmoved encoder, and SwAV's codes are constants of the task.
    literal = LiteralObjective(method, settings, views())
    GeSSL(method, settings)(views()).loss.backward()
    assert_slopes_agree(gradients(method), literal)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return launch(report, 2, tmp_path_factory.mktemp("dsa"))


@pytest.mark.parametrize("name", ["simclr", "byol", "swav"])
def test_two_ranks_regulate_as_one_process_on_the_concatenated_batch(reports, name):
    method = toy(name, "global", images=16)
    together = [torch.cat(pair) for pair in zip(views(10), views(11), strict=True)]
    expected = step(method, GeSSL(method, GesslConfig()), together)
    for one in reports:
        for key in ("gradient", "state"):
            torch.testing.assert_close(one[name][key], expected[key], rtol=1e-9, atol=1e-12)
        for key in ("dsa_separation", "dsa_prior"):
            torch.testing.assert_close(
                one[name]["metrics"][key], expected["metrics"][key], rtol=1e-10, atol=0
            )


def mean_over_tasks(settings, *, training=True):
    methods = [toy().train(training) for _ in range(2)]
    steps = [step(one, GeSSL(one, settings), views(10 + rank)) for rank, one in enumerate(methods)]
    return (steps[0]["gradient"] + steps[1]["gradient"]) / 2


def test_under_gessl_each_rank_s_images_are_a_task_of_their_own(reports):
    expected = mean_over_tasks(BI_LEVEL)
    for one in reports:
        torch.testing.assert_close(one["tasks"]["gradient"], expected, rtol=1e-9, atol=1e-12)


def test_under_gessl_with_negatives_of_all_ranks_only_the_ssl_loss_sees_them(reports):
    together = [torch.cat(pair) for pair in zip(views(10), views(11), strict=True)]
    method = toy("simclr", "global", images=16).eval()
    ssl = step(method, GeSSL(method, GesslConfig()), together)["gradient"]
    sigma = mean_over_tasks(BI_LEVEL.model_copy(update={"w_ssl": 0.0}), training=False)
    for one in reports:
        torch.testing.assert_close(one["across"]["gradient"], ssl + sigma, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("w_sigma", [0, 1])
def test_a_run_under_gessl_counts_the_images_of_one_process(fastgessl, tmp_path, monkeypatch, w_sigma):
    monkeypatch.setattr(dsa, "world_size", lambda: 2)
    options = f"--method.negatives global --gessl.w_sigma {w_sigma} --train.batch_size 32".split()
    more = (*options, "--train.max_steps", 1, "--train.run_dir", tmp_path / "run")
    outcome = fastgessl("train", "digits-simclr-dsa", *TINY, *more)
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
    facts = RunFacts(images_per_forward=8, local_views=1)
    DSA(SETTINGS, toy_method("moco", facts, queue_length=16), facts, view_size=2)
    asymmetric = toy_method("moco", facts, queue_length=16, symmetric=False)
    with pytest.raises(
        UsageError, match=r"MoCo projects 1 of 2 with these settings\. Set --method\.moco\.symmetric True"
    ):
        DSA(SETTINGS, asymmetric, facts, view_size=2)


def test_a_supervised_method_and_a_single_view_are_refused():
    facts = RunFacts(images_per_forward=64, classes=3)
    with pytest.raises(UsageError, match="this is Supervised with 2"):
        DSA(SETTINGS, toy_method("supervised", facts), facts, view_size=2)


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
    expected = unit(torch.stack([method.helper(view) for view in views()])).detach()
    torch.testing.assert_close(method.targets(views()).helper, expected)
    assert not method.helper.training
    torch.testing.assert_close(method.helper.state_dict(), before, rtol=0, atol=0)
