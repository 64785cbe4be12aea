"""Few-shot episodes: N classes, K labelled images of each, and the question which class a few further images
belong to.

Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017: a class is the mean of its labelled
features, and an image goes to the nearest mean. Features are on the unit sphere, as in Wang et al.,
"SimpleShot", arXiv 1911.04623 (L2N). Nothing is trained.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgessl.config import EvaluateConfig, UsageError
from fastgessl.evaluate.features import Features, RowFeatures
from fastgessl.evaluate.sources import DataFacts
from fastgessl.evaluate.tables import accuracies
from fastgessl.evaluate.tasks.base import EvaluationTask, register


def few_shot(
    pool: Features, *, ways: int, shots: int, queries: int = 15, episodes: int = 600, seed: int = 0
) -> dict[str, Any]:
    """`episodes` episodes of `ways` classes with `shots` labelled and `queries` unlabelled images of each,
    drawn from one pool: the mean accuracy, and as its interval half the width of the 95 % one (1.96 standard
    deviations of the episodes over √episodes), with how many classes had enough images to be drawn.

    The draws depend on labels and `seed` alone, so that encoders are compared on the same episodes. Raises
    UsageError where fewer than `ways` classes have shots + queries images, without labels, and for NaN
    features.

    >>> pool = Features(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8), torch.arange(32))
    >>> few_shot(pool, ways=3, shots=1, queries=2, episodes=5)["accuracy"]
    1.0
    """
    obstacle = too_few_for_episodes(pool.labels, ways, shots + queries)
    if obstacle or pool.labels is None:
        raise UsageError(f"Task few_shot: {obstacle}")
    pool.require_finite("few-shot images")
    members = _members(pool.labels, shots + queries)
    points = F.normalize(pool.features.double(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.stack(
        [_episode(points, _draw(members, ways, shots + queries, generator), shots) for _ in range(episodes)]
    )
    return {
        "accuracy": scores.mean().item(),
        "interval": 1.96 * scores.std().item() / episodes**0.5,
        "ways": ways,
        "shots": shots,
        "queries": queries,
        "episodes": episodes,
        "classes": len(members),
    }


def too_few_for_episodes(labels: Tensor | None, ways: int, images: int) -> str:
    """Why `ways` classes of `images` images each cannot be drawn; empty if they can."""
    if labels is None:
        return "the images have no labels. Add labels, or leave few_shot out."
    able = len(_members(labels, images))
    if able >= ways:
        return ""
    return (
        f"an episode takes {ways} classes of {images} images (shots and queries), but only {able} classes "
        "have as many. "
        "Choose smaller --evaluate.ways, --evaluate.shots or --evaluate.queries."
    )


def _members(labels: Tensor, images: int) -> list[Tensor]:
    """Row numbers of each class that has `images` images, in the order of the labels."""
    return [
        rows for label in labels.unique() if len(rows := (labels == label).nonzero().squeeze(1)) >= images
    ]


def _draw(members: list[Tensor], ways: int, images: int, generator: torch.Generator) -> Tensor:
    """Row numbers (ways, images) of random classes and random images of each."""
    chosen = torch.randperm(len(members), generator=generator)[:ways].tolist()
    return torch.stack(
        [members[one][torch.randperm(len(members[one]), generator=generator)[:images]] for one in chosen]
    )


def _episode(points: Tensor, rows: Tensor, shots: int) -> Tensor:
    """Share of query images nearest to the mean of their own class: points (N, F), rows (ways, shots +
    queries) -> ().
    """
    means = points[rows[:, :shots]].mean(dim=1)
    distances = torch.cdist(points[rows[:, shots:]].flatten(0, 1), means)
    own = torch.arange(len(rows)).repeat_interleave(rows.shape[1] - shots)
    return (distances.argmin(dim=1) == own).double().mean()


def _measure(features: RowFeatures, settings: EvaluateConfig, seed: int) -> dict[str, Any]:
    drawn = {"ways": settings.ways, "queries": settings.queries, "episodes": settings.episodes, "seed": seed}
    return {"episodes": [few_shot(features.episodes, shots=shots, **drawn) for shots in settings.shots]}


def _obstacle(facts: DataFacts, settings: EvaluateConfig) -> str:
    pool = facts.test if facts.pool is None else facts.pool
    return too_few_for_episodes(pool, settings.ways, max(settings.shots) + settings.queries)


register(
    EvaluationTask(
        "few_shot",
        _measure,
        columns=lambda settings: accuracies(
            [f"{settings.ways}-way\n{shots}-shot" for shots in settings.shots], "episodes"
        ),
        place=(2, 0),
        transfer=True,
        obstacle=_obstacle,
    )
)
