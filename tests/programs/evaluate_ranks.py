"""What each of several ranks runs: gather shards, evaluate, update the online probe, and write down what this
rank saw.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastgessl.config import EvaluateConfig, UsageError
from fastgessl.evaluate import EvaluationData, OnlineProbe, evaluate, extract_features, extract_views, monitor
from fastgessl.evaluate.features import RowFeatures

IMAGES, CLASSES, WORLD_SIZE = 45, 3, 3


def images() -> tuple[Tensor, Tensor]:
    """Images (45, 3, 4, 4) whose brightness depends on their class, and labels."""
    labels = torch.arange(IMAGES) % 7 % CLASSES
    return labels.view(-1, 1, 1, 1) + torch.randn(
        IMAGES, 3, 4, 4, generator=torch.Generator().manual_seed(0)
    ), labels


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU())


def shard(rows: Tensor, labelled: bool = True, views: int = 1) -> list[SimpleNamespace]:
    pixels, labels = images()
    noise = torch.randn(views, *pixels.shape, generator=torch.Generator().manual_seed(1)) * 0.1 * (views > 1)
    batch_rows = [part for part in rows.split(7) if len(part)]
    return [
        SimpleNamespace(
            views=[pixels[part] + noise[view][part] for view in range(views)],
            index=part,
            label=labels[part] if labelled else None,
        )
        for part in batch_rows
    ]


def everything(mine: Tensor, first_rank_only: Tensor) -> dict:
    """`mine`: rows of this rank's shard; `first_rank_only`: a shard that is empty on the other ranks."""
    net = encoder()
    settings = EvaluateConfig(knn_k=3, labels_per_class=4)
    data = EvaluationData(shard(mine), None, shard(mine, views=2))
    plain, unlabelled = (
        extract_features(net, shard(mine), "cpu"),
        extract_features(net, shard(first_rank_only, labelled=False), "cpu"),
    )
    pair = extract_views(net, shard(mine, views=2), "cpu")
    probe = OnlineProbe(48, CLASSES)
    return {
        "features": plain.features,
        "labels": plain.labels,
        "index": plain.index,
        "unlabelled": unlabelled.features,
        "unlabelled_labels": unlabelled.labels,
        "second_view": pair[1].features,
        "probe_losses": torch.stack(
            [probe.update(images()[0][mine].flatten(1), images()[1][mine])["loss"] for _ in range(5)]
        ),
        "probe": state_of(probe),
        "probe_of_few": state_of(probe_of_few(mine)),
        "report": evaluate({"raw pixels": "pixels", "this run": net}, data, settings, seed=3).to_json(),
        "monitor": monitor(RowFeatures(plain, plain), settings, probe_of(net, mine)),
        "error": error_of_nan(mine),
    }


def probe_of(net: nn.Module, mine: Tensor) -> OnlineProbe:
    probe = OnlineProbe(6, CLASSES)
    for _ in range(20):
        probe.update(net(images()[0][mine]), images()[1][mine])
    return probe


def probe_of_few(mine: Tensor) -> OnlineProbe:
    """Learns from ten images, all of them the first rank's."""
    probe, few = OnlineProbe(48, CLASSES), torch.arange(0, 30, 3)
    for _ in range(5):
        probe.update(images()[0][mine].flatten(1), images()[1][mine], torch.isin(mine, few))
    return probe


def state_of(probe: OnlineProbe) -> dict[str, Tensor]:
    return {name: value for name, value in probe.state_dict().items() if name != "_extra_state"}


def error_of_nan(mine: Tensor) -> str:
    broken = encoder()
    nn.init.constant_(broken[1].bias, float("nan"))
    try:
        evaluate({"this run": broken}, EvaluationData(shard(mine)), EvaluateConfig())
    except UsageError as error:
        return str(error)
    return ""


def report(rank: int, folder: Path) -> dict:
    # Shards interleave, as a sampler's do, and are of the same length so that rank means are the means of all
    # rows.
    return everything(torch.arange(rank, IMAGES, WORLD_SIZE), torch.arange(10 if rank == 0 else 0))
