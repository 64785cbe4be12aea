"""`fastgessl prepare`: what its words mean, its progress bar and its report. The work is done in
`pipelines/prepare.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.progress import track

from fastgessl.config import UsageError
from fastgessl.pipelines import NAMES
from fastgessl.pipelines.prepare import prepare_folder
from fastgessl.pipelines.sources.fetch import FETCHABLE, fetch
from fastgessl.recipes import Parser


def main(words: list[str]) -> None:
    """Run the command. UsageError or DataError for what cannot be done."""
    options = _parser().parse_args(words)
    if options.source in FETCHABLE:
        fetch(options.source, options.out)
        print(
            f"{options.source} lies under {options.out}. Train on it with --data.name {options.source} "
            f"--data.root {options.out}"
        )
        return
    if options.source in NAMES and not Path(options.source).exists():
        raise UsageError(
            f"{options.source} is not handed out freely. `fastgessl prepare` fetches {', '.join(FETCHABLE)}."
        )
    if options.per_shard < 1 or options.size < 0:
        raise UsageError(
            f"--per_shard must be at least 1 and --size 0 or more, found {options.per_shard} and "
            f"{options.size}."
        )
    report = prepare_folder(
        Path(options.source), options.out, size=options.size, per_shard=options.per_shard, track=_with_bar
    )
    for reason in report.left_out.values():
        print(f"left out: {reason}")
    kind = "npz" if options.out.suffix == ".npz" else "shards"
    print(
        f"{report.written} images written, {len(report.converted)} of them converted, "
        f"{len(report.left_out)} left out. "
        f"Train on them with --data.name {kind} --data.root {options.out}"
    )


def _parser() -> Parser:
    parser = Parser(
        program="prepare",
        description="Make a folder of pictures into tar shards or an .npz, or fetch a data set by name.",
    )
    parser.add_argument(
        "source",
        metavar="FOLDER|NAME",
        help=f"a folder of pictures, or one of {', '.join(FETCHABLE)} to fetch",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="an .npz, or a folder for tar shards; for a name, the folder to fetch into",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=0,
        help=".npz: side to which pictures are resized and cropped, pixels; 0 keeps theirs",
    )
    parser.add_argument("--per_shard", type=int, default=1000, help="shards: images in each")
    return parser


def _with_bar(work: Iterable[int], description: str) -> Iterable[int]:
    return track(work, description)
