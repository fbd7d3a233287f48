"""What a running stage says: one JSON line per report in metrics.jsonl, one line on the terminal."""

import json
import logging
import math
import time
from pathlib import Path

import jax

from kforcing_jax.errors import RunError

_LOG = logging.getLogger("kforcing_jax")


class StageLog:
    """Averages metrics between reports, watches for NaN and knows how long the stage has left."""

    def __init__(self, path: Path, stage: str, steps: int, tokens_per_step: float, seconds_before: float = 0.0):
        self._path, self._stage, self._steps, self._tokens_per_step = path, stage, steps, tokens_per_step
        self._start = time.monotonic() - seconds_before
        self._last_report = time.monotonic()
        self._unread: tuple[int, dict] | None = None
        self._since_report: list[dict[str, float]] = []

    @property
    def seconds(self) -> float:
        """Seconds of this stage so far, those before an interruption included."""
        return time.monotonic() - self._start

    def add(self, step: int, metrics: dict):
        """Takes the metrics of a dispatched step, and checks those of the step before it.

        Reading one step late keeps the device busy: the next step is dispatched before the last one is read.

        Raises:
          RunError: the loss or the gradient is not finite; names stage and step.
        """
        self.check()
        self._unread = (step, metrics)

    def check(self):
        """Reads the metrics not read yet. Raises like `add`."""
        if self._unread is None:
            return
        step, metrics = self._unread
        values = {name: float(value) for name, value in metrics.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                field = f"stages.{self._stage.replace('-', '_')}.learning_rate"
                raise RunError(
                    f"stage {self._stage}, step {step}: {name} is {values[name]}; stopped, the last good checkpoint "
                    f"is kept. A lower {field} usually cures it"
                )
        self._unread = None
        self._since_report.append(values)

    def report(self, step: int):
        """Writes the averages since the last report."""
        self.check()
        now = time.monotonic()
        count = len(self._since_report)
        means = {name: sum(m[name] for m in self._since_report) / count for name in self._since_report[0]}
        per_second = count * self._tokens_per_step / (now - self._last_report)
        record = {"stage": self._stage, "step": step} | means
        record |= {"tokens_per_second": round(per_second, 1), "seconds": round(self.seconds, 2)}
        if jax.process_index() == 0:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        eta = (self._steps - step) * (now - self._last_report) / count
        _LOG.info(self._line(record, eta))
        self._since_report, self._last_report = [], now

    def _line(self, record, eta):
        agreement = [
            record[f"agreement_{j}"] for j in range(1, 1 + sum(key.startswith("agreement_") for key in record))
        ]
        shown = f"  agreement {' '.join(f'{a:.2f}' for a in agreement)}" if agreement else ""
        return (
            f"{self._stage:<11} step {record['step']:>6,}/{self._steps:,}  loss {record['loss']:.4f}{shown}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  ETA {clock(eta)}"
        )


def clock(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
