"""The command line: which command, and what is said and returned where it fails.

Each command is a file of `fastgessl/commands/`, which parses its own words. Exit codes: 0 done; 2 a mistake
that the message tells how to mend; 130 / 138 / 143 stopped by Ctrl-C / SIGUSR1 / SIGTERM with a checkpoint
written. Nothing heavy is imported before it is known that there is work to do.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "train": "train a recipe, evaluate it and write the run's folder",
    "evaluate": "measure what a run, a timm model or a file of weights has learned",
    "embed": "write the features of a folder of images as .npz",
    "report": "write one HTML page on a run, or on several with a comparison",
    "export": "write a run's encoder for timm, torchvision or the hub",
    "recipes": "list the recipes, or show one with the source of each number",
    "doctor": "what this machine has, and which engine and kernels will be used",
    "prepare": "make a folder of pictures into tar shards or an .npz, or fetch a data set by name",
    "views": "write a picture of a recipe's images and their views, by one engine or by two side by side",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake never ends in a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fastgessl",
        description="Train and measure universal self-supervised representations.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument(
        "command",
        metavar="COMMAND",
        choices=COMMANDS,
        help="one of the commands below; COMMAND --help explains it",
    )
    command = parser.parse_args(words[:1]).command
    try:
        run = importlib.import_module(f"fastgessl.commands.{command}").main
    except ModuleNotFoundError as error:
        if (error.name or "fastgessl").startswith("fastgessl"):
            raise
        _fail(command, f"the package {error.name} is missing. Run pip install 'fastgessl[train]'.")
    try:
        if (code := run(words[1:])) is not None:
            sys.exit(code)
    except ValueError as error:
        if not getattr(error, "mendable", False):
            raise
        _fail(command, str(error))
    except KeyboardInterrupt:
        print(
            f"fastgessl {command}: interrupted. A run whose training had ended is measured by `fastgessl "
            "evaluate RUN`.",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _fail(command: str, message: str) -> NoReturn:
    """One line on standard error from the first process of a machine, and exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # A file's or folder's name may hold words that a terminal would obey.
        shown = "".join(
            character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in message
        )
        print(f"fastgessl {command}: {shown}", file=sys.stderr)
    sys.exit(2)
