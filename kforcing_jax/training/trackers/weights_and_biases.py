"""Weights & Biases. WANDB_MODE (online, offline, disabled), WANDB_PROJECT and the others of its variables hold."""

import html
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from kforcing_jax.data.whole_file import write_text
from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.training.trackers.tracker import TrackedRun

try:
    import wandb
except ImportError:
    raise ConfigError("logging.trackers = wandb needs the package wandb; pip install 'kforcing-jax[wandb]'") from None


class WeightsAndBiases:
    """One run for the whole curriculum; metrics are named STAGE/metric over STAGE/step, which begins anew in each.

    The id of the run is kept in RUN/wandb/run_id, so that a run that is started again goes on in the same curves.
    """

    def start(self, run: TrackedRun) -> None:
        """Begins the run there, or goes on with it. Raises RunError without an account or a network."""
        folder = run.folder / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        project, run_id = os.environ.get("WANDB_PROJECT", "kforcing-jax"), _kept_id(folder / "run_id")
        try:
            self._run = wandb.init(
                project=project, name=run.name, id=run_id, resume="allow", dir=run.folder, config=run.config
            )
        except wandb.Error as error:
            raise RunError(f"{error} WANDB_MODE=offline keeps the run on this disk, for wandb sync") from None
        self._stages: set[str] = set()

    def write(self, stage: str, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """One entry of its history, texts as pages."""
        if stage not in self._stages:
            # Steps of its own have to increase over the whole run.
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        pages = {
            name: wandb.Html(f"<pre>{html.escape(text)}</pre>", data_is_not_path=True) for name, text in texts.items()
        }
        self._run.log({f"{stage}/{name}": value for name, value in {"step": step, **scalars, **pages}.items()})

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


def _kept_id(path: Path) -> str:
    if not path.exists():
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()
