"""What the library says, in a notebook: lines that are brought up to date in their place, instead of thousands."""

import contextlib
import logging
from collections.abc import Iterator

from absl import logging as absl_logging

from kforcing_jax.errors import RunError


@contextlib.contextmanager
def live_progress() -> Iterator[None]:
    """Within it, progress is shown below the cell: of every stage, the newest line of each kind.

    Raises:
      RunError: the cell was interrupted. What was trained is kept, and the same cell goes on from there.
    """
    log = logging.getLogger("kforcing_jax")
    before = log.handlers, log.level, log.propagate
    log.handlers, log.propagate = [_Live()], False
    log.setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.FATAL)  # orbax reports every file
    try:
        yield
    except KeyboardInterrupt:
        raise RunError("interrupted; run the cell again, and it goes on where it stopped") from None
    finally:
        log.handlers, log.propagate = before[0], before[2]
        log.setLevel(before[1])


class _Live(logging.Handler):
    """A line takes the place of the one before it that began alike: a stage's step line that of its last steps."""

    def __init__(self):
        from IPython.display import display  # notebooks have it, the package does not ask for it

        super().__init__()
        self._display = display
        self._lines: dict[tuple[str, str], str] = {}
        self._shown = None

    def emit(self, record: logging.LogRecord):
        line = record.getMessage()
        stage, what = [*line.split(maxsplit=2), "", ""][:2]
        self._lines[stage, what[: len("compil")]] = line  # compiled takes the place of compiling
        text = {"text/plain": "\n".join(self._lines.values())}
        if self._shown is None:
            self._shown = self._display(text, raw=True, display_id=True)
        else:
            self._shown.update(text, raw=True)
