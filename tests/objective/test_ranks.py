"""Two and three gloo processes under DDP against one process: the same loss, gradients, parameters and
statistics.
"""

import pytest
import torch
from method_cases import ALL, cases
from programs.objective_ranks import report, two_steps
from rank_launch import launch
from smooth_toys import BI_LEVEL

from fastgessl.config import GesslConfig
from fastgessl.methods import METHODS
from fastgessl.objective import GeSSL

every_name = pytest.mark.parametrize("name", ALL)


@pytest.fixture(scope="module", params=[2, 3], ids="{}ranks".format)
def reports(request, tmp_path_factory):
    """What each rank reported, once for each world size."""
    return launch(report, request.param, tmp_path_factory.mktemp("ranks"))


def worst(found, expected):
    """Largest difference relative to the largest entry."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def tolerance(label):
    """A Hessian-vector product by differences over 4e-10 of the weights' norm rounds at up to 5e-6 of its
    size; everything else is exact.
    """
    return 1e-5 if label == "finite_difference" else 1e-12


def mean_over_tasks(toys, name, settings, seeds):
    total = 0.0
    for seed in seeds:
        method = toys.method(name)
        GeSSL(method, settings)(toys.views(seed)).loss.backward()
        total = total + toys.gradients(method) / len(seeds)
    return total


def concatenated(toys, ranks):
    return [torch.cat(same) for same in zip(*(toys.views(10 + rank) for rank in range(ranks)), strict=True)]


every_case = pytest.mark.parametrize(("name", "label"), cases([*BI_LEVEL]))


@every_case
def test_the_gradient_is_the_mean_of_the_single_process_task_gradients(toys, reports, name, label):
    expected = mean_over_tasks(toys, name, toys.bi_level[label], [10 + rank for rank in range(len(reports))])
    assert all(worst(one["tasks", name, label], expected) <= tolerance(label) for one in reports)


@every_name
def test_accumulated_micro_batches_of_all_ranks_are_averaged_as_tasks(toys, reports, name):
    seeds = [start + rank for rank in range(len(reports)) for start in (10, 20)]
    expected = mean_over_tasks(toys, name, toys.bi_level["exact"], seeds)
    assert all(worst(one["accumulated", name], expected) <= 1e-12 for one in reports)


@every_case
def test_an_objective_sharded_as_one_unit_gives_the_mean_of_the_task_gradients(toys, reports, name, label):
    expected = mean_over_tasks(toys, name, toys.bi_level[label], [10 + rank for rank in range(len(reports))])
    for rank, one in enumerate(reports):
        assert worst(one["sharded", name, label]["gradient"], expected) <= tolerance(label)
        sigma = GeSSL(toys.method(name), toys.bi_level[label])(toys.views(10 + rank)).metrics["sigma"]
        torch.testing.assert_close(one["sharded", name, label]["sigma"], sigma, rtol=1e-12, atol=0)


@every_case
def test_a_backbone_sharded_by_itself_is_refused_with_the_ways_out_and_trains_without_sigma(
    toys, reports, name, label
):
    for rank, one in enumerate(reports):
        found = one["sharded", name, label]
        assert all(
            way_out in found["refusal"]
            for way_out in ("fully_shard(objective)", "DistributedDataParallel", "w_sigma 0")
        )
        torch.testing.assert_close(
            found["plain"], GeSSL(toys.method(name), GesslConfig())(toys.views(10 + rank)).loss.detach()
        )


@every_case
def test_with_synchronised_batch_norm_and_global_negatives_sigma_stays_rank_local(toys, reports, name, label):
    ranks = len(reports)
    sigma_alone = toys.bi_level[label].model_copy(update={"w_ssl": 0.0})
    expected = mean_over_tasks(toys, name, sigma_alone, [10 + rank for rank in range(ranks)])
    assert all(worst(one["synchronised tasks", name, label], expected) <= tolerance(label) for one in reports)
    method = toys.method(name)
    GeSSL(method, GesslConfig())(concatenated(toys, ranks)).loss.backward()
    assert all(
        worst(one["both", name, label], expected + toys.gradients(method)) <= tolerance(label)
        for one in reports
    )


@every_case
def test_with_global_negatives_the_ssl_loss_gathers_and_the_inner_loss_does_not(toys, reports, name, label):
    sigma_alone = toys.bi_level[label].model_copy(update={"w_ssl": 0.0})
    sigma = mean_over_tasks(toys, name, sigma_alone, [10 + rank for rank in range(len(reports))])
    for one in reports:
        assert worst(
            one["global negatives", name, label], one["global negatives", name, "plain"] + sigma
        ) <= tolerance(label)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_plain_training_equals_one_process_on_the_concatenated_batch(toys, reports, name):
    seeds = [10 + rank for rank in range(len(reports))]
    method, labels = toys.method(name), torch.cat([toys.labels(seed) for seed in seeds])
    expected = two_steps(method, GeSSL(method, GesslConfig()), concatenated(toys, len(reports)), labels)
    found = [one["plain", name] for one in reports]
    loss = torch.stack([one["loss"] for one in found]).mean()
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-12, atol=0)
    for one in found:
        assert worst(one["gradient"], expected["gradient"]) <= 1e-12
        torch.testing.assert_close(one["state"], dict(expected["state"]), rtol=1e-12, atol=1e-12)
