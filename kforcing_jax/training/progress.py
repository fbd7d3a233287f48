"""What a running stage says: one JSON line per report in metrics.jsonl, one line on the terminal."""

import dataclasses
import datetime
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from kforcing_jax.data.whole_file import write_text
from kforcing_jax.errors import RunError
from kforcing_jax.training.spent import Spent
from kforcing_jax.training.trackers import Trackers

_LOG = logging.getLogger("kforcing_jax")
# Of a sample, on the terminal.
_LONGEST_SAMPLE = 90


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step of a stage is, besides its metrics.

    `tokens` are the useful ones of a step, of all processes; `flops` the operations that its arithmetic needs, on all
    devices, None where nobody has counted; `peak_teraflops` what one device could do, None where that is not known.
    """

    tokens: float
    flops: float | None = None
    devices: int = 1
    peak_teraflops: float | None = None
    learning_rate: Callable[[int], float] | None = None  # of step 0, 1, ...

    def rates(self, step: int, seconds: float) -> dict[str, float | None]:
        """Of steps that take so many seconds each, by the names in metrics.jsonl; `step` is the last of them."""
        teraflops = self.flops and self.flops / seconds / self.devices / 1e12
        return {
            "learning_rate": self.learning_rate and float(self.learning_rate(step - 1)),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "teraflops_per_device": teraflops and _rounded(teraflops),
            "peak_share": teraflops and self.peak_teraflops and _rounded(teraflops / self.peak_teraflops),
        }


class StageLog:
    """Averages metrics between reports, watches for NaN and knows how long the stage has left.

    What metrics.jsonl says of later steps than `first`, the stage's last one so far, belongs to no model any more and
    is removed. `spacings` are the steps between validations and between checkpoints, where there are any.
    """

    def __init__(
        self,
        path: Path,
        stage: str,
        first: int,
        steps: int,
        workload: Workload,
        spent: Spent,
        trackers: Trackers,
        spacings: Mapping[str, int] | None = None,
    ):
        self._path, self._stage, self._first, self._steps = path, stage, first, steps
        self._workload, self._spent, self._trackers = workload, spent, trackers
        self._spacings = spacings or {"validating": 1, "saving": 1}
        self._last_report = spent.here["stepping"]
        self._on_device: list[tuple[int, dict]] = []
        self._since_report: list[dict[str, float]] = []
        drop_later(path, stage, first)

    def add(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a dispatched step. They are read with others, by `report` or `check`.

        Waits for the step before it, so that the device is kept busy, and is no more than two steps behind.
        """
        if self._on_device:
            jax.block_until_ready(self._on_device[-1][1])
        self._on_device.append((step, metrics))

    def check(self) -> None:
        """Reads the metrics not read yet, and so waits for the last step.

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

    def report(self, step: int, validation: dict) -> None:
        """Writes the averages since the last report, and what a validation at this step has found, {} without one.

        Raises:
          RunError: as `check`, or metrics.jsonl cannot be written.
        """
        self.check()
        stepping, count = self._spent.here["stepping"], len(self._since_report)
        means = {name: sum(m[name] for m in self._since_report) / count for name in self._since_report[0]}
        each = (stepping - self._last_report) / count
        record = {"stage": self._stage, "step": step, "time": _now()} | means | self._workload.rates(step, each)
        record |= self._seconds() | validation
        record = {name: _finite(value) for name, value in record.items()}
        if jax.process_index() == 0:
            _append(self._path, record)
            self._trackers.write(self._stage, step, record)
        self._since_report, self._last_report = [], stepping
        _LOG.info(self._line(record, self._eta(step, each)))
        if validation:
            self._say_validation(step, validation)

    def _seconds(self):
        """All of them, and by part."""
        parts = self._spent.parts
        by_part = {f"seconds_{part}": round(seconds, 2) for part, seconds in parts.items()}
        return {"seconds": round(sum(parts.values()), 2)} | by_part

    def _eta(self, step, each):
        """Seconds to the last step: steps as the last ones, saving and validating as often and as long as so far."""
        here, done = self._spent.here, step - self._first
        # One validation right after a restart is not one for every step.
        beside = sum(here[part] / max(done, spacing) for part, spacing in self._spacings.items())
        return (self._steps - step) * (each + beside)

    def _line(self, record, eta):
        share = record["peak_share"]
        shown_share = "" if share is None else f"  {share:.0%} of peak"
        return (
            f"{self._stage:<11} step {record['step']:>6,}/{self._steps:,}  loss {record['loss']:.4f}"
            f"{_agreements(record, 'agreement_')}  {record['tokens_per_second']:,.0f} tokens/s{shown_share}  "
            f"ETA {clock(eta)}"
        )

    def _say_validation(self, step, validation):
        loss, block = validation["validation_loss"], validation.get("validation_block_agreement")
        if not math.isfinite(loss):
            _LOG.warning(f"{self._stage:<11} validation loss at step {step:,} is {loss}; training goes on")
        else:
            shown_block = "" if block is None else f"  block {block:.2f}"
            agreements = _agreements(validation, "validation_agreement_", " with ar")
            _LOG.info(f"{self._stage:<11} validation loss {loss:.4f}{agreements}{shown_block}")
        if "sample" in validation:
            _LOG.info(f"{self._stage:<11} sample: {shortened(validation['sample'], _LONGEST_SAMPLE)}")


def _agreements(record, prefix, whose=""):
    values = ["-" if value is None else f"{value:.2f}" for key, value in record.items() if key.startswith(prefix)]
    return f"  agreement{whose} {' '.join(values)}" if values else ""


def shortened(text: str, longest: int) -> str:
    """On one line, white space as single spaces; cut with an ellipsis where it has more characters than `longest`."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _rounded(value):
    """To four digits that count."""
    return float(f"{value:.4g}")


def _finite(value):
    """JSON has no NaN: null stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _append(path, record):
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


def drop_later(path: Path, stage: str, first: int) -> None:
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
