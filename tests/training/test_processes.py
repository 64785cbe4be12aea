"""Real launchers: a rank that dies ends its job and is named, restarts continue, and what `accelerate launch`
says is done or refused.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import read_lines

from fastgessl.runs import checkpoint

ROOT = Path(__file__).parents[2]
LIGHT = (
    *("digits-simclr", "--views.size", 8, "--model.width", 0.125, "--train.batch_size", 64),
    *("--train.checkpoint_every", 1, "--log.trackers"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
ACCELERATE = ("-m", "accelerate.commands.launch")
# Few-shot episodes for hours, drawn on rank 0 alone.
ENDLESS = ("--evaluate.tasks", "few_shot", "--evaluate.episodes", 10**8)
CONFIGURATION = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
main_process_port: 0
mixed_precision: bf16
"""
# torchrun gives its processes 30 s between SIGTERM and SIGKILL.
SECONDS_TO_END = 45


@contextmanager
def launched(run: Path, launcher: tuple, *options: object, **variables: str) -> Iterator[subprocess.Popen]:
    """`fastgessl train` under a launcher, in the run's folder, with what it says in `run.log`; killed at the
    end."""
    run.parent.mkdir(exist_ok=True)
    words = [*launcher, "-m", "fastgessl", "train", *LIGHT, "--train.run_dir", run, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    with run.with_suffix(".log").open("w") as log:
        job = subprocess.Popen(
            [sys.executable, *map(str, words)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with ended(job):
        yield job


@contextmanager
def ended(job: subprocess.Popen) -> Iterator[None]:
    """Afterwards nothing of the job is left, whatever has happened inside."""
    try:
        yield
    finally:
        for process in [*psutil.Process(job.pid).children(recursive=True), job] if job.poll() is None else []:
            process.kill()


def steps_done(run: Path) -> int:
    log = run / "metrics.jsonl"
    return len(read_lines(log)) if log.exists() else 0


def said(run: Path) -> str:
    return run.with_suffix(".log").read_text()


def processes(job: subprocess.Popen) -> dict[str, psutil.Process]:
    """The job's live processes by their rank."""
    found = {}
    for process in psutil.Process(job.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[process.environ().get("RANK", "")] = process
    found.pop("", None)
    return found


def wait_until(holds, job: subprocess.Popen, run: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert job.poll() is None and time.monotonic() < deadline, said(run)[-3000:]
        time.sleep(0.05)


def trains(run: Path) -> bool:
    return len(checkpoint.complete(run)) > 1


def killed(job: subprocess.Popen, run: Path, rank: int, moment: str) -> None:
    """Kill one rank during `training`, or once the others have left, during the `evaluation`."""
    if moment == "training":
        wait_until(lambda: trains(run), job, run)
    else:
        wait_until(lambda: (run / "encoder.safetensors").exists() and len(processes(job)) == 1, job, run)
    processes(job)[str(rank)].send_signal(signal.SIGKILL)


def ends_and_names(job: subprocess.Popen, run: Path, rank: int) -> None:
    assert job.wait(timeout=SECONDS_TO_END) != 0
    first = said(run).split("Root Cause")[1]
    assert re.search(rf"rank +: {rank} .*\n +exitcode +: -9", first), first
    assert checkpoint.load(checkpoint.complete(run)[-1])["step"] > 0


@pytest.mark.parametrize(
    ("rank", "moment"),
    [(1, "training"), (0, "evaluation"), pytest.param(0, "training", marks=pytest.mark.slow)],
)
def test_under_torchrun_a_killed_rank_is_named_and_the_others_end(tmp_path, rank, moment):
    run = tmp_path / "run"
    steps = 2 if moment == "evaluation" else 10_000
    with launched(run, TORCHRUN, "--train.max_steps", steps, "--train.epochs", 10_000, *ENDLESS) as job:
        killed(job, run, rank, moment)
        ends_and_names(job, run, rank)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_under_torchrun_with_restarts_the_run_continues_every_time(tmp_path, kills):
    run, steps = tmp_path / "run", 10 * (kills + 1)
    launcher = (*TORCHRUN, "--max_restarts", kills)
    options = ("--train.max_steps", steps, "--train.resume", "if_any", "--evaluate.tasks", "knn")
    with launched(run, launcher, *options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as job:
        for kill in range(kills):
            wait_until(lambda kill=kill: said(run).count("  folder   ") > kill, job, run)
            before = checkpoint.complete(run)[-1:]
            wait_until(lambda before=before: checkpoint.complete(run)[-1:] != before, job, run)
            processes(job)[str(kill % 2)].send_signal(signal.SIGKILL)
        assert job.wait(timeout=600) == 0, said(run)[-3000:]
    print(f"{said(run).count('continued from step-')} of {kills} restarts continued")
    assert said(run).count("continued from step-") == kills
    assert "a restart may hang" not in said(run)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, steps + 1))
    assert (run / "evaluation.json").is_file()


@pytest.mark.parametrize(
    ("rank", "moment"),
    [
        (1, "training"),
        pytest.param(0, "training", marks=pytest.mark.slow),
        pytest.param(0, "evaluation", marks=pytest.mark.slow),
    ],
)
def test_accelerate_launch_s_configuration_is_taken_and_a_killed_rank_named(tmp_path, rank, moment):
    run, configuration = tmp_path / "run", tmp_path / "accelerate.yaml"
    configuration.write_text(CONFIGURATION)
    steps = 2 if moment == "evaluation" else 10_000
    options = ("--train.max_steps", steps, "--train.epochs", 10_000, *ENDLESS)
    with launched(run, (*ACCELERATE, "--config_file", configuration), *options) as job:
        killed(job, run, rank, moment)
        ends_and_names(job, run, rank)
    assert "processes      2, " in said(run)
    assert "bf16 (from accelerate launch --mixed_precision bf16)" in said(run)


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (("--cpu", "--num_processes", 2), "asked for several processes and starts one"),
        (
            ("--use_fsdp", "--num_processes", 1, "--main_process_port", 0),
            "asks for FSDP .* --train.sharding fsdp",
        ),
        pytest.param(
            ("--cpu", "--num_processes", 1, "--dynamo_backend", "inductor"),
            "--dynamo_backend inductor is not done here.* --train.compile True",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--cpu", "--num_processes", 1, "--mixed_precision", "fp16"),
            "--mixed_precision fp16 needs a GPU",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_accelerate_launch_s_flags_are_refused_by_name(tmp_path, flags, answer):
    run = tmp_path / "run"
    with launched(run, (*ACCELERATE, *flags)) as job:
        assert job.wait(timeout=120) != 0
    assert re.search(answer, said(run)), said(run)[-3000:]
    assert not run.exists()


def test_two_processes_equal_one_on_plain_ssl(fastgessl, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--train.max_steps", 3, "--evaluate.tasks", "knn")
    assert fastgessl("train", *LIGHT, *options, "--train.run_dir", one).code == 0
    with launched(two, TORCHRUN, *options, ACCELERATE_USE_CPU="true") as job:
        assert job.wait(timeout=300) == 0, said(two)[-3000:]
    assert json.loads((two / "environment.json").read_text())["plan"]["world_size"] == 2
    found, expected = ([line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (two, one))
    assert found == pytest.approx(expected, rel=1e-4)
    weights, others = (load_file(run / "encoder.safetensors") for run in (one, two))
    torch.testing.assert_close(others, weights, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_signal_ends_the_step_saves_and_prints_how_to_continue(fastgessl, tmp_path, number, code):
    run = tmp_path / "run"
    with launched(run, (), "--train.max_steps", 100_000, "--train.epochs", 100_000) as job:
        wait_until(lambda: steps_done(run) >= 2, job, run)
        job.send_signal(number)
        assert job.wait(timeout=60) == code
    steps = steps_done(run)
    assert f"stopped by {number.name} after step {steps} of" in said(run)
    assert (run / "checkpoints" / f"step-{steps:09d}" / "state.pt").is_file()
    going_on = re.search(r"fastgessl (train .*--train.resume auto)", said(run))
    assert going_on
    further = ("--train.max_steps", steps + 2, "--evaluate.tasks", "knn")
    assert fastgessl(*going_on[1].split(), *further).code == 0
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, steps + 3))


@pytest.mark.slow
def test_the_slurm_script_of_the_page_starts_stops_on_the_signal_and_asks_to_be_requeued(tmp_path):
    page = (ROOT / "docs" / "scaling.md").read_text()
    script = re.search(r"```bash\n(.*?)```", page, re.DOTALL)
    assert script
    run = tmp_path / "run"
    quick = " ".join(map(str, (*LIGHT, "--train.max_steps", 100_000, "--train.epochs", 100_000)))
    text = script[1].replace("imagenet-simclr --data.root path/to/imagenet", quick)
    assert quick in text
    text = text.replace("runs/mine", str(run)).replace("  python -m", f"  {sys.executable} -m")
    (tmp_path / "job.sh").write_text(text)
    (tmp_path / "srun").write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        'for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!); done\n'
        "trap 'kill -USR1 ${pids[@]}' USR1\nworst=0\n"
        "for pid in ${pids[@]}; do while :; do wait $pid; code=$?; kill -0 $pid 2>/dev/null || break; done; "
        "[ $code -gt $worst ] && worst=$code; done\nexit $worst\n"
    )
    (tmp_path / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" > "$REQUEUED"\n'
    )
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "x", "SLURM_NTASKS": "2"}
    environment |= {"REQUEUED": str(tmp_path / "requeued"), "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        before = steps_done(run)
        with run.with_suffix(".log").open("a") as log:
            job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=environment, stderr=log)
        with ended(job):
            wait_until(lambda before=before: steps_done(run) > before, job, run)
            (step,) = psutil.Process(job.pid).children()
            step.send_signal(signal.SIGUSR1)
            assert job.wait(timeout=120) == 138
        assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
