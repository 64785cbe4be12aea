"""`make bench`: the measurements that take minutes on a CPU, one after the other, each in a process of its
own.

`make bench ARGS="--photos FOLDER … --cifar10 FILE.npz"` lets the engines read real files; without them they
are measured on noise alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import results

SUITES = ("kernels", "gessl", "steps", "pipelines", "evaluate", "report")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--photos", type=Path, nargs="+", default=[], help="folders of photos for bench.pipelines"
    )
    parser.add_argument("--cifar10", type=Path, help="an .npz with CIFAR-10 in train_x, for bench.pipelines")
    arguments = parser.parse_args(argv)
    photos = ["--photos", *(str(folder.resolve()) for folder in arguments.photos)] if arguments.photos else []
    cifar10 = ["--cifar10", str(arguments.cifar10.resolve())] if arguments.cifar10 else []
    for suite in SUITES:
        print(f"== python -m bench.{suite}", flush=True)
        words = [*photos, *cifar10] if suite == "pipelines" else []
        subprocess.run([sys.executable, "-m", f"bench.{suite}", *words], cwd=results.ROOT.parent, check=True)


if __name__ == "__main__":
    main()
