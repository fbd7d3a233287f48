"""`python -m kforcing_jax.serve` in a process of its own."""

import os
import re
import signal
import subprocess
import sys

from commands import REPOSITORY


class Serving:
    """A server that has started: its address, and what it said until then."""

    def __init__(self, *flags, **environment):
        command = [sys.executable, "-m", "kforcing_jax.serve", "--port=0", *flags]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
        self.process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving (\S+) at (http://\S+):", line):
                self.name, self.url = found[1], found[2]
                return
        raise AssertionError("".join(self.lines))

    def end(self):
        """The status after SIGTERM, and what was said since the start."""
        self.process.send_signal(signal.SIGTERM)
        said = self.process.stderr.read()
        return self.process.wait(60), said
