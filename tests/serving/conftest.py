"""A server in this process, on an engine without a model."""

import contextlib
import threading
import time

import httpx
import pytest
from fake_engine import FakeEngine

from kforcing_jax.config import DataConfig
from kforcing_jax.data.tokenizers import Tokenizer, train_tokenizer
from kforcing_jax.serving.app import Service, create_app
from kforcing_jax.serving.metrics import Metrics
from kforcing_jax.serving.plan import Served
from kforcing_jax.serving.scheduler import Scheduler
from kforcing_jax.serving.server import Server, bind
from kforcing_jax.serving.worker import Worker

ALPHABET = "".join(chr(code) for code in range(32, 127))


class Running:
    """A server that runs: its address, engine and parts."""

    def __init__(self, engine, tokenizer, **settings):
        served = {
            "mode": "student",
            "confidence": 0.0,
            "tau_range": (1.0, 1.0),
            "top_p": 1.0,
            "most_texts": 64,
            "chat_template": None,
        }
        served |= {name: settings.pop(name) for name in list(settings) if name in served}
        self.engine, self.tokenizer = engine, tokenizer
        clock = settings.pop("clock", time.monotonic)
        self.scheduler = Scheduler(engine, most_waiting=settings.pop("most_waiting", 64), clock=clock)
        self.metrics = Metrics("fake")
        self.metrics.watch(lambda: self.scheduler.running, lambda: self.scheduler.waiting, lambda: 0.5, engine.slots)
        eos_id = tokenizer.eos_id if tokenizer else None
        drain_seconds = settings.pop("drain_seconds", 60)
        self.service = Service(
            Served("fake", engine, tokenizer, eos_id, **served),
            self.scheduler,
            Worker(self.scheduler),
            self.metrics,
            settings.pop("seconds", 60),
            **settings,
        )
        bound = bind("127.0.0.1", 0)
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(create_app(self.service), drain_seconds)
        self.service.worker.on_failure = self.server.fail
        self.http = httpx.Client(timeout=30)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [bound]}, daemon=True)

    def is_idle(self):
        """Whether every slot is free and nothing waits."""
        return (self.scheduler.running, self.scheduler.waiting, self.engine.free_slots) == (0, 0, self.engine.slots)

    def wait_until(self, condition, seconds=60):
        """Fails when a condition does not come true in time."""
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, "it did not come true"
            time.sleep(0.005)

    def post(self, path="/v1/completions", **fields):
        """The response to a JSON body."""
        return self.http.post(self.url + path, json=fields)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A character a token."""
    return train_tokenizer(DataConfig(tokenizer="characters", vocab_size=200), [ALPHABET])


@pytest.fixture
def start(tokenizer):
    """Starts servers; they end with the test."""
    yield from _starter(tokenizer)


@pytest.fixture(scope="module")
def module_start(tokenizer):
    """Starts servers that the tests of a module share."""
    yield from _starter(tokenizer)


def _starter(tokenizer):
    with contextlib.ExitStack() as stack:

        def one(engine=None, tokenizer=tokenizer, **settings):
            running = Running(engine or FakeEngine(), tokenizer, **settings)
            running.thread.start()
            running.wait_until(lambda: running.server.started)
            stack.callback(_end, running)
            return running

        yield one


def _end(running):
    if isinstance(running.engine, FakeEngine):
        running.engine.gate.set()
    running.http.close()
    running.server.should_exit = True
    running.thread.join(20)
    assert not running.thread.is_alive()
