import pytest
import torch
from toys import assert_same_loss, logits, toy_method

from fastgessl.methods import Outputs, RunFacts


def toy(negatives="local", temperature=0.07):
    return toy_method("cissl", RunFacts(negatives=negatives), temperature=temperature)


def outputs(seed=0, images=7):
    torch.manual_seed(seed)
    teacher, student = (torch.randn(2, images, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return Outputs(teacher, teacher, student)


def cissl_by_definition(out, temperature):
    """Every view of every image against all 2N views, itself included; half of the target on each of the
    image's two views.
    """
    images = out.projections.shape[1]
    student, teacher = (
        [row / row.norm() for view in rows for row in view] for rows in (out.predictions, out.projections)
    )
    terms = []
    for i, query in enumerate(student):
        weights = [torch.exp(query @ key / temperature) for key in teacher]
        own, other = weights[i], weights[(i + images) % (2 * images)]
        terms.append(-(torch.log(own / sum(weights)) + torch.log(other / sum(weights))) / 2)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("negatives", ["local", "global"])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_cissl_s_loss_and_both_gradients_are_those_of_the_definition(negatives, temperature):
    out = outputs()
    found, expected = toy(negatives, temperature).loss(out), cissl_by_definition(out, temperature)
    assert_same_loss(found, expected, [out.predictions, out.projections], slopes=(1e-9, 1e-13))


def test_cissl_s_student_is_linear_and_its_teacher_is_not():
    method = toy().eval()
    features = torch.randn(2, 5, 6, dtype=torch.float64)
    both, halves = method(features=features), [method(features=share * features) for share in (-0.5, 1.5)]
    zero = method(features=torch.zeros_like(features))
    for name, linear in (("predictions", True), ("projections", False)):
        total = sum(getattr(half, name) for half in halves) - getattr(zero, name)
        assert torch.allclose(total, getattr(both, name), atol=1e-12) == linear


def test_both_of_cissl_s_heads_end_in_a_batch_norm_over_the_rows_of_both_views():
    out = toy()(features=3 + torch.randn(2, 50, 6, dtype=torch.float64))
    for rows in (out.predictions.flatten(0, 1), out.projections.flatten(0, 1)):
        torch.testing.assert_close(rows.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            rows.var(0, correction=0), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-2
        )


def test_cissl_s_pi_is_the_softmax_of_its_loss():
    method, out = toy(), outputs()
    (pi,) = method.similarity(out)
    table = logits(pi).log_softmax(1)
    images = table.shape[0] // 2
    expected = -(table.diagonal() + table.roll(-images, 1).diagonal()) / 2
    torch.testing.assert_close(expected.mean(), method.loss(out))


def test_cissl_s_measures_are_those_of_a_dense_softmax():
    method, out = toy(temperature=0.3), outputs()
    (pi,) = method.similarity(out)
    p = logits(pi).softmax(1)
    other = p.roll(len(p) // 2, 0)
    terms = method.measures(out)
    torch.testing.assert_close(terms["maximality"], -(p.mean(0) * p.mean(0).log()).sum())
    torch.testing.assert_close(terms["determinism"], -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(terms["invariance"], (p * (p / other).log()).sum(1).mean())
