"""Training one stage: steps, reports, validation and checkpoints."""

import contextlib
import dataclasses
import logging as python_logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from kforcing_jax.config import LoggingConfig, StageConfig
from kforcing_jax.data.packing import Batch
from kforcing_jax.sharding import abstract_on, parameter_shardings, put_batch, replicated
from kforcing_jax.training.changed_steps import lengths_from, say_what_changed
from kforcing_jax.training.checkpoints import StageCheckpoints
from kforcing_jax.training.flops import peak_teraflops
from kforcing_jax.training.interruption import Interruption
from kforcing_jax.training.objectives import Objective
from kforcing_jax.training.optimizer import learning_rate, make_optimizer
from kforcing_jax.training.profiling import ProfiledSteps, Profiler
from kforcing_jax.training.progress import StageLog, Workload
from kforcing_jax.training.records import weights_digest
from kforcing_jax.training.save_times import SaveTimes
from kforcing_jax.training.spent import Spent
from kforcing_jax.training.step import TrainState, init_state, train_step
from kforcing_jax.training.trackers import Trackers
from kforcing_jax.training.validation import Validation

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
    flops_per_step: float | None = None  # of the arithmetic, on all devices
    validation: Validation | None = None


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


def compiled_step(
    config: StageConfig, objective: Callable[[str], Objective], phase: Phase, state: TrainState
) -> jax.stages.Wrapped:
    """The jitted step of one phase: (state, teacher's params, batch, key) -> (state, metrics), the old state donated.

    `state` (arrays or shapes) says how the new state is laid out; arguments have to lie on the mesh already.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    fixed: dict[str, Any] = dict(objective=objective(phase.dtype), optimizer=make_optimizer(config))
    fixed |= dict(ema_decay=config.ema_decay, accumulation=config.accumulation)

    def step(state, teacher_params, batch, key):
        return train_step(state, batch, key, teacher_params=teacher_params, **fixed)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(shardings.step.mesh)))


def abstract_state(params: dict, config: StageConfig, mesh: Mesh) -> TrainState:
    """Shapes and shardings of a stage's state, from its parameters or their shapes."""
    state = jax.eval_shape(lambda p: init_state(p, make_optimizer(config)), params)
    return abstract_on(state, parameter_shardings(state, mesh))


def train(
    stage: Stage,
    mesh: Mesh,
    checkpoints: StageCheckpoints,
    metrics_path: Path,
    logging: LoggingConfig,
    trackers: Trackers | None = None,
    profile: tuple[ProfiledSteps, Path] | None = None,
) -> None:
    """Trains a stage to its last step, from its newest checkpoint if there is one, and leaves a last checkpoint.

    Args:
      trackers: who is told what metrics.jsonl is told.
      profile: steps to profile, and the folder for it.

    Raises:
      RunError: a loss or gradient that is not finite, and then the newest checkpoint is from before it; or a
        checkpoint that does not fit.
      KeyboardInterrupt: SIGINT or SIGTERM; the newest checkpoint is that of the last step.
    """
    steps, spent = stage.config.steps, Spent()
    with spent.on("restoring"):
        first, state, progress = _first_state(stage, mesh, checkpoints)
    if first:
        spent.go_on_from(progress["seconds"], progress.get("seconds_by_part"))
        _LOG.info(f"{stage.name:<11} goes on from step {first}/{steps}")
        say_what_changed(stage.name, stage.config, progress, first)
    spacings = {"validating": logging.validate_every, "saving": logging.checkpoint_every}
    log = StageLog(
        metrics_path, stage.name, first, steps, _workload(stage, mesh), spent, trackers or Trackers(), spacings
    )
    after_step = _AfterStep(stage, logging, checkpoints, log, spent, progress, first)
    batches = stage.batches(first)
    key = jax.device_put(stage.key, replicated(mesh))
    with Interruption() as interruption, Profiler(profile) as profiler:
        for phase in precision_phases(stage.config):
            program = None
            for step in range(first + 1, phase.last_step + 1):
                batch = put_batch(next(batches), mesh, stage.config.batch_size)
                program = program or _program(stage, phase, spent, state, stage.teacher_params, batch, key)
                with profiler.step(step):
                    state, metrics = program(state, stage.teacher_params, batch, key)
                log.add(step, metrics)
                if profiler.is_last(step):
                    log.check()
                    with spent.on("saving"):
                        profiler.stop()
                stops = interruption.is_asked_for(step)
                after_step(step, state, stops)
                if stops:
                    raise KeyboardInterrupt
            first = max(first, phase.last_step)
        if interruption.is_asked_for(steps + 1):  # while the last step was validated and saved
            raise KeyboardInterrupt


class _AfterStep:
    """What follows the steps of a stage, each when it is due: validation, a report, a checkpoint.

    `progress` is what the checkpoint says that the stage goes on from after `first` steps, {} at its beginning.
    """

    def __init__(
        self,
        stage: Stage,
        logging: LoggingConfig,
        checkpoints: StageCheckpoints,
        log: StageLog,
        spent: Spent,
        progress: dict,
        first: int,
    ):
        self._stage, self._logging, self._checkpoints, self._log, self._spent = stage, logging, checkpoints, log, spent
        self._lengths = lengths_from(progress.get("lengths"), first, stage.config.steps)
        self._validated = {name: progress[name] for name in ("validation_loss", "validation_step") if name in progress}
        self._saves = SaveTimes(logging)

    def __call__(self, step: int, state: TrainState, stops: bool) -> None:
        """All processes have to call this after every step; one that stops is saved, and not looked at."""
        is_last = step == self._stage.config.steps
        found = {}
        if self._stage.validation and not stops and (_is_due(step, self._logging.validate_every) or is_last):
            self._log.check()
            found = _validate(self._stage, self._stage.validation, state, self._spent)
            self._validated = _kept_of(found, step) if found else self._validated
        if found or is_last or step % self._logging.log_every == 0:
            self._log.report(step, found)
        if self._saves.is_due(step) or is_last or stops:
            self._save(step, state)

    def _save(self, step, state):
        self._log.check()
        with self._spent.on("saving"):
            progress = _progress(self._stage, state, step, self._spent, self._validated) | {"lengths": self._lengths}
            self._checkpoints.save(state, step, progress)
        self._saves.saved()


def _is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens after this one."""
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _compiling(stage: Stage, spent: Spent, what: str) -> Iterator[None]:
    """Says that something is compiled, and afterwards how long that took."""
    _LOG.info(f"{stage.name:<11} compiling {what}")
    start = time.monotonic()
    with spent.on("compiling"):
        yield
    _LOG.info(f"{stage.name:<11} compiled in {time.monotonic() - start:.1f} s")


def _program(stage: Stage, phase: Phase, spent: Spent, *arguments) -> jax.stages.Compiled:
    """What `compiled_step` gives, compiled for these arguments before it runs: so it is known what took the time."""
    with _compiling(stage, spent, f"the training step ({phase.dtype})"):
        return compiled_step(stage.config, stage.objective, phase, arguments[0]).lower(*arguments).compile()


def _kept_of(found: dict, step: int) -> dict:
    """What checkpoints keep of a validation; nothing of a loss that is no number, which is no JSON either."""
    loss = found["validation_loss"]
    return {"validation_loss": loss, "validation_step": step} if math.isfinite(loss) else {}


def _validate(stage: Stage, validation: Validation, state: TrainState, spent: Spent) -> dict:
    """What a validation finds; {} where the device's memory does not suffice, which is said: training goes on."""
    try:
        if not validation.is_compiled:
            with _compiling(stage, spent, "validation"):
                validation.compile(state.ema)
        with spent.on("validating"):
            return validation(state.ema)
    except jax.errors.JaxRuntimeError as error:
        _LOG.warning(f"{stage.name:<11} not validated: {' '.join(str(error).split())[:300]}")
        return {}


def _workload(stage: Stage, mesh: Mesh) -> Workload:
    peak = peak_teraflops(mesh.devices.flat[0].device_kind)
    return Workload(stage.tokens_per_step, stage.flops_per_step, mesh.size, peak, learning_rate(stage.config))


def _progress(stage: Stage, state: TrainState, step: int, spent: Spent, validated: dict) -> dict:
    """What a checkpoint says of itself, see `training.records`; validation may be of an earlier step, and names it."""
    progress = {"seconds": spent.total, "seconds_by_part": spent.parts, "made_from": stage.made_from} | validated
    return progress | ({"weights": weights_digest(state.ema)} if step == stage.config.steps else {})


def _first_state(stage, mesh, checkpoints):
    """(steps done, state, what the checkpoint says), from the newest good one or from the initial parameters."""
    abstract = abstract_state(stage.initial_params, stage.config, mesh)
    if checkpoints.latest_step:
        state, progress = checkpoints.restore(abstract)
        return int(state.step), state, progress
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    init = jax.jit(lambda params: init_state(params, make_optimizer(stage.config)), out_shardings=shardings)
    return 0, init(stage.initial_params), {}
