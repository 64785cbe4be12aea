"""Schedules against the formulas they cite."""

import math

import numpy as np
import pytest

from fastgessl.schedules import (
    half_cosine,
    inner_learning_rate,
    learning_rate,
    linear_warmup,
    scaled_learning_rate,
)


def test_learning_rate_warms_up_linearly_then_follows_half_a_cosine():
    rates = learning_rate(0.8, 110, warmup_steps=10)
    assert rates.shape == (110,)
    for step in range(10):
        assert rates[step] == pytest.approx(0.8 * (step + 1) / 10)
    for step in range(100):
        assert rates[10 + step] == pytest.approx(0.4 * (1 + math.cos(math.pi * step / 99)))


def test_learning_rate_ends_at_the_asked_share():
    assert learning_rate(2.0, 50, warmup_steps=5, end=0.1)[-1] == pytest.approx(0.2)


def test_constant_learning_rate_stays():
    assert set(learning_rate(0.3, 20, warmup_steps=4, shape="constant")[4:]) == {0.3}


def test_a_warm_up_longer_than_the_run_fills_it():
    rates = learning_rate(1.0, 4, warmup_steps=100)
    assert rates.tolist() == [0.25, 0.5, 0.75, 1.0]


def test_momentum_follows_byols_formula_and_weight_decay_dinos():
    momentum, decay = half_cosine(0.996, 1.0, 1000), half_cosine(0.04, 0.4, 1000)
    angles = [math.pi * step / 1000 for step in range(1000)]
    expected = [1 - (1 - 0.996) * (math.cos(angle) + 1) / 2 for angle in angles]
    np.testing.assert_allclose(momentum, expected, rtol=1e-12)
    expected = [0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(angle)) for angle in angles]
    np.testing.assert_allclose(decay, expected, rtol=1e-12)
    assert set(half_cosine(0.04, 0.04, 50)) == {0.04}


def test_the_teacher_s_temperature_rises_in_a_straight_line_and_stays():
    temperature = linear_warmup(0.04, 0.07, 100, warmup_steps=30)
    for step in range(100):
        assert temperature[step] == pytest.approx(0.04 + 0.03 * min(step / 30, 1))
    assert set(linear_warmup(0.04, 0.07, 5, warmup_steps=0)) == {0.07}


def test_alpha_is_constant_half_a_cosine_or_a_multiple_of_the_outer_rate():
    outer = learning_rate(0.8, 40, warmup_steps=10)
    assert set(inner_learning_rate(0.03, outer, shape="constant")) == {0.03}
    cosine = inner_learning_rate(0.03, outer, shape="cosine")
    for step in range(40):
        assert cosine[step] == pytest.approx(0.015 * (1 + math.cos(math.pi * step / 40)))
    assert cosine[-1] > 0
    assert inner_learning_rate(0.03, outer, shape="times_lr").tolist() == [0.03 * rate for rate in outer]


def test_learning_rate_scales_with_the_batch_unless_told_not_to():
    assert scaled_learning_rate(0.3, 4096, "linear") == pytest.approx(4.8)
    assert scaled_learning_rate(0.3, 4096, "none") == 0.3
