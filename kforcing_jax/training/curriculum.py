"""The curriculum: AR teacher, then students of doubling window, each from the one before (paper, section 3.3)."""

import dataclasses
import functools
import logging
import zlib

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kforcing_jax.config import Config
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.errors import RunError
from kforcing_jax.interop import released
from kforcing_jax.models import init_params
from kforcing_jax.models.gated import base_params, own_params
from kforcing_jax.registry import is_own
from kforcing_jax.sharding import (
    check_divisible,
    parameter_shardings,
    process_share,
    put_validation,
    replicated,
)
from kforcing_jax.training.changed_steps import fit_checkpoints, lengths_from, say_what_changed
from kforcing_jax.training.checkpoints import StageCheckpoints, abstract_params, load_stage
from kforcing_jax.training.flops import step_flops
from kforcing_jax.training.init_from import check_source, load_source
from kforcing_jax.training.profiling import ProfiledSteps
from kforcing_jax.training.progress import clock, drop_later
from kforcing_jax.training.recipes import check_own_parts, predecessors, stage_model, stage_objective, trained_part
from kforcing_jax.training.records import (
    check_made_from,
    checkpoint_steps,
    is_finished,
    made_from,
    run_vocabulary,
    stage_progress,
    weights_digest,
    write_progress,
)
from kforcing_jax.training.stage import Stage, train
from kforcing_jax.training.trackers import TrackedRun, Trackers, open_trackers
from kforcing_jax.training.validation import Comparison, MeanLoss, Validation, sample_of
from kforcing_jax.workdir import Workdir

_LOG = logging.getLogger("kforcing_jax")


def run(workdir: Workdir, corpus: Corpus, mesh: Mesh, profile: ProfiledSteps | None = None) -> None:
    """Trains every stage that is not finished, in order, and adds each to summary.json as it ends.

    `profile` are steps of every stage that are profiled, into RUN/profile/STAGE.

    Raises:
      ConfigError: a batch or the model cannot be split evenly over the mesh, a tracker is not installed, something of
        one's own fails, there is no room after the prompt of samples, or no stage has the steps to profile; before any
        stage starts.
      DataError: a batch is larger than the corpus, or no text is long enough for an evaluation's prompt; before any
        stage starts.
      RunError: as `train`; a stage came from something else than is there now; another process trains here; a
        tracker does not start.
    """
    check_divisible(workdir.config, mesh)
    names = ["ar", *workdir.config.students]
    for name in names:  # first: no model can be made in the order of another vocabulary's tokens
        check_source(workdir, name, corpus)
    if profile:
        profile.check(max(stage.last_step for stage in workdir.config.stages.values()))
    check_own_parts(workdir.config, run_vocabulary(workdir, corpus), corpus.segmented)
    sample_of(workdir.config, "ar", _model(workdir, corpus, "ar"), corpus)
    corpus.beginnings(1, workdir.config.evaluation.prompt_length)  # which the evaluation will want
    for name, stage in workdir.config.stages.items():
        if stage.last_step:
            corpus.check_batch_size(f"stages.{name.replace('-', '_')}.batch_size", stage.batch_size)
    with workdir.locked(), jax.set_mesh(mesh):
        for name in names:
            check_made_from(workdir, name, corpus)
            check_source(workdir, name, corpus)
        workdir.keep_config()
        with workdir.changed_summary() as summary:
            summary["stages"] = {k: v for k, v in summary["stages"].items() if k in names and is_finished(workdir, k)}
        with _trackers(workdir, names) as trackers:
            for name in names:
                _run_stage(workdir, corpus, name, mesh, trackers, profile)


def _trackers(workdir: Workdir, names: list[str]) -> Trackers:
    """Those of the run, if there is something left to track."""
    if not workdir.config.logging.trackers or _agreed(all(is_finished(workdir, name) for name in names)):
        return Trackers()
    run = TrackedRun(workdir.path, workdir.path.absolute().name, dataclasses.asdict(workdir.config))
    return open_trackers(workdir.config.logging.trackers, run)


def _run_stage(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh, trackers: Trackers, profile):
    # Again: what it came from may have been trained again just now.
    check_made_from(workdir, name, corpus)
    loss = None
    if _agreed(_has_good_end(workdir, corpus, name, mesh)):
        _LOG.info(f"{name:<11} finished, skipped")
    elif not workdir.config.stages[name].last_step:
        _import_stage(workdir, corpus, name, mesh)
    else:
        loss = _train_stage(workdir, corpus, name, mesh, trackers, profile)
    # Also for a stage whose run was stopped right after its last checkpoint.
    known = workdir.summary()["stages"].get(name, {})
    is_summarised = "validation_loss" in known and known.get("weights") == stage_progress(workdir, name).get("weights")
    if not _agreed(is_summarised):
        _summarise_stage(workdir, corpus, name, mesh, loss)


def _agreed(decision: bool) -> bool:
    """What the first process decides: others may see a file of a shared folder later, and wait in another place."""
    return bool(multihost_utils.broadcast_one_to_all(decision)) if jax.process_count() > 1 else decision


def _has_good_end(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh) -> bool:
    """Whether the stage has its last checkpoint, and this can be read; those past it and damaged ones are renamed."""
    past = fit_checkpoints(workdir.checkpoints_path(name), workdir.config.stages[name].last_step)
    if past:
        steps = ", ".join(map(str, sorted(past)))
        _LOG.info(f"{name:<11} checkpoints past its end are put aside, and come back where it is longer again: {steps}")
    if _agreed(is_finished(workdir, name)):
        if "made_from" not in stage_progress(workdir, name):
            _LOG.warning(f"{name:<11} does not say what it came from, taken as it is")
        with StageCheckpoints.of(workdir, name) as checkpoints:
            checkpoints.set_aside_damaged(abstract_params(_model(workdir, corpus, name), mesh))
    if _agreed(is_finished(workdir, name)):
        _end_here(workdir, corpus, name, mesh)
        return True
    return False


def _end_here(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh):
    """Where `steps` was set to a checkpoint that was not the last one: it says what the last one of a stage says."""
    progress, settings = stage_progress(workdir, name), workdir.config.stages[name]
    drop_later(workdir.metrics_path, name, settings.last_step)
    if "made_from" not in progress or "weights" in progress:
        return
    say_what_changed(name, settings, progress, settings.last_step)
    params = trained_part(_model(workdir, corpus, name), _finished(workdir, corpus, name, mesh))
    progress["weights"] = weights_digest(params)
    progress["lengths"] = lengths_from(progress.get("lengths"), settings.last_step, settings.last_step)
    write_progress(workdir, name, settings.last_step, progress)


def _train_stage(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh, trackers: Trackers, profile) -> MeanLoss:
    """Its loss too, whose program is compiled then."""
    config, settings = workdir.config, workdir.config.stages[name]
    share = process_share(mesh, settings.batch_size)
    teacher_params = _teacher_params(workdir, corpus, name, mesh)
    loss = _mean_loss(workdir, corpus, name, mesh, teacher_params)
    base = base_params(teacher_params) if _is_gated(workdir, name) else None
    initial_params, source = _initial_params(workdir, corpus, name, mesh, base)
    stage = Stage(
        name=name,
        config=settings,
        objective=functools.partial(stage_objective, config, name, run_vocabulary(workdir, corpus)),
        initial_params=initial_params,
        teacher_params=teacher_params,
        batches=lambda first: corpus.train_batches(settings.batch_size, config.seed, first, *share),
        tokens_per_step=settings.batch_size * corpus.useful_tokens_per_row,
        key=_stage_key(config, name),
        made_from=made_from(workdir, name, corpus) | source,
        flops_per_step=None if is_own(settings.objective) else step_flops(config, name, corpus.vocab_size),
        validation=_validation(workdir, corpus, name, mesh, teacher_params, base, loss),
    )
    profiled = profile and (profile, workdir.path / "profile" / name)
    with StageCheckpoints.of(workdir, name) as checkpoints:
        train(stage, mesh, checkpoints, workdir.metrics_path, config.logging, trackers, profiled)
    if config.logging.keep_best:
        _say_best(workdir, name)
    return loss


def _say_best(workdir: Workdir, name: str):
    said = {step: stage_progress(workdir, name, step) for step in checkpoint_steps(workdir, name)}
    losses = {step: p["validation_loss"] for step, p in said.items() if p.get("validation_step") == step}
    if losses:
        best = min(losses, key=lambda step: losses[step])
        _LOG.info(f"{name:<11} validated best at step {best:,}: {losses[best]:.4f} nats per token")


def _mean_loss(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh, teacher_params: dict) -> MeanLoss:
    objective = stage_objective(workdir.config, name, run_vocabulary(workdir, corpus))
    key = jax.device_put(_stage_key(workdir.config, name), replicated(mesh))
    return MeanLoss(objective, teacher_params, key, mesh)


def _validation(
    workdir: Workdir,
    corpus: Corpus,
    name: str,
    mesh: Mesh,
    teacher_params: dict,
    base: dict | None,
    loss: MeanLoss,
) -> Validation:
    """`base` are the weights of the AR teacher that a gated student's own ones belong to."""
    config = workdir.config
    rows = corpus.validation_batches(config.logging.validation_rows, config.evaluation.batch_size)
    model, comparison, window = _model(workdir, corpus, name), None, config.stages[name].window
    if window:
        if base is not None:
            ar_params = base
        elif predecessors(config, name)[0] == "ar":
            ar_params = teacher_params
        else:
            ar_params = _finished(workdir, corpus, "ar", mesh)
        ar = _model(workdir, corpus, "ar")
        key = _stage_key(config, name)
        comparison = Comparison(ar, ar_params, model, window, config.evaluation_tau, corpus.eos_id, key, config.top_p)
    return Validation(loss, rows, mesh, comparison, sample_of(config, name, model, corpus), base)


def _import_stage(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh):
    """Takes the stage's weights from a released file or model folder, or from another run."""
    settings = workdir.config.stages[name]
    source: dict = {}
    if settings.checkpoint:
        params = released.load_for(settings.checkpoint, _model(workdir, corpus, name), corpus.tokenizer, mesh)
    else:
        params, source = load_source(workdir, name, corpus, mesh)
    _LOG.info(f"{name:<11} taken from {settings.checkpoint or settings.init_from}, not trained")
    # It has not seen the data or the teacher.
    origin = {k: v for k, v in made_from(workdir, name, corpus).items() if k not in ("data", "teacher")} | source
    with StageCheckpoints.of(workdir, name) as checkpoints:
        progress = {"seconds": 0.0, "made_from": origin, "weights": weights_digest(params)}
        checkpoints.save_imported(params, progress)


def _summarise_stage(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh, loss: MeanLoss | None):
    """Adds steps, seconds and validation loss of a finished stage to summary.json."""
    loss = loss or _mean_loss(workdir, corpus, name, mesh, _teacher_params(workdir, corpus, name, mesh))
    params = _finished(workdir, corpus, name, mesh)
    settings = workdir.config.evaluation
    batches = put_validation(corpus.validation_batches(settings.rows, settings.batch_size), mesh)
    nats = loss(params, batches)
    progress = stage_progress(workdir, name)
    seconds = progress.get("seconds", 0.0)
    _LOG.info(f"{name:<11} done in {clock(seconds)}, validation loss {nats:.4f} nats per token")
    with workdir.changed_summary() as summary:
        # What was measured of other weights goes.
        before = summary["stages"].get(name, {})
        kept = before if before.get("weights") == progress.get("weights") else {}
        summary["stages"][name] = kept | {
            "steps": workdir.config.stages[name].last_step,
            "seconds": round(seconds, 1),
            "validation_loss": nats,
            "weights": progress.get("weights"),
        }


def _teacher_params(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh) -> dict:
    teacher, _ = predecessors(workdir.config, name)
    return _finished(workdir, corpus, teacher, mesh) if teacher else {}


def _finished(workdir: Workdir, corpus: Corpus, name: str, mesh: Mesh) -> dict:
    """The averaged weights of a finished stage. Raises RunError when it is not."""
    _check_finished(workdir, name)
    return load_stage(workdir, name, corpus, mesh)[1]


def _check_finished(workdir: Workdir, name: str):
    if not is_finished(workdir, name):
        raise RunError(f"stage {name} of {workdir.path} is not finished; run kforcing_jax.main on it again")


def _model(workdir: Workdir, corpus: Corpus, name: str):
    return stage_model(workdir.config, name, run_vocabulary(workdir, corpus))


def _stage_key(config: Config, name: str) -> jax.Array:
    """Depends on the name alone, so that adding a stage to a run changes nothing in the others."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))


def _is_gated(workdir: Workdir, name: str) -> bool:
    return bool(workdir.config.model.adapter_rank and workdir.config.stages[name].window)


def _initial_params(workdir, corpus, name, mesh, base=None) -> tuple[dict, dict]:
    """(fresh weights, over which come all weights of where the stage starts, what `made_from` says of another run).

    A student starts from its teacher, unless `init_from` says otherwise; of a gated one, whose teacher's weights are
    there (`base`), only what is its own is meant. Every device makes its own part of them.
    """
    model = _model(workdir, corpus, name)

    def init(key):
        return trained_part(model, init_params(model, key))

    shardings = parameter_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    key = jax.device_put(_stage_key(workdir.config, name), replicated(mesh))
    fresh = jax.jit(init, out_shardings=shardings)(key)

    def of_stage(stage):
        """What another stage of this run has of the same kind."""
        params = load_stage(workdir, stage, corpus, mesh, base)[1]
        return own_params(params) if base is not None else params

    _, origin = predecessors(workdir.config, name)
    if origin:
        _check_finished(workdir, origin)
        return fresh | of_stage(origin), {}
    if not workdir.config.stages[name].init_from:
        return fresh, {}
    if steps := checkpoint_steps(workdir, name):  # it needs the other run no longer
        kept = stage_progress(workdir, name).get("made_from", {})
        source = {key: kept[key] for key in ("init_from",) if key in kept}
        # Where it was not to be trained before, it starts from what was taken then.
        return (fresh | of_stage(name) if steps == [0] else fresh), source
    params, source = load_source(workdir, name, corpus, mesh)
    return fresh | params, source
