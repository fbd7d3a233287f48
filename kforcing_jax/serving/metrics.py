"""What gateways and dashboards read: the names of vLLM's metrics where it has them, and passes.

Nothing of a request is in them but numbers, the model's name, and why a text ended.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from kforcing_jax.serving.choices import Choice

_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    320,
    640,
)
_PER_TOKEN = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_PER_PASS = (1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 5, 6, 7, 8, 12, 16)

CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclasses.dataclass
class Times:
    """Of one text, by the server's clock, in seconds: asked for, given a slot, first and last new tokens.

    `at_first` is how many tokens came first, at once.
    """

    asked: float
    began: float | None = None
    first: float | None = None
    last: float | None = None
    at_first: int = 0


class Metrics:
    """The metrics of one server, in a registry of their own.

    `exact_in_one_pass`: in mode `exact` a window's first token is no draft, since it is drawn where the window hangs.
    """

    def __init__(self, model: str, exact_in_one_pass: bool = False):
        self._registry, self._model = CollectorRegistry(), model
        self._exact_in_one_pass = exact_in_one_pass
        self._success = self._make(Counter, "vllm:request_success", "Texts that ended, by reason.", "finished_reason")
        self._errors = self._make(
            Counter, "kforcing:request_errors", "Requests refused or failed, by status.", "status"
        )
        self._prompt = self._make(Counter, "vllm:prompt_tokens", "Tokens of prompts.")
        self._generated = self._make(Counter, "vllm:generation_tokens", "New tokens that were answered.")
        self._passes = self._make(Counter, "kforcing:passes", "Forward passes of texts, by model.", "model")
        self._drafts = self._make(Counter, "vllm:spec_decode_num_drafts", "Windows drafted in mode exact.")
        self._drafted = self._make(Counter, "vllm:spec_decode_num_draft_tokens", "Tokens drafted in mode exact.")
        self._accepted = self._make(Counter, "vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were kept.")
        self._accepted_at = self._make(
            Counter, "vllm:spec_decode_num_accepted_tokens_per_pos", "The same, by offset in the window.", "position"
        )
        timed: dict[str, Any] = {"buckets": _SECONDS}
        self._first = self._make(Histogram, "vllm:time_to_first_token_seconds", "Until the first new token.", **timed)
        self._whole = self._make(Histogram, "vllm:e2e_request_latency_seconds", "Until the last token.", **timed)
        self._queued = self._make(Histogram, "vllm:request_queue_time_seconds", "Until a slot was free.", **timed)
        timed = {"buckets": _PER_TOKEN}
        words = "Between tokens: the mean of what came at once."
        # The first is the older name of the second.
        names = "vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds"
        self._between = [self._make(Histogram, name, words, **timed) for name in names]
        self._per_token = self._make(
            Histogram, "vllm:request_time_per_output_token_seconds", "A text's mean time per token.", **timed
        )
        self._prompt_length = self._make(Histogram, "vllm:request_prompt_tokens", "Of a text.", buckets=_TOKENS)
        self._new_length = self._make(Histogram, "vllm:request_generation_tokens", "Of a text.", buckets=_TOKENS)
        self._per_pass = self._make(
            Histogram,
            "kforcing:tokens_per_pass",
            "Of a text: new tokens over passes, by mode.",
            "mode",
            buckets=_PER_PASS,
        )

    def watch(
        self, running: Callable[[], int], waiting: Callable[[], int], cached: Callable[[], float], slots: int
    ) -> None:
        """Adds what is true at the moment: texts with a slot, without, and the share of the caches in use."""
        gauges = {
            "vllm:num_requests_running": ("Texts that have a slot.", running),
            "vllm:num_requests_waiting": ("Texts that wait for a slot.", waiting),
            "vllm:kv_cache_usage_perc": ("Positions of the caches in use; 1 is all of them.", cached),
            "kforcing:slots": ("Texts that can run at a time.", lambda: slots),
        }
        for name, (words, value) in gauges.items():
            self._make(Gauge, name, words).set_function(value)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)

    def failed(self, status: int) -> None:
        """A request was refused, or failed, with a status of HTTP."""
        self._errors.labels(self._model, str(status)).inc()

    def began(self, times: Times, now: float) -> None:
        """A text has a slot, at `now` in seconds."""
        times.began = now
        self._queued.observe(now - times.asked)

    def progressed(self, times: Times, tokens: int, now: float) -> None:
        """A text has new tokens."""
        if times.first is None or times.last is None:
            times.first, times.at_first = now, tokens
            self._first.observe(now - times.asked)
        else:
            for histogram in self._between:
                histogram.observe((now - times.last) / tokens)
        times.last = now
        self._generated.inc(tokens)

    def ended(self, times: Times, choice: Choice, kept: tuple[int, ...], now: float) -> None:
        """A text has ended; `kept` as of its last `engine.Update`."""
        usage, mode = choice.usage, choice.wanted.request.mode
        self._success.labels(self._model, choice.reason).inc()
        self._prompt.inc(usage.prompt)
        self._prompt_length.observe(usage.prompt)
        self._new_length.observe(usage.completion)
        self._whole.observe(now - times.asked)
        later = usage.completion - times.at_first  # the time of those that came first is not known
        if later > 0 and times.first is not None and times.last is not None:
            self._per_token.observe((times.last - times.first) / later)
        if usage.completion and usage.passes:
            self._per_pass.labels(self._model, mode).observe(usage.completion / usage.passes)
        self._count_passes(usage.student_passes, usage.teacher_passes)
        if mode == "exact":
            self._count_drafts(kept, choice.wanted.request.k)

    def dropped(self, times: Times, choice: Choice) -> None:
        """A text was wanted no longer, or failed; what it had cost was spent."""
        self._success.labels(self._model, "abort").inc()
        if times.began is not None:
            self._prompt.inc(choice.usage.prompt)
            self._count_passes(choice.usage.student_passes, choice.usage.teacher_passes)

    def _count_passes(self, student, teacher):
        self._passes.labels(self._model, "student").inc(student)
        self._passes.labels(self._model, "teacher").inc(teacher)

    def _count_drafts(self, kept, k):
        """Draft j of a window was accepted where a pass kept more than j + 1 tokens."""
        drafts = (k or len(kept) - 1) - self._exact_in_one_pass
        self._drafts.inc(kept[0])
        self._drafted.inc(kept[0] * drafts)
        for position, accepted in enumerate(kept[1 : drafts + 1]):
            self._accepted.inc(accepted)
            self._accepted_at.labels(self._model, str(position)).inc(accepted)

    def _make(self, kind, name, words, *labels, **settings):
        metric = kind(name, words, ("model_name", *labels), registry=self._registry, **settings)
        return metric if labels else metric.labels(self._model)
