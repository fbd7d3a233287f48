"""First weights of a stage from a stage of another run, or all of its weights where it is not trained."""

import dataclasses

import jax
from jax.sharding import Mesh

from kforcing_jax.config import StageConfig
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.errors import RunError
from kforcing_jax.interop import official
from kforcing_jax.models.gated import own_params
from kforcing_jax.sharding import parameter_shardings
from kforcing_jax.training.checkpoints import load_checkpoint
from kforcing_jax.training.recipes import stage_model, trained_part
from kforcing_jax.training.records import (
    begun_stages,
    checkpoint_steps,
    kept_order,
    run_vocabulary,
    stage_progress,
    weights_digest,
)
from kforcing_jax.workdir import Workdir

# Fields of the model that change no weights, nor what they mean.
_ARITHMETIC = ("remat", "attention", "precision")


def check_sources(workdir: Workdir) -> None:
    """`check_source` of all stages, as far as their configurations tell: before anything is prepared or trained."""
    for name in ["ar", *workdir.config.students]:
        check_source(workdir, name)


def check_source(workdir: Workdir, name: str, corpus: Corpus | None = None) -> None:
    """Whether a stage can start from what its `init_from` names; one that has begun needs it no longer.

    Raises:
      RunError: there is no such run or stage, it has no checkpoint, or another model; with a corpus also: another
        vocabulary, or a student for another order of tokens on [0, 1).
    """
    if checkpoint_steps(workdir, name):
        return
    source = workdir.source(name)
    if source is None:
        return
    run, stage = source
    settings = workdir.config.stages[name]
    said = f"stages.{name}.init_from = {settings.init_from!r}"
    _check_stage(said, run, stage)
    _check_model(said, workdir, run, is_student=bool(run.config.stages[stage].window))
    _check_window(said, settings, run.config.stages[stage], stage)
    if corpus:
        _check_vocabulary(said, workdir, corpus, run, stage)


def _check_stage(said, run, stage):
    begun = begun_stages(run)
    if stage in begun:
        return
    there = f"stages with a checkpoint: {', '.join(begun)}" if begun else "none of its stages has a checkpoint"
    known = "has no checkpoint yet" if stage in run.config.stages else "is no stage of that run"
    raise RunError(f"{said}: {stage} {known}; {run.path} has {', '.join(run.config.stages)}, {there}")


def _check_model(said, workdir, run, is_student):
    """An AR model is bound to no order of tokens on [0, 1)."""
    here, there = dataclasses.asdict(workdir.config.model), dataclasses.asdict(run.config.model)
    may_differ = _ARITHMETIC if is_student else (*_ARITHMETIC, "cdf_order", "adapter_rank")
    for field, value in there.items():
        if field not in may_differ and here.get(field) != value:
            raise RunError(f"{said}: model.{field} = {value!r} there, {here.get(field)!r} here; set it to that")


def _check_window(said, settings: StageConfig, there: StageConfig, stage):
    if there.window and not settings.window:
        raise RunError(f"{said}: {stage} is a student, and the teacher starts from an AR model; name an AR stage")
    if settings.steps:
        return
    if there.window < settings.window:
        raise RunError(
            f"{said}: {stage} has window = {there.window}, too small for {settings.window} without training; give "
            "it steps, or name another stage"
        )
    if settings.window and not there.tau_min <= settings.tau_min <= settings.tau_max <= there.tau_max:
        raise RunError(
            f"{said}: {stage} was trained with tau_min, tau_max = {there.tau_min:g}, {there.tau_max:g}, and here it is "
            f"{settings.tau_min:g}, {settings.tau_max:g} without training"
        )
    if settings.window and settings.top_p != there.top_p:
        raise RunError(
            f"{said}: {stage} was trained with top_p = {there.top_p:g}, and here it is {settings.top_p:g} without "
            "training"
        )


def _check_vocabulary(said, workdir, corpus, run, stage):
    there = stage_progress(run, stage).get("made_from", {}).get("vocabulary") or run.tokenizer().digest
    if there != corpus.vocabulary_digest:
        raise RunError(
            f"{said}: it has another vocabulary ({there[:8]}) than {workdir.data_path} "
            f"({corpus.vocabulary_digest[:8]}); share its data (data.prepared = {str(run.data_path.absolute())!r}), or "
            "prepare the same text alike"
        )
    is_student = bool(run.config.stages[stage].window)
    if is_student and kept_order(run, stage) != run_vocabulary(workdir, corpus).cdf_order:
        raise RunError(
            f"{said}: {stage} is a student for another order of tokens on [0, 1) than this run has; take the AR "
            "teacher of that run too (stages.ar.init_from), in a new work directory"
        )


def _check_base(workdir, name, run, stage):
    """What a gated student adds to its AR teacher's weights is of no use beside others."""
    there = stage_progress(run, stage).get("made_from", {}).get("base", {}).get("weights")
    here = stage_progress(workdir, "ar").get("weights")
    if run.config.stages[stage].window and there != here:
        raise RunError(
            f"stages.{name.replace('-', '_')}.init_from = {workdir.config.stages[name].init_from!r}: {stage} was "
            f"trained on another AR teacher ({str(there)[:8]}; here it is {str(here)[:8]}); take that one too "
            "(stages.ar.init_from, stages.ar.steps = 0)"
        )


def load_source(workdir: Workdir, name: str, corpus: Corpus, mesh: Mesh) -> tuple[dict, dict]:
    """(averaged weights on the mesh, in this run's order of tokens, what `made_from` says of them).

    Of a gated student its own ones.

    All processes of a run have to call this together. Of a stage that is not finished, those of its newest checkpoint.

    Raises:
      RunError: as `check_source`, or the checkpoint is damaged.
    """
    check_source(workdir, name, corpus)
    source = workdir.source(name)
    assert source is not None  # only stages with `init_from` come here
    run, stage = source
    here = stage_model(workdir.config, name, run_vocabulary(workdir, corpus))
    if here.cfg.is_gated:
        _check_base(workdir, name, run, stage)
    # Nothing of that run's teacher is read where a gated student's own weights are all that is wanted.
    model, params, step = load_checkpoint(run, stage, corpus.tokenizer, mesh, base={} if here.cfg.is_gated else None)
    weights = weights_digest(trained_part(model, params))
    origin = {"run": str(run.path.absolute()), "stage": stage, "step": step, "weights": weights}
    if here.cfg.is_gated:
        params = own_params(params)  # in this run's order: a student is bound to it
    else:
        _, params = official.in_order(model, params, here.cfg.cdf_order)
    return jax.device_put(params, parameter_shardings(params, mesh)), {"init_from": origin}
