"""Checkpoints of the stages of a run, through orbax, and the trained models in them."""

import contextlib
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.errors import RunError
from kforcing_jax.models import init_params
from kforcing_jax.sharding import abstract_on, parameter_shardings, replicated
from kforcing_jax.training.recipes import stage_model
from kforcing_jax.training.records import check_made_from, complete_steps, run_vocabulary
from kforcing_jax.training.step import TrainState
from kforcing_jax.workdir import Workdir

_LOG = logging.getLogger("kforcing_jax")

# The averaged weights are an item of their own, so that decoding restores nothing else.
_ITEMS = {
    "ema": ocp.StandardCheckpointHandler,
    "training": ocp.StandardCheckpointHandler,
    "progress": ocp.JsonCheckpointHandler,
}


class StageCheckpoints:
    """The checkpoints of one stage: the newest two, written in the background.

    Teachers are not in them: a teacher is the finished checkpoint of another stage. A damaged checkpoint is said and
    passed over for the one before it.
    """

    def __init__(self, directory: Path):
        self._directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        with self._written():
            handlers = {name: handler() for name, handler in _ITEMS.items()}
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    @classmethod
    def of(cls, workdir: Workdir, stage: str) -> "StageCheckpoints":
        return cls(workdir.checkpoints_path(stage))

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        try:
            with self._written():
                self._manager.close()
        except RunError:
            if kind is None:  # otherwise there is an error already, most likely this one
                raise

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, None when there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, progress: dict):
        """Writes the state after `step` steps, and what `progress` says as JSON, unless that step is already saved.

        Raises:
          RunError: this checkpoint, or the one before it, could not be written.
        """
        if step == self.latest_step:
            return
        training = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
        self._save(step, ema=state.ema, training=training, progress=progress)

    def save_imported(self, params: dict, progress: dict):
        """Writes weights that were not trained here, as step 0. There is nothing to train on from: `restore` fails."""
        self._save(0, ema=params, progress=progress)

    def _save(self, step, progress, **trees):
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        with self._written():
            self._manager.save(step, args=ocp.args.Composite(progress=ocp.args.JsonSave(progress), **items))

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

    def restore_ema(self, abstract: dict) -> dict:
        """The newest good averaged weights. Raises like `restore`; nothing is renamed."""
        return self._newest_good(lambda step: None, ema=abstract)["ema"]

    def set_aside_damaged(self, abstract: dict):
        """Renames newest checkpoints whose averaged weights are damaged, as `restore` does, and raises like it.

        Without its last checkpoint a stage is not finished any more, and goes on from the one before.
        """
        self._newest_good(self._set_aside, ema=abstract, progress=None)

    def _newest_good(self, passed_over: Callable[[int], None], **abstract):
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step, before in zip(steps, [*steps[1:], None], strict=True):
            restored, reason = self._restored(step, **abstract)
            if reason is None:
                return restored
            where = self._directory / str(step)
            if before is None:
                raise RunError(
                    f"checkpoint {where} is damaged ({reason}), and there is no good one before it; restore it, or "
                    f"delete {self._directory.parent} to begin the stage again"
                )
            _LOG.warning(f"checkpoint {where} is damaged ({reason}); taking that of step {before}")
            passed_over(step)
        raise RunError(f"{self._directory} holds no checkpoint")

    def _restored(self, step, **abstract):
        """(items, None), or (None, what is wrong with them). Raises RunError for a model of another shape."""
        self._check_fits(step, abstract["ema"])
        args = {name: _restore_args(tree) for name, tree in abstract.items()}
        restored = reason = None
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged checkpoint
            reason = _one_line(error)
        if jax.process_count() > 1:  # one that cannot read its part is enough
            failed = multihost_utils.process_allgather(np.array(reason is not None))
            reason = (reason or "another process cannot read it") if failed.any() else None
        return restored, reason

    def _check_fits(self, step, abstract):
        """Raises RunError when the checkpoint says of itself that its weights are of another model."""
        try:
            there = _shapes(self._manager.item_metadata(step)["ema"].tree)
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
        self._manager.reload()


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


def is_finished(workdir: Workdir, stage: str) -> bool:
    """Whether the stage has its last checkpoint."""
    return workdir.config.stages[stage].last_step in complete_steps(workdir.checkpoints_path(stage))


def finished_stages(workdir: Workdir) -> list[str]:
    """Finished stages in the order of training."""
    return [name for name in ["ar", *workdir.config.students] if is_finished(workdir, name)]


def load_stage(workdir: Workdir, stage: str, tokens: Corpus | Tokenizer, mesh: Mesh | None = None):
    """(model, averaged weights) of a finished stage, spread over a mesh or whole on this process's first device.

    All processes of a run have to call this together.

    Where its last checkpoint is damaged, the one before it is taken, and that is said.

    Raises:
      RunError: the stage is not finished, does not fit the model, or was made from something else than is there.
    """
    if not is_finished(workdir, stage):
        raise RunError(f"stage {stage} of {workdir.path} is not finished; run kforcing_jax.main on it again")
    check_made_from(workdir, stage, tokens)
    model = stage_model(workdir.config, stage, run_vocabulary(workdir, tokens))
    with StageCheckpoints.of(workdir, stage) as checkpoints:
        params = checkpoints.restore_ema(abstract_params(model, mesh))
    return model, params if mesh else jax.tree.map(lambda x: x.addressable_data(0), params)


def abstract_params(model, mesh: Mesh | None = None) -> dict:
    """Shapes and shardings of a model's parameters: over a mesh, or one whole copy for every process."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return abstract_on(shapes, parameter_shardings(shapes, mesh) if mesh else _whole_everywhere())


def _whole_everywhere():
    """One whole copy on the first device of every process: checkpoints are restored by all processes together."""
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    return replicated(Mesh([firsts[i] for i in sorted(firsts)], "process"))
