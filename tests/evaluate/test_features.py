import pytest
import torch
from torch import nn

from fastgessl.config import UsageError
from fastgessl.evaluate import Features, extract_features, extract_views
from fastgessl.evaluate.features import Pixels, with_progress


def pictures(count: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def encoder() -> nn.Sequential:
    """With batch norm and dropout, which behave differently in training mode."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    net[1].running_mean += torch.randn(4)
    return net


def test_features_are_those_of_evaluation_mode_whatever_mode_the_encoder_is_in(loader):
    images, labels = pictures(), torch.arange(20) % 3
    expected = encoder().eval()(images).detach()

    features = extract_features(encoder().train(), loader([images], labels), "cpu")

    torch.testing.assert_close(features.features, expected)
    assert features.labels.equal(labels)
    assert features.features.dtype == torch.float32 and not features.features.requires_grad


def test_extraction_changes_no_weight_buffer_gradient_or_mode(loader):
    net = encoder().train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    extract_features(net, loader([pictures()], None), "cpu")

    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [module.training for module in net] == [True, False, True, True, True, True]


def test_training_mode_returns_after_an_error_too():
    net = encoder().train()

    with pytest.raises(ValueError, match="yields no batch"):
        extract_features(net, [], "cpu")

    assert all(module.training for module in net.modules())


def test_rows_come_in_index_order_with_their_labels(loader):
    images, order = pictures(), torch.randperm(20, generator=torch.Generator().manual_seed(1))

    shuffled = extract_features(encoder(), loader([images], torch.arange(20) * 7, order=order), "cpu")

    assert shuffled.index.tolist() == list(range(20))
    assert shuffled.labels.tolist() == [7 * i for i in range(20)]
    torch.testing.assert_close(shuffled.features, encoder().eval()(images).detach())


def test_views_are_extracted_side_by_side(loader):
    first, second = pictures(), pictures(seed=1)

    views = extract_views(encoder(), loader([first, second], None), "cpu")

    for view, images in zip(views, (first, second), strict=True):
        torch.testing.assert_close(view.features, encoder().eval()(images).detach())


def test_raw_pixels_are_the_flattened_images(loader):
    images = pictures()

    assert extract_features(
        Pixels(), loader([images.to(memory_format=torch.channels_last)], None), "cpu"
    ).features.equal(images.reshape(20, -1))


def test_raw_pixels_of_large_views_are_block_means(loader):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blocks = images.reshape(4, 3, 32, 2, 32, 2).mean(dim=(3, 5))

    torch.testing.assert_close(
        extract_features(Pixels(), loader([images], None), "cpu").features, blocks.flatten(1)
    )


@pytest.mark.parametrize(
    ("net", "views", "order", "message"),
    [
        (nn.Flatten(), 2, None, "yields 2 views an image"),
        (
            nn.Conv2d(3, 4, 3),
            1,
            None,
            r"maps views \(8, 3, 8, 8\) to \(8, 4, 6, 6\); evaluation needs \(B, F\)",
        ),
        (
            nn.Flatten(),
            1,
            torch.tensor([0, 1, 5, 2, 5]),
            r"yields 1 images more than once \(first: image 5\)",
        ),
    ],
)
def test_what_is_no_evaluation_loader_or_encoder_is_refused(loader, net, views, order, message):
    with pytest.raises(ValueError, match=message):
        extract_features(net, loader([pictures()] * views, None, order=order), "cpu")


def test_features_that_are_not_finite_name_their_owner_and_first_image():
    features = Features(
        torch.tensor([[1.0, 2.0], [float("inf"), 0.0], [0.0, float("nan")]]), None, torch.tensor([4, 7, 9])
    )

    with pytest.raises(
        UsageError, match=r"Row 'x': the features of 2 of 3 images are NaN or infinite \(first: image 7\)"
    ):
        features.require_finite("Row 'x'")


def test_a_log_file_gets_no_progress_bar_and_the_items_unchanged(loader, capfd):
    batches = loader([pictures()], None)

    assert list(with_progress(batches, "features", progress=True)) == batches
    assert list(with_progress(iter(batches), "features", progress=True)) == batches
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_progress_bar_and_the_items_unchanged(loader, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    batches = loader([pictures()], None)

    assert list(with_progress(batches, "features", progress=True)) == batches
    assert "features" in capfd.readouterr().err
