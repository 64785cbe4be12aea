import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from fastgessl.config import UsageError
from fastgessl.evaluate import Features, SgdProtocol, fit_gradient_probe, gradient_probe
from fastgessl.evaluate.sources import hold_out
from fastgessl.evaluate.tasks import gradient_probes


def as_torch_trains_it(train: Features, rate: float, epochs: int, seed: int, hidden: int) -> nn.Module:
    """One learning rate with torch's own layers, autograd, SGD and cosine, on the batches of the same
    generator.
    """
    inputs = torch.from_numpy(StandardScaler().fit_transform(train.features.double().numpy())).float()
    generator, count, width, classes = (
        torch.Generator().manual_seed(seed),
        len(train),
        inputs.shape[1],
        len(train.labels.unique()),
    )
    net = (
        nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        if hidden
        else nn.Linear(width, classes)
    )
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    if hidden:
        net[0].weight.data.copy_((torch.randn(width, hidden, generator=generator) * (2 / width) ** 0.5).T)
        net[2].weight.data.copy_((torch.randn(hidden, classes, generator=generator) * 0.01).T)
    weights = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in net.parameters() if parameter.ndim == 1]
    groups = [
        {"params": weights, "weight_decay": gradient_probes.WEIGHT_DECAY},
        {"params": biases, "weight_decay": 0},
    ]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    size = gradient_probes.batch_size(count)
    batches = max(1, count // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator)[: batches * size].split(size):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs[rows]), train.labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@pytest.mark.parametrize("hidden", [0, 12])
def test_the_probe_is_the_one_that_torchs_layers_autograd_and_sgd_train(cluster_features, hidden):
    train, test = (
        cluster_features(600, 10, 4, seed=0, spread=2.0),
        cluster_features(50, 10, 4, seed=1, spread=2.0),
    )
    net = as_torch_trains_it(train, 0.05, epochs=4, seed=3, hidden=hidden)
    scaler = StandardScaler().fit(train.features.double().numpy())
    expected = (
        net(torch.from_numpy(scaler.transform(test.features.double().numpy())).float())
        .double()
        .log_softmax(dim=1)
    )

    probe = fit_gradient_probe(train, SgdProtocol(hidden, epochs=4, seed=3, rates=(0.05,)))

    torch.testing.assert_close(
        probe.log_probabilities(test.features), expected.detach(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("hidden", [0, 12])
def test_rates_side_by_side_are_the_rates_one_by_one(cluster_features, hidden):
    train = cluster_features(300, 8, 3, seed=0, spread=2.0)
    rates, protocol = (0.3, 0.05, 0.001), SgdProtocol(hidden, epochs=5)
    fitted, held = hold_out(train.labels, 0.2, torch.Generator().manual_seed(0))
    inputs = (train.features - train.features.mean(dim=0)) / train.features.std(dim=0, correction=0)

    together = gradient_probes.descend(inputs[fitted], train.labels[fitted], rates, protocol)

    for number, rate in enumerate(rates):
        alone = gradient_probes.descend(inputs[fitted], train.labels[fitted], (rate,), protocol)
        for (weight, bias), (own_weight, own_bias) in zip(together, alone, strict=True):
            torch.testing.assert_close(weight[number], own_weight[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bias[number], own_bias[0], rtol=1e-4, atol=1e-5)
    assert len(held) == 60


def test_the_rate_of_the_best_validation_accuracy_is_chosen_and_trained_again_on_all_images(cluster_features):
    train, test = (
        cluster_features(400, 10, 4, seed=0, spread=4.0),
        cluster_features(300, 10, 4, seed=1, spread=4.0),
    )

    result = gradient_probe(train, test, SgdProtocol(epochs=3))

    best = max(result["validation"].values())
    assert result["learning_rate"] == min(
        rate for rate, accuracy in result["validation"].items() if accuracy == best
    )
    assert len(set(result["validation"].values())) > 1
    alone = fit_gradient_probe(train, SgdProtocol(epochs=3, rates=(result["learning_rate"],)))
    assert result["accuracy"] == alone.accuracy(test)


@pytest.mark.parametrize("hidden", [0, 8])
def test_no_test_label_reaches_the_choice_of_a_learning_rate(cluster_features, hidden):
    train, test = (
        cluster_features(300, 10, 4, seed=0, spread=2.0),
        cluster_features(200, 10, 4, seed=1, spread=2.0),
    )
    shuffled = Features(
        test.features,
        test.labels[torch.randperm(200, generator=torch.Generator().manual_seed(2))],
        test.index,
    )

    honest, blind = (gradient_probe(train, part, SgdProtocol(hidden, epochs=5)) for part in (test, shuffled))

    assert (blind["learning_rate"], blind["validation"]) == (honest["learning_rate"], honest["validation"])
    assert blind["accuracy"] < honest["accuracy"] - 0.2


def test_classes_too_small_to_validate_on_take_the_documented_rate():
    few = Features(
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 0, 1, 1, 2, 2]),
        torch.arange(6),
    )

    probe = fit_gradient_probe(few, SgdProtocol(epochs=2))

    assert probe.chosen == {"learning_rate": gradient_probes.DEFAULT_LEARNING_RATE, "validation": {}}


def test_what_allows_no_classifier_is_refused(cluster_features):
    good = cluster_features(40, 4, 2, seed=0)
    one_class = Features(good.features, torch.zeros(40, dtype=torch.int64), good.index)
    broken = Features(good.features * float("nan"), good.labels, good.index)

    for train, test, message in [
        (one_class, good, "of class 0"),
        (broken, good, "training images: .* NaN"),
        (good, broken, "test images: "),
    ]:
        with pytest.raises(UsageError, match=message):
            gradient_probe(train, test, SgdProtocol(epochs=1))
