"""Programs that take turns, under a clock that the tests set."""

import numpy as np

from kforcing_jax.evaluation.timing import in_turns


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def program(self, name, seconds, calls):
        """A program that takes the given times, one call after the other."""
        seconds = iter(seconds)

        def run():
            calls.append(name)
            self.now += next(seconds)

        return run


def test_programs_take_turns_after_one_run_each_that_is_not_timed():
    clock, calls = Clock(), []
    programs = {"a": clock.program("a", [99, 1, 2, 3], calls), "b": clock.program("b", [99, 4, 5, 6], calls)}
    times = in_turns(programs, 3, clock)
    assert calls == ["a", "b"] * 4
    np.testing.assert_allclose(times.seconds["a"], [1, 2, 3])
    assert times.median("b") == 5


def test_a_machine_that_slows_down_changes_no_ratio():
    """Ratios are those of one round; medians of both programs by themselves would say 1.5."""
    clock, slow = Clock(), np.array([1, 1, 1, 3, 9])
    programs = {"ar": clock.program("", [0, *(2 * slow)], []), "k4": clock.program("", [0, *slow], [])}
    assert in_turns(programs, 5, clock).ratio("ar", "k4") == {"median": 2, "low": 2, "high": 2}


def test_the_spread_is_that_of_the_quartiles():
    clock = Clock()
    programs = {"ar": clock.program("", [0, 1, 2, 3, 4, 5], []), "k1": clock.program("", [0, 1, 1, 1, 1, 1], [])}
    assert in_turns(programs, 5, clock).ratio("ar", "k1") == {"median": 3, "low": 2, "high": 4}
