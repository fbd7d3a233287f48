"""Rotary scaling out of config.json: the formulas of transformers for what a file leaves out."""

import math

import pytest

from kforcing_jax.architecture import Rope
from kforcing_jax.interop.fields import Fields
from kforcing_jax.interop.rope import read_rope, rope_fields

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def rope_of(config, max_length=4096):
    fields = Fields(config)
    rope = read_rope(fields, max_length)
    assert not fields.problems
    return rope


def test_old_and_new_fields_say_the_same():
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2}}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert rope_of(new) == rope_of(old) == Rope(base=5e5, scaling="linear", factor=2.0)


@pytest.mark.parametrize("factor", [1, 1.0, None])
def test_a_factor_of_one_says_nothing(factor):
    assert rope_of({"rope_parameters": {"rope_type": "default", "factor": factor}}) == Rope()
    fields = Fields({"rope_parameters": {"rope_type": "default", "factor": 2.0}})
    read_rope(fields, 4096)
    assert fields.problems == ["rope_parameters.factor = 2.0 is not known here"]


def test_without_any_field_the_base_is_ten_thousand():
    assert rope_of({}) == Rope() == rope_of({"rope_scaling": None, "rope_theta": None})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 0.7, "mscale_all_dim": 0.3}, (0.07 * math.log(4) + 1) / (0.03 * math.log(4) + 1)),
        ({"mscale": 0.7}, 0.1 * math.log(4) + 1),
        ({"mscale": 0.7, "mscale_all_dim": 0.0}, 0.1 * math.log(4) + 1),
    ],
)
def test_the_factor_of_yarn(changes, expected):
    assert rope_of({"rope_scaling": YARN | changes}).attention_factor == pytest.approx(expected)


def test_the_length_of_yarn():
    assert rope_of({"rope_scaling": YARN}).original_length == 1024
    bare = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}
    assert rope_of({"rope_scaling": bare}).original_length == 4096
    assert rope_of({"rope_scaling": YARN, "original_max_position_embeddings": 512}).original_length == 512


def test_a_factor_that_is_not_said_is_what_the_lengths_say():
    assert rope_of({"rope_scaling": YARN | {"factor": None}}, 8192).factor == 8.0


def test_zero_stands_for_the_usual_bounds():
    rope = rope_of({"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": None}})
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, True)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(),
        Rope(base=5e5, scaling="linear", factor=3.0),
        Rope(scaling="llama3", factor=8.0, original_length=64, low_freq_factor=1.5, high_freq_factor=5.0),
        Rope(scaling="yarn", factor=4.0, original_length=64, beta_fast=16.0, truncate=False, attention_factor=1.1),
    ],
)
def test_what_is_written_reads_back(rope):
    assert rope_of(rope_fields(rope)) == rope
