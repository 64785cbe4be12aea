"""The wheel holds everything, and the versions that were tested are pinned."""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as from a zip of the repository or on a system without links: they are short text
    files.
    """
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("the wheel is built from git's list of files, and this is no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, folder / "source" / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bytes(source.readlink()) if source.is_symlink() else source.read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "source"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next((folder / "dist").glob("*.whl"))


def test_the_wheel_offers_every_public_name_in_a_clean_environment(wheel, tmp_path):
    venv.create(tmp_path / "clean", with_pip=False)
    clean = tmp_path / "clean" / "bin" / "python"
    where = [clean, "-c", "import site; print(site.getsitepackages()[0])"]
    site = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), site], check=True)
    # The libraries come from this environment; the project itself must come from the wheel alone.
    libraries = [entry for entry in sys.path if entry.endswith("site-packages")]
    Path(site, "libraries.pth").write_text("\n".join(libraries))
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in "
        "str(finder).lower()]\n"
        "import importlib, fastgessl\n"
        f"assert fastgessl.__file__.startswith({site!r}), fastgessl.__file__\n"
        "for room in ('kernels', 'pipelines', 'methods', 'models', 'objective', 'evaluate', 'report'):\n"
        "    module = importlib.import_module('fastgessl.' + room)\n"
        "    assert module.__all__, room\n"
        "    for name in module.__all__: getattr(module, name)\n"
        "from fastgessl.recipes import names, load\n"
        "assert len([load(name) for name in names()]) > 10\n"
        "import fastgessl.cli, fastgessl.training.loop, fastgessl.commands.doctor\n"
    )
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([clean, "-c", code], check=True, cwd=tmp_path, env=own)


def test_every_package_is_named_with_its_place():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = {package: ROOT / package.replace(".", "/") for package in setuptools["packages"]}
    for package, place in setuptools["package-dir"].items():
        places |= {
            name: ROOT / name.replace(package, place, 1).replace(".", "/")
            for name in places
            if name.startswith(package)
        }
    found = {
        path.parent
        for top in ("fastgessl", "kernels", "pipelines")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert {place.resolve() for place in places.values()} == {path.resolve() for path in found}


def test_the_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["trainer"], *extras["train"], *extras["dev"]]
    names = {re.split(r"[\s\[<>=;]", entry)[0].lower() for entry in wanted} - {"fastgessl"}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+-]+", line) for line in lines)
    assert names <= {line.split("==")[0].lower() for line in lines}
