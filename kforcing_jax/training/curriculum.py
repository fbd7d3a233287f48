"""The curriculum: AR teacher, then students of doubling window, each from the one before (paper, section 3.3)."""

import dataclasses
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kforcing_jax.config import Config
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.models import CausalLM, PushForwardLM, init_params
from kforcing_jax.training.objectives import Objective, distillation, language_modelling, mean_loss
from kforcing_jax.training.progress import clock, say
from kforcing_jax.training.sharding import replicated
from kforcing_jax.training.stage import Stage, train
from kforcing_jax.workdir import Workdir

Model = CausalLM | PushForwardLM


def run(workdir: Workdir, corpus: Corpus, mesh: Mesh):
    """Trains every stage that is not finished, in order, and adds each to summary.json as it ends.

    Raises:
      DataError: a batch is larger than the corpus, before any stage starts.
      RunError: as `train`.
    """
    names = ["ar", *workdir.config.students]
    for name in names:
        corpus.check_batch_size(f"stages.{name.replace('-', '_')}.batch_size", workdir.config.stages[name].batch_size)
    with jax.set_mesh(mesh):
        for name in names:
            if workdir.is_finished(name):
                say(f"{name:<11} finished, skipped")
            else:
                _train_stage(workdir, corpus, name, mesh)
            # Also for a stage whose run was stopped right after its last checkpoint.
            if name not in workdir.summary()["stages"]:
                _summarise_stage(workdir, corpus, name)


def predecessors(config: Config, name: str) -> tuple[str | None, str | None]:
    """(teacher, origin): the stages that give a stage its targets and its first weights; None, None for `ar`.

    The origin of k is the student of k / 2, by preference one taught like this one. A stage with
    `teacher = "previous"` is taught by its origin, one with `teacher = "ar"` by the AR teacher.
    """
    stage = config.stages[name]
    if not stage.window:
        return None, None
    if stage.window == 1:
        return "ar", "ar"
    earlier = [other for other, s in config.students.items() if s.window == stage.window // 2]
    same = [other for other in earlier if config.stages[other].teacher == stage.teacher]
    origin = (same or earlier)[0]
    return ("ar" if stage.teacher == "ar" else origin), origin


def _train_stage(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh):
    config = workdir.config
    objective, teacher_params = _objective(workdir, corpus, name)
    key = _stage_key(config, name)
    stage = Stage(
        name=name,
        config=config.stages[name],
        objective=objective,
        initial_params=_initial_params(workdir, corpus, name, key, mesh),
        teacher_params=teacher_params,
        batches=lambda first: corpus.train_batches(config.stages[name].batch_size, config.seed, first),
        seq_len=config.data.seq_len,
        key=key,
    )
    with workdir.checkpoints(name) as checkpoints:
        train(stage, mesh, checkpoints, workdir.metrics_path, config.logging)


def _summarise_stage(workdir: Workdir, corpus: Corpus, name: str):
    """Adds steps, seconds and validation loss of a finished stage to summary.json."""
    objective, teacher_params = _objective(workdir, corpus, name)
    _, params = workdir.load(name, corpus)
    settings = workdir.config.evaluation
    batches_IxBxN = jnp.asarray(corpus.validation_batches(settings.rows, settings.batch_size))
    validate = jax.jit(lambda *args: mean_loss(objective("float32"), *args))
    loss = float(validate(params, teacher_params, batches_IxBxN, _stage_key(workdir.config, name)))
    with workdir.checkpoints(name) as checkpoints:
        seconds = checkpoints.seconds()
    say(f"{name:<11} done in {clock(seconds)}, validation loss {loss:.4f} nats per token")
    summary = workdir.summary()
    summary["stages"][name] = {
        "steps": workdir.config.stages[name].steps,
        "seconds": round(seconds, 1),
        "validation_loss": loss,
    }
    workdir.write_summary(summary)


def _objective(workdir: Workdir, corpus: Corpus, name: str) -> tuple[Callable[[str], Objective], dict]:
    """What a stage minimises, as a function of the compute dtype, and its teacher's parameters."""
    model = workdir.model(name, corpus)
    teacher_name, _ = predecessors(workdir.config, name)
    if teacher_name is None:
        return lambda dtype: language_modelling(_in_dtype(model, dtype)), {}
    teacher, teacher_params = workdir.load(teacher_name, corpus)
    stage = workdir.config.stages[name]
    return (
        lambda dtype: distillation(_in_dtype(model, dtype), _in_dtype(teacher, dtype), stage, corpus.eos_id),
        teacher_params,
    )


def _stage_key(config: Config, name: str) -> jax.Array:
    """Depends on the name alone, so that adding a stage to a run changes nothing in the others."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))


def _initial_params(workdir, corpus, name, key, mesh):
    """Fresh weights, over which come all weights that the origin stage has: a student starts from its teacher."""
    model = workdir.model(name, corpus)
    fresh = jax.jit(lambda k: init_params(model, k), out_shardings=replicated(mesh))(key)
    _, origin = predecessors(workdir.config, name)
    return fresh | workdir.load(origin, corpus)[1] if origin else fresh


def _in_dtype(model: Model, dtype: str) -> Model:
    """The same model computing in another dtype; parameters stay f32."""
    return type(model)(dataclasses.replace(model.cfg, dtype=dtype))
