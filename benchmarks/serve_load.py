"""Serving under load: AR, windows of 4 and the confident stride, over HTTP, by one server.

python benchmarks/serve_load.py --workdir=runs/tiny --plot=load.svg
python benchmarks/serve_load.py --url=http://127.0.0.1:8000 --rounds=5

Requests come at random, whether earlier ones were answered or not (Poisson; the same times, prompts, seeds and lengths
for every mode), at rates that rise until no mode keeps up: more than 1.1 times what it answers. Modes take turns at
every rate. The first fifth of a round is left out, and useful are the tokens that come in the rest of it. A request's
time and its first token's count from when it should have been sent; a time per token is that from a text's first event
to its last, over the tokens after the first event. Texts of a seed are compared with each other, and
a few of them with what the seed gives alone.

With `--workdir` the server is started here, and compared with its engine: the same requests without HTTP, and by twice
as many clients as there are slots, each of which asks again when it was answered.
"""

import asyncio
import contextlib
import datetime
import json
import math
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags, logging
from device import device_text
from load_client import Client, figures_of

from kforcing_jax.evaluation.plots import PALETTE, new_figure

_WORKDIR = flags.DEFINE_string("workdir", None, "A trained run with stages ar and k4: a server is started on it.")
_URL = flags.DEFINE_string("url", None, "A server that runs, instead.")
_SLOTS = flags.DEFINE_integer("slots", 16, "Texts at a time, of the server that is started.", lower_bound=1)
_FIRST_RATE = flags.DEFINE_float("first_rate", 25, "Requests a second to begin with.", lower_bound=0.01)
_FACTOR = flags.DEFINE_float("factor", 1.6, "From a rate to the next.", lower_bound=1.01)
_MOST_RATES = flags.DEFINE_integer("most_rates", 8, "However the server does.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 4, "In which the requests of a round are sent.", lower_bound=0.1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Of every mode at every rate, and without HTTP.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 48, "Of every text.", lower_bound=2)
_CONFIDENCE = flags.DEFINE_float("confidence", 0.3, "Of the confident stride.")
_PLOT = flags.DEFINE_string("plot", None, "Where to draw what was measured (.svg or .png).")
_JSON = flags.DEFINE_bool("json", False, "End with one JSON object on one line.")

_PROMPTS = (
    "The president",
    "In the morning",
    "Officials said",
    "A spokesman of",
    "The company is",
    "Police believe",
    "Last year the",
    "The government",
    "She told the",
    "Shares of the",
    "Two people were",
    "On Tuesday the",
    "The team has",
    "Prices in the",
    "Of the many who",
    "The city will",
)
_ALONE = 8  # requests whose texts are asked for one at a time
_MOST_PARTED = 0.01  # of texts: where rounding meets the edge of a bin, see docs/decoding.md
_KEEPS_UP = 1.1  # a mode that is offered less than so many times what it answers


def modes() -> dict[str, dict]:
    """What takes turns: the fields of its requests, by name."""
    student = {"mode": "student", "k": 4, "confidence": 0.0}
    return {"ar": {"mode": "ar"}, "k4": student, "confident": student | {"confidence": _CONFIDENCE.value}}


def request(index: int) -> dict:
    """What all modes share of one: prompt, seed and length."""
    prompt = _PROMPTS[index % len(_PROMPTS)]
    return {"prompt": prompt, "seed": index, "max_tokens": _NEW_TOKENS.value, "ignore_eos": True}


class Load:
    """Drives a server, and holds what it answers to what the same request gave before."""

    def __init__(self, url: str, runner: asyncio.Runner):
        self._client, self._runner = Client(url), runner
        self._known, self.compared, self.parted = {}, 0, 0

    def open_loop(self, mode: str, due_N) -> dict:
        """Figures of requests at these times."""
        start, busy = time.perf_counter(), time.process_time()
        answers = self._runner.run(self._client.at_times(self._bodies(mode, len(due_N)), due_N))
        cores = (time.process_time() - busy) / (time.perf_counter() - start)
        self._compare(mode, answers)
        return figures_of(answers, _SECONDS.value, _NEW_TOKENS.value) | {"client_cores": cores}

    def closed_loop(self, mode: str, count: int, clients: int) -> float:
        """Tokens per second of so many requests, by clients of which each has one at a time."""
        start = time.perf_counter()
        answers = self._runner.run(self._client.in_turn(self._bodies(mode, count), clients))
        seconds = time.perf_counter() - start
        self._compare(mode, answers)
        return sum(answer.tokens for answer in answers) / seconds

    def _bodies(self, mode, count):
        return [request(index) | modes()[mode] for index in range(count)]

    def _compare(self, mode, answers):
        """Raises SystemExit when more texts parted than rounding explains."""
        for answer in answers:
            if answer.status == 200:
                known = self._known.setdefault((mode, answer.index), answer.text)
                self.compared, self.parted = self.compared + 1, self.parted + (known != answer.text)
        if self.parted > _MOST_PARTED * self.compared:
            raise SystemExit(f"{mode}: {self.parted} of {self.compared} texts are not what their seed gave before")


def spread(rounds: list):
    """Median and quartiles of numbers, in whatever dicts they are."""
    if isinstance(rounds[0], dict):
        return {name: spread([each[name] for each in rounds]) for name in rounds[0]}
    low, median, high = np.percentile(rounds, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def at_rising_rates(load: Load) -> list[dict]:
    """Figures of all modes, by rate."""
    results = []
    for step in range(_MOST_RATES.value):
        rate = _FIRST_RATE.value * _FACTOR.value**step
        rounds = {mode: [] for mode in modes()}
        for index in range(_ROUNDS.value):
            gaps_N = np.random.default_rng([step, index]).exponential(1 / rate, int(2 * rate * _SECONDS.value) + 9)
            due_N = [due for due in gaps_N.cumsum().tolist() if due < _SECONDS.value]
            for mode, found in rounds.items():
                found.append(load.open_loop(mode, due_N))
        ratios = [
            k4["useful_tokens_per_second"] / (ar["useful_tokens_per_second"] or math.nan)
            for ar, k4 in zip(rounds["ar"], rounds["k4"], strict=True)
        ]
        by_mode = {mode: spread(found) for mode, found in rounds.items()}
        results.append({"requests_per_second": rate, "modes": by_mode, "k4_over_ar": spread(ratios)})
        say(_rate_text(results[-1]))
        if not any(map(keeps_up, by_mode.values())):
            break
    return results


def keeps_up(figures: dict) -> bool:
    """Whether a mode answers about as much as it is asked for."""
    return figures["offered_tokens_per_second"]["median"] <= _KEEPS_UP * figures["useful_tokens_per_second"]["median"]


def sustained(results: list[dict]) -> dict | None:
    """Of the highest rate at which k4's p95 time per token is AR's or better."""

    def is_as_good(result):
        slow = {mode: result["modes"][mode]["per_token"]["p95"]["median"] for mode in ("ar", "k4")}
        return slow["k4"] <= slow["ar"]

    return next(filter(is_as_good, reversed(results)), None)


@contextlib.contextmanager
def server():
    """Its address; what was started here ends with the context."""
    if _URL.value:
        yield _URL.value
        return
    command = [sys.executable, "-m", "kforcing_jax.serve", f"--workdir={_WORKDIR.value}", f"--slots={_SLOTS.value}"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen([*command, "--port=0"], stdout=log, stderr=log) as process,
    ):
        try:
            yield _address(process, log)
        finally:
            process.terminate()


def _address(process, log) -> str:
    """What the server says as soon as it is ready."""
    while True:
        is_over = process.poll() is not None
        log.seek(0)
        said = log.read()
        if found := re.search(r"^serving .* at (http\S+):", said, re.MULTILINE):
            return found[1]
        if is_over:
            raise SystemExit(f"the server ended before it was ready\n{said}")
        time.sleep(0.1)


class Bare:
    """The engine of a run without a server: requests in a row, slots refilled as they become free."""

    def __init__(self, count: int):
        from kforcing_jax.decoding import Engine, Request
        from kforcing_jax.training.checkpoints import load_stage
        from kforcing_jax.workdir import Workdir

        logging.set_verbosity(logging.FATAL)  # orbax reports every file
        workdir = Workdir.open(_WORKDIR.value)
        tokenizer = workdir.tokenizer()
        student = load_stage(workdir, "k4", tokenizer)
        teacher = None if student[0].cfg.is_gated else load_stage(workdir, "ar", tokenizer)
        length = workdir.config.data.seq_len
        self._engine = Engine(student=student, teacher=teacher, slots=_SLOTS.value, max_length=length, k=4)
        self._requests = {mode: [] for mode in modes()}
        for mode, settings in modes().items():
            for asked in map(request, range(count)):
                prompt = tokenizer.encode_prompt(asked["prompt"])
                self._requests[mode].append(Request(prompt, asked["max_tokens"], seed=asked["seed"], **settings))

    def tokens_per_second(self, mode: str) -> float:
        left, tokens, start = self._requests[mode][::-1], 0, time.perf_counter()
        while left or self._engine.free_slots < self._engine.slots:
            while left and self._engine.free_slots:
                self._engine.insert(left.pop())
            tokens += sum(len(update.tokens) for update in self._engine.step(wait=not left))
        return tokens / (time.perf_counter() - start)


def against_the_engine(load: Load) -> dict:
    """Tokens per second of both, by mode, and the share that the server takes."""
    count = 16 * _SLOTS.value
    bare, rounds = Bare(count), {mode: [] for mode in modes()}
    for index in range(_ROUNDS.value + 1):
        for mode, found in rounds.items():
            of_engine = bare.tokens_per_second(mode)
            of_server = load.closed_loop(mode, count, 2 * _SLOTS.value)
            if index:  # the first one compiled
                found.append({"engine": of_engine, "server": of_server, "overhead": 1 - of_server / of_engine})
    return {mode: spread(found) for mode, found in rounds.items()}


def say(text: str):
    """Progress: on stderr where stdout is for JSON."""
    print(text, file=sys.stderr if _JSON.value else sys.stdout, flush=True)


def _rate_text(result) -> str:
    lines = [f"{result['requests_per_second']:.1f} requests/s"]
    for mode, figures in result["modes"].items():
        useful = figures["useful_tokens_per_second"]
        times = (f"{words} {_joined(figures[key])}" for words, key in _TIMES.items())
        lines.append(
            f"  {mode:<10} {useful['median']:>7,.0f} tokens/s [{useful['low']:,.0f}, {useful['high']:,.0f}] of "
            f"{figures['offered_tokens_per_second']['median']:,.0f}  {', '.join(times)} ms  "
            f"{figures['tokens_per_pass']['median']:.2f} a pass  {figures['refused']['median']:.0f} refused  "
            f"{figures['failed']['median']:.0f} failed"
        )
    return "\n".join(lines)


_TIMES = {"first": "to_first_token", "token": "per_token", "whole": "whole"}


def _joined(percentiles) -> str:
    return "/".join(f"{each['median']:.3g}" for each in percentiles.values())


def _overhead_text(overhead) -> str:
    lines = ["server against engine, at full load"]
    for mode, each in overhead.items():
        share = each["overhead"]
        lines.append(
            f"  {mode:<10} {each['server']['median']:>7,.0f} of {each['engine']['median']:,.0f} tokens/s: "
            f"{share['median']:.0%} [{share['low']:.0%}, {share['high']:.0%}] overhead"
        )
    return "\n".join(lines)


def _sustained_text(result) -> str:
    if result is None:
        return "at no rate is k4's p95 time per token as good as AR's"
    ratio, figures = result["k4_over_ar"], result["modes"]
    said = ", ".join(f"{mode} {each['useful_tokens_per_second']['median']:,.0f}" for mode, each in figures.items())
    tokens = {mode: figures[mode]["per_token"]["p95"]["median"] for mode in ("k4", "ar")}
    return (
        f"sustained at {result['requests_per_second']:.1f} requests/s, tokens/s: {said}; k4 is {ratio['median']:.2f}x "
        f"AR [{ratio['low']:.2f}, {ratio['high']:.2f}], p95 {tokens['k4']:.2f} ms a token against {tokens['ar']:.2f}"
    )


def main(_):
    if bool(_WORKDIR.value) == bool(_URL.value):
        raise app.UsageError("give one of --workdir and --url")
    with server() as url, asyncio.Runner() as runner:
        load = Load(url, runner)
        for mode in modes():
            load.closed_loop(mode, _ALONE, clients=1)
        overhead = against_the_engine(load) if _WORKDIR.value else None
        if overhead:
            say(_overhead_text(overhead))
        results = at_rising_rates(load)
    say(f"{load.compared} texts compared with what their seed gave before, {load.parted} parted")
    say(_sustained_text(sustained(results)))
    if _JSON.value:
        general = {"device": device_text(), "date": datetime.date.today().isoformat(), "command": " ".join(sys.argv)}
        general |= {"texts_compared": load.compared, "texts_parted": load.parted}
        found = {"against_engine": overhead, "sustained": sustained(results), "results": results}
        print(json.dumps(general | found), flush=True)
    if _PLOT.value:
        _draw(results)


def _draw(results):
    panels = {
        "useful tokens per second": lambda figures: figures["useful_tokens_per_second"],
        "ms per token, p95": lambda figures: figures["per_token"]["p95"],
        "ms to the first token, p95": lambda figures: figures["to_first_token"]["p95"],
    }
    with new_figure(9.2, 2.8) as figure:
        for axes, (title, value) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for mode, colour in zip(results[0]["modes"], ("#555555", *PALETTE), strict=False):
                found = [value(result["modes"][mode]) for result in results]
                rates = [result["requests_per_second"] for result in results]
                low, median, high = ([each[name] for each in found] for name in ("low", "median", "high"))
                axes.plot(rates, median, color=colour, marker="o", markersize=3, label=mode)
                axes.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(rates, [f"{rate:.0f}" for rate in rates])
            axes.set_xlabel("requests per second")
            axes.set_title(title, loc="left", fontsize="medium")
        axes.set_yscale("log")
        axes.legend()
        figure.savefig(_PLOT.value)


if __name__ == "__main__":
    app.run(main)
