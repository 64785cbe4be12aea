"""Keep the tables that docs/evaluation.md shows, as the commands it names print them.

    python -m bench.studies.evaluation_tables [--few-shot FILE.npz]

One seed each: they show what is printed, and studies over seeds say what a method is worth.
"""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import results

RECIPE = "digits-simclr-gessl"
SHORT = ("--train.epochs", "12", "--evaluate.every_epochs", "3", "--train.keep_checkpoints", "20")
EVERYTHING = ("--tasks", "all", "--evaluate.learning_checkpoints", "4", "--evaluate.learning_tasks", "2")


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument(
        "--few-shot",
        type=Path,
        help="an .npz of further images, such as Omniglot's characters, for five-way episodes",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/evaluation-tables"), help="folder of the runs"
    )
    arguments = parser.parse_args(argv)
    # The whole recipe first, as `make train` has it; the rest is about a short run, whose checkpoints are all
    # kept.
    whole, short = arguments.work / "whole", arguments.work / "short"
    commands = {
        "whole": ("train", RECIPE, "--train.run_dir", str(whole)),
        "short": ("train", RECIPE, "--train.run_dir", str(short), *SHORT),
        "everything": ("evaluate", str(short), *EVERYTHING),
    }
    measured: dict[str, object] = {"recipe": RECIPE, "seed": 0}
    if arguments.few_shot:
        commands["few shot"] = (
            "evaluate",
            str(short),
            "--tasks",
            "few_shot",
            "--transfer",
            str(arguments.few_shot.resolve()),
        )
        measured["few_shot"] = {
            "file": arguments.few_shot.name,
            "sha256": hashlib.sha256(arguments.few_shot.read_bytes()).hexdigest(),
        }
    output = {name: _tables(name, words) for name, words in commands.items()}
    print(results.write("evaluation-tables", measured | {"output": output}, arguments.out))


def _tables(name: str, words: Sequence[str]) -> str:
    """What the command prints from its first table on, without the run's folder."""
    print(f"== {name}: fastgessl {' '.join(words)}", file=sys.stderr, flush=True)
    said = subprocess.run(
        [sys.executable, "-m", "fastgessl", *words], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    tables = said[said.index("Frozen features") : said.rindex("run folder: ")]
    return "\n".join(line.rstrip() for line in tables.splitlines())


if __name__ == "__main__":
    main()
