"""Checkpoints of one stage, through orbax."""

from pathlib import Path

import orbax.checkpoint as ocp

from kforcing_jax.errors import RunError
from kforcing_jax.training.step import TrainState

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
