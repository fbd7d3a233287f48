"""Training one stage: steps, reports and checkpoints."""

import dataclasses
import functools
import logging as python_logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from kforcing_jax.config import LoggingConfig, StageConfig
from kforcing_jax.data.packing import Batch
from kforcing_jax.sharding import abstract_on, parameter_shardings, put_batch, replicated
from kforcing_jax.training.checkpoints import StageCheckpoints
from kforcing_jax.training.interruption import Interruption
from kforcing_jax.training.objectives import Objective
from kforcing_jax.training.optimizer import make_optimizer
from kforcing_jax.training.progress import StageLog
from kforcing_jax.training.records import weights_digest
from kforcing_jax.training.step import TrainState, init_state, train_step

_LOG = python_logging.getLogger("kforcing_jax")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, ready to train."""

    name: str
    config: StageConfig
    objective: Callable[[str], Objective]  # compute dtype -> what is minimised
    initial_params: dict
    teacher_params: dict  # {} when the data is the teacher
    batches: Callable[[int], Iterator[Batch]]  # first step -> this process's rows: the data's state is the step
    tokens_per_step: float  # useful ones, of all processes
    key: jax.Array
    made_from: dict = dataclasses.field(default_factory=dict)  # kept with every checkpoint, see training.records


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps up to `last_step` whose blocks compute in `dtype`: one compiled program."""

    dtype: str
    last_step: int


def precision_phases(config: StageConfig) -> list[Phase]:
    """bf16 for the first part of the steps where the stage asks for it, then f32 at the precision of the model."""
    low = round(config.steps * config.bfloat16_fraction)
    phases = [Phase("bfloat16", low), Phase("float32", config.steps)]
    return [phase for phase, start in zip(phases, (0, low), strict=True) if phase.last_step > start]


def compiled_step(config: StageConfig, objective: Callable[[str], Objective], phase: Phase, state: TrainState):
    """The jitted step of one phase: (state, teacher's params, batch, key) -> (state, metrics), the old state donated.

    `state` (arrays or shapes) says how the new state is laid out; arguments have to lie on the mesh already.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = functools.partial(
        train_step,
        objective(phase.dtype),
        make_optimizer(config),
        config.ema_decay,
        config.accumulation,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(shardings.step.mesh)))


def abstract_state(params, config: StageConfig, mesh: Mesh):
    """Shapes and shardings of a stage's state, from its parameters or their shapes."""
    state = jax.eval_shape(lambda p: init_state(p, make_optimizer(config)), params)
    return abstract_on(state, parameter_shardings(state, mesh))


def train(stage: Stage, mesh: Mesh, checkpoints: StageCheckpoints, metrics_path: Path, logging: LoggingConfig) -> None:
    """Trains a stage to its last step, from its newest checkpoint if there is one, and leaves a last checkpoint.

    Raises:
      RunError: a loss or gradient that is not finite, and then the newest checkpoint is from before it; or a
        checkpoint that does not fit.
      KeyboardInterrupt: SIGINT or SIGTERM; the newest checkpoint is that of the last step.
    """
    steps = stage.config.steps
    first, state, seconds_before = _first_state(stage, mesh, checkpoints)
    if first:
        _LOG.info(f"{stage.name:<11} goes on from step {first}/{steps}")
    log = StageLog(metrics_path, stage.name, first, steps, stage.tokens_per_step, seconds_before)
    batches = stage.batches(first)
    key = jax.device_put(stage.key, replicated(mesh))
    with Interruption() as interruption:
        for phase in precision_phases(stage.config):
            step_function = compiled_step(stage.config, stage.objective, phase, state)
            for step in range(first + 1, phase.last_step + 1):
                batch = put_batch(next(batches), mesh, stage.config.batch_size)
                state, metrics = step_function(state, stage.teacher_params, batch, key)
                log.add(step, metrics)
                stops = interruption.is_asked_for(step)
                if step % logging.log_every == 0 or step == steps:
                    log.report(step)
                if step % logging.checkpoint_every == 0 or step == steps or stops:
                    log.check()
                    checkpoints.save(state, step, _progress(stage, state, step, log.seconds))
                if stops:
                    raise KeyboardInterrupt
            first = max(first, phase.last_step)


def _progress(stage, state, step, seconds):
    progress = {"seconds": seconds, "made_from": stage.made_from}
    return progress | ({"weights": weights_digest(state.ema)} if step == stage.config.steps else {})


def _first_state(stage, mesh, checkpoints):
    """(steps done, state, seconds they took), from the newest good checkpoint or from the initial parameters."""
    abstract = abstract_state(stage.initial_params, stage.config, mesh)
    if checkpoints.latest_step:
        state, progress = checkpoints.restore(abstract)
        return int(state.step), state, progress["seconds"]
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    init = jax.jit(lambda params: init_state(params, make_optimizer(stage.config)), out_shardings=shardings)
    return 0, init(stage.initial_params), 0.0
