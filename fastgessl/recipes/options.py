"""The options of the command line: one for each field of the configuration, checked by pydantic."""

import argparse
import types
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fastgessl.config import Config, UsageError
from fastgessl.recipes.compose import describe, unknown_option


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no shortened names, and whose mistakes are UsageErrors of one line."""

    def __init__(self, *, program: str, **options: Any) -> None:
        super().__init__(prog=f"fastgessl {program}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` explains every option.")


def override(config: Config, words: list[str], program: str, description: str = "") -> Config:
    """`config` with the options `words` of the command line over it.

    `--help` among them prints every option with its value in `config`, and exits with 0. Raises UsageError
    for an unknown option and a value that does not fit.

    >>> words = ["--method.moco.symmetric", "False", "--evaluate.tasks", "knn", "linear"]
    >>> config = override(Config(), words, "train")
    >>> config.method.moco.symmetric, config.evaluate.tasks
    (False, ('knn', 'linear'))
    """
    parser = Parser(
        program=program, description=description, usage=f"fastgessl {program} [--section.option VALUE ...]"
    )
    _add_section(parser, "", config)
    given, unknown = parser.parse_known_args([_with_underscores(word) for word in words])
    if unknown:
        raise UsageError(f"{unknown_option(unknown[0])} `{parser.prog} --help` explains every option.")
    values = config.model_dump()
    for option, value in vars(given).items():
        *sections, name = option.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = None if value == [None] else value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(describe(error)) from None


def leading_word(words: list[str], program: str, name: str, meaning: str) -> tuple[str, list[str]]:
    """The word that a command needs before its options, and the options; "" where help is asked for instead.

    `name` and `meaning` say what the word is. Raises UsageError if it is missing.
    """
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    if {"-h", "--help"} & set(words):
        return "", ["--help"]
    raise UsageError(f"{name} is missing: {meaning}. `fastgessl {program} --help` lists the options.")


def _with_underscores(word: str) -> str:
    """--train.batch-size=64 is --train.batch_size=64."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _add_section(parser: argparse.ArgumentParser, name: str, section: BaseModel) -> None:
    """Give `parser` an option for each field of `section` and of the sections in it."""
    group = parser.add_argument_group(name or "the run", type(section).__doc__)
    for key, field in type(section).model_fields.items():
        option, value = f"{name}.{key}".lstrip("."), getattr(section, key)
        if isinstance(value, BaseModel):
            _add_section(parser, option, value)
            continue
        kinds = _kinds(field.annotation)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        group.add_argument(
            f"--{option}",
            default=argparse.SUPPRESS,
            nargs="*" if any(get_origin(kind) is tuple for kind in kinds) else None,
            type=_or_none if types.NoneType in kinds else str,
            metavar="|".join(_shown_kind(kind) for kind in kinds),
            help=f"{field.description} (default: {shown})".replace("%", "%%"),
        )


def _or_none(word: str) -> str | None:
    return None if word == "None" else word


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """What a field may be: the members of a union, without what only limits their values."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for member in get_args(annotation) for kind in _kinds(member))
    return (annotation,)


def _shown_kind(kind: Any) -> str:
    """A type as the help text names it.

    >>> [_shown_kind(kind) for kind in (int, Literal["a", "b"], tuple[float, float], types.NoneType)]
    ['INT', '{a,b}', 'FLOAT', 'None']
    """
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    if get_origin(kind) is tuple:
        return _shown_kind(_kinds(get_args(kind)[0])[0])
    return "None" if kind is types.NoneType else kind.__name__.upper()
