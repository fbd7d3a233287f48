"""What a running stage says: one JSON line per report in metrics.jsonl, one line on the terminal."""

import json
import logging
import math
import time
from pathlib import Path

import jax

from kforcing_jax.data.whole_file import write_text
from kforcing_jax.errors import RunError

_LOG = logging.getLogger("kforcing_jax")


class StageLog:
    """Averages metrics between reports, watches for NaN and knows how long the stage has left.

    What metrics.jsonl says of later steps than `first`, the stage's last one so far, belongs to no model any more and
    is removed.
    """

    def __init__(
        self, path: Path, stage: str, first: int, steps: int, tokens_per_step: float, seconds_before: float = 0.0
    ):
        self._path, self._stage, self._steps, self._tokens_per_step = path, stage, steps, tokens_per_step
        self._start = time.monotonic() - seconds_before
        self._last_report = time.monotonic()
        self._on_device: list[tuple[int, dict]] = []
        self._since_report: list[dict[str, float]] = []
        _drop_later(path, stage, first)

    @property
    def seconds(self) -> float:
        """Seconds of this stage so far, those before an interruption included."""
        return time.monotonic() - self._start

    def add(self, step: int, metrics: dict):
        """Takes the metrics of a dispatched step. They are read with others, by `report` or `check`.

        Waits for the step before it, so that the device is kept busy, and is no more than two steps behind.
        """
        if self._on_device:
            jax.block_until_ready(self._on_device[-1][1])
        self._on_device.append((step, metrics))

    def check(self):
        """Reads the metrics not read yet.

        Raises:
          RunError: a loss or gradient is not finite; names stage and step.
        """
        for (step, _), metrics in zip(self._on_device, jax.device_get([m for _, m in self._on_device]), strict=True):
            for name in ("loss", "grad_norm"):
                if not math.isfinite(metrics[name]):
                    field = f"stages.{self._stage.replace('-', '_')}.learning_rate"
                    raise RunError(
                        f"stage {self._stage}, step {step}: {name} is {metrics[name]}; stopped, the last good "
                        f"checkpoint is kept. A lower {field} usually cures it"
                    )
            self._since_report.append({name: float(value) for name, value in metrics.items()})
        self._on_device = []

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
            _append(self._path, record)
        eta = (self._steps - step) * (now - self._last_report) / count
        _LOG.info(self._line(record, eta))
        self._since_report, self._last_report = [], now

    def _line(self, record, eta):
        agreement = [f"{value:.2f}" for key, value in record.items() if key.startswith("agreement_")]
        shown = f"  agreement {' '.join(agreement)}" if agreement else ""
        return (
            f"{self._stage:<11} step {record['step']:>6,}/{self._steps:,}  loss {record['loss']:.4f}{shown}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  ETA {clock(eta)}"
        )


def _append(path, record):
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


def _drop_later(path, stage, first):
    """Leaves what is said of other stages, and of this one up to `first`. A line that a kill cut short goes too."""
    if jax.process_index() or not path.exists():
        return

    def stays(line):
        try:
            record = json.loads(line)
            return record["stage"] != stage or record["step"] <= first
        except (ValueError, TypeError, KeyError):
            return False

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if not all(map(stays, lines)):
        write_text(path, "".join(filter(stays, lines)))


def clock(seconds: float) -> str:
    """h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
