"""The benchmark of serving: what its client reads, figures by hand, and a run against a server without a model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from load_client import Answer, figures_of

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def _event(text, tokens, passes):
    said = {"choices": [{"index": 0, "text": text, "tokens": tokens, "passes": passes}]}
    return b"5a\r\ndata: " + json.dumps(said).encode() + b"\n\n\r\n"


@pytest.mark.parametrize("cut", [0, 1, 40, 70])
def test_an_event_counts_when_its_last_byte_came(cut):
    first, second = _event("ab", 2, 1), _event("c", 1, 2)
    pieces = [(1.0, HEAD + first), (2.0, second[:cut]), (3.0, second[cut:] + b"0\r\n\r\n")]
    answer = Answer.read(7, 0.5, pieces)
    assert (answer.index, answer.status, answer.text, answer.passes) == (7, 200, "abc", 2)
    assert answer.events == [(1.0, 2), (3.0, 1)]
    assert (answer.seconds_to_first, answer.seconds, answer.seconds_per_token) == (0.5, 2.5, 2.0)


def test_refusals_and_errors_within_streams_are_no_texts():
    refused = Answer.read(0, 0.0, [(1.0, b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}")])
    broken = Answer.read(0, 0.0, [(1.0, HEAD + _event("a", 1, 1) + b'b\r\ndata: {"error":{}}\n\n\r\n')])
    assert (refused.status, broken.status, Answer.read(0, 0.0, []).status) == (429, 500, 0)


def test_figures_by_hand():
    """Of ten seconds the first two are left out: what was asked in them, and what came."""
    answers = [
        Answer(0, 1.0, 200, "", [(1.5, 4), (2.5, 4)], 2),
        Answer(1, 4.0, 200, "", [(5.0, 4), (7.0, 4)], 4),
        Answer(2, 9.0, 200, "", [(9.5, 8), (11.5, 4)], 4),
        Answer(3, 9.5, 429, "", [], 0),
    ]
    figures = figures_of(answers, seconds=10, new_tokens=8)
    assert figures["offered_tokens_per_second"] == 3 * 8 / 8
    assert figures["useful_tokens_per_second"] == (4 + 4 + 4 + 8) / 8
    assert figures["per_token"]["p50"] == 500 and figures["to_first_token"]["p50"] == 750
    assert figures["tokens_per_pass"] == 20 / 8 and (figures["refused"], figures["failed"]) == (1, 0)
    assert math.isnan(figures_of([], 10, 8)["whole"]["p99"])


class Streaming(FakeEngine):
    """A text takes several steps, however long these might be."""

    def step(self, passes, **how):
        return super().step(min(passes, 3), **how)


def test_modes_take_the_same_requests_until_none_keeps_up(start, tmp_path):
    # So many that a machine that stands still for a moment refuses nobody.
    running = start(Streaming(slots=4, max_length=64, k=4), most_waiting=1024)
    flags = ("--rounds=2", "--seconds=0.5", "--first_rate=20", "--factor=10", "--most_rates=2")
    plot = tmp_path / "load.svg"
    command = [sys.executable, str(BENCHMARK), f"--url={running.url}", *flags, f"--plot={plot}", "--json"]
    done = subprocess.run(command, cwd=BENCHMARK.parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert "cpu" in report["device"] and len(report["date"]) == 10 and "serve_load.py" in report["command"]
    assert report["texts_compared"] > 3 * 8 and report["texts_parted"] == 0
    first, last = report["results"][0]["modes"], report["results"][-1]["modes"]
    assert {name: figures["offered_tokens_per_second"] for name, figures in first.items()} == {
        name: first["ar"]["offered_tokens_per_second"] for name in ("ar", "k4", "confident")
    }
    assert all(figures["failed"]["high"] == figures["refused"]["high"] == 0 for figures in last.values())
    assert plot.read_text().count("confident") and "k4" in done.stderr.splitlines()[-1]
    running.wait_until(running.is_idle)
