"""A stage whose number of steps has changed since it was trained: which checkpoints count, and what it means.

Every checkpoint has in its `progress` the `lengths` of its stage so far: pairs of a step and the number of steps that
the stage was to have from there on.
"""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kforcing_jax.config import StageConfig
from kforcing_jax.training.optimizer import learning_rate
from kforcing_jax.workdir import complete_steps

_LOG = logging.getLogger("kforcing_jax")
# Of checkpoints past the end of a stage that was made shorter.
_LATER = "later-"


def fit_checkpoints(directory: Path, last_step: int) -> list[int]:
    """Renames checkpoints past a stage's last step, and takes back those that are not past it any more.

    Returns the steps of those that were put aside now. All processes of a run have to call this together.
    """
    past = [step for step in complete_steps(directory) if step > last_step]
    if jax.process_index() == 0:
        for step in past:
            aside = directory / f"{_LATER}{step}"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier change
            (directory / str(step)).rename(aside)
        for aside in directory.glob(f"{_LATER}*"):
            number = aside.name.removeprefix(_LATER)
            if number.isdecimal() and int(number) <= last_step and not (directory / number).exists():
                aside.rename(directory / number)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("fit checkpoints")
    return past


def lengths_from(before: Sequence[Sequence[int]] | None, step: int, steps: int) -> list[list[int]]:
    """`lengths` of a stage that goes on from a step and is to have `steps`; `before` are those of its checkpoint.

    Of a checkpoint that does not say, it is taken to have been so from the start.
    """
    if not before:
        return [[0, steps]]
    kept = [list(pair) for pair in before]
    return kept if kept[-1][1] == steps else [*kept, [step, steps]]


def what_changed(config: StageConfig, lengths: Sequence[Sequence[int]], step: int) -> tuple[str, bool] | None:
    """(a sentence, whether all is as if `config.steps` had been so from the start) of a stage after `step` steps.

    `lengths` are those of its checkpoint. None where nothing has changed.
    """
    if not lengths or lengths[-1][1] == config.steps:
        return None
    before, steps = lengths[-1][1], config.steps
    said = f"steps was {before:,} and is {steps:,}"
    differences = [*_of_rates(config, lengths, step), *_of_precision(config, lengths, step)]
    if differences:
        return f"{said} at step {step:,}: {'; '.join(differences)}", False
    return f"{said}: as if it had been so from the start", True


def say_what_changed(name: str, config: StageConfig, progress: dict, step: int) -> None:
    """Says `what_changed` of a stage; `progress` is what its checkpoint of that step says of itself."""
    changed = what_changed(config, progress.get("lengths") or [], step)
    if changed:
        words, is_the_same = changed
        _LOG.log(logging.INFO if is_the_same else logging.WARNING, f"{name:<11} {words}")


def _of_rates(config, lengths, step):
    """Where there were no steps, no rate was another one."""
    then = np.concatenate([_rates(config, steps, first, end) for first, end, steps in _segments(lengths, step)])
    if np.array_equal(then, _rates(config, config.steps, 0, step)):
        return
    followed = [steps for first, end, steps in _segments(lengths, step) if end > first]
    last = _rates(config, followed[-1], step, step + 1)[0]
    if step == config.steps:
        yield f"it ends with a learning rate of {last:.3g}: its {config.schedule} schedule was that of another length"
        return
    now = _rates(config, config.steps, step, step + 1)[0]
    yield (
        f"the learning rate goes from {last:.3g} to {now:.3g} and follows the {config.schedule} schedule of "
        f"{config.steps:,} steps from here"
    )


def _of_precision(config, lengths, step):
    then = sum(np.clip(_low(config, steps), first, end) - first for first, end, steps in _segments(lengths, step))
    if then != min(_low(config, config.steps), step):
        low = _low(config, config.steps)
        yield f"bfloat16 was for {then:,} steps so far, and would be for the first {low:,} of {config.steps:,}"


def _segments(lengths, step):
    """(first, end, steps): from step `first` to before `end` the stage was to have so many steps."""
    ends = [pair[0] for pair in lengths[1:]] + [step]
    return [(first, end, steps) for (first, steps), end in zip(lengths, ends, strict=True)]


def _rates(config, steps, first, end) -> np.ndarray:
    """Learning rates of the steps from `first` to before `end`, of a stage of so many steps."""
    rate = learning_rate(dataclasses.replace(config, steps=steps))
    return np.asarray(jnp.broadcast_to(rate(jnp.arange(first, end)), (end - first,)))


def _low(config, steps) -> int:
    """How many steps of a stage of so many are in bfloat16."""
    return round(steps * config.bfloat16_fraction)
