"""Stopping after any step and continuing is as if nothing had happened: every bit of the state and of the
log, for every method.
"""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_training import differences, run_steps, small_config, start, write_images
from tiny_run import read_lines

from fastgessl.methods import METHODS
from fastgessl.methods.simclr import SimCLR
from fastgessl.runs import checkpoint
from fastgessl.schedules import half_cosine, learning_rate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


def resumes_exactly(config, tmp_path):
    """Take every step of a run once more, each in a training of its own that starts from the checkpoint
    before it.
    """
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_steps(start(config, whole), whole)
    saved = checkpoint.complete(whole)
    assert len(saved) == config.train.max_steps
    for before, after in itertools.pairwise(saved):
        run_steps(start(config, resumed, before), resumed, one=True)
        assert (
            differences(checkpoint.load(resumed / "checkpoints" / after.name), checkpoint.load(after)) == []
        )
    assert read_lines(resumed / "metrics.jsonl") == read_lines(whole / "metrics.jsonl")[1:]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_step_of_every_method_continues_to_the_bit(data, tmp_path, name):
    # sigma on every second step, micro-batches, an epoch that ends inside the run, queues, frozen prototypes,
    # momentum encoders
    resumes_exactly(
        small_config(data, name, gessl={"w_sigma": 1.0, "every": 2, "inner_lr_schedule": "cosine"}), tmp_path
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {"name": "lars", "clip_gradient": 1.0}},
        {"optim": {"name": "adamw", "clip_gradient": 1.0}},
        {"dsa": {"weight": 0.5, "helper": "momentum", "neighbours": 2}},
        {"train": {"gradient_cache": 3}},
    ],
    ids=["lars", "adamw", "dsa", "gradient caching"],
)
def test_optimizers_regulator_and_gradient_caching_continue_to_the_bit(data, tmp_path, sections):
    shorter = {"train": sections.get("train", {}) | {"max_steps": 3}}
    resumes_exactly(small_config(data, **sections | shorter), tmp_path)


def test_learning_rate_and_weight_decay_follow_their_schedules_and_vectors_do_not_decay(data, tmp_path):
    optim = {"name": "adamw", "base_lr": 0.8, "weight_decay": 0.04}
    schedule = {"warmup_epochs": 1, "end_weight_decay": 10}
    training = start(small_config(data, optim=optim, schedule=schedule), tmp_path)
    found = []
    for training.step in range(5):
        training.begin_step()
        found.append([(group["lr"], group["weight_decay"]) for group in training.optimizer.param_groups])
    decays = half_cosine(0.04, 0.4, 5)
    rates = learning_rate(0.8 * 16 / 256, 5, warmup_steps=3)
    assert found == [
        [(rate, decay), (rate, 0.0)] for rate, decay in zip(rates.tolist(), decays.tolist(), strict=True)
    ]


class Random(SimCLR):
    """Draws from every generator that a method may draw from."""

    def forward(self, views=None, *, features=None):
        out = super().forward(views, features=features)
        noise = torch.rand_like(out.projections) + random.random() + np.random.random()
        return replace(out, projections=out.projections + noise)


def test_the_generators_of_torch_numpy_and_python_continue_to_the_bit(data, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "simclr", Random)
    resumes_exactly(small_config(data, train={"max_steps": 3}), tmp_path)
