"""When a stage is saved before its end: every so many steps, and every so many seconds."""

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from kforcing_jax.config import LoggingConfig


class SaveTimes:
    """After which steps to save, the same in all processes: by time, the first one decides.

    `clock` gives seconds.
    """

    def __init__(self, settings: LoggingConfig, clock: Callable[[], float] = time.monotonic):
        self._settings, self._clock = settings, clock
        self._last = clock()

    def is_due(self, step: int) -> bool:
        """Whether to save after this step. All processes have to ask at every step."""
        if step % self._settings.checkpoint_every == 0:
            return True
        if not self._settings.checkpoint_seconds:
            return False
        if jax.process_count() == 1:
            return self._is_late()
        # An agreement waits for the devices, as a report does.
        if step % self._settings.log_every:
            return False
        return bool(multihost_utils.broadcast_one_to_all(np.array(self._is_late())))

    def saved(self) -> None:
        """A checkpoint was made now."""
        self._last = self._clock()

    def _is_late(self):
        return self._clock() - self._last >= self._settings.checkpoint_seconds
