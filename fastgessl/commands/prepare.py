"""`fastgessl prepare`: a data set fetched by name, or a folder of photos made into tar shards or one .npz."""

from pathlib import Path

from rich.progress import track

from fastgessl.config import UsageError
from fastgessl.pipelines import NAMES
from fastgessl.pipelines.prepare import prepare_folder
from fastgessl.pipelines.sources.named import FETCHABLE, fetch
from fastgessl.recipes import Parser


def main(words: list[str]) -> None:
    """Run the command. UsageError or DataError for what cannot be done."""
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
    options = parser.parse_args(words)
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
    folder, out = Path(options.source), options.out
    prepared = prepare_folder(folder, out, size=options.size, per_shard=options.per_shard, track=track)
    for reason in prepared.left_out.values():
        print(f"left out: {reason}")
    kind = "npz" if out.suffix == ".npz" else "shards"
    print(
        f"{prepared.written} images written, {len(prepared.converted)} of them converted, "
        f"{len(prepared.left_out)} left out. Train on them with --data.name {kind} --data.root {out}"
    )
