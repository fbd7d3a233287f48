"""Saving by steps and by time, under a clock that the tests turn."""

import jax
import pytest
from jax.experimental import multihost_utils

from kforcing_jax.config import LoggingConfig
from kforcing_jax.training.save_times import SaveTimes


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def saved_after(times, clock, steps, seconds_each):
    """The steps after which a stage saves whose steps take so long."""
    saved = []
    for step in range(1, steps + 1):
        clock.now += seconds_each
        if times.is_due(step):
            times.saved()
            saved.append(step)
    return saved


def test_without_seconds_the_steps_decide(clock):
    times = SaveTimes(LoggingConfig(checkpoint_every=4), clock)
    assert saved_after(times, clock, 9, seconds_each=1e6) == [4, 8]


def test_a_checkpoint_that_is_too_old_is_made_anew_between_the_steps(clock):
    times = SaveTimes(LoggingConfig(checkpoint_every=10, checkpoint_seconds=30), clock)
    # 30 seconds after the beginning, 30 after that, and then 30 after that of step 10.
    assert saved_after(times, clock, 14, seconds_each=10) == [3, 6, 9, 10, 13]


def several(monkeypatch, decision=None):
    """Two processes; `decision` is what the first one says. Returns what was asked for."""
    asked = []

    def broadcast(own):
        asked.append(bool(own))
        return own if decision is None else decision

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    return asked


def test_several_processes_agree_when_they_report_and_no_more_often(clock, monkeypatch):
    asked = several(monkeypatch)
    times = SaveTimes(LoggingConfig(checkpoint_every=12, checkpoint_seconds=25, log_every=4), clock)
    assert saved_after(times, clock, 13, seconds_each=10) == [4, 8, 12]
    assert asked == [True, True]  # after 4 and 8; of step 12 all know


@pytest.mark.parametrize("decision", [True, False])
def test_the_clock_of_the_first_process_decides(clock, monkeypatch, decision):
    several(monkeypatch, decision)
    times = SaveTimes(LoggingConfig(checkpoint_every=100, checkpoint_seconds=25, log_every=4), clock)
    assert saved_after(times, clock, 4, seconds_each=0 if decision else 1000) == ([4] if decision else [])
