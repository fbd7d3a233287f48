"""The thread in which the engine works."""

import logging
import threading
import time
import traceback
from collections.abc import Callable

from kforcing_jax.serving.scheduler import Scheduler

_LOG = logging.getLogger("kforcing_jax")
# So many steps in a row that fail are no accident.
_MOST_FAILURES = 3
_IDLE_SECONDS = 0.1
# A step that lasts longer hangs: steps are to take hundredths of a second, and nothing compiles.
_STALL_SECONDS = 60
# For the step that it is in when it has to stop.
_SECONDS_TO_STOP = 5


class Worker:
    """Steps a scheduler as long as there is something to do.

    What the engine raises ends the texts that have a slot; their caches are given up, and the others go on. After three
    such steps in a row all texts end, no more are taken, and `on_failure` is called.
    """

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self.on_failure: Callable[[], None] = lambda: None
        self._is_ending = False
        self.has_failed = False
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def is_stalled(self) -> bool:
        """Whether a step does not end."""
        began = self._step_began
        return began is not None and time.monotonic() - began > _STALL_SECONDS

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it works, or hangs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends after the step that it is in, if that ends; texts that are left end with an error."""
        self._is_ending = True
        self._scheduler.close()
        if self.is_alive:
            self._thread.join(_SECONDS_TO_STOP)
        if self.is_alive:
            self._scheduler.drop("the server was shut down")
        else:
            self._scheduler.fail(RuntimeError("the server was shut down"), everything=True)

    def _work(self):
        failures = 0
        while not self._is_ending and failures < _MOST_FAILURES:
            if not self._scheduler.wait(_IDLE_SECONDS):
                continue
            self._step_began = time.monotonic()
            try:
                failures = 0 if self._scheduler.step() else failures
            except Exception as error:  # whatever it is, those who wait have to know
                failures += 1
                _LOG.error(f"a step of the engine failed\n{traceback.format_exc()}")
                self._fail(error, everything=failures == _MOST_FAILURES)
            self._step_began = None
        if failures == _MOST_FAILURES:
            self.has_failed = True
            self.on_failure()

    def _fail(self, error, everything):
        if everything:
            self._scheduler.close()
        try:
            self._scheduler.fail(error, everything)
        except Exception:
            _LOG.error(f"the engine cannot be released\n{traceback.format_exc()}")
