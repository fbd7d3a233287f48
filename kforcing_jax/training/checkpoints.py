"""Checkpoints of the stages of a run, through orbax, and the trained models in them."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from kforcing_jax.errors import RunError
from kforcing_jax.models import init_params
from kforcing_jax.sharding import abstract_on, parameter_shardings, replicated
from kforcing_jax.training.recipes import Vocabulary, stage_model
from kforcing_jax.training.step import TrainState
from kforcing_jax.workdir import Workdir

# The averaged weights are an item of their own, so that decoding restores nothing else.
_ITEMS = ("ema", "training", "progress")


class StageCheckpoints:
    """The checkpoints of one stage: the newest two, written in the background.

    Teachers are not in them: a teacher is the finished checkpoint of another stage.
    """

    def __init__(self, directory: Path):
        self._directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=_ITEMS)

    @classmethod
    def of(cls, workdir: Workdir, stage: str) -> "StageCheckpoints":
        return cls(workdir.checkpoints_path(stage))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, None when there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, seconds: float):
        """Writes the state after `step` steps and `seconds` of training, unless that step is already saved."""
        if step == self.latest_step:
            return
        training = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                ema=ocp.args.StandardSave(state.ema),
                training=ocp.args.StandardSave(training),
                progress=ocp.args.JsonSave({"seconds": seconds}),
            ),
        )

    def save_imported(self, params: dict):
        """Writes weights that were not trained here, as step 0. There is nothing to train on from: `restore` fails."""
        self._manager.save(
            0, args=ocp.args.Composite(ema=ocp.args.StandardSave(params), progress=ocp.args.JsonSave({"seconds": 0.0}))
        )

    def restore(self, abstract: TrainState) -> tuple[TrainState, float]:
        """The newest state, on the shardings of the abstract one, and the seconds that it took.

        Raises:
          RunError: the checkpoint has another shape than `abstract`, or is damaged.
        """
        training = {"step": abstract.step, "params": abstract.params, "opt_state": abstract.opt_state}
        restored = self._restore(
            ema=ocp.args.StandardRestore(abstract.ema),
            training=ocp.args.StandardRestore(training),
            progress=ocp.args.JsonRestore(),
        )
        return TrainState(ema=restored["ema"], **restored["training"]), restored["progress"]["seconds"]

    def restore_ema(self, abstract: dict) -> dict:
        """The newest averaged weights. Raises like `restore`."""
        return self._restore(ema=ocp.args.StandardRestore(abstract))["ema"]

    def seconds(self) -> float:
        """Seconds of training that the newest checkpoint took."""
        return self._restore(progress=ocp.args.JsonRestore())["progress"]["seconds"]

    def _restore(self, **items):
        try:
            return self._manager.restore(self.latest_step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged or foreign checkpoint
            reason = " ".join(str(error).split())[:300]
            where = self._directory / str(self.latest_step)
            raise RunError(
                f"checkpoint {where} does not fit this model or is damaged ({reason}); "
                "restore the config it was made with, or use another work directory"
            ) from None


def is_finished(workdir: Workdir, stage: str) -> bool:
    """Whether the stage has its last checkpoint."""
    if not workdir.checkpoints_path(stage).exists():
        return False
    with StageCheckpoints.of(workdir, stage) as checkpoints:
        return checkpoints.latest_step == workdir.config.stages[stage].last_step


def finished_stages(workdir: Workdir) -> list[str]:
    """Finished stages in the order of training."""
    return [name for name in ["ar", *workdir.config.students] if is_finished(workdir, name)]


def load_stage(workdir: Workdir, stage: str, vocabulary: Vocabulary, mesh: Mesh | None = None):
    """(model, averaged weights) of a finished stage, spread over a mesh or whole on this process's first device.

    All processes of a run have to call this together.

    Raises:
      RunError: the stage is not finished, or does not fit the model.
    """
    if not is_finished(workdir, stage):
        raise RunError(f"stage {stage} of {workdir.path} is not finished; run kforcing_jax.main on it again")
    model = stage_model(workdir.config, stage, vocabulary)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    shardings = parameter_shardings(shapes, mesh) if mesh else _whole_everywhere()
    with StageCheckpoints.of(workdir, stage) as checkpoints:
        params = checkpoints.restore_ema(abstract_on(shapes, shardings))
    return model, params if mesh else jax.tree.map(lambda x: x.addressable_data(0), params)


def _whole_everywhere():
    """One whole copy on the first device of every process: checkpoints are restored by all processes together."""
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    return replicated(Mesh([firsts[i] for i in sorted(firsts)], "process"))
