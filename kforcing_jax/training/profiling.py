"""Profiles of some steps of a stage, by JAX's profiler."""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from kforcing_jax.errors import ConfigError

_LOG = logging.getLogger("kforcing_jax")


class ProfiledSteps(NamedTuple):
    """Steps `first` to `last` of a stage, the first step of a stage being 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "ProfiledSteps":
        """From FIRST:LAST. Raises ConfigError."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        steps = cls(*map(int, match.groups())) if match else cls(0, 0)
        if not 1 <= steps.first <= steps.last:
            raise ConfigError(f"profile = {text!r} should be FIRST:LAST, steps of a stage, such as 20:25")
        return steps

    def check(self, steps: int) -> None:
        """Raises ConfigError when a stage of so many steps, the longest one, has none of them."""
        if self.first > steps:
            raise ConfigError(
                f"profile = '{self.first}:{self.last}' begins after step {steps}, the last one of the longest stage"
            )


class Profiler:
    """Profiles the given steps of one stage into a folder. Nothing of it can end training."""

    def __init__(self, profile: tuple[ProfiledSteps, Path] | None):
        none: tuple[ProfiledSteps, Path | None] = ProfiledSteps(0, 0), None
        self._steps, self._folder = profile or none
        self._runs = self._has_begun = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The context in which a step is dispatched."""
        # Where a stage goes on within them, from there.
        if self._steps.first <= number <= self._steps.last and not self._has_begun:
            self._has_begun, self._runs = True, self._tried(jax.profiler.start_trace, self._folder)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def is_last(self, number: int) -> bool:
        """Whether the profile ends with this step. Its result has to be waited for before `stop`."""
        return self._runs and number == self._steps.last

    def stop(self) -> None:
        """Writes the profile, if one is being taken."""
        if not self._runs:
            return
        self._runs = False
        if self._tried(jax.profiler.stop_trace):
            _LOG.info(
                f"profile in {self._folder}; open it with: pip install xprof && xprof --logdir={self._folder}, or its "
                "*.trace.json.gz at https://ui.perfetto.dev"
            )

    def _tried(self, action, *arguments) -> bool:
        try:
            action(*arguments)
        except Exception as error:  # a full disk, or another profile that is being taken
            _LOG.warning(f"no profile: {' '.join(str(error).split())}")
            return False
        return True
