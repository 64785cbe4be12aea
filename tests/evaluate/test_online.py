import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgessl.evaluate import OnlineProbe


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


def pretrain(
    steps: int, probe: OnlineProbe | None
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """A few steps on a loss without labels -> weights and buffers, last gradients, random state."""
    net = encoder()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for _ in range(steps):
        features = net(torch.randn(12, 6))
        optimizer.zero_grad()
        features.square().mean().backward()
        if probe is not None:
            probe.update(features, torch.arange(12) % 3)
        optimizer.step()
    return net.state_dict(), [parameter.grad for parameter in net.parameters()], torch.get_rng_state()


def test_the_online_probe_changes_no_bit_of_the_encoder_its_gradients_or_the_random_stream():
    torch.manual_seed(1)
    weights, gradients, stream = pretrain(6, None)

    probe = OnlineProbe(5, 3)
    probed_weights, probed_gradients, probed_stream = pretrain(6, probe)

    assert all(value.equal(probed_weights[name]) for name, value in weights.items())
    assert all(one.equal(other) for one, other in zip(gradients, probed_gradients, strict=True))
    assert stream.equal(probed_stream)
    assert probe.weight.abs().sum() > 0


def test_the_constructor_draws_no_random_number():
    state = torch.get_rng_state()

    OnlineProbe(5, 3)

    assert torch.get_rng_state().equal(state)


def test_nothing_flows_back_through_the_logits():
    features = torch.randn(4, 5, requires_grad=True)
    probe = OnlineProbe(5, 3)

    probe(features).sum().backward()

    assert features.grad is None and probe.weight.grad is not None


def test_update_equals_adam_on_a_linear_layer_over_standardised_features():
    batches = torch.randn(4, 16, 5, generator=torch.Generator().manual_seed(0)) * 3 + 10
    labels = torch.arange(16) % 3
    probe, layer = OnlineProbe(5, 3, lr=0.05), nn.Linear(5, 3)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    mean, variance = batches[0].mean(0), batches[0].var(0, correction=0)
    for number, batch in enumerate(batches):
        if number:
            mean = 0.9 * mean + 0.1 * batch.mean(0)
            variance = 0.9 * variance + 0.1 * batch.var(0, correction=0)
        loss = F.cross_entropy(layer((batch - mean) / (variance + 1e-6).sqrt()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        assert probe.update(batch, labels)["loss"].item() == pytest.approx(loss.item(), rel=1e-5)

    torch.testing.assert_close(probe.weight, layer.weight, rtol=1e-4, atol=1e-5)


def test_rows_that_are_not_chosen_leave_no_trace():
    batches = torch.randn(4, 16, 5, generator=torch.Generator().manual_seed(0)) * 3 + 10
    labels, chosen = torch.arange(16) % 3, torch.arange(16) % 4 > 0
    spoiled = torch.where(chosen[:, None], batches, 1e3)
    probe, alone, idle = OnlineProbe(5, 3), OnlineProbe(5, 3), OnlineProbe(5, 3)

    idle.update(spoiled[0], labels, torch.zeros(16, dtype=torch.bool))
    assert idle.updates == 0 and (idle.weight == 0).all() and (idle.mean == 0).all()

    for batch, whole in zip(spoiled, batches, strict=True):
        found, expected = probe.update(batch, labels, chosen), alone.update(whole[chosen], labels[chosen])
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
        assert found["accuracy"].item() == pytest.approx(expected["accuracy"].item())
    torch.testing.assert_close(probe.mean, alone.mean)
    torch.testing.assert_close(probe.variance, alone.variance)


def test_the_online_probe_learns_what_is_linearly_there(cluster_features):
    train, test = cluster_features(120, 10, 4, seed=0), cluster_features(200, 10, 4, seed=1)
    probe = OnlineProbe(10, 4)
    before = probe.accuracy(test)
    seen = [probe.update(train.features, train.labels)["accuracy"].item() for _ in range(60)]

    assert before == pytest.approx(0.25) == seen[0]
    assert probe.accuracy(test) > 0.8 and seen[-1] > 0.8


def test_a_restored_probe_continues_to_the_last_digit():
    batches, labels = torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    whole, first, second = OnlineProbe(5, 3), OnlineProbe(5, 3), OnlineProbe(5, 3)
    for batch in batches:
        whole.update(batch, labels)
    for batch in batches[:3]:
        first.update(batch, labels)
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second.update(batch, labels)

    assert second.weight.equal(whole.weight) and second.mean.equal(whole.mean)


def test_updates_are_float32_under_autocast_and_no_grad():
    batch, labels = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    plain, wrapped = OnlineProbe(5, 3), OnlineProbe(5, 3)
    plain.update(batch, labels)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wrapped.update(batch, labels)

    assert wrapped.weight.equal(plain.weight) and wrapped.weight.abs().sum() > 0
