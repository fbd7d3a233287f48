"""Training one stage: steps, reports and checkpoints."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from kforcing_jax.config import LoggingConfig, StageConfig
from kforcing_jax.training.checkpoints import StageCheckpoints, abstract_like
from kforcing_jax.training.objectives import Objective, in_full_precision
from kforcing_jax.training.optimizer import make_optimizer
from kforcing_jax.training.progress import StageLog
from kforcing_jax.training.sharding import batch_sharding, replicated
from kforcing_jax.training.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, ready to train."""

    name: str
    config: StageConfig
    objective: Callable[[str], Objective]  # compute dtype -> what is minimised
    initial_params: dict
    teacher_params: dict  # {} when the data is the teacher
    batches: Callable[[int], Iterator[np.ndarray]]  # first step -> tokens_BxN: the data's state is the step
    seq_len: int
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps up to `last_step` in one precision: one compiled program."""

    dtype: str
    last_step: int


def precision_phases(config: StageConfig) -> list[Phase]:
    """bf16 for the first part of the steps where the stage asks for it, then f32."""
    low = round(config.steps * config.bfloat16_fraction)
    phases = [Phase("bfloat16", low), Phase("float32", config.steps)]
    return [phase for phase, start in zip(phases, (0, low), strict=True) if phase.last_step > start]


def train(stage: Stage, mesh: Mesh, checkpoints: StageCheckpoints, metrics_path: Path, logging: LoggingConfig) -> None:
    """Trains a stage to its last step, from its newest checkpoint if there is one, and leaves a last checkpoint.

    Raises:
      RunError: a loss or gradient that is not finite, and then the newest checkpoint is from before it; or a
        checkpoint that does not fit.
    """
    steps, optimizer = stage.config.steps, make_optimizer(stage.config)
    state = jax.jit(lambda params: init_state(params, optimizer), out_shardings=replicated(mesh))(stage.initial_params)
    first, seconds_before = checkpoints.latest_step or 0, 0.0
    if first:
        state, seconds_before = checkpoints.restore(abstract_like(state, replicated(mesh)))

    log = StageLog(metrics_path, stage.name, steps, stage.config.batch_size * stage.seq_len, seconds_before)
    batches = stage.batches(first)
    for phase in precision_phases(stage.config):
        train_step = make_train_step(_objective(stage, phase), optimizer, stage.config.ema_decay, mesh)
        for step in range(first + 1, phase.last_step + 1):
            tokens_BxN = jax.device_put(next(batches), batch_sharding(mesh))
            state, metrics = train_step(state, stage.teacher_params, tokens_BxN, stage.key)
            log.add(step, metrics)
            if step % logging.log_every == 0 or step == steps:
                log.report(step)
            if step % logging.checkpoint_every == 0 or step == steps:
                log.check()
                checkpoints.save(state, step, log.seconds)
        first = max(first, phase.last_step)


def _objective(stage, phase):
    objective = stage.objective(phase.dtype)
    return in_full_precision(objective) if phase.dtype == "float32" else objective
