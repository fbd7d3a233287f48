"""Clients that misbehave, an engine that fails, a server that is told to end: nothing is lost, nobody else notices."""

import asyncio
import contextlib
import gc
import random
import resource
import socket
import time

import httpx
import pytest
from fake_engine import FakeEngine
from raw_http import ask, body, head, whole

from kforcing_jax.decoding import Request
from kforcing_jax.serving import app, server, session, worker


def connect(running, sent=b""):
    sock = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    sock.sendall(sent)
    return sock


def read_until(sock, end):
    """What comes, in however many parts, until this is in it."""
    answer = b""
    while end not in answer:
        part = sock.recv(10_000)
        assert part, answer
        answer += part
    return answer


def text(running, seed=1, prompt="hello", new=20):
    request = Request(running.tokenizer.encode(prompt), new, seed=seed)
    return running.tokenizer.decode(running.engine.expected(request))


@pytest.fixture
def held(start):
    """A server whose engine waits until its gate is opened."""
    running = start(FakeEngine(slots=2, k=2))
    running.engine.gate.clear()
    return running


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 5}, {"n": 5, "stream": True}])
def test_who_hangs_up_frees_slots_and_queue(held, fields):
    sock = connect(held, head(body(**fields)))
    held.wait_until(lambda: held.scheduler.running == min(fields.get("n", 1), 2))
    sock.close()
    held.wait_until(lambda: held.scheduler.waiting == 0)
    held.engine.gate.set()
    held.wait_until(held.is_idle)
    assert held.post(prompt="hello", max_tokens=20, seed=1, ignore_eos=True).json()["choices"][0]["text"] == text(held)


def test_who_hangs_up_amid_a_stream_frees_its_slot(start):
    running = start(FakeEngine(slots=1, k=1, max_length=4000))
    sock = connect(running, head(body(max_tokens=3900, stream=True)))
    assert b"data:" in sock.recv(100_000)
    running.engine.gate.clear()
    sock.close()
    running.engine.gate.set()
    running.wait_until(running.is_idle)
    assert len(running.engine.inserted) == 1


def test_a_reader_that_takes_nothing_holds_no_slot_and_is_left_in_the_end(start, monkeypatch):
    monkeypatch.setattr(app, "SECONDS_FOR_A_READER", 0.5)
    running = start(FakeEngine(slots=1, k=1, max_length=30_000))
    running.engine.gate.clear()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", running.port))
    sock.sendall(head(body(max_tokens=29_000, stream=True)))
    running.wait_until(lambda: running.scheduler.running)
    running.engine.gate.set()
    other = running.post(prompt="hello", max_tokens=20, seed=1, ignore_eos=True)
    assert other.json()["choices"][0]["text"] == text(running)
    running.wait_until(running.is_idle)
    running.wait_until(lambda: not running.server.server_state.tasks)
    sock.close()


def test_half_a_request_takes_nothing_and_is_told_so(start, monkeypatch):
    monkeypatch.setattr(app, "_SECONDS_FOR_A_BODY", 1)
    monkeypatch.setattr(server, "_SECONDS_FOR_A_HEAD", 1)
    running = start()
    silent, idle, part = (
        connect(running),
        connect(running, b"POST /v1/comp"),
        connect(running, head(b'{"prompt":', length=100)),
    )
    gone = connect(running, head(b'{"prompt":', length=100))
    gone.close()
    assert running.post(prompt="a", max_tokens=2).status_code == 200
    answer = part.recv(10_000).decode()
    assert " 408 " in answer.splitlines()[0] and "connection: close" in answer.lower()
    assert silent.recv(10) == idle.recv(10) == b""  # both are closed
    endless = connect(running, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000)
    with contextlib.suppress(ConnectionError):
        assert endless.recv(10) == b""
    running.wait_until(running.is_idle)
    for sock in (silent, idle, part, endless):
        sock.close()


def test_more_than_may_wait_is_told_when_to_come_again(start):
    running = start(FakeEngine(slots=1), most_waiting=2)
    running.engine.gate.clear()
    socks = [connect(running, head(body())) for _ in range(3)]
    running.wait_until(lambda: running.scheduler.running + running.scheduler.waiting == 3)
    refused = running.post(prompt="a")
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    running.engine.gate.set()
    for sock in socks:
        assert b"200 OK" in sock.recv(10_000)
        sock.close()
    running.wait_until(running.is_idle)


def test_a_request_that_takes_too_long_ends_with_504(start):
    later = [0.0]
    running = start(FakeEngine(slots=1), seconds=60, clock=lambda: time.monotonic() + later[0])
    running.engine.gate.clear()
    socks = [connect(running, head(body()))]
    running.wait_until(lambda: running.scheduler.running)  # it runs, the others wait
    socks += [connect(running, head(body(**fields))) for fields in ({"stream": True}, {"n": 2})]
    running.wait_until(lambda: running.scheduler.waiting == 3)
    later[0] = 61.0
    running.engine.gate.set()
    for sock in socks:
        answer = sock.recv(10_000).decode()
        assert " 504 " in answer.splitlines()[0] and '"code":"timeout"' in answer
        sock.close()
    running.wait_until(running.is_idle)


def test_what_the_engine_raises_is_a_500_for_those_in_it_and_the_server_goes_on(held):
    held.engine.failures.append(ValueError("a secret detail"))
    socks = [connect(held, head(body(seed=0)))]
    held.wait_until(lambda: held.scheduler.running == 1)  # the first is in the step, which the gate holds
    socks += [connect(held, head(body(seed=seed))) for seed in (1, 2)]
    held.wait_until(lambda: held.scheduler.running + held.scheduler.waiting == 3)
    held.engine.gate.set()
    answers = [sock.recv(10_000).decode() for sock in socks]
    assert sorted(answer.split(" ")[1] for answer in answers) == ["200", "200", "500"]
    assert not any("secret detail" in answer for answer in answers)
    for sock in socks:
        sock.close()
    held.wait_until(held.is_idle)
    assert httpx.get(f"{held.url}/health").status_code == 200
    assert held.post(prompt="hello", max_tokens=20, seed=1, ignore_eos=True).json()["choices"][0]["text"] == text(held)


def test_what_is_raised_amid_a_stream_is_its_last_event(start):
    running = start(FakeEngine(slots=1, k=1, max_length=30_000, seconds=0.01))
    asked = body(max_tokens=29_000, stream=True)
    with httpx.stream("POST", f"{running.url}/v1/completions", content=asked) as response:
        lines = response.iter_lines()
        assert response.status_code == 200 and "choices" in next(lines)
        running.engine.failures.append(ValueError("broken"))
        last = [line for line in lines if line][-2:]
    assert "server_error" in last[0] and last[1] == "data: [DONE]"
    running.wait_until(running.is_idle)


def test_an_engine_that_fails_three_times_in_a_row_ends_the_server(held):
    held.engine.failures += [ValueError(str(n)) for n in range(3)]
    socks = [connect(held, head(body(seed=seed, n=2))) for seed in range(4)]
    held.wait_until(lambda: held.scheduler.running + held.scheduler.waiting == 8)
    held.engine.gate.set()
    for sock in socks:
        assert " 500 " in sock.recv(10_000).decode().splitlines()[0]
        sock.close()
    held.thread.join(20)
    assert not held.thread.is_alive() and held.service.status == "failed" and held.is_idle()


def test_a_signal_drains_what_has_begun_takes_no_more_and_ends(held):
    socks = [connect(held, head(body(seed=seed, stream=bool(seed % 2)))) for seed in range(6)]
    kept = connect(held)  # a connection without a request
    held.wait_until(lambda: held.scheduler.running + held.scheduler.waiting == 6)
    held.server.handle_exit(15, None)
    health = httpx.get(f"{held.url}/health")
    assert health.status_code == 503 and health.json() == {"status": "draining"}
    refused = held.post(prompt="a")
    assert refused.status_code == 503 and "retry-after" in refused.headers
    held.engine.gate.set()
    for sock in socks:
        answer = b""
        while part := sock.recv(10_000):
            answer += part
            if b"[DONE]" in answer or b'"usage"' in answer:
                break
        assert b"200 OK" in answer and b'"finish_reason":"length"' in answer
    held.thread.join(20)
    assert not held.thread.is_alive() and held.is_idle()
    kept.close()


def test_a_second_signal_ends_what_is_left_with_an_answer(start, caplog):
    running = start(FakeEngine(slots=1), drain_seconds=60)
    running.engine.gate.clear()
    socks = [connect(running, head(body(stream=bool(n % 2)))) for n in range(4)]
    running.wait_until(lambda: running.scheduler.running + running.scheduler.waiting == 4)
    for _ in range(2):
        running.server.handle_exit(15, None)
    for sock in socks:
        assert b" 503 " in sock.recv(10_000).splitlines()[0]
    running.engine.gate.set()
    running.thread.join(20)
    assert not running.thread.is_alive() and running.is_idle() and "Exception" not in caplog.text


def test_requests_one_after_the_other_that_nobody_waits_for_leave_no_trace(start, caplog):
    running = start(FakeEngine(seconds=0.01))
    for _ in range(5):
        connect(running, head(body()) * 50).close()
    running.wait_until(lambda: not running.server.server_state.connections)
    running.wait_until(running.is_idle)
    assert "Exception" not in caplog.text


def test_what_does_not_end_while_draining_is_told_so(start):
    running = start(FakeEngine(slots=1, k=1, max_length=500), drain_seconds=0.2)
    running.engine.gate.clear()
    sock = connect(running, head(body(max_tokens=400)))
    running.wait_until(lambda: running.scheduler.running)
    running.server.handle_exit(15, None)
    assert b" 503 " in sock.recv(10_000).splitlines()[0]
    running.engine.gate.set()
    running.thread.join(20)
    assert not running.thread.is_alive() and running.is_idle()


def test_a_thousand_who_hang_up_at_any_time_change_nothing_for_the_others(start):
    running, numbers = start(FakeEngine(slots=4, k=2, max_length=64), most_waiting=4096), random.Random(1)

    async def one(number):
        fields = {"seed": number, "stream": bool(number % 2), "max_tokens": numbers.randrange(1, 50)}
        gone = numbers.random() * 0.05 if number % 3 else None
        answer = await ask(running.port, fields, gone)
        return answer is None or whole(answer, fields["stream"]) == text(running, number, new=fields["max_tokens"])

    async def all_of_them():
        right = []
        for first in range(0, 1500, 150):
            right += await asyncio.gather(*(one(number) for number in range(first, first + 150)))
        return right

    right = asyncio.run(all_of_them())
    assert all(right) and len(right) == 1500
    running.wait_until(running.is_idle)


def test_a_thousand_connections_at_once_are_served(start):
    server.allow_many_files()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2500:
        pytest.skip("a process may not have so many files open here: ulimit -Hn")
    running = start(FakeEngine(slots=8, k=4), most_waiting=1024)

    def all_are_here():
        return (
            running.scheduler.running + running.scheduler.waiting
            == len(running.server.server_state.connections)
            == 1000
        )

    async def all_of_them():
        asked = [ask(running.port, {"seed": seed, "max_tokens": 8}) for seed in range(1000)]
        answers = asyncio.gather(*asked)
        try:
            await asyncio.to_thread(running.wait_until, all_are_here)
        finally:  # nobody would be answered
            running.engine.gate.set()
        return await answers

    running.engine.gate.clear()
    answers = asyncio.run(all_of_them())
    assert [whole(answer, False) for answer in answers] == [text(running, seed, new=8) for seed in range(1000)]
    running.wait_until(running.is_idle)


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.smoke)])
def test_thousands_of_requests_in_a_row_leave_nothing_behind(start, count):
    running = start(FakeEngine(slots=8, k=4), most_waiting=1024)

    async def in_a_row(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        for number in range(count):
            writer.write(head(body(max_tokens=4, stream=bool(number % 2))))
            answer = b""
            while not answer.endswith((b"\r\n0\r\n\r\n", b"}")):
                answer += await reader.read(65_536)
            assert b"200 OK" in answer
        writer.close()

    async def several(count):
        await asyncio.gather(*(in_a_row(count // 4) for _ in range(4)))

    def objects():
        running.wait_until(running.is_idle)
        running.wait_until(lambda: not running.server.server_state.tasks)
        running.engine.inserted.clear()
        running.engine.steps.clear()
        gc.collect()
        return len(gc.get_objects())

    asyncio.run(several(400))
    before = objects()
    asyncio.run(several(count))
    assert objects() < before + 500


def test_a_step_that_hangs_is_seen_and_its_requests_still_end(start, monkeypatch):
    monkeypatch.setattr(worker, "_STALL_SECONDS", 0.1)
    monkeypatch.setattr(session, "_SECONDS_FOR_A_STEP", 0.1)
    running = start(FakeEngine(slots=1), seconds=0.2)
    running.engine.gate.clear()
    answer = running.post(prompt="a", max_tokens=4)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    running.wait_until(lambda: running.service.status == "stalled")
    health = httpx.get(f"{running.url}/health")
    assert (health.status_code, health.json()["status"]) == (503, "stalled")
    running.engine.gate.set()
    running.wait_until(running.is_idle)
    running.wait_until(lambda: httpx.get(f"{running.url}/health").status_code == 200)


def test_a_connection_may_be_idle_longer_than_balancers_leave_it(start):
    assert start().server.config.timeout_keep_alive > 600


def test_a_server_whose_engine_hangs_ends_all_the_same(start, monkeypatch):
    monkeypatch.setattr(worker, "_SECONDS_TO_STOP", 0.2)
    running = start(FakeEngine(slots=1), drain_seconds=0.1)
    running.engine.gate.clear()
    sock = connect(running, head(body()))
    running.wait_until(lambda: running.scheduler.running)
    running.server.handle_exit(15, None)
    assert b" 503 " in sock.recv(10_000).splitlines()[0]
    running.thread.join(20)
    assert not running.thread.is_alive() and running.service.worker.is_alive


def test_what_goes_wrong_within_streams_is_counted(start):
    running = start(FakeEngine(slots=1, k=1, max_length=30_000, seconds=0.01))
    sock = connect(running, head(body(max_tokens=29_000, stream=True)))
    read_until(sock, b"data:")
    running.engine.failures.append(ValueError("broken"))
    read_until(sock, b"[DONE]\n\n\r\n0\r\n\r\n")
    sock.sendall(head(body(max_tokens=29_000, stream=True)))
    read_until(sock, b"data:")
    sock.close()
    running.wait_until(running.is_idle)
    text = httpx.get(f"{running.url}/metrics").text
    for status in ("500", "499"):
        assert f'kforcing:request_errors_total{{model_name="fake",status="{status}"}} 1.0' in text


def test_pages_of_other_sites_may_not_ask(start):
    """A browser lets them send, and says where they are from. With a key they would have to know it."""
    running = start()
    for origin, status in (("https://elsewhere.org", 403), ("null", 403), (running.url, 200)):
        headers = {"Origin": origin, "Content-Type": "text/plain"}
        answer = httpx.post(f"{running.url}/v1/completions", content=body(), headers=headers)
        assert answer.status_code == status and bool(running.engine.inserted) == (status == 200)
    headers = {"Origin": "https://public.org", "X-Forwarded-Host": "public.org"}  # of a proxy
    assert httpx.post(f"{running.url}/v1/completions", content=body(), headers=headers).status_code == 200
