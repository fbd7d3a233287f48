"""What a tracker is. `registry.TRACKERS` has their names."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is told of: its directory, a name for it, its configuration as nested dictionaries."""

    folder: Path
    name: str
    config: dict


class Tracker(Protocol):
    """Takes what a run reports. Made without arguments; one object lives as long as the process, in process 0 alone.

    A run that is started again makes a new one, which goes on in the same place. Reports after the newest checkpoint
    may then come a second time.
    """

    def start(self, run: TrackedRun) -> None:
        """Before anything is trained. What this raises ends the run: nothing is lost yet."""

    def write(self, stage: str, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """A report of a stage after its `step`-th step. What this raises is said once, and training goes on."""

    def close(self) -> None:
        """At the end, also of a run that failed."""
