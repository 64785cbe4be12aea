"""The command line: parse, build, run, close. Nothing else.

Exit codes: 0 done; 2 a mistake that the message tells how to mend; 130 / 138 / 143 stopped by Ctrl-C /
SIGUSR1 / SIGTERM with a checkpoint written; 75 another process of the job has died. Nothing heavy is imported
before it is known that there is work to do.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastgessl.config import Config, UsageError

if TYPE_CHECKING:
    from fastgessl.recipes import Recipe

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
    """Run one command; never returns a traceback for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
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
    command = parser.parse_args(arguments[:1]).command
    run = {
        "train": _train,
        "evaluate": _evaluate,
        "embed": _embed,
        "report": _report,
        "export": _export,
        "recipes": _recipes,
        "doctor": _doctor,
        "prepare": _prepare,
        "views": _views,
    }[command]
    try:
        run(arguments[1:])
    except ValueError as error:
        if not isinstance(error, _mistakes()):
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


def _mistakes() -> tuple[type[ValueError], ...]:
    """What a user can mend: UsageError, and DataError if the pipelines were imported at all."""
    pipelines = sys.modules.get("fastgessl.pipelines")
    return (UsageError, pipelines.DataError) if pipelines else (UsageError,)


def _train(arguments: list[str]) -> None:
    recipe, options = _positional(
        arguments, "train", "RECIPE", "a composed name such as digits-simclr-gessl, or a YAML file"
    )
    print_config = "--print_config" in options
    config = _override(
        _load(recipe).config,
        [word for word in options if word != "--print_config"],
        f"fastgessl train {recipe}",
    )
    if print_config:
        print(to_yaml(config), end="")
        return
    from fastgessl.training.loop import train

    sys.exit(train(config))


def _evaluate(arguments: list[str]) -> None:
    target, options = _positional(
        arguments, "evaluate", "TARGET", "the folder of a run, timm:NAME, or a .safetensors file"
    )
    from fastgessl.evaluate.subject import base_config, open_subject

    options = [
        {"--tasks": "--evaluate.tasks", "--transfer": "--evaluate.transfer"}.get(word, word)
        for word in options
    ]
    config = _override(base_config(target), options, f"fastgessl evaluate {target}")
    from fastgessl.evaluate.run import evaluate_subject

    evaluate_subject(open_subject(target, config))


def _embed(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fastgessl embed", description=COMMANDS["embed"], epilog="Further options as of `evaluate`."
    )
    parser.add_argument("target", help="the folder of a run, timm:NAME, or a .safetensors file")
    parser.add_argument("path", type=Path, help="folder of images, or an .npz")
    parser.add_argument(
        "--out", type=Path, default=Path("embeddings.npz"), help="file to write (default: embeddings.npz)"
    )
    given, options = parser.parse_known_args(arguments)
    from fastgessl.evaluate.subject import base_config, open_subject

    config = _override(base_config(given.target), options, f"fastgessl embed {given.target}")
    from fastgessl.commands.embed import embed

    count = embed(open_subject(given.target, config), given.path, given.out)
    print(f"{count} images: {given.out}")


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="fastgessl report", description=COMMANDS["report"])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several are compared"
    )
    parser.add_argument(
        "--out", type=Path, help="file to write (default: report.html in the folder of the first run)"
    )
    given = parser.parse_args(arguments)
    from fastgessl.report import write_report

    print(write_report(given.runs, given.out))


def _export(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="fastgessl export", description=COMMANDS["export"])
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument(
        "--to", required=True, metavar="KIND", help="safetensors, torchvision, timm or hub-folder"
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: export-KIND in the run's folder)")
    given = parser.parse_args(arguments)
    from fastgessl.commands.export import export_run

    print(export_run(given.run, given.to, given.out))


def _recipes(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="fastgessl recipes", description=COMMANDS["recipes"])
    parser.add_argument(
        "name", nargs="?", help="recipe to show in full, for example digits-simclr-gessl-fast"
    )
    name = parser.parse_args(arguments).name
    if name is None:
        _print_matrix()
    else:
        _print_recipe(_load(name))


def _doctor(arguments: list[str]) -> None:
    argparse.ArgumentParser(prog="fastgessl doctor", description=COMMANDS["doctor"]).parse_args(arguments)
    from fastgessl.commands.doctor import print_findings

    print_findings()


def _prepare(arguments: list[str]) -> None:
    from fastgessl.commands.prepare import prepare

    prepare(arguments, COMMANDS["prepare"])


def _views(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fastgessl views", description=COMMANDS["views"], epilog="Further options as of `train`."
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a composed name such as digits-simclr-gessl, or a YAML file"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("views.png"), help="file to write (default: views.png)"
    )
    parser.add_argument("--images", type=int, default=8, help="images to show, one a row (default: 8)")
    parser.add_argument(
        "--against",
        default="",
        metavar="ENGINE",
        help="second engine, which shows the same draw below the first one",
    )
    given, options = parser.parse_known_args(arguments)
    config = _override(_load(given.recipe).config, options, f"fastgessl views {given.recipe}")
    from fastgessl.commands.views import write_view_grid

    grid = write_view_grid(config, given.out, count=given.images, against=given.against)
    print(f"{grid.path}: {grid.views} views an image by {' and '.join(grid.engines)}")
    if given.against:
        print(
            f"they differ by {grid.mean_difference:.2f} of 255 on average, {grid.largest_difference:.1f} at "
            "most"
        )


def _load(recipe: str) -> Recipe:
    from fastgessl.recipes import load

    return load(recipe)


def _positional(arguments: list[str], command: str, name: str, meaning: str) -> tuple[str, list[str]]:
    """The word before the options, or the help text if there is none."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if not {"-h", "--help"} & set(arguments):
        raise UsageError(
            f"{name} is missing: {meaning}. `fastgessl {command} --help` lists the options, `fastgessl "
            "recipes` the recipes."
        )
    extra = {
        "train": "--print_config prints the complete configuration and stops.",
        "evaluate": "--tasks and --transfer are short for --evaluate.tasks and --evaluate.transfer.",
    }[command]
    _override(
        Config(),
        ["--help"],
        f"fastgessl {command} {name}",
        f"{COMMANDS[command]}. {name}: {meaning}. {extra}",
    )
    raise SystemExit(0)


def _override(config: Config, options: list[str], program: str, description: str = "") -> Config:
    """`config` with the command line's options over it, by tyro; its findings about bad options become a
    UsageError.
    """
    import tyro

    _refuse_unknown(options)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                Config,
                default=config,
                args=options,
                prog=program,
                description=description,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(printed.getvalue())) from None


def _refuse_unknown(options: list[str]) -> None:
    from fastgessl.recipes import dotted_keys

    for word in options:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if word.startswith("--") and name != "help" and name not in dotted_keys():
            near = difflib.get_close_matches(name, dotted_keys(), n=3, cutoff=0.5)
            meant = f" Perhaps you meant {', '.join('--' + key for key in near)}." if near else ""
            raise UsageError(f"unknown option {word}.{meant} `fastgessl train --help` explains every option.")


def _one_line(boxed: str) -> str:
    """Tyro's boxed message as one sentence: without its frame, the help text that it repeats, and pydantic's
    jargon.
    """
    words = " ".join(re.sub(r"[╭╮╰╯│─]+|[-+]{5,}|^\||\|$", " ", boxed, flags=re.MULTILINE).split())
    words = re.split(r" Argument helptext: | For full helptext, | For further information visit ", words)[0]
    words = re.sub(
        r"^(Value error|Parsing error|Invalid choice|Missing argument|Required options) ", "", words
    )
    found = re.match(
        r"Error parsing (\S+): \d+ validation errors? for \w+ (.*) \[type=\w+, input_value=(.*), input_type=",
        words,
    )
    if found is None:
        return f"{words.rstrip('.')}. `fastgessl train --help` explains every option."
    section, finding, value = found.groups()
    if "Value error, " in finding:
        return finding.split("Value error, ", 1)[1]
    field, _, problem = finding.partition(" ")
    return f"--{section}.{field}: {problem[0].lower()}{problem[1:]}, found {value}. `fastgessl train --help` explains every option."


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML that `fastgessl train FILE.yaml` accepts."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _print_matrix() -> None:
    from rich.console import Console
    from rich.table import Table

    from fastgessl.recipes import backbones, parts

    table = Table(title="<data>-<method>[-<backbone>][-<n>ep][-dsa][-gessl[-<preset>]]", title_justify="left")
    for column in ("recipes", "backbones"):
        table.add_column(column)
    for data in parts("data"):
        groups: dict[str, list[str]] = {}
        for method in parts("methods"):
            groups.setdefault(", ".join(backbones(data, method)), []).append(f"{data}-{method}")
        for offered, recipes in groups.items():
            table.add_row(" ".join(recipes), offered)
    console = Console()
    console.print(table)
    for kind, title in (
        ("data", "data sets"),
        ("methods", "methods"),
        ("regulators", "regulators"),
        ("gessl", "GeSSL presets"),
    ):
        console.print(f"\n{title}")
        for name, part in parts(kind).items():
            console.print(f"  {name:12} {part['about']}", highlight=False, soft_wrap=True)
    console.print("\n`fastgessl recipes NAME` shows one in full, with the source of each number.")


def _print_recipe(recipe: Recipe) -> None:
    for option, value in recipe.config.options().items():
        source = recipe.sources.get(option, "default")
        print(f"{f'{option}: {_scalar(value)}':<56} # {source}")


def _scalar(value: object) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def _fail(command: str, message: str) -> NoReturn:
    """One line on standard error from the first process of a machine, and exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # A file's or folder's name may hold words that a terminal would obey.
        shown = "".join(
            character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in message
        )
        print(f"fastgessl {command}: {shown}", file=sys.stderr)
    sys.exit(2)
