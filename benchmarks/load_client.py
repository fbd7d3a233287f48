"""A client of streams that takes little of the machine that it shares with the server.

It keeps bytes and their times, and reads them when everything was answered.
"""

import asyncio
import json
import math
import re
import time
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Servers hang up on clients that say nothing for some seconds.
_SECONDS_IDLE = 2


class Answer(NamedTuple):
    """What came of a request; times in seconds.

    Attributes:
      index: of the request.
      due: when it should have been sent.
      status: of HTTP; 500 too where a stream ended with an error, 0 where nothing came.
      events: (time, number of new tokens) of those that brought some.
      passes: of the models, for the text.
    """

    index: int
    due: float
    status: int
    text: str
    events: list[tuple[float, int]]
    passes: int

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.events)

    @property
    def seconds_to_first(self) -> float:
        return self.events[0][0] - self.due

    @property
    def seconds(self) -> float:
        return self.events[-1][0] - self.due

    @property
    def seconds_per_token(self) -> float:
        """From the first event to the last, over the tokens after the first event; nan where all came at once."""
        later = self.tokens - self.events[0][1]
        return (self.events[-1][0] - self.events[0][0]) / later if later else math.nan

    @classmethod
    def read(cls, index: int, due: float, pieces: list[tuple[float, bytes]]) -> "Answer":
        """Of a response over HTTP, as pieces of it came."""
        whole, ends = b"".join(piece for _, piece in pieces), np.cumsum([len(piece) for _, piece in pieces])
        status, text, events, passes = int(whole[9:12] or 0), "", [], 0
        for found in re.finditer(rb"data: (\{.*\})\n\n", whole) if status == 200 else ():
            said = json.loads(found[1])
            if "error" in said:
                return cls(index, due, 500, text, events, passes)
            (choice,) = said["choices"]
            text, passes = text + choice["text"], choice["passes"]
            if choice["tokens"]:
                events.append((pieces[np.searchsorted(ends, found.end())][0], choice["tokens"]))
        return cls(index, due, status, text, events, passes)


class Client:
    """Asks a server for streams, over as many connections as it takes."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        self._host, self._port, self._free = parts.hostname, parts.port or 80, []

    async def at_times(self, bodies: Sequence[dict], due_N: Sequence[float]) -> list[Answer]:
        """Sends each when it is due, whether others were answered or not. All times are seconds from now."""
        asked, start = [], time.perf_counter()
        for index, (body, due) in enumerate(zip(bodies, due_N, strict=True)):
            if (early := start + due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            asked.append(asyncio.ensure_future(self._ask(index, body, start + due)))
        answers = [Answer.read(*each) for each in await asyncio.gather(*asked)]
        return [
            answer._replace(due=answer.due - start, events=[(t - start, n) for t, n in answer.events])
            for answer in answers
        ]

    async def in_turn(self, bodies: Sequence[dict], clients: int) -> list[Answer]:
        """By so many clients, each of which asks when it was answered."""
        left, found = iter(enumerate(bodies)), []

        async def one():
            for index, body in left:
                found.append(await self._ask(index, body, time.perf_counter()))

        await asyncio.gather(*(one() for _ in range(clients)))
        return [Answer.read(*each) for each in sorted(found, key=lambda each: each[0])]

    async def _ask(self, index, body, due):
        while self._free and self._free[-1].used < time.perf_counter() - _SECONDS_IDLE:
            self._free.pop().transport.close()
        connection = self._free.pop() if self._free else await self._connected()
        pieces = await connection.ask(self._message(body))
        if not connection.transport.is_closing():
            self._free.append(connection)
        return index, due, pieces

    async def _connected(self):
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return connection

    def _message(self, body):
        body = json.dumps(body | {"stream": True}).encode()
        lines = (
            "POST /v1/completions HTTP/1.1",
            f"Host: {self._host}:{self._port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        return "\r\n".join((*lines, "", "")).encode() + body


def figures_of(answers: list[Answer], seconds: float, new_tokens: int) -> dict:
    """Of a round in which requests were sent for so many seconds; times are in milliseconds."""
    begin = 0.2 * seconds
    asked = [answer for answer in answers if begin <= answer.due]
    good = [answer for answer in asked if answer.status == 200 and answer.events]
    came = sum(count for answer in answers for at, count in answer.events if begin <= at < seconds)
    passes = sum(answer.passes for answer in good)
    return {
        "offered_tokens_per_second": len(asked) * new_tokens / (seconds - begin),
        "useful_tokens_per_second": came / (seconds - begin),
        "to_first_token": _percentiles(answer.seconds_to_first for answer in good),
        "per_token": _percentiles(answer.seconds_per_token for answer in good),
        "whole": _percentiles(answer.seconds for answer in good),
        "tokens_per_pass": sum(answer.tokens for answer in good) / passes if passes else math.nan,
        "refused": sum(answer.status == 429 for answer in answers),
        "failed": sum(answer.status not in (200, 429) for answer in answers),
    }


def _percentiles(seconds: Iterable[float]) -> dict[str, float]:
    known = [1e3 * value for value in seconds if not math.isnan(value)]
    return {f"p{p}": float(np.percentile(known, p)) if known else math.nan for p in (50, 95, 99)}


class _Connection(asyncio.Protocol):
    """For one request after the other."""

    def connection_made(self, transport):
        self.transport, self.used, self._answered = transport, time.perf_counter(), None

    def ask(self, message: bytes) -> asyncio.Future:
        """The pieces of the response, with their times; incomplete where the server hangs up."""
        self._pieces, self._end = [], b""
        self._answered = asyncio.get_running_loop().create_future()
        self.transport.write(message)
        return self._answered

    def data_received(self, data):
        self.used = time.perf_counter()
        self._pieces.append((self.used, data))
        self._end = (self._end + data)[-7:]
        if self._end == b"\r\n0\r\n\r\n" or self._is_refused():
            self._answered.set_result(self._pieces)

    def _is_refused(self):
        """A whole answer of another status has a length, and no end of its own."""
        if self._pieces[0][1].startswith(b"HTTP/1.1 200"):
            return False
        head, _, body = b"".join(piece for _, piece in self._pieces).partition(b"\r\n\r\n")
        return f"content-length: {len(body)}\r\n".encode() in head.lower() + b"\r\n"

    def connection_lost(self, error):
        if self._answered and not self._answered.done():
            self._answered.set_result(self._pieces)
