"""Who gets a slot when: a bounded queue in front of an engine, fair among those who ask.

Any thread may submit and cancel; one thread steps. Nothing here knows JAX: the engine is anything with `slots`,
`free_slots`, `insert`, `step`, `free` and `release` (`decoding.engine.Engine`).
"""

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

# Of a step, in seconds: long enough that what surrounds it is little, short enough that streams flow.
STEP_SECONDS = 0.02
# The same where texts wait for a slot: what surrounds a step costs by the step, and a text that waits gains by speed.
BUSY_STEP_SECONDS = 0.04
MOST_PASSES = 16
# Parts of new prompts that a step reads before its passes: half as many as those, so that a long prompt does not hold
# up what runs, and enough that slots do not stand idle where short ones come at any time.
CHUNKS = 8
# Over so many slots that came free the time until the next one is averaged.
_REMEMBERED = 64


class _Engine(Protocol):
    """What a scheduler uses of an engine."""

    @property
    def slots(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    def insert(self, request: Any) -> int: ...
    def step(self, passes: int, *, wait: bool, chunks: int | None) -> list[Any]: ...
    def free(self, slot: int) -> None: ...
    def release(self) -> None: ...


class Refused(Exception):
    """Why a request is not taken, for now; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Refused):
    """As many texts wait as may."""


class Closed(Refused):
    """No more texts are taken."""


@dataclasses.dataclass(eq=False)
class Job:
    """One text that is wanted.

    Attributes:
      request: what the engine is given.
      tell: called with every `engine.Update` of it, and with an Exception where it ends without one: `TimeoutError` for
        its deadline, otherwise what the engine raised. In the thread that steps, so it has to be short.
      deadline: by the scheduler's clock.
      admitted: when it had a slot; None before.
      tokens, passes: of the text so far, the prompt included; of the model that has most.
    """

    request: Any
    tell: Callable[[Any], None]
    deadline: float = math.inf
    slot: int | None = None
    is_cancelled: bool = False
    admitted: float | None = None
    tokens: int = 0
    passes: int = 0


class Scheduler:
    """Gives free slots to texts, in turn among the groups in which they were submitted."""

    def __init__(self, engine: _Engine, *, most_waiting: int, clock: Callable[[], float] = time.monotonic):
        self._engine, self._most_waiting, self._clock = engine, most_waiting, clock
        self._changed = threading.Condition()
        self._groups: collections.deque[collections.deque[Job]] = collections.deque()
        self._running: dict[int, Job] = {}
        self._ended: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._seconds_per_pass = STEP_SECONDS
        self._is_closed = False

    # What any thread may call.

    @property
    def waiting(self) -> int:
        """Texts without a slot."""
        with self._changed:
            return self._count_waiting()

    @property
    def running(self) -> int:
        """Texts with a slot."""
        return len(self._running)

    @property
    def cached(self) -> int:
        """Tokens of the texts that have a slot."""
        return sum(job.tokens for job in list(self._running.values()))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues the texts of one caller, all or none.

        Raises:
          QueueFull: they would wait, and so many may not.
          Closed: no more are taken.
        """
        with self._changed:
            if self._is_closed:
                raise Closed("the server is shutting down; ask another one, or later", 1)
            here = len(self._running) + self._count_waiting()
            if here + len(jobs) > self._engine.slots + self._most_waiting:
                raise QueueFull(f"{here} texts run or wait already", self._retry_after())
            if not self._groups:
                self._ended.clear()  # how fast slots come free is known only while they are wanted
            self._groups.append(collections.deque(jobs))
            self._changed.notify()

    def cancel(self, *jobs: Job) -> None:
        """Drops texts; their slots are free before the next step. Of those that have ended, nothing."""
        with self._changed:
            for job in jobs:
                job.is_cancelled = True
            if any(job.slot is None for job in jobs):
                self._keep_waiting(lambda job: not job.is_cancelled)
            self._changed.notify()

    def close(self) -> None:
        """Takes no more texts. Those that are here go on."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def wait(self, seconds: float) -> bool:
        """Whether there is something to do, at the latest after some time."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._running or self._groups), seconds)

    # What one thread calls.

    def step(self) -> bool:
        """Frees what was dropped or is too late, admits, and gives all texts some passes: whether there were any.

        Raises whatever the engine raises; `fail` has to follow.
        """
        with self._changed:
            self._expire()
            self._admit()
            running = dict(self._running)
            is_awaited = bool(self._groups)
        if not running:
            return False
        start = self._clock()
        seconds = BUSY_STEP_SECONDS if is_awaited else STEP_SECONDS
        # Not until one ends: of texts that began at different times one would end in nearly every pass.
        updates = self._engine.step(self._passes(seconds), wait=True, chunks=CHUNKS)
        self._note_passes(self._clock() - start, [(running[update.slot], update) for update in updates])
        with self._changed:
            for update in updates:
                if update.is_finished:
                    self._leave(running[update.slot])
        for update in updates:
            running[update.slot].tokens += len(update.tokens)
            if not running[update.slot].is_cancelled:
                running[update.slot].tell(update)
        return True

    def drop(self, reason: str) -> None:
        """Ends all texts with an error; their slots are free before the next step. Any thread may call it."""
        with self._changed:
            jobs = [*self._running.values(), *(job for group in self._groups for job in group)]
            self._groups.clear()
            self._changed.notify()
            for job in jobs:
                if not job.is_cancelled:
                    job.tell(Closed(reason, 1))
                job.is_cancelled = True

    def fail(self, error: Exception, everything: bool = False) -> None:
        """Ends the texts that have a slot, or all, with an error, and frees the engine."""
        with self._changed:
            dropped = list(self._running.values())
            self._running.clear()
            if everything:
                dropped += [job for group in self._groups for job in group]
                self._groups.clear()
            for job in dropped:
                job.slot = None
        for job in dropped:
            if not job.is_cancelled:
                job.tell(error)
        self._engine.release()

    def _count_waiting(self):
        return sum(map(len, self._groups))

    def _leave(self, job):
        """A slot is free again."""
        del self._running[job.slot]
        job.slot = None
        self._ended.append(self._clock())

    def _retry_after(self) -> int:
        """Seconds until a slot is free for one of those that wait, by how fast the last ones came free."""
        if len(self._ended) < 2:
            return 1
        seconds = (self._ended[-1] - self._ended[0]) / (len(self._ended) - 1)
        return min(max(math.ceil(seconds), 1), 60)

    def _expire(self):
        now = self._clock()
        for slot, job in list(self._running.items()):
            if job.is_cancelled or job.deadline <= now:
                self._engine.free(slot)
                self._leave(job)
                self._say_late(job)
        late = [job for group in self._groups for job in group if job.deadline <= now]
        for job in late:
            self._say_late(job)
        if late:
            self._keep_waiting(lambda job: job.deadline > now)

    def _keep_waiting(self, is_kept):
        kept = (collections.deque(filter(is_kept, group)) for group in self._groups)
        self._groups = collections.deque(group for group in kept if group)

    def _say_late(self, job):
        if not job.is_cancelled:
            job.tell(TimeoutError("the request took longer than it may"))

    def _admit(self):
        """A slot for a text of every group in turn: who asks for a thousand texts waits for them, nobody else."""
        while self._groups and self._engine.free_slots:
            group = self._groups.popleft()
            job = group.popleft()
            if group:
                self._groups.append(group)
            try:
                job.slot = self._engine.insert(job.request)
            except Exception as error:
                job.tell(error)
                raise
            job.admitted, job.tokens = self._clock(), len(job.request.prompt)
            self._running[job.slot] = job

    def _passes(self, seconds) -> int:
        """Of the next step, that is to take so long."""
        return min(max(round(seconds / self._seconds_per_pass), 1), MOST_PASSES)

    def _note_passes(self, seconds, told):
        """How long a pass takes, from a step and what it gave; it may have ended early."""
        done = 0
        for job, update in told:
            passes = max(update.passes.values())
            done, job.passes = max(done, passes - job.passes), passes
        if done:
            # One slow step (a long prompt, another process) should not make the next ones short.
            self._seconds_per_pass += 0.1 * (max(seconds / done, 1e-6) - self._seconds_per_pass)
