"""The curriculum: AR teacher, then students of doubling window, each from the one before (paper, section 3.3)."""

import functools
import logging
import zlib

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kforcing_jax.config import Config
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.interop import released
from kforcing_jax.models import init_params
from kforcing_jax.sharding import (
    check_divisible,
    parameter_shardings,
    process_share,
    put_validation,
    replicated,
)
from kforcing_jax.training.checkpoints import StageCheckpoints, abstract_params, is_finished, load_stage
from kforcing_jax.training.objectives import mean_loss
from kforcing_jax.training.progress import clock
from kforcing_jax.training.recipes import predecessors, stage_model, stage_objective
from kforcing_jax.training.records import check_made_from, made_from, run_vocabulary, stage_progress, weights_digest
from kforcing_jax.training.stage import Stage, train
from kforcing_jax.workdir import Workdir

_LOG = logging.getLogger("kforcing_jax")


def run(workdir: Workdir, corpus: Corpus, mesh: Mesh):
    """Trains every stage that is not finished, in order, and adds each to summary.json as it ends.

    Raises:
      ConfigError: a batch or the model cannot be split evenly over the mesh, before any stage starts.
      DataError: a batch is larger than the corpus, before any stage starts.
      RunError: as `train`; a stage came from something else than is there now; another process trains here.
    """
    check_divisible(workdir.config, mesh)
    names = ["ar", *workdir.config.students]
    for name in names:
        corpus.check_batch_size(f"stages.{name.replace('-', '_')}.batch_size", workdir.config.stages[name].batch_size)
    with workdir.locked(), jax.set_mesh(mesh):
        for name in names:
            check_made_from(workdir, name, corpus)
        workdir.keep_config()
        with workdir.changed_summary() as summary:
            summary["stages"] = {k: v for k, v in summary["stages"].items() if k in names and is_finished(workdir, k)}
        for name in names:
            _run_stage(workdir, corpus, name, mesh)


def _run_stage(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh):
    # Again: what it came from may have been trained again just now.
    check_made_from(workdir, name, corpus)
    if _agreed(_has_good_end(workdir, corpus, name, mesh)):
        _LOG.info(f"{name:<11} finished, skipped")
    elif workdir.config.stages[name].checkpoint:
        _import_stage(workdir, corpus, name, mesh)
    else:
        _train_stage(workdir, corpus, name, mesh)
    # Also for a stage whose run was stopped right after its last checkpoint.
    known = workdir.summary()["stages"].get(name, {})
    is_summarised = "validation_loss" in known and known.get("weights") == stage_progress(workdir, name).get("weights")
    if not _agreed(is_summarised):
        _summarise_stage(workdir, corpus, name, mesh)


def _agreed(decision: bool) -> bool:
    """What the first process decides: others may see a file of a shared folder later, and wait in another place."""
    return bool(multihost_utils.broadcast_one_to_all(decision)) if jax.process_count() > 1 else decision


def _has_good_end(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh) -> bool:
    """Whether the stage has its last checkpoint, and this can be read; a damaged one is renamed."""
    if is_finished(workdir, name):
        if "made_from" not in stage_progress(workdir, name):
            _LOG.warning(f"{name:<11} does not say what it came from, taken as it is")
        with StageCheckpoints.of(workdir, name) as checkpoints:
            checkpoints.set_aside_damaged(abstract_params(_model(workdir, corpus, name), mesh))
    return is_finished(workdir, name)


def _train_stage(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh):
    config, settings = workdir.config, workdir.config.stages[name]
    share = process_share(mesh, settings.batch_size)
    stage = Stage(
        name=name,
        config=settings,
        objective=functools.partial(stage_objective, config, name, run_vocabulary(workdir, corpus)),
        initial_params=_initial_params(workdir, corpus, name, mesh),
        teacher_params=_teacher_params(workdir, corpus, name, mesh),
        batches=lambda first: corpus.train_batches(settings.batch_size, config.seed, first, *share),
        tokens_per_step=settings.batch_size * corpus.useful_tokens_per_row,
        key=_stage_key(config, name),
        made_from=made_from(workdir, name, corpus),
    )
    with StageCheckpoints.of(workdir, name) as checkpoints:
        train(stage, mesh, checkpoints, workdir.metrics_path, config.logging)


def _import_stage(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh):
    """Takes the stage's weights from a released file."""
    path = workdir.config.stages[name].checkpoint
    params = released.load_for(path, _model(workdir, corpus, name), corpus.tokenizer)
    _LOG.info(f"{name:<11} taken from {path}, not trained")
    with StageCheckpoints.of(workdir, name) as checkpoints:
        params = jax.device_put(params, parameter_shardings(params, mesh))
        origin = made_from(workdir, name, corpus)
        del origin["data"]  # it has not seen it
        progress = {"seconds": 0.0, "made_from": origin, "weights": weights_digest(params)}
        checkpoints.save_imported(params, progress)


def _summarise_stage(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh):
    """Adds steps, seconds and validation loss of a finished stage to summary.json."""
    objective = stage_objective(workdir.config, name, run_vocabulary(workdir, corpus))
    _, params = load_stage(workdir, name, corpus, mesh)
    settings = workdir.config.evaluation
    batches = put_validation(corpus.validation_batches(settings.rows, settings.batch_size), mesh)
    validate = jax.jit(functools.partial(mean_loss, objective), out_shardings=replicated(mesh))
    key = jax.device_put(_stage_key(workdir.config, name), replicated(mesh))
    loss = float(validate(params, _teacher_params(workdir, corpus, name, mesh), batches, key))
    progress = stage_progress(workdir, name)
    seconds = progress.get("seconds", 0.0)
    _LOG.info(f"{name:<11} done in {clock(seconds)}, validation loss {loss:.4f} nats per token")
    with workdir.changed_summary() as summary:
        # What was measured of other weights goes.
        before = summary["stages"].get(name, {})
        kept = before if before.get("weights") == progress.get("weights") else {}
        summary["stages"][name] = kept | {
            "steps": workdir.config.stages[name].last_step,
            "seconds": round(seconds, 1),
            "validation_loss": loss,
            "weights": progress.get("weights"),
        }


def _teacher_params(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh) -> dict:
    teacher, _ = predecessors(workdir.config, name)
    return load_stage(workdir, teacher, corpus, mesh)[1] if teacher else {}


def _model(workdir: Workdir, corpus: Corpus, name: str):
    return stage_model(workdir.config, name, run_vocabulary(workdir, corpus))


def _stage_key(config: Config, name: str) -> jax.Array:
    """Depends on the name alone, so that adding a stage to a run changes nothing in the others."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))


def _initial_params(workdir, corpus, name, mesh):
    """Fresh weights, over which come all weights that the origin stage has: a student starts from its teacher.

    Every device makes its own part of them.
    """
    model = _model(workdir, corpus, name)
    init = functools.partial(init_params, model)
    shardings = parameter_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    key = jax.device_put(_stage_key(workdir.config, name), replicated(mesh))
    fresh = jax.jit(init, out_shardings=shardings)(key)
    _, origin = predecessors(workdir.config, name)
    return fresh | load_stage(workdir, origin, corpus, mesh)[1] if origin else fresh
