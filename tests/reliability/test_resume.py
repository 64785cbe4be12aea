"""Stopping after any step and going on is as if nothing had happened: every bit of the state and of the log,
for every method.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from reliability.small_training import differences, run_steps, small_config, start, write_images
from tiny_run import read_lines

from fastgessl.methods import METHODS
from fastgessl.methods.simclr import SimCLR
from fastgessl.runs import checkpoint
from fastgessl.training import health as guard


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
        training = start(config, resumed)
        run_steps(training, resumed, training.load(before), one=True)
        assert (
            differences(checkpoint.load(resumed / "checkpoints" / after.name), checkpoint.load(after)) == []
        )
    assert read_lines(resumed / "metrics.jsonl") == read_lines(whole / "metrics.jsonl")[1:]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_step_of_every_method_goes_on_to_the_bit(data, tmp_path, monkeypatch, name):
    monkeypatch.setitem(
        guard._PATIENCE, "collapsed", 2
    )  # DINO's narrow head begins collapsed: what the log remembers goes on too
    # sigma on every second step, micro-batches, an epoch that ends inside the run, queues, frozen prototypes,
    # momentum encoders
    resumes_exactly(
        small_config(data, name, gessl={"w_sigma": 1.0, "every": 2, "inner_lr_schedule": "cosine"}), tmp_path
    )


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_every_optimiser_goes_on_to_the_bit(data, tmp_path, optimizer):
    resumes_exactly(
        small_config(data, optim={"name": optimizer, "clip_gradient": 1.0}, train={"max_steps": 3}), tmp_path
    )


def test_the_dsa_regulator_goes_on_to_the_bit(data, tmp_path):
    resumes_exactly(
        small_config(
            data, dsa={"weight": 0.5, "helper": "momentum", "neighbours": 2}, train={"max_steps": 3}
        ),
        tmp_path,
    )


def test_gradient_caching_goes_on_to_the_bit(data, tmp_path):
    resumes_exactly(small_config(data, train={"max_steps": 3, "gradient_cache": 3}), tmp_path)


class Random(SimCLR):
    """Draws from every generator that a method may draw from."""

    def forward(self, views=None, *, features=None):
        out = super().forward(views, features=features)
        noise = torch.rand_like(out.projections) + random.random() + np.random.random()
        return replace(out, projections=out.projections + noise)


def test_the_generators_of_torch_numpy_and_python_go_on_to_the_bit(data, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "simclr", Random)
    resumes_exactly(small_config(data, train={"max_steps": 3}), tmp_path)
