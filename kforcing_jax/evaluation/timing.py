"""Timing programs that take turns, so that what slows the machine down for a while slows all of them."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of R runs of each program; run r of all of them belongs to round r."""

    seconds: Mapping[str, np.ndarray]

    def median(self, name: str) -> float:
        """Of the seconds of a program."""
        return float(np.median(self.seconds[name]))

    def ratio(self, numerator: str, denominator: str) -> dict[str, float]:
        """Median, and first and last quartile (`low`, `high`), of the ratios within a round."""
        low, median, high = np.percentile(self.seconds[numerator] / self.seconds[denominator], [25, 50, 75])
        return {"median": float(median), "low": float(low), "high": float(high)}


def in_turns(
    programs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """Runs every program once to warm up, then `rounds` times in turns. A program returns when its work is done."""
    for program in programs.values():
        program()
    seconds = {name: np.zeros(rounds) for name in programs}
    for index in range(rounds):
        for name, program in programs.items():
            start = clock()
            program()
            seconds[name][index] = clock() - start
    return Times(seconds)
