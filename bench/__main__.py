"""`make bench`: the measurements that take minutes on a CPU, one after the other, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

from bench import results

SUITES = ("kernels", "gessl", "steps", "pipelines", "evaluate", "report")


def main() -> None:
    for suite in SUITES:
        print(f"== python -m bench.{suite}", flush=True)
        subprocess.run([sys.executable, "-m", f"bench.{suite}"], cwd=results.ROOT.parent, check=True)


if __name__ == "__main__":
    main()
