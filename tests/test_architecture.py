"""The house stays as it is drawn: imports run downwards, nothing turns in a circle, functions fit on a
screen.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    ("fastgessl.__main__",),
    ("fastgessl", "fastgessl.cli"),
    ("fastgessl.commands",),
    ("fastgessl.report",),
    ("fastgessl.training",),
    ("fastgessl.evaluate",),
    ("fastgessl.build",),
    ("fastgessl.objective",),
    ("fastgessl.methods",),
    ("fastgessl.models",),
    ("fastgessl.runs",),
    ("fastgessl.recipes",),
    ("fastgessl.distributed",),
    ("fastgessl.config", "fastgessl.schedules"),
    ("fastgessl.pipelines",),
    ("fastgessl.pipelines.engines",),
    ("fastgessl.pipelines.draws", "fastgessl.pipelines.bad_files"),
    ("fastgessl.pipelines.views", "fastgessl.pipelines.decode"),
    ("fastgessl.pipelines.sources",),
    ("fastgessl.kernels",),
    ("fastgessl.kernels.similarity", "fastgessl.kernels.views"),
    ("fastgessl.kernels.backend", "fastgessl.kernels.checks", "fastgessl.kernels.collectives"),
    ("fastgessl.kernels.reference",),
)
"""Top to bottom; the longest name that fits is a module's room."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PLACES = {"fastgessl": "fastgessl", "kernels": "fastgessl.kernels", "pipelines": "fastgessl.pipelines"}
SOURCES = [
    path
    for place in PLACES
    for path in sorted((ROOT / place).rglob("*.py"))
    if "fastgessl/kernels" not in path.as_posix() and "fastgessl/pipelines" not in path.as_posix()
]
OWN = [*SOURCES, *sorted((ROOT / "bench").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]


def name_of(path: Path) -> str:
    """The module that a file is."""
    place, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PLACES[place], *rest]).removesuffix(".__init__")


MODULES = {name_of(path): path for path in SOURCES}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """The project's modules that a file imports, inside functions too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def room_of(module: str) -> str:
    """The room of a module.

    >>> room_of("fastgessl.pipelines.engines.dali"), room_of("fastgessl.pipelines.loader")
    ('fastgessl.pipelines.engines', 'fastgessl.pipelines')
    """
    while module not in FLOOR_OF:
        module = module.rpartition(".")[0]
    return module


def test_no_import_runs_upwards_between_rooms():
    upwards = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in imports(path)
        if room_of(module) != room_of(imported) and FLOOR_OF[room_of(module)] >= FLOOR_OF[room_of(imported)]
    ]
    assert not upwards


def test_no_module_leads_back_to_itself():
    below = {module: set(imports(path)) - {module} for module, path in MODULES.items()}
    while leaves := [module for module, targets in below.items() if not targets]:
        below = {module: targets - set(leaves) for module, targets in below.items() if module not in leaves}
    assert not below, "these import one another, or what does"


def test_seven_files_are_loose():
    loose = {path.name for path in (ROOT / "fastgessl").glob("*.py")}
    assert len(loose) <= 7, loose


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function with its class's name before it."""
    for node in ast.walk(parsed(path)):
        body = getattr(node, "body", [])
        for inner in body if isinstance(body, list) else []:
            if isinstance(inner, ast.FunctionDef):
                yield (f"{node.name}." if isinstance(node, ast.ClassDef) else "") + inner.name, inner


def parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    return [
        one.arg for one in given.posonlyargs + given.args + given.kwonlyargs if one.arg not in ("self", "cls")
    ]


def public_names() -> set[str]:
    """What the kernels and pipelines offer to others, whose signatures follow those that people know."""
    return {
        constant.value
        for package in ("fastgessl.kernels", "fastgessl.pipelines")
        for node in parsed(MODULES[package]).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for constant in ast.walk(node.value)
        if isinstance(constant, ast.Constant)
    }


def test_a_function_takes_six_parameters():
    offered = public_names()
    many = [
        f"{path.relative_to(ROOT)}: {name} takes {len(parameters(function))}"
        for path in [*SOURCES, *(ROOT / "bench").rglob("*.py")]
        # Operators and launches pass operands one by one; a definition has its function's signature.
        if "kernels/similarity" not in path.as_posix() and path.name != "reference.py"
        for name, function in functions(path)
        if len(parameters(function)) > 6
        and not offered & set(name.split("."))
        and not any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
    ]
    assert not many


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_are_short_and_laid_out_by_the_formatter(path):
    if path.relative_to(ROOT).parts[0] != "kernels":
        lines = path.read_text().splitlines()
        assert not [number for number, line in enumerate(lines, 1) if len(line) > 110]
        assert not [number for number, line in enumerate(lines, 1) if "fmt: " + "skip" in line]


def test_a_class_has_a_name_of_its_own():
    names = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]
