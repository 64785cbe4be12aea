import pytest
import torch
from torch import nn
from toys import assert_same_loss, logits, toy_backbone, toy_images, toy_method, trained, unit

from fastgessl.config import UsageError
from fastgessl.methods import Outputs, RunFacts
from fastgessl.methods.dino import Teacher


def toy(classes=None, steps_per_epoch=4.0, total_steps=12, **options):
    facts = RunFacts(total_steps=total_steps, steps_per_epoch=steps_per_epoch, classes=classes)
    given = {"prototypes": 9, "temperature": 0.1}
    return toy_method("dino", facts, toy_backbone(norm=True), **given | options)


def outputs_and_teacher(crops):
    torch.manual_seed(0)
    rows = unit(torch.randn(crops, 7, 4, dtype=torch.float64)).requires_grad_()
    student = Outputs(rows, rows, prototypes=unit(torch.randn(9, 4, dtype=torch.float64)).requires_grad_())
    teacher = unit(torch.randn(2, 7, 4, dtype=torch.float64)), unit(torch.randn(9, 4, dtype=torch.float64))
    center = 0.1 * torch.randn(9, dtype=torch.float64)
    return student, Teacher(*teacher, center, torch.tensor(0.06, dtype=torch.float64))


@pytest.mark.parametrize("crops", [2, 5])
def test_dino_s_loss_and_gradient_are_the_definition(crops):
    """Caron et al. 2021, eq. (3): Σ over the teacher's views x and the student's other views x' of H(P_t(x),
    P_s(x')), as a mean.
    """
    out, teacher = outputs_and_teacher(crops)
    student = out.projections @ out.prototypes.T
    targets = torch.softmax(
        (teacher.rows @ teacher.prototypes.T - teacher.center) / teacher.temperature, dim=-1
    )
    pairs = [(target, view) for target in (0, 1) for view in range(crops) if view != target]
    terms = [
        -(targets[t] * torch.log(torch.softmax(student[v] / 0.1, dim=-1))).sum(-1).mean() for t, v in pairs
    ]
    found, expected = toy().loss(out, teacher), torch.stack(terms).mean()
    assert_same_loss(found, expected, [out.projections, out.prototypes], slopes=(1e-9, 1e-13))


def lightly_head(projector, last_layer):
    heads = pytest.importorskip("lightly.models.modules.heads", reason="lightly is the oracle here")
    head = heads.DINOProjectionHead(6, 8, 4, 9).double()
    layers = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    linear = [layer for layer in projector if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, ours in zip(layers, linear, strict=True):
            layer.weight.copy_(ours.weight)
            layer.bias.copy_(ours.bias)
        head.last_layer.weight_v.copy_(last_layer.weight)
    return head


def test_head_loss_center_and_gradients_are_lightly_s():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is the oracle here")
    method = toy(
        teacher_temperature=0.05, teacher_temperature_start=0.05, center_momentum=0.8, momentum_start=1.0
    )
    for parameter in method.momentum_last_layer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    student = lightly_head(method.projector, method.last_layer)
    teacher = lightly_head(method.momentum_projector, method.momentum_last_layer)
    criterion = lightly.DINOLoss(
        9, teacher_temp=0.05, warmup_teacher_temp_epochs=0, center_momentum=0.8
    ).double()
    method.eval()
    for seed in (0, 1):
        crops = toy_images(seed, views=4)
        targets, out = method.targets(crops), method(crops)
        features = method.backbone(torch.cat(crops)).detach()
        found = method.loss(out, targets)
        expected = criterion(list(teacher(features).detach().chunk(4)[:2]), list(student(features).chunk(4)))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        slopes = [torch.autograd.grad(found, method.last_layer.weight)[0]]
        slopes.append(torch.autograd.grad(expected, student.last_layer.weight_v)[0])
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-9)
        method.update_state([(out, targets)], 0)
        torch.testing.assert_close(method.center, criterion.center.flatten(), rtol=1e-6, atol=1e-9)


def test_dino_s_pi_is_the_student_s_softmax_of_every_view_over_the_outputs_without_the_centre():
    out, teacher = outputs_and_teacher(3)
    (pi,) = toy(temperature=0.3).similarity(out, teacher)
    torch.testing.assert_close(logits(pi), out.projections.flatten(0, 1) @ out.prototypes.T / 0.3)


OPTIONS = {
    "momentum_start": 0.9,
    "teacher_temperature_start": 0.04,
    "teacher_temperature": 0.07,
    "teacher_warmup_epochs": 1.5,
    "center_momentum": 0.8,
}


def test_centre_and_temperature_follow_a_literal_simulation():
    method, center = toy(**OPTIONS), torch.zeros(9, dtype=torch.float64)
    for step in range(12):
        outputs = []
        for _, targets in trained(method, 1, first=step, views=4):
            assert targets.temperature.item() == pytest.approx(0.04 + 0.03 * min(step / 6, 1))
            torch.testing.assert_close(targets.center, center, rtol=1e-10, atol=1e-14)
            outputs += [row @ targets.prototypes.T for row in targets.rows.flatten(0, 1)]
        center = 0.8 * center + 0.2 * torch.stack(outputs).mean(0)
    torch.testing.assert_close(method.center, center, rtol=1e-10, atol=1e-14)


def test_targets_keep_their_values_when_the_state_moves_on():
    method = toy(**OPTIONS)
    targets = method.targets(toy_images())
    kept = [
        tensor.clone() for tensor in (targets.rows, targets.prototypes, targets.center, targets.temperature)
    ]
    trained(method, 2, views=4)
    assert all(torch.equal(a, b) for a, b in zip(kept, vars(targets).values(), strict=True))
    assert (
        method.center - targets.center
    ).abs().max() > 0 and method.teacher_temperature != targets.temperature


def test_the_last_layer_has_unit_rows_and_stands_still_in_the_first_epochs():
    method = toy(freeze_epochs=0.5)
    start = method.last_layer.weight.detach().clone()
    trained(method, 2, views=4)
    assert torch.equal(method.last_layer.weight, start)
    trained(method, 1, first=2, views=4)
    assert (method.last_layer.weight - start).abs().max() > 1e-5
    torch.testing.assert_close(
        method(toy_images()).prototypes.norm(dim=1), torch.ones(9, dtype=torch.float64)
    )


def test_a_batch_norm_stands_in_front_of_each_gelu_if_asked_for():
    kinds = [type(layer).__name__ for layer in toy(head_norm=True).projector]
    assert kinds == ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in toy().projector)


def test_too_few_outputs_are_refused():
    with pytest.raises(
        UsageError, match=r"method.dino.prototypes is 9, and the training images have 10 classes"
    ):
        toy(classes=10)
