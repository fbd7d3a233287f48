"""Stopping between two steps, so that what was trained is kept."""

import logging
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

_LOG = logging.getLogger("kforcing_jax")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While this context is active, a first SIGINT or SIGTERM asks to stop, and a second one interrupts at once.

    Of several processes SIGTERM alone asks: JAX passes it on, so that all stop after the same step.
    """

    def __init__(self):
        self._asked = False
        self._handlers = {}

    def __enter__(self):
        # Python lets the main thread alone have signal handlers.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            # What is ignored stays so: shells let background jobs ignore the Ctrl-C that is meant for others.
            heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *exception):
        self._restore()

    def is_asked_for(self, step: int) -> bool:
        """Whether to stop after this step. All processes have to ask at every step."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)

    def _ask(self, number: int, frame: FrameType | None):
        self._asked = True
        self._restore()
        _LOG.info("stopping after this step; once more to stop at once")

    def _restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
