"""Students that an experiment trains from the stages of a finished run, and the figures that they are compared by."""

import contextlib
import copy
import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from device import device_text

from kforcing_jax.evaluation.fidelity import agreement
from kforcing_jax.evaluation.samples import generate, measure, prompts
from kforcing_jax.models import CausalLM, PushForwardLM, init_params
from kforcing_jax.models.gated import with_own
from kforcing_jax.sharding import make_mesh, put_batch
from kforcing_jax.training.checkpoints import load_stage
from kforcing_jax.training.objectives import Objective, distillation
from kforcing_jax.training.optimizer import make_optimizer
from kforcing_jax.training.recipes import trained_part
from kforcing_jax.training.stage import Phase, abstract_state, compiled_step
from kforcing_jax.training.step import init_state
from kforcing_jax.workdir import Workdir

# Between two lines on the terminal, in steps.
_REPORTED = 200


class Experiment:
    """A finished run: its AR teacher, its data, its recipes."""

    def __init__(self, workdir: Workdir):
        self.workdir, self.config, self.corpus = workdir, workdir.config, workdir.prepared()
        self.mesh = make_mesh(workdir.config.mesh)
        self.ar, self.ar_params = self.stage("ar")

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: str) -> Iterator["Experiment"]:
        """The run in a directory, with its mesh set."""
        logging.set_verbosity(logging.FATAL)  # orbax reports every file
        experiment = cls(Workdir.open(path))
        with jax.set_mesh(experiment.mesh):
            yield experiment

    def stage(self, name: str) -> tuple:
        """(model, averaged weights) of a stage of the run."""
        return load_stage(self.workdir, name, self.corpus, self.mesh)

    def train(self, name: str, student: PushForwardLM, teacher: tuple, first: dict, *, steps: int, **changes) -> dict:
        """Averaged weights after `steps` steps by the recipe of a stage, in f32; the rest is as for `Training`."""
        training = Training(self, name, student, teacher, first, steps, **changes)
        training.advance(steps)
        return training.whole(training.state.ema)

    def figures(self, name: str, student: PushForwardLM, params: dict, teacher: CausalLM | None = None) -> dict:
        """Agreement with the AR teacher in f32 (by default as the run's draws), and what it says of samples."""
        settings, window = self.config.evaluation, self.config.stages[name].window
        batches = self.corpus.validation_batches(settings.rows, settings.batch_size)
        shared = dict(tau=1.0, eos_id=self.corpus.eos_id)
        models = teacher or self.ar, self.ar_params, student, params
        fidelity = agreement(*models, batches, jax.random.key(0), window=window, **shared)
        starts = prompts(self.corpus, settings.samples, settings.prompt_length)
        decoding = dict(max_new_tokens=settings.new_tokens, seeds=np.arange(len(starts)), k=window)
        decoded = generate(student, params, starts, **decoding, **shared)
        return fidelity | measure(self.ar, self.ar_params, decoded, settings.prompt_length, self.corpus.eos_id)


class Training:
    """A student on its way: by the recipe of a stage that is to have `steps` steps, from the weights of `first`.

    `first` has weights to begin with, as far as they go; the others are fresh. `teacher` is (model, weights); of a
    gated student these hold the AR teacher's. `objective` is as `distillation`, `changes` are of the stage's fields.
    """

    def __init__(
        self,
        experiment: Experiment,
        name: str,
        student: PushForwardLM,
        teacher: tuple,
        first: dict,
        steps: int,
        objective: Callable[..., Objective] = distillation,
        **changes,
    ):
        self._experiment, self._name, self._student, self._teacher = experiment, name, student, teacher
        self._made = objective
        self._config = dataclasses.replace(experiment.config.stages[name], steps=steps, **changes)
        params = trained_part(student, init_params(student, jax.random.key(self._config.window)))
        params |= trained_part(student, first)
        self._abstract = abstract_state(params, self._config, experiment.mesh)
        state = init_state(jax.tree.map(jnp.copy, params), make_optimizer(self._config))
        self.state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, self._abstract))

    def whole(self, params: dict) -> dict:
        """All weights of the student, from those that are trained."""
        return with_own(self._teacher[1], params) if self._student.cfg.is_gated else params

    def branched(self) -> "Training":
        """The same at this step, to go on in another way."""
        other = copy.copy(self)
        other.state = jax.tree.map(jnp.copy, self.state)
        return other

    def advance(self, last_step: int, dtype: str = "float32"):
        """Trains on to a step, blocks computing in a dtype."""
        experiment, config, done = self._experiment, self._config, int(self.state.step)
        step = compiled_step(config, self._objective, Phase(dtype, last_step), self._abstract)
        batches = experiment.corpus.train_batches(config.batch_size, experiment.config.seed, done)
        start = time.monotonic()
        for number in range(done + 1, last_step + 1):
            batch = put_batch(next(batches), experiment.mesh, config.batch_size)
            self.state, metrics = step(self.state, self._teacher[1], batch, jax.random.key(0))
            if number % _REPORTED == 0 or number == last_step:
                minutes = (time.monotonic() - start) / 60
                say(f"  {self._name} step {number}/{config.steps}, loss {metrics['loss']:.3f}, {minutes:.1f} min")

    def _objective(self, dtype):
        models = [m.clone(cfg=dataclasses.replace(m.cfg, dtype=dtype)) for m in (self._student, self._teacher[0])]
        return self._made(*models, self._config, self._experiment.corpus.eos_id)


def line(figures: dict) -> str:
    """The figures that decide, in one line."""
    agreements = " ".join(f"{a:.3f}" for a in figures["agreement"])
    return (
        f"agreement {agreements}, block {figures['block_agreement']:.3f}, "
        f"NLL {figures['sample_nll']:.3f}, entropy {figures['sample_entropy']:.3f}"
    )


def say(*words: str):
    """On the terminal, at once."""
    print(*words, flush=True)


def write_json(path: str | None, experiment: Experiment, results: dict):
    """The results with device, date and configuration, where a path is given."""
    if path:
        about = {"device": device_text(), "date": datetime.date.today().isoformat()}
        about["config"] = dataclasses.asdict(experiment.config)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(about | results, file, indent=1)
