"""Rotary frequencies of every scaling, against formulas written out for one channel."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.architecture import Rope
from kforcing_jax.models.rotary import rotary_angles, rotary_frequencies

WIDTH = 16


def plain(base, channel):
    return base ** (-2 * channel / WIDTH)


def test_linear_scaling_divides_positions():
    scaled = rotary_angles(jnp.array([8.0]), Rope(base=500.0, scaling="linear", factor=4.0), WIDTH)
    np.testing.assert_allclose(scaled, rotary_angles(jnp.array([2.0]), Rope(base=500.0), WIDTH), rtol=1e-6)


def test_llama3_keeps_fast_channels_divides_slow_ones_and_blends_between():
    rope = Rope(
        base=10_000.0, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64
    )
    expected = []
    for channel in range(WIDTH // 2):
        frequency = plain(rope.base, channel)
        wavelength = 2 * math.pi / frequency
        if wavelength < 64 / 4:
            expected.append(frequency)
        elif wavelength > 64 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    np.testing.assert_allclose(rotary_frequencies(rope, WIDTH), expected, rtol=1e-5)
    assert expected[0] == 1 and expected[-1] == pytest.approx(plain(rope.base, 7) / 8)


def test_yarn_ramps_from_kept_to_divided_channels_and_scales_what_is_attended():
    rope = Rope(
        base=10_000.0,
        scaling="yarn",
        factor=4.0,
        original_length=64,
        beta_fast=4.0,
        beta_slow=1.0,
        attention_factor=1.25,
    )
    first = math.floor(WIDTH / 2 * math.log(64 / (4 * 2 * math.pi)) / math.log(1e4))
    last = math.ceil(WIDTH / 2 * math.log(64 / (2 * math.pi)) / math.log(1e4))
    expected = [
        plain(rope.base, c) * (1 - (share := min(max((c - first) / (last - first), 0), 1)) + share / 4)
        for c in range(WIDTH // 2)
    ]
    np.testing.assert_allclose(rotary_frequencies(rope, WIDTH), expected, rtol=1e-5)
    cos, sin = rotary_angles(jnp.array([5]), rope, WIDTH)
    np.testing.assert_allclose(cos**2 + sin**2, 1.25**2, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"scaling": "dynamic"}, r"model.rope.scaling = 'dynamic' is not one of default, linear, llama3, yarn"),
        ({"base": 1.0}, r"model.rope.base = 1.0 should be above 1, and finite"),
        ({"factor": 0.0}, r"model.rope.factor = 0.0 should be positive and finite"),
        ({"scaling": "yarn"}, r"model.rope.original_length = 0 should be at least 1 with yarn"),
        (
            {"scaling": "llama3", "original_length": 8, "low_freq_factor": 4.0},
            r"model.rope.low_freq_factor = 4.0 should be positive and below model.rope.high_freq_factor = 4.0",
        ),
    ],
)
def test_what_a_rope_cannot_be_is_named(changes, line):
    assert line in list(Rope(**changes).problems())
