"""A real browser: headless Chromium, driven by the DevTools protocol over a pipe."""

import json
import os
import shutil
import socket
import time

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
SECONDS = 20


class Browser:
    """One tab. Chromium reads commands from its descriptor 3, writes to 4, and ends when their socket is closed."""

    def __init__(self, folder):
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
        self.socket, theirs = socket.socketpair()
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        pipe = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), fd) for fd in (3, 4)]
        command = [CHROMIUM, *flags.split(), "--no-first-run", f"--user-data-dir={folder}"]
        self.pid = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=[*quiet, *pipe])
        theirs.close()
        self.socket.settimeout(3 * SECONDS)
        self.received, self.count, self.session = b"", 0, {}
        tab = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]}

    def send(self, method, **params):
        """The result of a command of the protocol."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | self.session
        self.socket.sendall(json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self):
        while b"\0" not in self.received:
            self.received += self.socket.recv(1 << 16) or pytest.fail("Chromium has ended")
        message, self.received = self.received.split(b"\0", 1)
        return json.loads(message)

    def run(self, script):
        """The value of an expression of JavaScript, awaited."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition):
        """Waits until an expression of JavaScript holds."""
        end = time.monotonic() + SECONDS
        while not self.run(condition):
            assert time.monotonic() < end, f"not {condition}: {self.run('document.body.innerText')}"
            time.sleep(0.02)

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.until(f"location.href === {url!r} && document.readyState === 'complete'")

    def close(self):
        self.socket.close()
        os.waitpid(self.pid, 0)
