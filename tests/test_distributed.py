"""What a launcher asks for, and which ranks a collective spans; real launchers are in
tests/training/test_processes.py, several processes in tests/objective/test_ranks.py.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastgessl import distributed
from fastgessl.config import Config, UsageError
from fastgessl.distributed import build_accelerator, choose_precision, rank_local, world_group, world_size


def configured(**sections):
    return Config.model_validate({"log": {"trackers": ()}} | sections)


def test_one_process_spans_itself():
    assert (world_size(), world_group()) == (1, None)


@pytest.fixture
def four_ranks():
    """A process group of four whose collectives send nothing: this process is its rank 1."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def test_inside_rank_local_a_rank_is_alone_even_if_left_by_an_error(four_ranks):
    assert (world_size(), world_group()) == (4, dist.group.WORLD)
    with pytest.raises(KeyError), rank_local():
        with rank_local():
            assert (world_size(), world_group()) == (1, None)
        assert world_size() == 1
        raise KeyError
    assert world_size() == 4


def test_a_tracker_whose_package_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "get_available_trackers", list)
    with pytest.raises(UsageError, match=r"log.trackers tensorboard: .* pip install tensorboard"):
        build_accelerator(configured(log={"trackers": ("tensorboard",)}), tmp_path)


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_that_only_emulates_bf16_trains_in_fp16(monkeypatch, native, precision):
    """Without an argument torch counts emulation as support."""
    gpu = SimpleNamespace(
        is_available=lambda: True,
        is_bf16_supported=lambda including_emulation=True: native or including_emulation,
    )
    monkeypatch.setattr(torch, "cuda", gpu)
    assert choose_precision(configured()) == (precision, "for this GPU")


@pytest.mark.parametrize(
    ("launched", "asked", "chosen"),
    [
        ("bf16", "auto", "bf16"),
        ("no", "auto", "fp32"),
        ("no", "bf16", "bf16"),  # `no` is also what the launcher says where it was not asked
        ("bf16", "bf16", "bf16"),
        ("bf16", "fp32", "--mixed_precision bf16 contradicts --train.precision fp32"),
        ("fp16", "auto", "--mixed_precision fp16 needs a GPU"),
        ("fp8", "auto", "--mixed_precision fp8: .* Take bf16"),
    ],
)
def test_the_launcher_s_precision_is_taken_or_refused_by_name(monkeypatch, launched, asked, chosen):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config = configured(train={"precision": asked, "device": "cpu"})
    if chosen in ("fp32", "bf16"):
        assert choose_precision(config)[0] == chosen
    else:
        with pytest.raises(UsageError, match=chosen):
            choose_precision(config)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed .* --train.sharding fsdp"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP .* --train.sharding fsdp"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism configuration"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend inductor .* --train.compile True"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "contradicts --train.accumulate 2. Give .* 4"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "several processes and starts one"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_the_launcher_asks_and_does_not_get_is_refused_by_name(monkeypatch, tmp_path, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        build_accelerator(configured(train={"accumulate": 2}), tmp_path)


def test_a_launcher_for_the_cpu_and_a_configuration_for_a_gpu_contradict_each_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_precision(configured()) == ("fp32", "for this CPU")
    with pytest.raises(UsageError, match=r"contradicts --train.device cuda"):
        choose_precision(configured(train={"device": "cuda"}))
