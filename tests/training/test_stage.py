"""The training loop on a problem small enough to see through: fit a vector to the mean of the batch."""

import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.config import LoggingConfig, MeshConfig, StageConfig
from kforcing_jax.data.packing import Batch
from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.sharding import abstract_on, make_mesh, replicated
from kforcing_jax.training import stage as stage_module
from kforcing_jax.training.checkpoints import StageCheckpoints
from kforcing_jax.training.losses import Mean, weighted_mean
from kforcing_jax.training.objectives import Inputs, Objective
from kforcing_jax.training.profiling import ProfiledSteps
from kforcing_jax.training.save_times import SaveTimes
from kforcing_jax.training.spent import PARTS
from kforcing_jax.training.stage import Phase, Stage, precision_phases, train

POISON = 99


def losses(params, teacher_params, inputs):
    tokens_BxN, noise_Bx1x3 = inputs.batch.tokens, inputs.noise_BxNxK
    loss_B = jnp.mean((params["w"] + noise_Bx1x3[:, 0] - tokens_BxN) ** 2, axis=1)
    loss_B += jnp.where(jnp.any(tokens_BxN == POISON), jnp.nan, 0.0)
    return weighted_mean(loss_B, jnp.ones(loss_B.shape)), {"agreement_1": Mean(jnp.float32(1), jnp.float32(2))}


def draw_inputs(batch, key):
    return Inputs(batch, 0.1 * jax.random.normal(key, (len(batch.tokens), 1, 3)))


objective = Objective(draw_inputs, losses)


def batches(first, poisoned_step=None):
    for step in itertools.count(first + 1):
        yield Batch(np.full((2, 3), POISON if step == poisoned_step else step % 5, np.int32))


def make_stage(batches=batches, **config):
    return Stage(
        name="k1",
        config=StageConfig(**({"window": 1, "steps": 7, "batch_size": 2, "learning_rate": 0.1} | config)),
        objective=lambda dtype: objective,
        initial_params={"w": jnp.zeros(3)},
        teacher_params={},
        batches=batches,
        tokens_per_step=6,
        key=jax.random.key(0),
    )


ONE_DEVICE = MeshConfig(data=1)


def run(directory, stage, profile=None, **logging):
    mesh = make_mesh(ONE_DEVICE)
    settings = LoggingConfig(**({"log_every": 2, "checkpoint_every": 3} | logging))
    with StageCheckpoints(directory / "checkpoints", settings) as checkpoints:
        train(stage, mesh, checkpoints, directory / "metrics.jsonl", settings, profile=profile)
        return checkpoints.restore_newest(abstract_on(stage.initial_params, replicated(mesh)))[0]


def latest_step(directory):
    with StageCheckpoints(directory / "checkpoints") as checkpoints:
        return checkpoints.latest_step


class Interruption(Exception):
    pass


def interrupted_before(step):
    def interrupted(first):
        yield from itertools.islice(batches(first), step - 1)
        raise Interruption

    return interrupted


@pytest.mark.parametrize("step", [2, 5])
def test_an_interrupted_stage_ends_exactly_like_an_uninterrupted_one(tmp_path, step):
    expected = run(tmp_path / "whole", make_stage())
    with pytest.raises(Interruption):
        run(tmp_path / "cut", make_stage(interrupted_before(step)))
    resumed = run(tmp_path / "cut", make_stage())
    np.testing.assert_array_equal(resumed["w"], expected["w"])


def compilations_said(caplog):
    return [line.split("compiling ")[1] for line in caplog.messages if "compiling" in line]


@pytest.mark.parametrize("settings", [{}, {"schedule": "wsd", "decay_fraction": 0.25}])
def test_a_stage_that_is_made_longer_ends_as_if_it_had_been_so_from_the_start(tmp_path, settings, caplog):
    """Of `wsd`, while the rate is constant under both lengths."""
    caplog.set_level("INFO", "kforcing_jax")
    expected = run(tmp_path / "whole", make_stage(steps=12, **settings))
    with pytest.raises(Interruption):
        run(tmp_path / "grown", make_stage(interrupted_before(6), steps=8, **settings))
    grown = run(tmp_path / "grown", make_stage(steps=12, **settings))
    np.testing.assert_array_equal(grown["w"], expected["w"])
    assert "steps was 8 and is 12: as if it had been so from the start" in caplog.text


def test_a_cosine_that_is_made_longer_says_where_its_rate_jumps_to(tmp_path, caplog):
    run(tmp_path, make_stage(schedule="cosine"))
    longer = run(tmp_path, make_stage(schedule="cosine", steps=14))
    assert "steps was 7 and is 14 at step 7: the learning rate goes from 0 to 0.05 and follows" in caplog.text
    assert latest_step(tmp_path) == 14 and np.isfinite(longer["w"]).all()


def test_a_stage_is_saved_by_time_between_its_steps(tmp_path, monkeypatch):
    seconds = itertools.count(step=10)  # each time that the clock is looked at
    monkeypatch.setattr(stage_module, "SaveTimes", functools.partial(SaveTimes, clock=lambda: next(seconds)))
    settings = {"checkpoint_every": 100, "checkpoint_seconds": 15, "keep_newest": 9}
    run(tmp_path, make_stage(steps=5), **settings)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]


def test_a_stage_is_one_compiled_program_and_says_when_it_is_compiled(tmp_path, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    run(tmp_path, make_stage())
    assert compilations_said(caplog) == ["the training step (float32)"]
    assert re.fullmatch(r"k1          compiled in \d+\.\d s", caplog.messages[1])


def test_two_precisions_are_two_programs_and_f32_comes_last(tmp_path, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    dtypes, stage = [], make_stage(bfloat16_fraction=0.6)
    object.__setattr__(stage, "objective", lambda dtype: dtypes.append(dtype) or objective)
    run(tmp_path, stage)
    assert dtypes == ["bfloat16", "float32"]
    assert compilations_said(caplog) == ["the training step (bfloat16)", "the training step (float32)"]


def test_a_step_that_would_compile_again_is_refused(tmp_path):
    """What is compiled before the first step takes no other batch: nothing compiles unsaid."""

    def growing(first):
        for step, batch in enumerate(batches(first)):
            yield Batch(np.tile(batch.tokens, (1, 1 + step // 3)))

    with pytest.raises(TypeError, match="differ"):
        run(tmp_path, make_stage(growing))


def test_precision_phases_split_the_steps():
    assert precision_phases(StageConfig(steps=10)) == [Phase("float32", 10)]
    assert precision_phases(StageConfig(steps=10, bfloat16_fraction=0.8)) == [
        Phase("bfloat16", 8),
        Phase("float32", 10),
    ]
    assert precision_phases(StageConfig(steps=10, bfloat16_fraction=1.0)) == [Phase("bfloat16", 10)]


@pytest.mark.parametrize("poisoned", [1, 4, 6])
def test_a_nan_stops_the_stage_by_name_and_keeps_the_last_good_checkpoint(tmp_path, poisoned):
    with pytest.raises(RunError, match=f"stage k1, step {poisoned}: loss is nan"):
        run(tmp_path, make_stage(lambda first: batches(first, poisoned)))
    good = (poisoned - 1) // 3 * 3
    assert latest_step(tmp_path) == (good or None)
    resumed = run(tmp_path, make_stage())
    assert np.isfinite(resumed["w"]).all()


def test_the_average_follows_the_parameters_with_its_decay(tmp_path):
    follows = run(tmp_path / "a", make_stage(ema_decay=0.0))
    lags = run(tmp_path / "b", make_stage(ema_decay=0.9))
    assert np.all(np.abs(lags["w"]) < np.abs(follows["w"]))


def test_metrics_are_averaged_between_reports_and_the_last_step_is_reported(tmp_path):
    run(tmp_path, make_stage())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    wanted = {"stage", "step", "time", "loss", "agreement_1", "grad_norm", "tokens_per_second", "seconds"}
    assert all(wanted <= line.keys() and line["stage"] == "k1" for line in lines)
    assert lines[-1]["seconds"] >= lines[0]["seconds"] > 0


class Validations:
    """In place of a `Validation`: the mean of the averaged weights, and what was asked."""

    is_compiled = False

    def __init__(self, loss=None):
        self.compilations, self.calls, self._loss = 0, 0, loss

    def compile(self, params):
        self.is_compiled, self.compilations = True, self.compilations + 1

    def __call__(self, params):
        assert self.is_compiled
        self.calls += 1
        return {"validation_loss": float(params["w"].mean()) if self._loss is None else self._loss}


def validated(validation, **config):
    stage = make_stage(**config)
    object.__setattr__(stage, "validation", validation)
    return stage


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_is_validated_as_often_as_asked_and_at_its_end_by_one_program(tmp_path, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    validation = Validations()
    run(tmp_path, validated(validation), validate_every=3)
    found = {line["step"]: line["validation_loss"] for line in records(tmp_path) if "validation_loss" in line}
    assert found.keys() == {3, 6, 7} and len(set(found.values())) == 3
    assert [line["step"] for line in records(tmp_path)] == [2, 3, 4, 6, 7]
    assert (validation.compilations, validation.calls) == (1, 3)
    assert compilations_said(caplog) == ["the training step (float32)", "validation"]


def test_a_validation_that_does_not_fit_the_device_is_said_and_training_goes_on(tmp_path, caplog):
    class TooLarge(Validations):
        def __call__(self, params):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    run(tmp_path, validated(TooLarge()), validate_every=3)
    assert "not validated: RESOURCE_EXHAUSTED" in caplog.text
    assert (tmp_path / "checkpoints/7").is_dir()


def test_a_checkpoint_knows_the_last_validation_and_its_step_also_after_a_restart(tmp_path):
    def kept(step):
        progress = json.loads((tmp_path / f"checkpoints/{step}/progress/metadata").read_text())
        return progress["validation_step"], progress["validation_loss"]

    with pytest.raises(Interruption):
        stage = validated(Validations(loss=2.5), batches=interrupted_before(5))
        run(tmp_path, stage, validate_every=2, checkpoint_every=3)
    assert kept(3) == (2, 2.5)
    run(tmp_path, validated(Validations(loss=1.5)), validate_every=5, checkpoint_every=1)
    assert kept(7) == (7, 1.5)
    assert [line["step"] for line in records(tmp_path) if "validation_loss" in line] == [2, 5, 7]


def test_a_validation_loss_that_is_no_number_is_said_and_training_goes_on(tmp_path, caplog):
    run(tmp_path, validated(Validations(loss=math.nan)), validate_every=3)
    assert "validation loss at step 3 is nan; training goes on" in caplog.text
    assert [line["validation_loss"] for line in records(tmp_path) if "validation_loss" in line] == [None] * 3
    assert "validation_loss" not in json.loads((tmp_path / "checkpoints/7/progress/metadata").read_text())


def test_seconds_by_part_add_up_and_go_on_after_an_interruption(tmp_path):
    parts = [f"seconds_{name}" for name in PARTS]
    with pytest.raises(Interruption):
        run(tmp_path, validated(Validations(), batches=interrupted_before(6)), validate_every=2)
    run(tmp_path, validated(Validations()), validate_every=2)
    lines = records(tmp_path)
    for line in lines:
        assert sum(line[part] for part in parts) == pytest.approx(line["seconds"], abs=0.031)  # six are rounded
    assert all(lines[-1][part] >= lines[0][part] for part in parts)
    assert lines[-1]["seconds_restoring"] > 0 and lines[-1]["seconds_saving"] > 0


def test_the_learning_rate_of_a_report_is_that_of_its_step(tmp_path):
    run(tmp_path, make_stage(schedule="linear", warmup_steps=2), log_every=1)
    rates = [line["learning_rate"] for line in records(tmp_path)]
    np.testing.assert_allclose(rates, [0.1 / 3, 0.2 / 3, 0.1, 0.08, 0.06, 0.04, 0.02], rtol=1e-6)


def test_the_steps_to_profile_leave_a_trace_and_the_place_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    run(tmp_path, make_stage(), profile=(ProfiledSteps.parse("3:4"), tmp_path / "profile"))
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert f"profile in {tmp_path / 'profile'}; open it with" in caplog.text


def test_a_profile_that_cannot_be_taken_does_not_end_training(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the folder should be")
    run(tmp_path, make_stage(), profile=(ProfiledSteps(3, 20), tmp_path / "profile"))
    assert latest_step(tmp_path) == 7 and "no profile: " in caplog.text


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "0:5", "5:4", "a:b", "1:2:3", "-1:5"])
def test_steps_to_profile_that_are_none_are_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=re.escape(f"profile = {text!r} should be FIRST:LAST")):
        ProfiledSteps.parse(text)


def test_a_checkpoint_of_another_shape_is_refused_by_path(tmp_path):
    run(tmp_path, make_stage(), checkpoint_every=2)
    stage = make_stage(steps=9)
    object.__setattr__(stage, "initial_params", {"w": jnp.zeros(4)})
    with pytest.raises(RunError, match=r"checkpoints/7 does not fit this model"):
        run(tmp_path, stage)


def damage(directory, pattern, how):
    """Every file of a checkpoint that the pattern names is cut short, emptied or removed."""
    files = [path for path in directory.glob(pattern) if path.is_file()]
    assert files
    for path in files:
        if how == "removed":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2 if how == "cut short" else 0)


@pytest.mark.parametrize(
    ("pattern", "how"),
    [("ema/d/*", "cut short"), ("training/_METADATA", "emptied"), ("progress/*", "removed"), ("**/*", "removed")],
)
def test_training_goes_on_before_a_damaged_checkpoint_and_ends_the_same(tmp_path, pattern, how, caplog):
    expected = run(tmp_path, make_stage())
    damage(tmp_path / "checkpoints/7", pattern, how)
    np.testing.assert_array_equal(run(tmp_path, make_stage())["w"], expected["w"])
    assert "checkpoints/7 is damaged" in caplog.text and "taking that of step 6" in caplog.text
    assert latest_step(tmp_path) == 7


def test_damaged_weights_are_passed_over_and_left_where_they_are(tmp_path, caplog):
    run(tmp_path, make_stage(), checkpoint_every=6)
    damage(tmp_path / "checkpoints/7", "ema/_METADATA", "cut short")
    abstract = abstract_on({"w": jnp.zeros(3)}, replicated(make_mesh(ONE_DEVICE)))
    with StageCheckpoints(tmp_path / "checkpoints") as checkpoints:
        params, step = checkpoints.restore_newest(abstract)
        assert np.isfinite(params["w"]).all() and step == 6
        assert checkpoints.latest_step == 7 and "taking that of step 6" in caplog.text
        damage(tmp_path / "checkpoints/6", "ema/_METADATA", "emptied")
        with pytest.raises(RunError, match=r"checkpoints/6 is damaged .* no good one before it"):
            checkpoints.restore_newest(abstract)


def test_what_metrics_say_of_an_earlier_try_is_dropped(tmp_path):
    run(tmp_path, make_stage(), log_every=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "other", "step": 1}\n{"stage": "k1", "st')
    shutil.rmtree(tmp_path / "checkpoints")
    run(tmp_path, make_stage(), log_every=5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("other", 1), ("k1", 5), ("k1", 7)]


def test_metrics_are_read_once_a_report(tmp_path, monkeypatch):
    read, real = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: read.append(len(tree)) or real(tree))
    run(tmp_path, make_stage(), log_every=4, checkpoint_every=7)
    assert [steps for steps in read if steps] == [4, 3]


@pytest.fixture
def interruptible():
    """Tests may run in the background, where shells let SIGINT be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_a_step_which_is_kept(tmp_path, number, caplog):
    before = signal.getsignal(number)
    caplog.set_level("INFO", "kforcing_jax")

    def signalled(first):
        for step, batch in enumerate(batches(first), start=first + 1):
            if step == 5:
                os.kill(os.getpid(), number)
                while signal.getsignal(number) != before:
                    time.sleep(0.01)
            yield batch

    looked_at = Validations()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, validated(looked_at, batches=signalled), validate_every=5)
    assert looked_at.calls == 0  # there may be little time
    assert latest_step(tmp_path) == 5 and signal.getsignal(number) == before
    assert "stopping after this step" in caplog.text
    stopped = run(tmp_path, make_stage())
    assert "goes on from step 5/7" in caplog.text
    np.testing.assert_array_equal(stopped["w"], run(tmp_path / "whole", make_stage())["w"])


@pytest.mark.usefixtures("interruptible")
def test_a_signal_during_the_last_validation_stops_before_the_next_stage(tmp_path):
    class Signalled(Validations):
        def __call__(self, params):
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) != signal.default_int_handler:
                time.sleep(0.01)
            return super().__call__(params)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, validated(Signalled()), validate_every=100)
    assert latest_step(tmp_path) == 7


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def signalled(first):
        os.kill(os.getpid(), signal.SIGINT)
        yield from batches(first)

    try:
        run(tmp_path, make_stage(signalled))
    finally:
        signal.signal(signal.SIGINT, before)
    assert latest_step(tmp_path) == 7


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_does_not_wait_for_the_step(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def signalled(first):
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) != before:  # two signals at once are one
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        yield from batches(first)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, make_stage(signalled))
    assert latest_step(tmp_path) is None
