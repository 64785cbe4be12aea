"""The real command, killed at random moments until it has got through: kill_loop.py KILLS STEPS FOLDER.
Prints one JSON line.

Runs are forks of this process, so that a kill finds them training, saving or loading and not importing
libraries.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from fastgessl.cli import main
from fastgessl.runs import checkpoint

OPTIONS = (
    *("digits-byol-gessl", "--views.size", "8", "--model.width", "0.125", "--method.projector_hidden", "32"),
    *(
        "--method.predictor_hidden",
        "32",
        "--train.batch_size",
        "16",
        "--train.accumulate",
        "2",
        "--train.epochs",
        "1000",
    ),
    *(
        "--train.checkpoint_every",
        "3",
        "--train.resume",
        "if_any",
        "--evaluate.tasks",
        "geometry",
        "--log.trackers",
    ),
)


def launched(steps: int, run: Path) -> int:
    process = os.fork()
    if process == 0:
        with (run.parent / f"{run.name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            main(["train", *OPTIONS, "--train.max_steps", str(steps), "--train.run_dir", str(run)])
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(1)
    return process


def finished(process: int) -> bool:
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) == 0


def killed_once(process: int, run: Path, chance: random.Random) -> bool:
    """False if the run had ended before. A fifth of the kills come within a second of the start; two fifths
    as soon as a checkpoint is being written, two fifths at any moment, both after the run has got further
    than the last time."""
    before, kind = checkpoint.complete(run), chance.choice(("early", "saving", "saving", "any", "any"))
    due = time.monotonic() + chance.uniform(0.0, 1.0) if kind == "early" else float("inf")
    while time.monotonic() < due:
        further = due == float("inf") and checkpoint.complete(run) != before
        if further and kind == "any":
            due = time.monotonic() + chance.uniform(0.0, 1.5)
        if further and kind == "saving" and list((run / "checkpoints").glob("*.part")):
            break
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "a run failed instead of being killed"
            return False
        time.sleep(0.0005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def loop(kills: int, steps: int, folder: Path) -> dict[str, int]:
    assert finished(launched(steps, folder / "whole")), (folder / "whole.log").read_text()
    run, chance = folder / "killed", random.Random(kills)
    found = {"kills": 0, "while_saving": 0, "before_the_first_checkpoint": 0, "samples_lost": 0}
    while found["kills"] < kills and killed_once(launched(steps, run), run, chance):
        found["kills"] += 1
        found["while_saving"] += bool(list((run / "checkpoints").glob("*.part")))
        newest = checkpoint.complete(run)
        found["before_the_first_checkpoint"] += not newest
        for complete in newest:
            checkpoint.load(complete)
    assert finished(launched(steps, run)), (folder / "killed.log").read_text()
    for file in ("metrics.jsonl", "encoder.safetensors", "evaluation.json"):
        assert (run / file).read_bytes() == (folder / "whole" / file).read_bytes(), file
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    last = [checkpoint.load(checkpoint.complete(folder / name)[-1]) for name in ("whole", "killed")]
    assert last[0]["loader"] == last[1]["loader"]
    return found | {"steps": steps, "images": steps * 32}


if __name__ == "__main__":
    print(json.dumps(loop(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
