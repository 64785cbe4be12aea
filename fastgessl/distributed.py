"""The processes of a job: what their launcher asks for, how they come together, and which ranks a collective
spans. Collectives with backwards that are right at every order: `fastgessl.kernels.collectives`.

The convention of the whole project: each rank backpropagates the loss of its own rows, and gradients are
averaged over ranks (DDP).
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    parse_flag_from_env,
)

from fastgessl.config import Config, UsageError

Precision = Literal["fp32", "bf16", "fp16"]
_ALONE: ContextVar[bool] = ContextVar("rank_local", default=False)
# What accelerate launch can ask for and this trainer does in a way of its own, or not at all: its variable,
# its name, what to do.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "Launch with --multi_gpu and give --train.sharding fsdp, which spreads weights, gradients and "
        "optimizer state, and --train.accumulate.",
    ),
    "ACCELERATE_USE_FSDP": ("FSDP", "Launch with --multi_gpu and give --train.sharding fsdp (FSDP2)."),
    "ACCELERATE_USE_MEGATRON_LM": (
        "Megatron-LM",
        "Launch with --multi_gpu; --train.sharding fsdp spreads the weights.",
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "a parallelism configuration",
        "Launch with --multi_gpu; --train.sharding fsdp spreads the weights.",
    ),
}
# Launchers say how many processes there are by one of these; mpirun's are read by Accelerate.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def build_accelerator(config: Config, folder: Path) -> Accelerator:
    """Device, precision, processes and trackers. UsageError for what this machine does not have, and for what
    the launcher asks and the configuration, or this trainer, does otherwise.
    """
    _check_launcher(config)
    _check_trackers(config)
    precision, _ = choose_precision(config)
    accelerator = Accelerator(
        cpu=_on_cpu(config),
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(config.log.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.train.accumulate, sync_with_dataloader=False
        ),
        # Batch-norm statistics are synchronised by the norm itself or not at all; broadcasting rank 0's would
        # be a third meaning.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.train.timeout_minutes)),
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UsageError(
            f"the launcher says that there are {launched} processes (WORLD_SIZE), but Accelerate joined "
            f"{accelerator.num_processes} of them. Launch with `torchrun --nproc_per_node N -m fastgessl "
            "train ...`, or set RANK and LOCAL_RANK for each."
        )
    # torchrun then keeps one store over all restarts, which holds the addresses of processes that are gone,
    # and gloo and NCCL call those (torch 2.15; pytorch issue 135712).
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    kept = restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if kept and accelerator.is_main_process:
        print(
            f"warning: --max_restarts {restarts}, but a restart may hang. Launch with "
            "`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone ...`, or with --rdzv_backend c10d "
            "on several machines.",
            file=sys.stderr,
            flush=True,
        )
    return accelerator


def choose_precision(config: Config) -> tuple[Precision, str]:
    """The autocast type of the encoder, and who chose it: the configuration, then `accelerate launch`, then
    the device. UsageError where the first two contradict each other.
    """
    asked, on_cpu = config.train.precision, _on_cpu(config)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    flag = f"accelerate launch --mixed_precision {launched}"
    if launched not in ("", "no", "fp16", "bf16"):
        raise UsageError(f"{flag}: this trainer knows no, fp16 and bf16. Take bf16.")
    # accelerate launch says `no` also where it was not asked for anything.
    if launched not in ("", "no") and asked not in ("auto", launched):
        raise UsageError(
            f"{flag} contradicts --train.precision {asked}. Leave out one of the two, or make them agree."
        )
    reason = "as configured"
    precision: Precision
    if asked != "auto":
        precision = asked
    elif launched:
        precision = "fp32" if launched == "no" else "bf16" if launched == "bf16" else "fp16"
        reason = f"from {flag}"
    else:
        precision = "fp32" if on_cpu else precision_of_gpu()
        reason = "for this CPU" if on_cpu else "for this GPU"
    if precision == "fp16" and on_cpu:
        raise UsageError(
            f"{'train.precision fp16' if asked == 'fp16' else flag} needs a GPU (its small range needs a "
            "gradient scaler). On a CPU take fp32 or bf16."
        )
    return precision, reason


def precision_of_gpu() -> Literal["bf16", "fp16"]:
    """What train.precision auto takes on the present GPU: bf16 where it is more than emulated."""
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def continues_alone(accelerator: Accelerator) -> bool:
    """End the process group, on all ranks together. True on rank 0, which is a world of its own from here on;
    every other rank has nothing left to do and returns.

    Rank 0 may then work for hours, and nobody waits for it in a collective that has a time limit.
    """
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()
    return accelerator.is_main_process


@contextmanager
def rank_local() -> Iterator[None]:
    """Inside, this rank is a world of its own: batch norm uses its own rows and losses its own negatives.

    GeSSL's inner loop runs here, because a task belongs to one rank and every rank may hold weights of its
    own.

    >>> with rank_local():
    ...     world_size(), world_group()
    (1, None)
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world_group() -> dist.ProcessGroup | None:
    """The process group of all ranks; None where there is one process only, and inside `rank_local`."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def world_size() -> int:
    """How many ranks `world_group` spans: 1 where it is None."""
    return 1 if world_group() is None else dist.get_world_size()


def _on_cpu(config: Config) -> bool:
    """Whether training runs on the CPU. UsageError for a GPU that is not there, or that the launcher rules
    out.
    """
    launched = parse_flag_from_env("ACCELERATE_USE_CPU")
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "train.device is cuda, but torch finds no GPU here. Train with --train.device cpu, or see "
            "`fastgessl doctor`."
        )
    if config.train.device == "cuda" and launched:
        raise UsageError(
            "accelerate launch --cpu (ACCELERATE_USE_CPU) contradicts --train.device cuda. Leave out one of "
            "the two."
        )
    return config.train.device == "cpu" or launched or not torch.cuda.is_available()


def _check_launcher(config: Config) -> None:
    """UsageError for what `accelerate launch` asks for and would not get."""
    for variable, (asked, instead) in _REFUSED.items():
        if parse_flag_from_env(variable):
            raise UsageError(
                f"accelerate launch asks for {asked} ({variable}), which it does not do here. {instead}"
            )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        raise UsageError(
            f"accelerate launch --dynamo_backend {compiler} is not done here. Leave it out and give "
            "--train.compile True, which compiles the encoder by inductor."
        )
    micro_batches = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(config.train.accumulate))
    if micro_batches != str(config.train.accumulate):
        raise UsageError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS {micro_batches} contradicts --train.accumulate "
            f"{config.train.accumulate}. Give --train.accumulate {micro_batches}, or unset the variable."
        )
    several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if several and not any(name in os.environ for name in _WORLD_SIZES):
        raise UsageError(
            "accelerate launch was asked for several processes and starts one: so it does with --cpu, or "
            "without --multi_gpu. Launch N processes with `accelerate launch --multi_gpu --num_processes N "
            "-m fastgessl train ...`, also without a GPU, or with `torchrun --nproc_per_node N -m fastgessl "
            "train ... --train.device cpu`."
        )


def _check_trackers(config: Config) -> None:
    """UsageError for a tracker that would be dropped with a warning, and the run recorded nowhere."""
    if unknown := [name for name in config.log.trackers if name not in LoggerType.list()]:
        raise UsageError(
            f"log.trackers '{unknown[0]}' is no tracker that Accelerate knows. Choose from "
            f"{', '.join(sorted(LoggerType.list()))}, or give "
            "--log.trackers without a name for none."
        )
    here = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in config.log.trackers if name not in here and name != "all"]:
        raise UsageError(
            f"log.trackers {missing[0]}: its package is not installed here. pip install {missing[0]}, or "
            "leave it out; "
            f"installed are {', '.join(sorted(here)) or 'none'}."
        )
