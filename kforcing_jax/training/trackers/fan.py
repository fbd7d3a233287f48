"""All trackers of a run as one, which never ends training."""

import contextlib
import logging
import numbers
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from kforcing_jax.errors import RunError
from kforcing_jax.registry import TRACKERS
from kforcing_jax.training.trackers.tracker import TrackedRun, Tracker

_LOG = logging.getLogger("kforcing_jax")


class Trackers:
    """What every tracker of a run is told. One that fails is said once and asked again at the next report."""

    def __init__(self, trackers: dict[str, Tracker] | None = None):
        self._trackers = dict(trackers or {})
        self._failed: set[str] = set()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def add(self, name: str, tracker: Tracker) -> None:
        """Takes one that has started."""
        self._trackers[name] = tracker

    def close(self) -> None:
        """Closes all of them, whatever happens."""
        for name, tracker in self._trackers.items():
            with self._survived(name):
                tracker.close()

    def write(self, stage: str, step: int, record: dict) -> None:
        """Numbers and texts of a line of metrics.jsonl, under their names there."""
        values = {name: value for name, value in record.items() if name not in ("stage", "step", "time")}
        scalars = {name: float(value) for name, value in values.items() if isinstance(value, numbers.Real)}
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        for name, tracker in self._trackers.items():
            with self._survived(name):
                tracker.write(stage, step, scalars, texts)

    @contextlib.contextmanager
    def _survived(self, name):
        try:
            yield
        except Exception as error:  # theirs are of any kind: a network, a disk, somebody's own code
            if name not in self._failed:
                _LOG.warning(f"tracker {name} fails ({_said(error)}); training goes on, metrics.jsonl has everything")
            self._failed.add(name)


def check_trackers(names: Sequence[str]) -> dict[str, type[Tracker]]:
    """The classes of trackers, by the names of `logging.trackers`.

    Raises:
      ConfigError: a name that is not in the table, or a package that is not installed.
    """
    return {name: TRACKERS.find(name) for name in names}


def open_trackers(names: Sequence[str], run: TrackedRun) -> Trackers:
    """Trackers that have started, in process 0; elsewhere none. All processes of a run have to call this together.

    Raises:
      RunError: one of them is not there, or could not start.
    """
    started, error = Trackers(), None
    for name in names if jax.process_index() == 0 else ():
        try:
            tracker = TRACKERS.find(name)()
            tracker.start(run)
            started.add(name, tracker)
        except Exception as raised:  # of any kind, as theirs are
            error = f"tracker {name} cannot start: {_said(raised)}"
            break
    if names and jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.array(error is not None)))
        error = error or ("a tracker of process 0 cannot start" if failed else None)
    if error:
        started.close()
        raise RunError(error)
    return started


def _said(error) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]} ..."
