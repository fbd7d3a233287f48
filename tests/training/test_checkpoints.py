"""Which checkpoints of a stage stay, and how they are read while another process trains."""

import os
import shutil

import jax
import jax.numpy as jnp
import pytest

from kforcing_jax.config import LoggingConfig
from kforcing_jax.errors import RunError
from kforcing_jax.training.checkpoints import StageCheckpoints
from kforcing_jax.training.step import TrainState


def state(step):
    w = {"w": jnp.full(3, step, jnp.float32)}
    return TrainState(step=jnp.int32(step), params=w, ema=w, opt_state={"m": jnp.zeros(2)})


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0).ema)


def save(folder, losses, **settings):
    """Checkpoints of steps 1, 2, ... with these validation losses, None where nobody has validated."""
    with StageCheckpoints(folder, LoggingConfig(**settings)) as checkpoints:
        for step, loss in enumerate(losses, start=1):
            progress = {"seconds": 1.0} | ({} if loss is None else {"validation_loss": loss, "validation_step": step})
            checkpoints.save(state(step), step, progress)
    return folder


def steps(folder):
    return sorted(int(name) for name in os.listdir(folder))


def test_the_newest_the_mth_and_the_best_stay_each_by_its_field(tmp_path):
    losses = [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]
    assert steps(save(tmp_path / "newest", losses, keep_newest=1)) == [6]
    assert steps(save(tmp_path / "every", losses, keep_newest=1, keep_every=4)) == [4, 6]
    assert steps(save(tmp_path / "best", losses, keep_newest=1, keep_best=2)) == [2, 3, 6]


def test_the_last_checkpoint_stays_whatever_it_is_worth(tmp_path):
    assert steps(save(tmp_path / "a", [1.0, 2.0, float("nan")], keep_newest=1, keep_best=1)) == [1, 3]
    assert steps(save(tmp_path / "b", [1.0, 2.0, None], keep_newest=1, keep_best=1)) == [1, 3]


def test_what_stays_may_change_with_the_run(tmp_path):
    folder = save(tmp_path / "run", [3.0, 1.0, 2.0], keep_newest=3, keep_best=1)
    with StageCheckpoints(folder, LoggingConfig(keep_newest=1, keep_best=1)) as checkpoints:
        checkpoints.save(state(4), 4, {"seconds": 1.0})
    assert steps(folder) == [2, 4]


def test_any_checkpoint_that_is_there_can_be_read(tmp_path):
    folder = save(tmp_path / "run", [None] * 3, keep_newest=3)
    with StageCheckpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore_newest(ABSTRACT)[1] == 3
        assert checkpoints.restore_newest(ABSTRACT, last_step=2)[1] == 2
        assert checkpoints.restore_step(ABSTRACT, 1)["w"].tolist() == [1, 1, 1]
        with pytest.raises(RunError, match="has no checkpoint of step 7, but of 1, 2, 3"):
            checkpoints.restore_step(ABSTRACT, 7)


def test_a_checkpoint_that_goes_while_it_is_read_is_no_damage(tmp_path, caplog):
    """As where another process trains, makes a new one and deletes this one."""
    folder = save(tmp_path / "run", [None], keep_newest=1)
    with StageCheckpoints(folder, read_only=True) as checkpoints:
        real = checkpoints._reader.restore

        def goes(path, args):
            if path.name == "1":
                shutil.copytree(path, path.with_name("2"))
                shutil.rmtree(path)
            return real(path, args=args)

        checkpoints._reader.restore = goes
        assert checkpoints.restore_newest(ABSTRACT)[1] == 2
    assert "damaged" not in caplog.text


def test_reading_leaves_everything_as_it_is(tmp_path, caplog):
    folder = save(tmp_path / "run", [None, None])
    for path in folder.glob("2/ema/**/d/*"):
        os.truncate(path, 10)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with StageCheckpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore_newest(ABSTRACT)[1] == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "checkpoints" not in os.listdir(tmp_path) and "2 is damaged" in caplog.text
