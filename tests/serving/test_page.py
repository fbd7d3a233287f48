"""The page at `/` in a real browser, against a fake server of the HTTP contract that sends its streams byte by byte."""

import http.server
import json
import re
import threading
import time
from importlib import resources

import pytest
from browser import CHROMIUM, SECONDS, Browser
from fake_engine import FakeEngine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")

PAGE = resources.files("kforcing_jax.serving").joinpath("page.html").read_bytes()
MODES = ["student", "ar", "exact"]
MODEL = {
    "id": "tiny",
    "max_model_len": 128,
    "k": 4,
    "mode": "student",
    "modes": MODES,
    "tau": [0.5, 1.5],
    "temperature": 0.75,
}


class Server(http.server.ThreadingHTTPServer):
    """Answers each mode with what `answers` has for it: the blocks [(text, tokens)] of a stream, or (status, error)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def reset(self):
        self.model, self.api_key = MODEL, None
        self.answers = {
            "ar": [("Der ", 1), ("grüne ", 1), ("日本 ", 1), ("👍🏽", 1), (" end", 1)],
            "student": [("Der grüne ", 2), ("日本 👎🏽 end!", 4)],
            "exact": [("Der grüne 日", 3), ("本 👍🏽 end", 2)],
        }
        self.paths, self.keys, self.requests = [], [], []
        self.meeting = None  # a barrier that requests wait at
        self.late_error = None  # after the blocks of a stream
        self.is_endless, self.is_cut, self.hung_up = False, False, threading.Semaphore(0)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path == "/":
            self.answer(200, PAGE, "text/html; charset=utf-8")
        elif self.is_allowed():
            self.answer(200, json.dumps({"object": "list", "data": [self.server.model]}).encode())

    def do_POST(self):
        self.server.paths.append(self.path)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        if not self.is_allowed():
            return
        if self.server.meeting:
            self.server.meeting.wait(timeout=SECONDS)
        answer = self.server.answers[request["mode"]]
        if isinstance(answer, tuple):
            return self.refuse(*answer)
        try:
            self.stream(answer)
        except OSError:
            self.server.hung_up.release()
            self.close_connection = True

    def is_allowed(self):
        key = self.headers["Authorization"]
        self.server.keys.append(key)
        if self.server.api_key and key != f"Bearer {self.server.api_key}":
            self.refuse(401, "the key is missing")
            return False
        return True

    def stream(self, blocks):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for passes, (text, tokens) in enumerate(blocks, 1):
            self.choice(text, tokens, passes)
        while self.server.is_endless:
            self.choice("on ", 1, 99)
            time.sleep(0.01)
        if self.server.late_error:
            self.event(json.dumps({"error": {"message": self.server.late_error}}))
            self.event("[DONE]")
        elif not self.server.is_cut:
            self.choice("", 0, len(blocks), "length")
            usage = {"completion_tokens": sum(tokens for _, tokens in blocks), "passes": len(blocks)}
            self.event(json.dumps({"choices": [], "usage": usage}))
            self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def choice(self, text, tokens, passes, reason=None):
        choice = {"index": 0, "text": text, "tokens": tokens, "passes": passes, "finish_reason": reason}
        self.event(json.dumps({"choices": [choice]}, ensure_ascii=False))

    def event(self, data):
        for byte in f"data: {data}\n\n".encode():
            self.wfile.write(b"1\r\n%c\r\n" % byte)

    def refuse(self, status, message):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.answer(status, json.dumps({"error": error}).encode())

    def answer(self, status, body, content_type="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def running_server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(running_server):
    running_server.reset()
    yield running_server
    running_server.is_endless = False  # where a test has failed, what it left must not go on


@pytest.fixture
def page(browser, server):
    return load(browser, server)


def load(browser, server):
    """The page, ready to start."""
    browser.open(server.url.rstrip("/") + "/")
    browser.until("!document.getElementById('start').disabled")
    return browser


def fill(page, **values):
    for name, value in values.items():
        page.run(f"""(() => {{
            const field = document.getElementById({name!r});
            field.value = {json.dumps(value)};
            for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, {{ bubbles: true }}));
        }})()""")


def press(page, selector):
    page.run(f"document.querySelector({selector!r}).click()")


def wait(page):
    page.until("document.getElementById('stop').disabled")


def write(page):
    """Presses Start and waits for the end."""
    press(page, "#start")
    wait(page)


def shown(page, selector):
    """Texts of all elements of a selector."""
    return page.run(f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)")


def test_both_texts_stream_under_one_seed_and_the_page_says_where_they_part(page, server):
    fill(page, prompt="Sag: ", k="3", confidence="0.25", tau="0.75", seed="17", max_tokens="9")
    write(page)
    assert shown(page, "h2") == ["AR", "Student"]
    assert shown(page, ".panel .beside") == ["one token a pass", "k = 3, confidence 0.25"]
    assert shown(page, ".given") == ["Sag: ", "Sag: "]
    assert shown(page, ".same") == ["Der grüne 日本 "] * 2
    assert shown(page, "mark") == ["👍🏽 end", "👎🏽 end!"]  # whose first halves are equal
    assert shown(page, "#verdict") == ["Student parts from AR after 13 characters."]
    assert all(re.fullmatch(r"Reached max tokens, began after \d+ ms\.", note) for note in shown(page, ".note"))
    same = {"model": "tiny", "prompt": "Sag: ", "seed": 17, "temperature": 0.75, "max_tokens": 9, "stream": True}
    same |= {"stream_options": {"include_usage": True}}
    assert server.requests == [same | {"mode": "ar"}, same | {"mode": "student", "k": 3, "confidence": 0.25}]


def test_tokens_and_passes_are_counted(page):
    write(page)
    assert shown(page, ".tokens") == ["5", "6"]
    assert shown(page, ".passes") == ["5", "2"]
    assert shown(page, ".stride") == ["1.00", "3.00"]
    assert all(float(speed) > 0 for speed in shown(page, ".speed"))


def test_counters_run_while_texts_do_and_stop_hangs_up(page, server):
    server.is_endless = True
    press(page, "[value=once]")
    press(page, "#start")
    page.until("[...document.querySelectorAll('.tokens')].every((one) => Number(one.textContent) > 8)")
    assert shown(page, "#verdict") == ["Student parts from AR after 13 characters."]  # as soon as they do
    press(page, "#stop")
    assert all(server.hung_up.acquire(timeout=SECONDS) for _ in range(2))
    wait(page)
    assert shown(page, ".note") == ["Stopped.", "Stopped."]


def test_exact_is_said_to_be_identical(page, server):
    fill(page, mode="exact")
    write(page)
    assert shown(page, "#verdict") == ["Exact is identical to AR: 19 characters."]
    assert shown(page, "mark") == ["", ""]
    assert server.requests[1]["k"] == 4 and "confidence" not in server.requests[1]
    assert page.run("document.getElementById('confidence').disabled")


def test_a_text_that_ends_parts_from_one_that_goes_on(page, server):
    server.answers = {"ar": [("same", 1)], "student": [("same!", 2)]}
    write(page)
    assert shown(page, "mark") == ["", "!"]
    assert shown(page, "#verdict") == ["Student parts from AR after 4 characters."]


def test_errors_stand_in_words_beside_their_text(page, server):
    server.answers["student"] = (400, "k = 9 is more than 4")
    write(page)
    assert shown(page, ".error") == shown(page, ".panel:last-child .error") == ["k = 9 is more than 4"]
    server.answers |= {"ar": (429, "The queue is full."), "student": (500, "The engine failed.")}
    write(page)
    assert shown(page, ".error") == ["The queue is full. (try again in 7 s)", "The engine failed."]


def test_an_error_within_a_stream_is_shown_with_what_came_before(page, server):
    server.late_error = "The request took longer than 600 s."
    write(page)
    assert shown(page, ".error") == [server.late_error] * 2
    assert shown(page, "mark") == ["👍🏽 end", "👎🏽 end!"]


def test_a_stream_that_breaks_off_is_no_end(page, server):
    server.answers, server.is_cut = {"ar": [("half", 1)], "student": [("half", 1)]}, True
    write(page)
    assert shown(page, ".error") == ["The stream broke off before its end."] * 2
    assert shown(page, "#verdict") == ["Student equals AR as far as both go: 4 characters."]


def test_markup_of_a_model_is_text(page, server):
    evil = "<img src=x onerror='window.evil = 1'><script>window.evil = 1</script></mark><b>&amp;"
    server.answers = {"ar": [("a" + evil, 1)], "student": [(evil, 1)]}
    fill(page, prompt=evil)
    write(page)
    assert shown(page, ".given") == [evil, evil]
    assert shown(page, "mark") == ["a" + evil, evil]
    assert page.run("window.evil === undefined && !document.querySelector('.text :is(img, script, b)')")


def test_events_are_the_same_wherever_a_stream_is_cut(page):
    stream = 'data: {"ü": "👍🏽"}\r\n\r\n: comment\ndata:two\r\ndata: lines\r\n\r\nid: 3\rdata: 日\r\rdata: [DONE]\n\n'
    found = page.run(f"""(async () => {{
        const bytes = new TextEncoder().encode({json.dumps(stream)}), found = new Set();
        for (let cut = 0; cut <= bytes.length; cut++) {{
            const body = new ReadableStream({{ start(sink) {{
                for (const part of [bytes.slice(0, cut), bytes.slice(cut)]) sink.enqueue(part);
                sink.close();
            }} }});
            const all = [];
            for await (const data of events(body)) all.push(data);
            found.add(JSON.stringify(all));
        }}
        return [...found];
    }})()""")
    assert list(map(json.loads, found)) == [['{"ü": "👍🏽"}', "two\nlines", "日", "[DONE]"]]


def test_requests_run_at_once_where_that_is_wanted(page, server):
    server.meeting = threading.Barrier(2)  # neither is answered before both are there
    press(page, "[value=once]")
    write(page)
    assert shown(page, ".error") == [] and shown(page, ".tokens") == ["5", "6"]


def test_requests_take_turns_by_default(page, server):
    server.is_endless = True
    press(page, "#start")
    page.until("Number(document.querySelector('.tokens').textContent) > 8")
    assert shown(page, ".note")[1] == "Waits for AR to end."
    press(page, "#stop")
    wait(page)
    assert shown(page, ".note") == ["Stopped.", "Not started."]
    assert [request["mode"] for request in server.requests] == ["ar"]


@pytest.mark.parametrize("mode, heading, why", [("ar", "AR", "No student"), ("student", "Student", "No AR teacher")])
def test_a_model_alone_has_one_text_and_the_page_says_why(browser, server, mode, heading, why):
    server.model = MODEL | {"modes": [mode], "mode": mode, "k": None if mode == "ar" else 4, "tau": None}
    page = load(browser, server)
    assert shown(page, "h2") == [heading]
    assert why in shown(page, "#model")[0]
    assert page.run("document.getElementById('k').disabled") == (mode == "ar")
    write(page)
    assert shown(page, "#verdict") == [""]
    assert [request["mode"] for request in server.requests] == [mode]


def test_controls_stay_within_what_the_models_allow(page, server):
    limits = [page.run(f"[{name}.min, {name}.max, {name}.value]") for name in ("k", "tau", "max_tokens")]
    assert limits == [["1", "4", "4"], ["0.5", "1.5", "0.75"], ["1", "128", "64"]]
    fill(page, tau="3")
    press(page, "#start")
    assert page.run("document.getElementById('stop').disabled") and not server.requests


def test_an_api_key_is_asked_for_sent_and_not_kept(browser, server):
    server.api_key = "sesame"
    browser.open(server.url.rstrip("/") + "/")
    browser.until("document.getElementById('model').textContent.includes('wants an API key')")
    fill(browser, key="sesame")
    browser.until("!document.getElementById('start').disabled")
    write(browser)
    assert server.keys == [None, "Bearer sesame", "Bearer sesame", "Bearer sesame"]
    assert browser.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert "sesame" not in browser.run("location.href + document.documentElement.outerHTML")
    assert browser.run("document.getElementById('key').type") == "password"


def test_the_keyboard_is_enough_and_controls_have_names(page):
    assert page.run("[...form.elements].every((one) => one.labels?.length || one.ariaLabel || one.textContent)")
    press(page, "#dice")
    assert page.run("seed.value") != "0"
    page.run("document.getElementById('prompt').focus()")
    key = {"key": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 2}
    page.send("Input.dispatchKeyEvent", type="rawKeyDown", **key)
    page.until("document.querySelectorAll('mark')[1].textContent")
    wait(page)
    assert page.run("document.activeElement.id + document.activeElement.value") == "promptThe president said"
    page.run("document.getElementById('start').focus()")
    write(page)
    assert page.run("document.activeElement.id") == "start"


def test_nothing_is_wider_than_a_phone_and_nothing_jumps(page, server):
    server.answers = {"ar": [("long" * 200, 123456)], "student": [("wide" * 200, 1234)]}
    size = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    columns = "new Set([...document.querySelectorAll('.panel')].map((one) => one.getBoundingClientRect().left)).size"
    assert page.run(columns) == 2
    page.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    try:
        before = page.run(size)
        write(page)
        assert page.run(size) == before and before[0] == 360
        assert page.run("[...document.querySelectorAll('.text')].every((one) => one.scrollWidth === one.clientWidth)")
        assert page.run(columns) == 1
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")


def test_dark_is_dark(page):
    brightness = {}
    for scheme in ("light", "dark", ""):
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours = page.run("(({ backgroundColor, color }) => [backgroundColor, color])(getComputedStyle(form))")
        brightness[scheme] = [sum(map(int, re.findall(r"\d+", colour))) for colour in colours]
    assert brightness["light"][0] > 600 > 200 > brightness["light"][1]
    assert brightness["dark"][1] > 600 > 200 > brightness["dark"][0]


def test_the_page_is_one_file(page, server):
    write(page)
    assert set(server.paths) == {"/", "/v1/models", "/v1/completions"}
    assert not re.search(
        rb"innerHTML|insertAdjacentHTML|document\.write|https?://|@import|url\(|<script [^>]*src", PAGE
    )


def test_the_page_works_with_the_server_that_it_comes_with(browser, start):
    running = start(FakeEngine(max_length=40), confidence=0.25)
    page = load(browser, running)
    assert page.run("document.getElementById('confidence').value") == "0.25"
    fill(page, prompt="hello", seed="7", max_tokens="8")
    write(page)
    assert shown(page, ".tokens") == ["8", "8"] and shown(page, ".passes") == ["4", "4"]
    assert shown(page, ".same") == [running.post(prompt="hello", seed=7, max_tokens=8).json()["choices"][0]["text"]] * 2
    student = running.engine.inserted[1]
    assert (student.mode, student.k, student.confidence, student.seed) == ("student", 2, 0.25, 7)
    fill(page, prompt="h" * 50)
    write(page)
    assert all("context of 40 tokens" in words for words in shown(page, ".panel .error"))
    running.wait_until(running.is_idle)
