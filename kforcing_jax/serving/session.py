"""One request: its texts go to the scheduler, their updates come back, and at the end nothing of it is left."""

import asyncio
import collections
import time
from collections.abc import AsyncIterator, Sequence

from kforcing_jax.decoding import Update
from kforcing_jax.serving.choices import Choice, Delta
from kforcing_jax.serving.errors import ApiError
from kforcing_jax.serving.metrics import Metrics, Times
from kforcing_jax.serving.scheduler import Closed, Job, QueueFull, Scheduler

# The scheduler looks at deadlines between steps.
_SECONDS_FOR_A_STEP = 2


class Mailbox:
    """From the engine's thread to the event loop: one call wakes it for all that a step tells."""

    def __init__(self):
        self._loop, self._is_called = asyncio.get_running_loop(), False
        self._letters: collections.deque[tuple[asyncio.Queue, tuple]] = collections.deque()

    def put(self, queue: asyncio.Queue, entry: tuple) -> None:
        """Puts an entry into a queue of the loop. Any thread may call it."""
        self._letters.append((queue, entry))
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self):
        self._is_called = False  # before it looks: what is put from now on calls again
        while self._letters:
            queue, entry = self._letters.popleft()
            queue.put_nowait(entry)


class Session:
    """The texts of a request, from the event loop's side."""

    def __init__(
        self, choices: Sequence[Choice], scheduler: Scheduler, metrics: Metrics, mailbox: Mailbox, seconds: float
    ):
        """`seconds` is the time that it may take."""
        self.choices = choices
        self._scheduler, self._metrics, self._mailbox, self._seconds = scheduler, metrics, mailbox, seconds
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[tuple[int, Update | Exception, float]] = asyncio.Queue()
        now = time.monotonic()
        self._times = [Times(now) for _ in choices]
        self._jobs = [
            Job(choice.wanted.request, self._teller(choice.index), deadline=now + seconds) for choice in choices
        ]

    def _teller(self, index):
        """In the engine's thread, and with its time: who reads an answer slowly does not change what it took."""

        return lambda update: self._mailbox.put(self._updates, (index, update, time.monotonic()))

    def submit(self) -> None:
        """Queues the texts. Their deadline is the scheduler's to see to; where it cannot, as a step hangs, it is ours.

        Raises:
          ApiError: 429 where too many wait, 503 where no more are taken; both say when to come again.
        """
        try:
            self._scheduler.submit(self._jobs)
            late = 0, TimeoutError("the request took longer than it may"), 0.0
            self._late = self._loop.call_later(self._seconds + _SECONDS_FOR_A_STEP, self._updates.put_nowait, late)
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", headers=_again(error)) from None
        except Closed as error:
            raise ApiError(503, str(error), headers=_again(error)) from None

    async def deltas(self) -> AsyncIterator[list[tuple[Choice, Delta]]]:
        """What comes, until all texts have ended: everything that is there at a time, at least one.

        Raises:
          ApiError: 504 for the deadline, 500 where the engine failed.
        """
        left = len(self.choices)
        while left:
            found = [await self._updates.get()]
            while not self._updates.empty():
                found.append(self._updates.get_nowait())
            told = [pair for entry in found if (pair := self._tell(*entry))]
            left -= sum(delta.reason is not None for _, delta in told)
            if told:
                yield told

    def _tell(self, index, update: Update | Exception, now: float) -> tuple[Choice, Delta] | None:
        choice, times, job = self.choices[index], self._times[index], self._jobs[index]
        if isinstance(update, TimeoutError):
            raise _failure(update)
        if choice.reason:
            return None  # a step that had begun before its slot was freed
        if isinstance(update, Exception) or update.error:
            raise _failure(update)
        if times.began is None:
            self._metrics.began(times, job.admitted)
        delta = choice.add(update)
        if delta.tokens:
            self._metrics.progressed(times, delta.tokens, now)
        if delta.reason:
            self._metrics.ended(times, choice, update.kept, now)
            if not update.is_finished:
                self._scheduler.cancel(job)
        return (choice, delta) if delta.tokens or delta.text or delta.reason else None

    def end(self) -> None:
        """Frees what still runs or waits: after it nothing of the request is left."""
        self._late.cancel()
        left = [index for index, choice in enumerate(self.choices) if choice.reason is None]
        if left:
            self._scheduler.cancel(*(self._jobs[index] for index in left))
        for index in left:
            self._metrics.dropped(self._times[index], self.choices[index])


def _again(error) -> dict[str, str]:
    return {"Retry-After": str(error.retry_after)}


def _failure(update: Update | Exception) -> ApiError:
    if isinstance(update, TimeoutError):
        # The openai client would ask twice more.
        return ApiError(504, str(update), code="timeout", headers={"x-should-retry": "false"})
    if isinstance(update, Closed):
        return ApiError(503, str(update), headers=_again(update))
    if isinstance(update, Exception):
        return ApiError(500, "the engine failed; the server's log says why")
    return ApiError(500, str(update.error))
