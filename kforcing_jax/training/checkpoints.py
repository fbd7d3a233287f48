"""Checkpoints of the stages of a run, through orbax, and the trained models in them."""

import contextlib
import dataclasses
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
    PreservationPolicy,
)

from kforcing_jax.config import LoggingConfig
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.errors import RunError
from kforcing_jax.models import CausalLM, PushForwardLM, init_params
from kforcing_jax.models.gated import with_own
from kforcing_jax.sharding import abstract_on, parameter_shardings, replicated
from kforcing_jax.training.recipes import stage_model, trained_part
from kforcing_jax.training.records import (
    begun_stages,
    check_made_from,
    checkpoint_steps,
    finished_stages,
    is_finished,
    run_vocabulary,
    unfinished_stages,
)
from kforcing_jax.training.step import TrainState
from kforcing_jax.workdir import Workdir, complete_steps

__all__ = [
    "LoadedStage",
    "StageCheckpoints",
    "abstract_params",
    "begun_stages",
    "finished_stages",
    "is_finished",
    "load_checkpoint",
    "load_stage",
    "unfinished_stages",
]

_LOG = logging.getLogger("kforcing_jax")
# Of a checkpoint's progress and metrics, by which the best are kept.
_LOSS = "validation_loss"

# The averaged weights are an item of their own, so that decoding restores nothing else.
_ITEMS = {
    "ema": ocp.StandardCheckpointHandler,
    "training": ocp.StandardCheckpointHandler,
    "progress": ocp.JsonCheckpointHandler,
}


def _handlers():
    return {name: handler() for name, handler in _ITEMS.items()}


class StageCheckpoints:
    """The checkpoints of one stage, written in the background; `settings` say which ones stay.

    Teachers are not in them: a teacher is the finished checkpoint of another stage. A damaged checkpoint is said and
    passed over for the one before it. With `read_only` nothing is made, renamed or deleted, and another process may
    train the stage meanwhile.
    """

    def __init__(self, directory: Path, settings: LoggingConfig | None = None, *, read_only: bool = False):
        self._directory = directory.resolve()
        handlers = _handlers() | {"metrics": ocp.JsonCheckpointHandler()}  # those of the manager, which nobody reads
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
        self._manager = None if read_only else self._opened(_keeping(settings or LoggingConfig()))

    def _opened(self, options):
        with self._written():
            return ocp.CheckpointManager(self._directory, options=options, item_handlers=_handlers())

    @classmethod
    def of(cls, workdir: Workdir, stage: str, *, read_only: bool = False) -> "StageCheckpoints":
        """Those of a stage of a run, kept as its configuration says."""
        return cls(workdir.checkpoints_path(stage), workdir.config.logging, read_only=read_only)

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        self._reader.close()
        if self._manager is None:
            return
        try:
            with self._written():
                self._manager.close()
        except RunError:
            if kind is None:  # otherwise there is an error already, most likely this one
                raise

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, None when there is none."""
        return self._writer.latest_step()

    @property
    def _writer(self) -> ocp.CheckpointManager:
        """Which there is unless these are read only."""
        assert self._manager is not None
        return self._manager

    def save(self, state: TrainState, step: int, progress: dict) -> None:
        """Writes the state after `step` steps, and what `progress` says as JSON, unless that step is already saved.

        A `validation_loss` of this step (its `validation_step`, where there is one) may make it one of the best.

        Raises:
          RunError: this checkpoint, or the one before it, could not be written.
        """
        if step == self.latest_step:
            return
        training = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
        is_of_now = progress.get("validation_step", step) == step
        metrics = {_LOSS: progress[_LOSS]} if _LOSS in progress and is_of_now else None
        self._save(step, metrics, ema=state.ema, training=training, progress=progress)

    def save_imported(self, params: dict, progress: dict) -> None:
        """Writes weights that were not trained here, as step 0. There is nothing to train on from: `restore` fails."""
        self._save(0, None, ema=params, progress=progress)

    def _save(self, step, metrics, progress, **trees):
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items = ocp.args.Composite(progress=ocp.args.JsonSave(progress), **items)
        with self._written():
            self._writer.save(step, args=items, metrics=metrics)

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds for a full disk
            raise RunError(f"checkpoints in {self._directory} cannot be written: {_one_line(error)}") from None

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict]:
        """The newest good state, on the shardings of the abstract one, and what was saved as its `progress`.

        Newer ones that are damaged are renamed, so that their steps can be saved again.

        Raises:
          RunError: the checkpoint has another shape than `abstract`, or all of them are damaged.
        """
        training = {"step": abstract.step, "params": abstract.params, "opt_state": abstract.opt_state}
        restored = self._newest_good(self._set_aside, ema=abstract.ema, training=training, progress=None)
        return TrainState(ema=restored["ema"], **restored["training"]), restored["progress"]

    def restore_newest(self, abstract: dict, last_step: int | None = None) -> tuple[dict, int]:
        """The newest good averaged weights and their step, of those up to a last one; nothing is renamed.

        Where another process trains, checkpoints come and go meanwhile: what is gone is no damage.

        Raises:
          RunError: as `restore`.
        """
        failed: set[int] = set()
        step = self._newest_step(last_step, failed)
        while step is not None:
            restored, reason = self._restored(step, ema=abstract)
            if reason is None:
                return restored["ema"], step
            failed.add(step)
            following = self._newest_step(last_step, failed)
            is_replaced = following is not None and following > step
            if not is_replaced and step in complete_steps(self._directory):
                self._say_damaged(step, reason, following)
            step = following
        raise RunError(f"{self._directory} holds no checkpoint")

    def restore_step(self, abstract: dict, step: int) -> dict:
        """The averaged weights of one checkpoint. Raises RunError when it is missing, damaged or of another shape."""
        if _agreed_step(step if step in complete_steps(self._directory) else None) is None:
            there = ", ".join(map(str, sorted(complete_steps(self._directory))))
            raise RunError(f"{self._directory} has no checkpoint of step {step}, but of {there or 'none'}")
        restored, reason = self._restored(step, ema=abstract)
        if reason is not None:
            raise RunError(f"checkpoint {self._directory / str(step)} is damaged ({reason})")
        return restored["ema"]

    def _newest_step(self, last_step, failed) -> int | None:
        if self._manager:
            self._manager.wait_until_finished()
        steps = [step for step in complete_steps(self._directory) if last_step is None or step <= last_step]
        return _agreed_step(next((step for step in steps if step not in failed), None))

    def set_aside_damaged(self, abstract: dict) -> None:
        """Renames newest checkpoints whose averaged weights are damaged, as `restore` does, and raises like it.

        Without its last checkpoint a stage is not finished any more, and goes on from the one before.
        """
        self._newest_good(self._set_aside, ema=abstract, progress=None)

    def _newest_good(self, passed_over: Callable[[int], None], **abstract):
        steps = sorted(self._writer.all_steps(), reverse=True)
        for step, before in zip(steps, [*steps[1:], None], strict=True):
            restored, reason = self._restored(step, **abstract)
            if reason is None:
                return restored
            self._say_damaged(step, reason, before)
            passed_over(step)
        raise RunError(f"{self._directory} holds no checkpoint")

    def _say_damaged(self, step, reason, before):
        """Raises RunError where there is none before it."""
        where = self._directory / str(step)
        if before is None:
            raise RunError(
                f"checkpoint {where} is damaged ({reason}), and there is no good one before it; restore it, or "
                f"delete {self._directory.parent} to begin the stage again"
            )
        _LOG.warning(f"checkpoint {where} is damaged ({reason}); taking that of step {before}")

    def _restored(self, step, **abstract):
        """(items, None), or (None, what is wrong with them). Raises RunError for a model of another shape."""
        self._check_fits(step, abstract["ema"])
        args = {name: _restore_args(tree) for name, tree in abstract.items()}
        restored = reason = None
        try:
            restored = self._reader.restore(self._directory / str(step), args=ocp.args.Composite(**args))
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged checkpoint
            reason = _one_line(error)
        if jax.process_count() > 1:  # one that cannot read its part is enough
            failed = multihost_utils.process_allgather(np.array(reason is not None))
            reason = (reason or "another process cannot read it") if failed.any() else None
        return restored, reason

    def _check_fits(self, step, abstract):
        """Raises RunError when the checkpoint says of itself that its weights are of another model."""
        try:
            there = _shapes(self._reader.metadata(self._directory / str(step)).item_metadata["ema"].tree)
        except Exception:  # damaged: what it is of will not be known
            return
        here = _shapes(abstract)
        wrong = [path for path in here | there if there.get(path) != here.get(path)]
        if wrong:
            raise RunError(
                f"checkpoint {self._directory / str(step)} does not fit this model: {wrong[0]} is "
                f"{there.get(wrong[0], 'missing')} there, {here.get(wrong[0], 'missing')} here; restore the config it "
                "was made with, or use another work directory"
            )

    def _set_aside(self, step):
        if jax.process_index() == 0:
            path = self._directory / str(step)
            aside = path.with_name(f"damaged-{step}")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            path.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        self._writer.reload()


@dataclasses.dataclass(frozen=True)
class _EveryNth(PreservationPolicy):
    """Checkpoints whose step is a multiple; orbax's own means something else in some of its versions."""

    steps: int

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step % self.steps == 0 for checkpoint in checkpoints]


def _keeping(settings: LoggingConfig) -> ocp.CheckpointManagerOptions:
    """The newest ones stay in any case; that is where a stage ends."""
    policies: list[PreservationPolicy] = [LatestN(settings.keep_newest)]
    if settings.keep_every:
        policies.append(_EveryNth(settings.keep_every))
    if not settings.keep_best:
        return ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(policies))
    best = {"n": settings.keep_best, "reverse": True, "keep_checkpoints_without_metrics": False}
    policies.append(BestN(get_metric_fn=_loss, **best))
    return ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies), best_fn=_loss, best_mode="min"
    )


def _loss(metrics: dict) -> float:
    """NaN is no loss to be proud of."""
    return metrics[_LOSS] if np.isfinite(metrics[_LOSS]) else np.inf


def _agreed_step(step: int | None) -> int | None:
    """What the first process sees: of a folder that changes, another one may see something else."""
    if jax.process_count() == 1:
        return step
    step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if step < 0 else step


def _restore_args(abstract: dict | None):
    """None stands for an item that is JSON."""
    return ocp.args.JsonRestore() if abstract is None else ocp.args.StandardRestore(abstract)


def _one_line(error) -> str:
    """The beginning and the end of what tensorstore and orbax say: the file and the reason."""
    text = re.sub(r" \[[a-z_ ]+='.*", "", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"


def _shapes(tree) -> dict[str, tuple]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


class LoadedStage(NamedTuple):
    """A model, its averaged weights, and the step that these are of."""

    model: CausalLM | PushForwardLM
    params: dict
    step: int


def load_stage(
    workdir: Workdir, stage: str, tokens: Corpus | Tokenizer, mesh: Mesh | None = None, base: dict | None = None
) -> tuple[CausalLM | PushForwardLM, dict]:
    """(model, averaged weights) of a stage at its newest checkpoint, see `load_checkpoint`."""
    return load_checkpoint(workdir, stage, tokens, mesh, base=base)[:2]


def load_checkpoint(
    workdir: Workdir,
    stage: str,
    tokens: Corpus | Tokenizer,
    mesh: Mesh | None = None,
    step: int | None = None,
    base: dict | None = None,
) -> LoadedStage:
    """A stage at its newest checkpoint or at a step, spread over a mesh or whole on this process's first device.

    All processes of a run have to call this together. The stage need not be finished, and another process may train it
    meanwhile; the step of one that is not is said. Where a checkpoint is damaged, the one before it is taken, and that
    is said. A gated student comes with the weights of its AR teacher: `base`, where these were loaded before.

    Raises:
      RunError: the stage has no checkpoint (of that step), does not fit the model, or was made from something else than
        is there.
    """
    if not checkpoint_steps(workdir, stage):
        raise RunError(f"stage {stage} of {workdir.path} has no checkpoint yet; run kforcing_jax.main on it")
    check_made_from(workdir, stage, tokens)
    model = stage_model(workdir.config, stage, run_vocabulary(workdir, tokens))
    abstract, last_step = abstract_params(model, mesh), workdir.config.stages[stage].last_step
    with StageCheckpoints.of(workdir, stage, read_only=True) as checkpoints:
        if step is None:
            params, step = checkpoints.restore_newest(abstract, last_step)
        else:
            params = checkpoints.restore_step(abstract, step)
    if step != last_step and not is_finished(workdir, stage):
        _LOG.info(f"{stage} at step {step:,} of {last_step:,}, not finished")
    elif step != last_step:
        _LOG.info(f"{stage} at step {step:,}, not its last, {last_step:,}")
    params = params if mesh else jax.tree.map(lambda x: x.addressable_data(0), params)
    if model.cfg.is_gated:
        params = with_own(load_stage(workdir, "ar", tokens, mesh)[1] if base is None else base, params)
    return LoadedStage(model, params, step)


def abstract_params(model: CausalLM | PushForwardLM, mesh: Mesh | None = None) -> dict:
    """Shapes and shardings of what is kept of a model's parameters: over a mesh, or whole for every process."""
    shapes = jax.eval_shape(lambda: trained_part(model, init_params(model, jax.random.key(0))))
    return abstract_on(shapes, parameter_shardings(shapes, mesh) if mesh else _whole_everywhere())


def _whole_everywhere():
    """One whole copy on the first device of every process: checkpoints are restored by all processes together."""
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    return replicated(Mesh([firsts[i] for i in sorted(firsts)], "process"))
