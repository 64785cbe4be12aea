"""`fastgessl views`: a picture of a recipe's images and their views, by one engine, or the same draw by two,
one below the other.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastgessl import pipelines
from fastgessl.build import view_specs
from fastgessl.config import Config, UsageError
from fastgessl.pipelines.sources.images import Images
from fastgessl.recipes import Parser, load, override

_GAP, _LABEL = 4, 14
_BACKGROUND, _INK = (255, 255, 255), (60, 60, 60)


def main(words: list[str]) -> None:
    """Run the command. UsageError or DataError for what cannot be done."""
    parser = Parser(program="views", description=__doc__, epilog="Further options as of `fastgessl train`.")
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a composed name such as digits-simclr-gessl, or a YAML file"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("views.png"), help="file to write (default: views.png)"
    )
    parser.add_argument("--images", type=int, default=8, help="images to show, one per row (default: 8)")
    parser.add_argument(
        "--against",
        default="",
        metavar="ENGINE",
        help="second engine, which shows the same draw below the first one",
    )
    given, options = parser.parse_known_args(words)
    config = override(load(given.recipe).config, options, f"views {given.recipe}")
    print(write_view_grid(config, given.out, count=given.images, against=given.against))


def write_view_grid(config: Config, out: Path, *, count: int, against: str = "") -> str:
    """Draw `count` training images of `config`, one a row: the image itself, its global views, its local
    views.

    With `against`, the name of a second engine, each row is followed by the same draw as that engine makes
    it. Returns what was written, and how far two engines are apart. UsageError or DataError for whatever does
    not fit.
    """
    if out.suffix.lower() != ".png":
        raise UsageError(
            f"views are written as .png, found --out {str(out)!r}. Give a file name that ends in .png."
        )
    if not out.parent.is_dir():
        raise UsageError(
            f"the folder {str(out.parent)!r} of --out does not exist. Make it, or write elsewhere."
        )
    if count < 1:
        raise UsageError(f"--images must be at least 1, found {count}.")
    images = pipelines.open_images(config.data.name, config.data.root)
    assert images is not None  # only a test split can be absent
    made = [
        _views(config, images, engine, min(count, len(images)))
        for engine in (config.data.engine, against)
        if engine
    ]
    engines, shown = tuple(name for name, _ in made), [views for _, views in made]
    _draw(shown, engines).save(out)
    written = f"{out}: {len(shown[0]) - 1} views per image by {' and '.join(engines)}"
    if not against:
        return written
    gap = torch.cat([(first - second).abs().flatten() for first, second in zip(*shown, strict=True)])
    return f"{written}\nthey differ by {gap.mean():.2f} of 255 on average, {gap.max():.1f} at most"


def _views(config: Config, images: Images, engine: str, count: int) -> tuple[str, list[Tensor]]:
    """The engine that made them, and (count, 3, S, S) pixel values from 0 to 255: the image itself, then each
    view as training has it in its first epoch."""
    views = config.views
    whole = pipelines.evaluation_view(views.size, mean=views.mean, std=views.std)
    loader = pipelines.build(
        images,
        [*view_specs(config), whole],
        batch_size=count,
        engine=engine,
        seed=config.train.seed,
        workers=config.data.workers,
    )
    batch = next(iter(loader))
    loader.close()
    mean, std = (torch.tensor(values)[:, None, None] for values in (views.mean, views.std))
    return loader.engine_name, [
        ((view * std + mean) * 255).clamp(0, 255) for view in (batch.views[-1], *batch.views[:-1])
    ]


def _draw(shown: list[list[Tensor]], engines: tuple[str, ...]) -> Image.Image:
    """Rows of images, each by every engine; columns of views, as wide as they are."""
    sizes = [view.shape[-1] for view in shown[0]]
    names = ["image", *(f"view {number}" for number in range(1, len(sizes)))]
    left = [_GAP + sum(sizes[:column]) + _GAP * column for column in range(len(sizes))]
    count, height = len(shown[0][0]), max(sizes) + _GAP + (_LABEL if len(engines) > 1 else 0)
    grid = Image.new(
        "RGB", (left[-1] + sizes[-1] + _GAP, _LABEL + _GAP + count * len(engines) * height), _BACKGROUND
    )
    pen = ImageDraw.Draw(grid)
    for column, name in enumerate(names):
        pen.text((left[column], 1), name, fill=_INK)
    for row in range(count * len(engines)):
        image, engine = divmod(row, len(engines))
        top = _LABEL + _GAP + row * height
        if len(engines) > 1:
            pen.text((_GAP, top), engines[engine], fill=_INK)
            top += _LABEL
        for column, view in enumerate(shown[engine]):
            pixels = view[image].permute(1, 2, 0).round().to(torch.uint8).contiguous().numpy()
            grid.paste(Image.fromarray(pixels), (left[column], top))
    return grid
