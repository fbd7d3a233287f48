"""What the library says, on a terminal.

Library code reports through `logging.getLogger("kforcing_jax")`; commands show it as plain lines on stderr, so that
`--json` output on stdout stays clean.
"""

import contextlib
import logging
import sys


def show_progress() -> None:
    """Shows what the library reports from now on. Of several processes, the first one speaks."""
    log = logging.getLogger("kforcing_jax")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [_Terminal()]


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord):
        # A signal may have come while something else was printed.
        with contextlib.suppress(RuntimeError):
            if _is_first_process():
                print(record.getMessage(), file=sys.stderr, flush=True)


def _is_first_process() -> bool:
    """Without importing JAX, which a command may never need."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0
