import math

import pytest
import torch
from toys import assert_same_loss, logits, toy_images, toy_method

from fastgessl.config import UsageError
from fastgessl.methods import Outputs, RunFacts

SETTINGS = {
    "entropy_weight": 2.3,
    "invariance_weight": 0.8,
    "temperature": 1.0,
    "assignment_temperature": 0.5,
}


def toy(facts=None, **options):
    return toy_method("dissl", facts, **{"prototypes": 12, **SETTINGS, **options})


def outputs(views=2, images=7):
    torch.manual_seed(0)
    teacher, teacher_weight, student, student_weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, images, 4), (12, 4), (views, images, 6), (12, 6))
    )
    return Outputs(student, teacher, student, teacher_weight, student_weight)


def dissl_by_definition(out, entropy_weight, invariance_weight, temperature, assignment_temperature):
    """Dubois et al. 2022, eq. (10), view by view: p = softmax(teacher / τ_t), q = softmax(student / τ_s)."""
    p = [(view @ out.prototypes.T / assignment_temperature).softmax(1) for view in out.projections]
    q = [(view @ out.predicted_prototypes.T / temperature).softmax(1) for view in out.predictions]
    distilled = [-(p[i] * q[j].log()).sum(1).mean() for i in range(len(p)) for j in range(len(q)) if i != j]
    invariant = [-(p[i] * p[j].log()).sum(1).mean() for i in range(len(p)) for j in range(len(p)) if i != j]
    entropy = [-(each.mean(0) * each.mean(0).log()).sum() for each in p]
    mean = [torch.stack(terms).mean() for terms in (distilled, entropy, invariant)]
    return mean[0] - entropy_weight * mean[1] + invariance_weight * mean[2]


@pytest.mark.parametrize("views", [2, 5])
@pytest.mark.parametrize(
    "changed", [{}, {"entropy_weight": 0.0}, {"invariance_weight": 0.0, "temperature": 0.3}]
)
def test_dissl_s_loss_and_all_its_gradients_are_those_of_the_definition(views, changed):
    out = outputs(views)
    found, expected = toy(**changed).loss(out), dissl_by_definition(out, **(SETTINGS | changed))
    tensors = [out.projections, out.predictions, out.prototypes, out.predicted_prototypes]
    assert_same_loss(found, expected, tensors, slopes=(1e-9, 1e-12))
    # No stop-gradient: the teacher's side has a gradient of its own.
    assert torch.autograd.grad(found, out.projections)[0].abs().max() > 1e-3


def test_dissl_s_student_is_one_linear_layer_over_the_representation():
    method = toy()
    out = method(toy_images(views=4))
    assert (
        torch.equal(out.predictions, out.features)
        and out.predicted_prototypes is method.student_prototypes.weight
    )
    assert len(out.projections) == 2 and len(out.predictions) == 4


def test_dissl_s_teacher_sees_only_the_views_of_full_size():
    out = toy()(toy_images(views=4))
    expected = toy().teacher(out.features[:2].flatten(0, 1)).unflatten(0, (2, 5))
    assert torch.equal(out.projections, expected)


def test_dissl_s_pi_is_the_student_s_softmax_of_every_view():
    out = outputs(views=3)
    for view, pi in zip(out.predictions, toy(temperature=0.7).similarity(out), strict=True):
        torch.testing.assert_close(logits(pi), view @ out.predicted_prototypes.T / 0.7)


def test_dissl_s_measures_are_those_of_its_teacher_s_assignment():
    out = outputs()
    terms = toy().measures(out)
    p = (out.projections @ out.prototypes.T / 0.5).softmax(-1)
    rows = p.flatten(0, 1)
    torch.testing.assert_close(terms["maximality"], -(rows.mean(0) * rows.mean(0).log()).sum())
    torch.testing.assert_close(terms["determinism"], -(rows * rows.log()).sum(1).mean())
    torch.testing.assert_close(terms["invariance"], (p * (p / p.flip(0)).log()).sum(-1).mean())
    collapsed = Outputs(
        out.features,
        torch.ones_like(out.projections),
        out.predictions,
        1e3 * out.prototypes,
        out.predicted_prototypes,
    )
    assert toy().measures(collapsed)["maximality"] < 1e-6 < math.log(12) - terms["determinism"]


def test_no_more_prototypes_than_classes_are_refused():
    with pytest.raises(UsageError, match=r"dissl.prototypes is 10, and the training images have 10 classes"):
        toy(RunFacts(classes=10), prototypes=10)
    toy(RunFacts(classes=10), prototypes=11)
