"""Three hosts made of network namespaces: a process dies, a cable is pulled, and the run goes on under
torchrun's elastic launch.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reliability.test_faults import QUICK, steps_done
from tiny_run import read_lines

pytestmark = pytest.mark.slow
HOSTS, SWITCH = ("alpha", "beta", "gamma"), "fgswitch"


def ip(*words: str, check: bool = True) -> bool:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, (words, done.stderr)
    return done.returncode == 0


@pytest.fixture
def hosts():
    """Namespaces with an address each, 10.77.0.1 to 10.77.0.3, on one switch."""
    names = (SWITCH, *(f"fg{host}" for host in HOSTS))
    if not ip("netns", "add", SWITCH, check=False):
        pytest.skip("network namespaces need a privilege that this process does not have")
    try:
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
        for number, name in enumerate(names[1:], start=1):
            ip("netns", "add", name)
            ip(
                "-n",
                name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"port{number}",
                "netns",
                SWITCH,
            )
            ip("-n", SWITCH, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names[1:]
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def launched(number: int, name: str, folder: Path, options: tuple) -> subprocess.Popen:
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    torchrun = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2:3",
            "--nproc_per_node=1",
            "--max_restarts=5",
            "--rdzv_backend=c10d",
        ),
        *("--rdzv_endpoint=10.77.0.1:29400", "--rdzv_id=soak", f"--local_addr=10.77.0.{number}"),
        f"--rdzv_conf=is_host={str(number == 1).lower()},last_call_timeout=5,timeout=300,keep_alive_interval=5",
    ]
    command = [*torchrun, "-m", "fastgessl", "train", *map(str, options)]
    # A host name of its own: messages and rendezvous shall tell the hosts apart.
    host = [
        "ip",
        "netns",
        "exec",
        name,
        "unshare",
        "--uts",
        "sh",
        "-c",
        f'hostname {name} && exec "$@"',
        "sh",
    ]
    log = (folder / f"{name}.log").open("w")
    return subprocess.Popen(
        [*host, *command], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for_steps(run: Path, steps: int, processes: list[subprocess.Popen], seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while steps_done(run) < steps:
        assert any(process.poll() is None for process in processes), "all hosts have stopped"
        assert time.monotonic() < deadline, f"{steps_done(run)} steps of {steps}"
        time.sleep(0.2)


def said(folder: Path, name: str, pattern: str, seconds: float) -> float:
    """Seconds until the log of a host says it."""
    started = time.monotonic()
    while not re.search(pattern, (folder / f"{name}.log").read_text()):
        assert time.monotonic() - started < seconds, (folder / f"{name}.log").read_text()[-3000:]
        time.sleep(0.1)
    return time.monotonic() - started


def workers_on(name: str) -> list[int]:
    """The processes in a namespace that train."""
    listed = subprocess.run(
        ["ip", "netns", "pids", name], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = [
        int(pid)
        for pid in listed
        if b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return [pid for pid in ours if b"fastgessl" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_killed_process_and_a_pulled_cable_are_named_within_a_minute_and_the_run_goes_on(tmp_path, hosts):
    run, steps = tmp_path / "run", 600
    options = (
        *QUICK,
        "--train.batch_size",
        48,
        "--train.max_steps",
        steps,
        "--train.run_dir",
        run,
        "--train.resume",
        "if_any",
    )
    processes = [launched(number, name, tmp_path, options) for number, name in enumerate(hosts, start=1)]
    try:
        wait_for_steps(run, 20, processes)
        (victim,) = workers_on(hosts[1])
        os.kill(victim, signal.SIGKILL)
        killed = said(tmp_path, hosts[0], rf"rank \d \(host {hosts[1]}, process {victim}\) has died", 60)
        before = steps_done(run)
        wait_for_steps(run, before + 20, processes)
        ip("-n", SWITCH, "link", "set", "port3", "down")
        pulled = said(tmp_path, hosts[0], rf"rank \d \(host {hosts[2]}, process \d+\) has died", 60)
        wait_for_steps(run, steps_done(run) + 20, processes)
        two_left = "processes      2," in (tmp_path / f"{hosts[0]}.log").read_text()
        wait_for_steps(run, steps, processes)
        ends = [process.wait(timeout=300) for process in processes[:2]]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    print(
        f"process killed: named after {killed:.1f} s; cable pulled: named after {pulled:.1f} s; {steps} "
        "steps, none lost"
    )
    assert two_left
    assert ends == [0, 0]
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, steps + 1))


def test_hosts_that_reach_rank_0_but_not_one_another_end_with_a_name_instead_of_waiting(tmp_path, hosts):
    for port in ("port2", "port3"):  # isolated ports of a switch talk to the others only
        subprocess.run(
            ["ip", "netns", "exec", SWITCH, "bridge", "link", "set", "dev", port, "isolated", "on"],
            check=True,
        )
    options = (
        *QUICK,
        "--train.batch_size",
        48,
        "--train.max_steps",
        5,
        "--train.run_dir",
        tmp_path / "run",
        "--train.join_seconds",
        20,
    )
    command = [sys.executable, "-m", "fastgessl", "train", *map(str, options)]
    variables = {
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29500",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    variables |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *command],
            env=os.environ | variables | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank, name in enumerate(hosts)
    ]
    try:
        said = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert all(process.returncode for process in processes)
    assert any(
        re.search(r"fastgessl train: .*rank [12] \(host [^)]*\) stopped: [^;]*(10.77.0.[23]|Gloo)", words)
        for words in said
    ), said
    assert not (tmp_path / "run").exists()


def test_the_slurm_script_of_the_page_starts_stops_on_the_signal_and_asks_to_be_requeued(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    script = re.search(r"```bash\n(.*?)```", page, re.DOTALL)
    assert script
    run = tmp_path / "run"
    quick = " ".join(map(str, (*QUICK, "--train.max_steps", 100_000, "--train.epochs", 100_000)))
    text = (
        script[1]
        .replace("imagenet-simclr --data.root path/to/imagenet", quick)
        .replace("runs/mine", str(run))
    )
    assert quick in text
    (tmp_path / "job.sh").write_text(text.replace("  python -m", f"  {sys.executable} -m"))
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nshift\nfor rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!); '
        "done\n"
        "trap 'kill -USR1 ${pids[@]}' USR1\nworst=0\nfor pid in ${pids[@]}; do while :; do wait $pid; "
        "code=$?; "
        "kill -0 $pid 2>/dev/null || break; done; [ $code -gt $worst ] && worst=$code; done\nexit $worst\n"
    )
    (tmp_path / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" > "$REQUEUED"\n'
    )
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "x",
        "SLURM_NTASKS": "2",
        "REQUEUED": str(tmp_path / "requeued"),
    }
    for round_ in range(2):
        job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=environment, start_new_session=True)
        try:
            wait_for_steps(run, steps_done(run) + 5, [job])
            (step,) = subprocess.run(
                ["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True
            ).stdout.split()
            os.kill(int(step), signal.SIGUSR1)
            assert job.wait(timeout=120) == 138, round_
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
        assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    lines = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    assert lines == list(range(1, len(lines) + 1))
