"""One request: its texts go to the scheduler, their updates come back, and at the end nothing of it is left."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from kforcing_jax.decoding import Update
from kforcing_jax.serving.choices import Choice, Delta
from kforcing_jax.serving.errors import ApiError
from kforcing_jax.serving.metrics import Metrics, Times
from kforcing_jax.serving.scheduler import Closed, Job, QueueFull, Scheduler

# The scheduler looks at deadlines between steps.
_SECONDS_FOR_A_STEP = 2


class Session:
    """The texts of a request, from the event loop's side."""

    def __init__(self, choices: Sequence[Choice], scheduler: Scheduler, metrics: Metrics, seconds: float):
        """`seconds` is the time that it may take."""
        self.choices = choices
        self._scheduler, self._metrics = scheduler, metrics
        self._loop, self._updates = asyncio.get_running_loop(), asyncio.Queue()
        now = time.monotonic()
        self._times = [Times(now) for _ in choices]
        self._jobs = [
            Job(choice.wanted.request, self._teller(choice.index), deadline=now + seconds) for choice in choices
        ]

    def _teller(self, index):
        """In the engine's thread, and with its time: who reads an answer slowly does not change what it took."""

        def tell(update):
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update, time.monotonic()))

        return tell

    def submit(self):
        """Queues the texts.

        Raises:
          ApiError: 429 where too many wait, 503 where no more are taken; both say when to come again.
        """
        try:
            self._scheduler.submit(self._jobs)
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
            found = [await self._next()]
            while not self._updates.empty():
                found.append(self._updates.get_nowait())
            told = [self._tell(*entry) for entry in found]
            told = [pair for pair in told if pair]
            left -= sum(delta.reason is not None for _, delta in told)
            if told:
                yield told

    async def _next(self):
        """The deadline is the scheduler's to see to; where it cannot, because a step hangs, it is ours."""
        try:
            async with asyncio.timeout_at(self._jobs[0].deadline + _SECONDS_FOR_A_STEP):
                return await self._updates.get()
        except TimeoutError:
            raise _failure(TimeoutError("the request took longer than it may")) from None

    def _tell(self, index, update: Update | Exception, now: float) -> tuple[Choice, Delta] | None:
        choice, times, job = self.choices[index], self._times[index], self._jobs[index]
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

    def end(self):
        """Frees what still runs or waits: after it nothing of the request is left."""
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
