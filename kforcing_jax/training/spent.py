"""Where the time of a stage goes."""

import contextlib
import time
from collections.abc import Iterator, Mapping

# What is not said to go to one of the others is time of steps, waiting for their data included.
PARTS = ("compiling", "restoring", "saving", "validating", "stepping")


class Spent:
    """Seconds of a stage by what they went to, those before an interruption included: they add up to all of it.

    The clock runs from the beginning of the object. Checkpoints are written in the background: `saving` is what
    training waited for.
    """

    def __init__(self):
        self._start = time.monotonic()
        self._here = dict.fromkeys(PARTS[:-1], 0.0)
        self._before = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        """What happens in this context goes to one of `PARTS`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._here[part] += time.monotonic() - start

    def go_on_from(self, seconds: float, parts: Mapping[str, float] | None = None) -> None:
        """Adds what earlier processes took: `seconds`, by `parts` where these are known."""
        self._before |= dict(parts) if parts else {"stepping": seconds}

    @property
    def here(self) -> dict[str, float]:
        """By part, of this process."""
        return self._here | {"stepping": time.monotonic() - self._start - sum(self._here.values())}

    @property
    def parts(self) -> dict[str, float]:
        """By part, of the stage."""
        return {part: self._before[part] + seconds for part, seconds in self.here.items()}

    @property
    def total(self) -> float:
        """Seconds of the stage so far."""
        return sum(self._before.values()) + time.monotonic() - self._start
