"""Who gets a slot when, with a fake engine and a fake clock."""

import random

import pytest
from fake_engine import Clock, FakeEngine

from kforcing_jax.decoding import Request
from kforcing_jax.serving.scheduler import CHUNKS, MOST_PASSES, STEP_SECONDS, Closed, Job, QueueFull, Scheduler


class Caller:
    """Somebody who asks for texts, and notes what is told."""

    def __init__(self, scheduler, name, count=1, new=8, prompt=(5,), **job):
        self.told = {index: [] for index in range(count)}
        self.jobs = [
            Job(Request([*prompt], new, seed=100 * name + index), self.told[index].append, **job)
            for index in range(count)
        ]
        scheduler.submit(self.jobs)

    def tokens(self, index=0):
        return [token for update in self.told[index] if hasattr(update, "tokens") for token in update.tokens]

    def ended(self, index=0):
        last = self.told[index][-1] if self.told[index] else None
        return isinstance(last, Exception) or bool(last and last.is_finished)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def engine():
    return FakeEngine(slots=2, k=2)


@pytest.fixture
def scheduler(engine, clock):
    return Scheduler(engine, most_waiting=6, clock=clock)


def balance(scheduler, engine):
    """Free and busy slots are all slots."""
    assert scheduler.running + engine.free_slots == engine.slots


def finish(scheduler, engine):
    for _ in range(1000):
        if not scheduler.wait(0):
            return balance(scheduler, engine)
        scheduler.step()
        balance(scheduler, engine)
    raise AssertionError("it does not end")


def test_texts_get_what_the_engine_gives_and_end(scheduler, engine):
    caller = Caller(scheduler, 1, count=3)
    finish(scheduler, engine)
    for index, job in enumerate(caller.jobs):
        assert caller.tokens(index) == engine.expected(job.request) and caller.ended(index)
    assert (scheduler.running, scheduler.waiting, scheduler.cached) == (0, 0, 0)


def test_slots_go_round_among_callers_so_that_many_texts_hold_nobody_up(scheduler, engine):
    Caller(scheduler, 1, count=5)
    Caller(scheduler, 2, count=1)
    Caller(scheduler, 3, count=1)
    finish(scheduler, engine)
    callers = [request.seed // 100 for request in engine.inserted]
    assert callers == [1, 2, 3, 1, 1, 1, 1]


def test_callers_are_served_in_the_order_in_which_they_came(scheduler, engine):
    for name in range(6):
        Caller(scheduler, name)
    finish(scheduler, engine)
    assert [request.seed // 100 for request in engine.inserted] == list(range(6))


def test_texts_beyond_free_slots_and_queue_are_refused_as_a_whole(scheduler, engine):
    Caller(scheduler, 1, count=5)
    with pytest.raises(QueueFull, match="5 texts run or wait"):
        Caller(scheduler, 2, count=4)
    Caller(scheduler, 3, count=3)  # 2 slots and 6 that may wait
    finish(scheduler, engine)
    assert {request.seed // 100 for request in engine.inserted} == {1, 3}


def test_when_to_come_again_follows_from_how_fast_texts_end(scheduler, engine, clock):
    with pytest.raises(QueueFull) as nothing_known:
        Caller(scheduler, 1, count=9)
    assert nothing_known.value.retry_after == 1
    Caller(scheduler, 1, new=1)
    finish(scheduler, engine)
    clock.now += 1000  # nobody waited, which says nothing
    for _ in range(8):
        Caller(scheduler, 2, new=1)
    for _ in range(3):
        scheduler.step()
        clock.now += 14
    with pytest.raises(QueueFull) as known:
        Caller(scheduler, 1, count=9)
    assert known.value.retry_after == 6  # 2 slots every 14 seconds: 28 seconds between the first and the last of 6


def test_a_text_that_is_dropped_frees_its_slot_before_the_next_pass(scheduler, engine):
    first, second = Caller(scheduler, 1, new=30), Caller(scheduler, 2, new=30)
    waiting, last = Caller(scheduler, 3), Caller(scheduler, 4)
    scheduler.step()
    scheduler.cancel(first.jobs[0])
    scheduler.cancel(waiting.jobs[0])
    told = len(first.told[0])
    scheduler.step()
    assert [request.seed // 100 for request in engine.inserted] == [1, 2, 4]
    finish(scheduler, engine)
    assert len(first.told[0]) == told and not waiting.told[0]
    assert second.tokens() == engine.expected(second.jobs[0].request) and last.ended()


def test_dropping_what_has_ended_does_nothing(scheduler, engine):
    first = Caller(scheduler, 1, new=1)
    finish(scheduler, engine)
    second = Caller(scheduler, 2, new=20)
    scheduler.step()
    scheduler.cancel(first.jobs[0])
    finish(scheduler, engine)
    assert second.tokens() == engine.expected(second.jobs[0].request)


def test_texts_end_at_their_deadline_with_a_slot_or_without(scheduler, engine, clock):
    engine.slots = 1
    running, waiting = Caller(scheduler, 1, new=30, deadline=5), Caller(scheduler, 2, new=30, deadline=5)
    later = Caller(scheduler, 3, new=4, deadline=50)
    scheduler._seconds_per_pass = STEP_SECONDS  # a pass a step
    scheduler.step()
    clock.now = 5
    scheduler.step()
    for caller in (running, waiting):
        assert isinstance(caller.told[0][-1], TimeoutError)
    finish(scheduler, engine)
    assert later.tokens() == engine.expected(later.jobs[0].request)


def test_a_step_lasts_about_as_long_as_it_should(scheduler, engine, clock):
    real = engine.step

    def slow(passes, **settings):
        clock.now += 0.004 * passes
        return real(passes, **settings)

    engine.step = slow
    for name in range(100):
        Caller(scheduler, name, new=30)
        finish(scheduler, engine)
    assert engine.steps[-1][0] in (4, 5)  # of 4 ms, in a step of 20
    engine.step = real  # no time at all
    for name in range(100):
        Caller(scheduler, name, new=30)
        finish(scheduler, engine)
    assert engine.steps[-1][0] == MOST_PASSES


def test_steps_are_longer_where_somebody_waits_and_read_prompts_in_parts(scheduler, engine):
    Caller(scheduler, 1, count=2, new=31)
    scheduler.step()
    alone, *how = engine.steps[-1]
    assert how == [True, CHUNKS]
    Caller(scheduler, 2)
    scheduler.step()
    awaited, *how = engine.steps[-1]
    assert awaited > alone and how == [True, CHUNKS]


def test_a_closed_scheduler_takes_no_more_and_finishes_what_is_there(scheduler, engine):
    caller = Caller(scheduler, 1, count=4)
    scheduler.close()
    with pytest.raises(Closed):
        Caller(scheduler, 2)
    finish(scheduler, engine)
    assert all(caller.ended(index) for index in range(4))


def test_what_fails_ends_the_texts_with_a_slot_and_leaves_the_others(scheduler, engine):
    caller = Caller(scheduler, 1, count=3)
    engine.failures.append(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken") as raised:
        scheduler.step()
    scheduler.fail(raised.value)
    balance(scheduler, engine)
    assert [str(caller.told[index][-1]) for index in (0, 1)] == ["broken"] * 2 and not caller.told[2]
    finish(scheduler, engine)
    assert caller.tokens(2) == engine.expected(caller.jobs[2].request)


def test_a_text_that_cannot_be_inserted_is_told_so(scheduler, engine):
    caller = Caller(scheduler, 1, prompt=(1000,))
    with pytest.raises(Exception, match="1000") as raised:
        scheduler.step()
    scheduler.fail(raised.value)
    assert caller.ended() and not scheduler.waiting
    balance(scheduler, engine)


def test_all_can_be_dropped_at_once(scheduler, engine):
    caller = Caller(scheduler, 1, count=4, new=30)
    scheduler.step()
    scheduler.drop("over")
    finish(scheduler, engine)
    assert all(str(caller.told[index][-1]) == "over" for index in range(4)) and engine.free_slots == engine.slots


def test_whatever_is_dropped_when_the_others_get_their_own_tokens(clock):
    """A thousand random aborts, among texts that come, wait, run and end."""
    numbers, engine = random.Random(0), FakeEngine(slots=5, k=3, max_length=80)
    scheduler = Scheduler(engine, most_waiting=40, clock=clock)
    callers, aborted = [], set()
    while len(aborted) < 1000:
        try:
            count, new = numbers.randrange(1, 4), numbers.randrange(1, 40)
            caller = Caller(scheduler, len(callers), count=count, new=new, prompt=[7] * numbers.randrange(1, 40))
            callers.append(caller)
        except QueueFull:
            pass
        for caller in numbers.sample(callers[-20:], min(len(callers), 3)):
            index = numbers.randrange(len(caller.jobs))
            if not caller.ended(index):
                scheduler.cancel(caller.jobs[index])
                aborted.add((id(caller), index))
        if numbers.random() < 0.7:
            scheduler._seconds_per_pass = STEP_SECONDS / numbers.randrange(1, 5)
            scheduler.step()
            balance(scheduler, engine)
    finish(scheduler, engine)
    for caller in callers:
        for index, job in enumerate(caller.jobs):
            expected = engine.expected(job.request)
            if (id(caller), index) in aborted:
                assert caller.tokens(index) == expected[: len(caller.tokens(index))]
            else:
                assert caller.tokens(index) == expected and caller.ended(index)
    assert engine.free_slots == engine.slots and not scheduler.waiting
