"""A table, told once: the terminal and the HTML report show the same one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """Headings and cells as text; line breaks in them are kept. The first column names the rows.

    >>> table = Table(["encoder", "k-NN"], [["this <run>", "91.5"]])
    >>> "<td>91.5</td>" in table.html(), "this &lt;run&gt;" in table.html()
    (True, True)
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: str = ""
    """What stands below it."""

    def terminal(self) -> RenderableType:
        """The table as rich prints it."""
        table = rich.table.Table(box=SIMPLE_HEAD, caption=self.notes or None, caption_justify="left")
        table.padding = (0, 0)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0)
        for row in self.rows:
            table.add_row(*row)
        # The title is above the table: one of a narrow table would be folded to its width.
        return Group(Text(self.title, style="italic"), table) if self.title else table

    def html(self) -> str:
        """The table as HTML, every text of it escaped; it scrolls sideways where the screen is narrow."""
        head = "".join(f"<th>{_html(text)}</th>" for text in self.headings)
        body = ""
        for first, *rest in self.rows:
            cells = "".join(f"<td>{_html(cell)}</td>" for cell in rest)
            body += f'<tr><th scope="row">{_html(first)}</th>{cells}</tr>'
        title, notes = (
            f'<p class="caption">{_html(text)}</p>' if text else "" for text in (self.title, self.notes)
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'{title}<div class="scroll">{table}</div>{notes}'


def _html(text: str) -> str:
    return escape(text).replace("\n", "<br>")


@dataclass(frozen=True)
class Column:
    """A column that a task adds to the table of frozen features."""

    heading: str
    show: Callable[[dict[str, Any]], str]
    """What the task has measured -> the text of a cell."""
    needs: str = "accuracy"
    """A measurement without which the column is left out."""


def percent(heading: str, key: str = "accuracy") -> Column:
    """A column of a share in per cent.

    >>> percent("linear").show({"accuracy": 0.915})
    '91.5'
    """
    return Column(f"{heading}\n%", lambda measured: f"{100 * measured[key]:.1f}", key)


def decimals(heading: str, key: str, digits: int) -> Column:
    """A column of a number; None, as JSON has it, is infinite."""

    def show(measured: dict[str, Any]) -> str:
        return f"{math.inf if measured[key] is None else measured[key]:.{digits}f}"

    return Column(heading, show, key)


def accuracies(headings: Sequence[str], key: str) -> list[Column]:
    """A column for each entry of the list `key`: its accuracy in per cent, with ± what it varies by."""

    def column(number: int, heading: str) -> Column:
        return Column(f"{heading}\n%", lambda measured: spread(measured[key][number]), key)

    return [column(number, heading) for number, heading in enumerate(headings)]


def spread(found: dict[str, Any]) -> str:
    """An accuracy in per cent, with ± its deviation over draws or half of its interval.

    >>> spread({"accuracy": 0.5, "deviation": 0.012}), spread({"accuracy": 0.5})
    ('50.0±1.2', '50.0')
    """
    around = found.get("deviation") or found.get("interval") or 0
    return f"{100 * found['accuracy']:.1f}" + (f"±{100 * around:.1f}" if around else "")
