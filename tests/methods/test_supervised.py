import pytest
import torch
from toys import toy_images, toy_method

from fastgessl.config import GesslConfig, UsageError
from fastgessl.methods import RunFacts
from fastgessl.objective import GeSSL, measure_sigma

LABELS = torch.tensor([0, 2, 1, 2, 0])


def toy(classes=3):
    return toy_method("supervised", RunFacts(classes=classes))


@pytest.mark.parametrize("count", [1, 3])
def test_supervised_loss_and_gradient_are_the_mean_negative_log_likelihood_over_views_and_images(count):
    method = toy()
    result = GeSSL(method, GesslConfig())(toy_images(1, count), labels=LABELS)
    result.loss.backward()
    found = method.classifier.weight.grad.clone()
    rows = [method.backbone[1](view.flatten(1)) @ method.classifier.weight.T for view in toy_images(1, count)]
    likelihood = torch.stack(
        [(row[i].exp() / row[i].exp().sum())[label] for row in rows for i, label in enumerate(LABELS)]
    )
    torch.testing.assert_close(result.loss, -likelihood.log().mean())
    (expected,) = torch.autograd.grad(-likelihood.log().mean(), method.classifier.weight)
    torch.testing.assert_close(found, expected)


def test_the_classifier_has_one_vector_a_class_and_nothing_else():
    method = toy()
    assert {name: tuple(weight.shape) for name, weight in method.classifier.named_parameters()} == {
        "weight": (3, 6)
    }


@pytest.mark.parametrize(
    ("autocast", "dtype"), [(torch.bfloat16, torch.float32), (None, torch.float32), (None, torch.float64)]
)
def test_logits_are_at_least_float32(autocast, dtype):
    method = toy().to(dtype)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = method([view.to(dtype) for view in toy_images(1)])
    assert out.features.dtype == (autocast or dtype) and out.projections.dtype == dtype
    torch.testing.assert_close(out.projections, out.features.to(dtype), rtol=0, atol=0)


def test_supervised_accuracy_is_measured_on_the_views():
    method = toy()
    out = method(toy_images(1))
    found = method.measures(out, LABELS)["train_accuracy"]
    guesses = [(view @ method.classifier.weight.T).argmax(1) for view in out.features]
    assert found.item() == pytest.approx(
        sum((guess == LABELS).double().mean().item() for guess in guesses) / 2
    )


@pytest.mark.parametrize(
    "settings", [GesslConfig(w_sigma=1.0), GesslConfig(inner_steps=1, inner_lr=0.1, w_sigma=1.0)]
)
def test_supervised_learning_has_a_sigma_on_its_labels(settings):
    result = GeSSL(toy(), settings)(toy_images(1), labels=LABELS)
    assert result.metrics["sigma"] > 0 > result.metrics["delta_loss"]
    measured = measure_sigma(toy(), settings, toy_images(1), LABELS)
    assert measured == pytest.approx(result.metrics["sigma"].item())


def test_images_without_labels_are_refused():
    with pytest.raises(UsageError, match="the training images have none"):
        toy(classes=None)
    with pytest.raises(UsageError, match="learns from labels and was given none"):
        GeSSL(toy(), GesslConfig())(toy_images(1))
    with pytest.raises(UsageError, match="was given 4 for 5 samples"):
        GeSSL(toy(), GesslConfig())(toy_images(1), labels=LABELS[:4])
