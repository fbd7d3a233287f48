"""What another number of steps means for a stage that has begun, by its schedule; and which checkpoints count."""

import json

import pytest

from kforcing_jax.config import StageConfig
from kforcing_jax.training.changed_steps import fit_checkpoints, lengths_from, what_changed


def stage(steps, **fields):
    return StageConfig(window=1, steps=steps, learning_rate=0.1, **fields)


def said(config, lengths, step):
    words, _ = what_changed(config, lengths, step)
    return words


def is_the_same(config, lengths, step):
    _, same = what_changed(config, lengths, step)
    return same


def test_nothing_is_said_where_nothing_changed_or_nothing_is_known():
    assert what_changed(stage(7), [[0, 7]], 3) is None
    assert what_changed(stage(7), [], 3) is None


@pytest.mark.parametrize("step", [0, 1, 500, 700])
def test_a_constant_rate_knows_no_length(step):
    assert is_the_same(stage(1000, warmup_steps=20), [[0, 700]], step)
    assert said(stage(1000), [[0, 700]], 700) == ("steps was 700 and is 1,000: as if it had been so from the start")


def test_warm_up_stable_decay_may_change_until_the_rate_falls_under_either_length():
    wsd = dict(schedule="wsd", decay_fraction=0.2)
    assert is_the_same(stage(1000, **wsd), [[0, 500]], 400)  # the rate falls from step 400 of 500
    assert not is_the_same(stage(1000, **wsd), [[0, 500]], 402)
    assert is_the_same(stage(500, **wsd), [[0, 1000]], 400)
    assert not is_the_same(stage(500, **wsd), [[0, 1000]], 450)
    assert "goes from 0.1 to 0.05 and follows the wsd schedule of 500 steps" in said(
        stage(500, **wsd), [[0, 1000]], 450
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_rate_that_falls_all_the_way_jumps_and_that_is_said(schedule):
    words = said(stage(200, schedule=schedule), [[0, 100]], 50)
    after = {"cosine": "0.0854", "linear": "0.075"}[schedule]
    assert words == (
        f"steps was 100 and is 200 at step 50: the learning rate goes from 0.05 to {after} and follows the {schedule} "
        "schedule of 200 steps from here"
    )
    assert is_the_same(stage(200, schedule=schedule), [[0, 100]], 0)


def test_a_schedule_that_is_cut_short_is_said_with_the_rate_that_it_ends_with():
    words = said(stage(50, schedule="cosine"), [[0, 100]], 50)
    assert "it ends with a learning rate of 0.05: its cosine schedule was that of another length" in words


def test_a_length_that_is_set_back_in_time_was_never_another_one():
    lengths = [[0, 100], [50, 200]]
    assert is_the_same(stage(100, schedule="cosine"), lengths, 50)
    assert not is_the_same(stage(100, schedule="cosine"), lengths, 60)


def test_a_length_under_which_nothing_was_trained_has_no_rate():
    words = said(stage(200, schedule="linear"), [[0, 100], [50, 50]], 50)
    assert "steps was 50 and is 200 at step 50: the learning rate goes from 0.05 to 0.075" in words


def test_bfloat16_that_ends_elsewhere_is_said():
    low = dict(bfloat16_fraction=0.5)
    assert is_the_same(stage(200, **low), [[0, 100]], 50)
    assert "bfloat16 was for 50 steps so far, and would be for the first 100 of 200" in said(
        stage(200, **low), [[0, 100]], 60
    )
    assert "bfloat16 was for 60 steps so far, and would be for the first 50 of 100" in said(
        stage(100, **low), [[0, 200]], 60
    )


def test_lengths_hold_every_change_once():
    assert lengths_from(None, 0, 100) == [[0, 100]]
    assert lengths_from([[0, 100]], 40, 100) == [[0, 100]]
    assert lengths_from([[0, 100]], 40, 200) == [[0, 100], [40, 200]]


def checkpoints(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "of").write_text(json.dumps(name))
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_past_the_end_are_put_aside_and_come_back(tmp_path):
    folder = checkpoints(tmp_path / "checkpoints", "400", "600", "700")
    assert fit_checkpoints(folder, 600) == [700]
    assert names(folder) == ["400", "600", "later-700"]
    assert fit_checkpoints(folder, 650) == []
    assert names(folder) == ["400", "600", "later-700"]
    assert fit_checkpoints(folder, 700) == []
    assert names(folder) == ["400", "600", "700"]


def test_a_checkpoint_that_was_made_meanwhile_stays(tmp_path):
    folder = checkpoints(tmp_path / "checkpoints", "600", "700", "later-700")
    fit_checkpoints(folder, 700)
    assert names(folder) == ["600", "700", "later-700"]


def test_weights_from_elsewhere_stay_until_there_are_newer_ones(tmp_path):
    folder = checkpoints(tmp_path / "checkpoints", "0")
    assert fit_checkpoints(folder, 0) == fit_checkpoints(folder, 5) == [] and names(folder) == ["0"]
    assert fit_checkpoints(tmp_path / "nowhere", 5) == []


def test_a_checkpoint_that_does_not_say_was_to_have_its_steps_from_the_start():
    assert lengths_from(None, 300, 700) == lengths_from([], 0, 700) == [[0, 700]]
    assert what_changed(StageConfig(steps=900), lengths_from(None, 400, 400), 400)[1]
