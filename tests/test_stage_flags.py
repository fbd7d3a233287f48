"""Stages that flags add, take out and rename."""

import pytest
from micro import CONFIG_FILE

from kforcing_jax.cli.config_file import read_config
from kforcing_jax.errors import ConfigError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG_FILE)
    return str(path)


def given(file, *flags):
    return read_config(file, dict(flag.split("=", 1) for flag in flags))


def test_a_stage_is_added_as_the_largest_below_it(file, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    config = given(file, "stages.k2.steps=9", "stages.k4.window=4", "stages.k4.learning_rate=0.5")
    assert list(config.students) == ["k1", "k2", "k4"]
    assert (config.stages["k4"].window, config.stages["k4"].learning_rate, config.stages["k4"].steps) == (4, 0.5, 5)
    assert caplog.messages == ["stage k4 is new: window = 4, all else as k2 unless given"]


def test_the_name_of_a_new_stage_says_its_teacher(file):
    for flags in (["stages.k2_from_ar.window=2"], ["stages.k2-from-ar.window=2", "stages.k2-from-ar.steps=3"]):
        config = given(file, *flags)
        assert config.stages["k2-from-ar"].teacher == "ar" and "k2" in config.stages
    assert given(file, "stages.k4.window=4", "stages.k4.teacher=ar").stages["k4-from-ar"].window == 4


def test_stages_may_be_added_in_any_order(file):
    config = given(file, "stages.k8.window=8", "stages.k4.window=4", "stages.k4.steps=3", "stages.k2.steps=7")
    assert list(config.students) == ["k1", "k2", "k4", "k8"] and config.stages["k4"].steps == 3


def test_the_first_student_is_added_as_the_teacher(file):
    config = given(file, "stages.k2=none", "stages.k1=none", "stages.ar.batch_size=8", "stages.k1.window=1")
    assert list(config.students) == ["k1"]
    own = given(file, "stages.k2=none", "stages.k1=none", "stages.k1.window=1", "stages.k1.objective=distillation")
    assert own.stages["k1"].objective == "distillation"


def test_another_teacher_is_another_name_also_for_the_other_flags(file, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    for steps in ("stages.k2.steps=7", "stages.k2_from_ar.steps=7"):
        config = given(file, steps, "stages.k2.teacher=ar")
        assert list(config.students) == ["k1", "k2-from-ar"] and config.stages["k2-from-ar"].steps == 7
    assert "stage k2 is k2-from-ar, for its teacher is 'ar'; to have both" in caplog.text
    assert list(given(file, "stages.k2.teacher=previous").students) == ["k1", "k2"]


def test_a_stage_is_taken_out(file):
    assert list(given(file, "stages.k2=none").students) == ["k1"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["stages.k2.widnow=4"],
            "stages.k2.widnow is not a field of the configuration; did you mean stages.k2.window?",
        ),
        (["stages.k4.widnow=4"], "stages.k4 is not a field.*a new stage needs its window: --config.stages.k4.window=4"),
        (["stages.k4=none"], r"stages.k4 is not a field of the configuration; did you mean stages.k\d\?$"),
        (["stages.k3.window=3"], "stages.k3.window = 3 does not double the window of an earlier stage"),
        (["stages.k4.window=8"], "stages.k4 has window = 8 .* it should be called k8"),
        (["stages.k4.window=four"], "stages.k4.window = 'four' should be a whole number"),
        (
            ["stages.k2.steps=9", "stages.k2=none"],
            r"stages.k2.steps has no effect: stages.k2 = none leaves .* out",
        ),
        (
            ["stages.k1=none", "stages.k4.window=4"],
            "stages.k2.window = 2 does not double the window of an earlier stage.*it builds on k1, and without that "
            "goes too: stages.k2 = none, stages.k4 = none$",
        ),
        (["stages.ar=none"], "stages.ar is missing"),
        (
            ["stages.k2_from_ar.window=2", "stages.k2.teacher=ar"],
            "stages.k2.teacher = 'ar' makes it k2-from-ar, which is there already",
        ),
        (["stages.k2.teacher=arr"], "stages.k2.teacher = 'arr' is not one of previous, ar"),
        (["stages.k2=3"], "stages.k2 = 3 should be a group of fields"),
    ],
)
def test_a_wrong_stage_is_named_with_what_would_be_right(file, flags, says):
    with pytest.raises(ConfigError, match=says):
        given(file, *flags)
