"""Synchronised batch norm on two gloo processes against torch's batch norm on one."""

import pytest
import torch
from programs.batch_norm_ranks import ROWS, case, derivatives, report
from rank_launch import launch
from timm.layers import BatchNormAct2d
from torch import nn

from fastgessl.config import ModelConfig, UsageError
from fastgessl.models import SynchronisedBatchNorm, build_backbone, synchronise_batch_norm

every_shape = pytest.mark.parametrize("shape", [(4,), (4, 3, 3)], ids=["1d", "2d"])


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return launch(report, len(ROWS), tmp_path_factory.mktemp("batch_norm"))


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@every_shape
def test_values_first_and_second_derivatives_are_those_of_one_process_with_all_rows(reports, shape):
    rows, tangents, norm = case(shape)
    out, first, second = derivatives(norm, rows, tangents)
    found = [one["derivatives", shape] for one in reports]
    close(torch.cat([one[0] for one in found]), out)
    for order, expected in ((1, first), (2, second)):
        close(torch.cat([one[order][0] for one in found]), expected[0], 1e-11)
        for one in found:
            close(one[order][1:], expected[1:], 1e-11)


@every_shape
def test_running_statistics_are_those_of_one_process_with_all_rows(reports, shape):
    rows, _, norm = case(shape)
    norm(rows)
    for one in reports:
        close(one["running", shape], dict(norm.named_buffers()))


def test_without_momentum_the_running_statistics_are_the_mean_over_batches(reports):
    norm = nn.BatchNorm1d(4, momentum=None, affine=False, dtype=torch.float64)
    for factor in (1.0, 2.0, 4.0):
        norm(factor * case((4,))[0])
    for one in reports:
        close(one["cumulative"], dict(norm.named_buffers()))


@every_shape
def test_alone_and_in_evaluation_it_is_torch_s_batch_norm_bit_for_bit(reports, shape):
    rows, _, norm = case(shape)
    for one, own in zip(reports, rows.split(ROWS), strict=True):
        norm.load_state_dict(norm.state_dict() | one["running", shape])
        assert torch.equal(one["evaluation", shape], norm.eval()(own))
        assert torch.equal(one["alone", shape], norm.train()(own))


def test_float32_keeps_its_digits_a_thousand_deviations_from_zero(reports):
    rows, _, norm = case((4, 3, 3), torch.float32, offset=1e3)
    expected = norm.double()(rows.double()).float()
    # The inputs themselves carry 6e-8 · 1e3 deviations; sums of squares in float32 would be off by 1e-1 here.
    assert (torch.cat([one["far from zero"] for one in reports]) - expected).abs().max() < 2e-3


def test_bfloat16_rows_are_averaged_in_float32_and_returned_in_bfloat16(reports):
    rows = case((4, 3, 3))[0]
    found = torch.cat([one["bfloat16"] for one in reports])
    assert found.dtype == torch.bfloat16
    expected = case((4, 3, 3), torch.float32)[2](rows.bfloat16().float())
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=2e-2)


def test_the_conversion_keeps_parameters_buffers_names_and_results():
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(stem="small", width=0.25))
    images = torch.randn(4, 3, 16, 16)
    before, expected = backbone.state_dict(keep_vars=True), backbone.eval()(images)
    converted = synchronise_batch_norm(backbone)
    after = converted.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert torch.equal(converted(images), expected)
    norms = [module for module in converted.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 20 and all(
        type(norm) is SynchronisedBatchNorm and not norm.training for norm in norms
    )
    assert synchronise_batch_norm(converted) is converted


def test_timm_s_batch_norm_with_activation_keeps_its_activation():
    norm, images = BatchNormAct2d(4), torch.randn(3, 4, 2, 2)
    expected = norm(images)
    converted = synchronise_batch_norm(nn.Sequential(norm))
    assert isinstance(converted[0], SynchronisedBatchNorm) and expected.min() == 0
    assert torch.equal(converted(images), expected)


def test_an_unknown_kind_of_batch_norm_is_refused():
    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(UsageError, match="Odd is known"):
        synchronise_batch_norm(nn.Sequential(Odd(4)))


def test_a_vector_is_no_batch():
    with pytest.raises(ValueError, match="needs \\(batch, channels"):
        SynchronisedBatchNorm(4)(torch.zeros(4))
