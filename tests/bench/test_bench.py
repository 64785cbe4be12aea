"""What the measuring programs write can be believed, and the GPU program tries itself out on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench import results

ROOT = Path(__file__).resolve().parents[2]


def test_a_result_names_versions_processor_and_commit(tmp_path):
    path = results.write("trial", {"answer": [1, 2]}, tmp_path)
    record = json.loads(path.read_text())
    assert record["answer"] == [1, 2]
    assert {"commit", "processor", "threads", "versions", "python", "gpus"} <= set(record)
    assert path.parent == tmp_path / results.machine()


def test_the_commit_is_dirty_if_code_changed_and_not_if_results_did(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(results, "ROOT", tmp_path / "bench")
    assert results.commit() == "unknown"
    for name in ("bench/results/one.json", "code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = results.commit()
    (tmp_path / "bench/results/one.json").write_text("2")
    assert results.commit() == clean and "dirty" not in clean
    (tmp_path / "code.py").write_text("2")
    assert results.commit() == f"{clean}-dirty"


def test_the_gpu_program_tries_itself_out_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--profile", "--seconds", "60", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = {path.stem.split("-gpu-")[1]: json.loads(path.read_text()) for path in tmp_path.glob("*/*.json") if "-gpu-" in path.stem}
    assert set(records) == {"ceilings", "tests", "kernels", "steps", "engines", "quality", "gessl", "scaling", "profile"}
    assert all(record["complete"] and record["dry_run"] and record["rows"] for record in records.values())
    assert not [row for record in records.values() for row in record["rows"].values() if "error" in row]
    assert records["tests"]["rows"]["pytest"]["exit_code"] == 0
    ours = records["steps"]["rows"]["simclr-resnet18-16"]["rows"]["ours"]
    assert ours["images_per_second"] > 0 and len(ours["samples"]) >= 3
    assert set(records["scaling"]["rows"]) == {"1 ranks", "2 ranks"} and records["scaling"]["rows"]["2 ranks"]["ranks"] == 2
    assert list(tmp_path.glob("*/*.trace.json"))


def test_a_stage_that_dies_leaves_its_rows_and_does_not_take_the_others_along(tmp_path):
    program = (
        "import os, sys; from bench import gpu, stages\n"
        "def dying(conditions):\n    yield 'first', {'rate': 1}\n    os._exit(9)\n"
        "stages.STAGES['quality'] = dying\n"
        "gpu.main(sys.argv[1:])"
    )
    words = ["--dry-run", "--stage", "quality", "--seconds", "5", "--out", str(tmp_path), "--in-this-process"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    (path,) = tmp_path.glob("*/*-gpu-quality.json")
    record = json.loads(path.read_text())
    assert done.returncode == 9 and record["rows"] == {"first": {"rate": 1}} and not record["complete"]
