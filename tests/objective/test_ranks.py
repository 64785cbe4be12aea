"""Two and three gloo processes under DDP against one process: the same loss, gradients, parameters and
statistics.
"""

from pathlib import Path

import pytest
import torch
from method_cases import ALL, cases
from rank_launch import launch

from fastgessl.config import GesslConfig
from fastgessl.methods import METHODS
from fastgessl.objective import GeSSL

PROGRAM = Path(__file__).with_name("rank_program.py")
every_name = pytest.mark.parametrize("name", ALL)


@pytest.fixture(scope="module", params=[2, 3], ids="{}ranks".format)
def reports(request, tmp_path_factory):
    """What each rank reported, once for each world size."""
    return launch(PROGRAM, request.param, tmp_path_factory.mktemp("ranks"))


def worst(found, expected):
    """Largest difference relative to the largest entry."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def mean_over_tasks(toys, name, settings, seeds):
    total = 0.0
    for seed in seeds:
        method = toys.method(name)
        GeSSL(method, settings)(toys.views(seed)).loss.backward()
        total = total + toys.gradients(method) / len(seeds)
    return total


def concatenated(toys, ranks):
    return [torch.cat(same) for same in zip(*(toys.views(10 + rank) for rank in range(ranks)), strict=True)]


def concatenated_labels(toys, ranks):
    return torch.cat([toys.labels(10 + rank) for rank in range(ranks)])


@pytest.mark.parametrize(
    ("name", "label"), cases(["exact", "fast", "head", "first_order", "finite_difference", "sigma alone"])
)
def test_the_gradient_is_the_mean_of_the_single_process_task_gradients(toys, reports, name, label):
    expected = mean_over_tasks(toys, name, toys.bi_level[label], [10 + rank for rank in range(len(reports))])
    # A Hessian-vector product by differences over 4e-10 of the weights' norm rounds at up to 5e-6 of its
    # size; everything else is exact.
    tolerance = 1e-5 if label == "finite_difference" else 1e-12
    assert all(worst(report["tasks", name, label], expected) <= tolerance for report in reports)


@every_name
def test_accumulated_micro_batches_of_all_ranks_are_averaged_as_tasks(toys, reports, name):
    seeds = [start + rank for rank in range(len(reports)) for start in (10, 20)]
    expected = mean_over_tasks(toys, name, toys.bi_level["exact"], seeds)
    assert all(worst(report["accumulated", name], expected) <= 1e-12 for report in reports)


@pytest.mark.parametrize(
    ("name", "label"), cases(["exact", "fast", "head", "first_order", "finite_difference"])
)
def test_an_objective_sharded_as_one_unit_gives_the_mean_of_the_task_gradients(toys, reports, name, label):
    expected = mean_over_tasks(toys, name, toys.bi_level[label], [10 + rank for rank in range(len(reports))])
    for rank, report in enumerate(reports):
        assert worst(report["sharded", name, label]["gradient"], expected) <= (
            1e-5 if label == "finite_difference" else 1e-12
        )
        sigma = GeSSL(toys.method(name), toys.bi_level[label])(toys.views(10 + rank)).metrics["sigma"]
        torch.testing.assert_close(report["sharded", name, label]["sigma"], sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "label"), cases(["exact", "fast", "head", "first_order", "finite_difference"])
)
def test_a_backbone_sharded_by_itself_is_refused_with_the_ways_out_and_trains_without_sigma(
    toys, reports, name, label
):
    for rank, report in enumerate(reports):
        found = report["sharded", name, label]
        assert all(
            way_out in found["refusal"]
            for way_out in ("fully_shard(objective)", "DistributedDataParallel", "w_sigma 0")
        )
        torch.testing.assert_close(
            found["plain"], GeSSL(toys.method(name), GesslConfig())(toys.views(10 + rank)).loss.detach()
        )


@pytest.mark.parametrize(("name", "label"), cases(["exact", "fast", "head", "finite_difference"]))
def test_with_synchronised_batch_norm_and_global_negatives_sigma_stays_rank_local(toys, reports, name, label):
    ranks = len(reports)
    sigma_alone = toys.bi_level[label].model_copy(update={"w_ssl": 0.0})
    expected = mean_over_tasks(toys, name, sigma_alone, [10 + rank for rank in range(ranks)])
    tolerance = 1e-5 if label == "finite_difference" else 1e-12
    assert all(worst(report["synchronised tasks", name, label], expected) <= tolerance for report in reports)
    method = toys.method(name)
    GeSSL(method, GesslConfig())(concatenated(toys, ranks)).loss.backward()
    assert all(
        worst(report["both", name, label], expected + toys.gradients(method)) <= tolerance
        for report in reports
    )


@pytest.mark.parametrize(
    ("name", "label"), cases(["exact", "fast", "head", "first_order", "finite_difference"])
)
def test_with_global_negatives_the_ssl_loss_gathers_and_the_inner_loss_does_not(toys, reports, name, label):
    sigma_alone = toys.bi_level[label].model_copy(update={"w_ssl": 0.0})
    sigma = mean_over_tasks(toys, name, sigma_alone, [10 + rank for rank in range(len(reports))])
    tolerance = 1e-5 if label == "finite_difference" else 1e-12
    for report in reports:
        assert (
            worst(report["global negatives", name, label], report["global negatives", name, "plain"] + sigma)
            <= tolerance
        )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_plain_training_equals_one_process_on_the_concatenated_batch(toys, reports, name):
    method = toys.method(name)
    objective = GeSSL(method, GesslConfig())
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    for step in range(2):
        optimizer.zero_grad(set_to_none=True)
        result = objective(
            concatenated(toys, len(reports)), step, labels=concatenated_labels(toys, len(reports))
        )
        result.loss.backward()
        optimizer.step()
        method.update_state([(result.outputs, result.targets)], step)
    found = [report["plain", name] for report in reports]
    assert torch.stack([one["loss"] for one in found]).mean().item() == pytest.approx(
        result.loss.item(), rel=1e-12
    )
    for one in found:
        assert worst(one["gradient"], toys.gradients(method)) <= 1e-12
        for key, value in method.state_dict().items():
            torch.testing.assert_close(
                one["state"][key], value, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
            )
