"""`fastgessl recipes`: list the recipes, or show one with the source of each number."""

import yaml
from rich.console import Console
from rich.table import Table

from fastgessl.recipes import Parser, backbones, load, parts


def main(words: list[str]) -> None:
    """Run the command. UsageError for an unknown recipe."""
    parser = Parser(program="recipes", description=__doc__)
    parser.add_argument(
        "name", nargs="?", help="recipe to show in full, for example digits-simclr-gessl-fast"
    )
    name = parser.parse_args(words).name
    if name is None:
        _print_matrix()
        return
    recipe = load(name)
    for option, value in recipe.config.options().items():
        scalar = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
        print(f"{f'{option}: {scalar}':<56} # {recipe.sources.get(option, 'default')}")


def _print_matrix() -> None:
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
