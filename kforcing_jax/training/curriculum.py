"""The curriculum: AR teacher, then students of doubling window, each from the one before (paper, section 3.3)."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.training.objectives import distillation, language_modelling, mean_loss
from kforcing_jax.training.progress import clock, say
from kforcing_jax.training.sharding import replicated
from kforcing_jax.training.stage import Stage, train
from kforcing_jax.workdir import Workdir, init_params

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
                _run_stage(workdir, corpus, name, mesh)


def predecessors(config, name: str) -> tuple[str | None, str | None]:
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


def _run_stage(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh):
    config = workdir.config
    stage_config = config.stages[name]
    teacher_name, _ = predecessors(config, name)
    # The key depends on the name alone, so adding a stage to a run changes nothing in the others.
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))
    model = workdir.model(name, corpus)
    teacher, teacher_params = workdir.load(teacher_name, corpus) if teacher_name else (None, {})

    def objective(dtype: str):
        if teacher is None:
            return language_modelling(_in_dtype(model, dtype))
        return distillation(_in_dtype(model, dtype), _in_dtype(teacher, dtype), stage_config, corpus.eos_id)

    stage = Stage(
        name=name,
        config=stage_config,
        objective=objective,
        initial_params=_initial_params(workdir, corpus, name, key, mesh),
        teacher_params=teacher_params,
        batches=lambda first: corpus.train_batches(stage_config.batch_size, config.seed, first),
        seq_len=config.data.seq_len,
        key=key,
    )
    with workdir.checkpoints(name) as checkpoints:
        params, seconds = train(stage, mesh, checkpoints, workdir.metrics_path, config.logging)
    loss = _validation_loss(workdir, corpus, objective("float32"), params, teacher_params, key)
    say(f"{name:<11} done in {clock(seconds)}, validation loss {loss:.4f} nats per token")
    _add_to_summary(workdir, name, {"steps": stage_config.steps, "seconds": round(seconds, 1), "validation_loss": loss})


def _initial_params(workdir, corpus, name, key, mesh):
    """Fresh weights, over which come all weights that the origin stage has: a student starts from its teacher."""
    model = workdir.model(name, corpus)
    fresh = jax.jit(lambda k: init_params(model, k), out_shardings=replicated(mesh))(key)
    _, origin = predecessors(workdir.config, name)
    return fresh | workdir.load(origin, corpus)[1] if origin else fresh


def _validation_loss(workdir, corpus, objective, params, teacher_params, key):
    settings = workdir.config.evaluation
    batches_IxBxN = corpus.validation_batches(settings.rows, settings.batch_size)
    compiled = jax.jit(lambda *args: mean_loss(objective, *args))
    return float(compiled(params, teacher_params, jnp.asarray(batches_IxBxN), key))


def _add_to_summary(workdir, name, measured):
    summary = workdir.summary()
    summary["stages"][name] = summary["stages"].get(name, {}) | measured
    workdir.write_summary(summary)


def _in_dtype(model: Model, dtype: str) -> Model:
    """The same model computing in another dtype; parameters stay f32."""
    return type(model)(dataclasses.replace(model.cfg, dtype=dtype))
