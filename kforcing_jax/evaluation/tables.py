"""A run's figures as tables for the terminal; report.py shows the same on a page.

What the summary does not hold yet is shown as "-".
"""

import dataclasses
import math
import re
import textwrap
from collections.abc import Callable

from kforcing_jax.training.progress import clock

_VS_AR = (
    "speed over AR's, so many requests at a time: median [quartiles] of rounds in which all stages take turns; "
    "unclear: the quartiles are further apart than the median is from 1"
)
WHY_LITTLE_GAIN = (
    "A student's pass carries 2k rows of every text (the k tokens before, k of noise), AR's carries one: nearly free "
    "where a pass waits for weights or for kernels to start; on a CPU a tiny model pays for each, and gains little."
)


@dataclasses.dataclass(frozen=True)
class Column:
    """One figure per stage: `show(stage)` gives its text."""

    name: str
    meaning: str
    show: Callable[[dict], str]
    to_the_left: bool = False  # so that offset j is below offset j
    needs: str = ""  # the column is left out when no stage has this key
    terminal: bool = True  # the page has room for all columns, a terminal has not


def is_number(value: object) -> bool:
    """Whether a value can be shown: measured, and finite."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number_text(value, digits):
    return f"{value:,.{digits}f}" if is_number(value) else "-"


def _short(value):
    """A fraction in few characters: .70."""
    return _number_text(value, 2).removeprefix("0")


def _number(name, key, digits, meaning, **settings):
    return Column(name, meaning, lambda stage: _number_text(stage.get(key), digits), **settings)


def _offsets(name, meaning):
    return Column(name, meaning, lambda stage: " ".join(map(_short, stage.get(name) or [])) or "-", to_the_left=True)


def _loss(name, meaning, of_ar):
    def show(stage):
        return _number_text(stage.get("validation_loss"), 3) if (stage["name"] == "ar") == of_ar else "-"

    return Column(name, meaning, show, terminal=False)


def _time(stage):
    return clock(stage["seconds"]) if is_number(stage.get("seconds")) else "-"


def _p_values(stage):
    tests = (stage.get(key) or {} for key in ("joint_g_test", "joint_g_test_null"))
    return ", ".join(_number_text(test.get("p_value"), 3) for test in tests)


def interval_text(figures: dict, key: str, digits: int) -> str:
    """A figure with its interval: 104.8 [98.1, 112.0]."""
    interval = figures.get(f"{key}_interval")
    ends = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return _number_text(figures.get(key), digits) + ends


def ratio_text(ratio: dict | None) -> str:
    """A ratio of times with its quartiles, and whether they are further apart than it is from 1."""
    if not ratio:
        return "-"
    unclear = ratio["high"] - ratio["low"] > abs(ratio["median"] - 1)
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]{' unclear' if unclear else ''}"


_QUALITY = (
    _number("steps", "steps", 0, "training steps", terminal=False),
    Column("time", "duration of the training", _time, terminal=False),
    _loss("loss on text", "validation loss of the AR teacher, nats per token", of_ar=True),
    _loss("loss vs teacher", "of a student, on the tokens of the teacher that it learns from", of_ar=False),
    _offsets("agreement", "per offset: how often the student's token is what the AR teacher draws from the same noise"),
    _offsets("chance", "per offset: how often two independent draws of the AR teacher are equal"),
    _number("block", "block_agreement", 2, "how often all offsets agree; 1 - block bounds a block's total variation"),
    _number("NLL", "sample_nll", 2, "of the samples under the AR teacher, nats per token"),
    _number("entropy", "sample_entropy", 2, "of the AR teacher there; low with low NLL is repetition, not quality"),
    _number("token H", "token_entropy", 2, "entropy of the tokens within a sample, nats", terminal=False),
    _number("distinct", "distinct_2", 2, "distinct bigrams over all bigrams of the samples"),
    _number("repeat", "repetition_4", 2, "share of a sample's 4-grams that repeat an earlier one"),
    Column(
        "Gen-PPL",
        "perplexity of the samples under the external scorer, and its 95 % interval over prompts",
        lambda stage: interval_text(stage.get("external") or {}, "gen_ppl", 1),
        needs="external",
    ),
    _number("TV", "joint_tv", 3, "total variation between blocks and the AR teacher's exact joint", needs="joint_tv"),
    _number("AR null", "joint_tv_null", 3, "TV of an AR sample of that size: no student is below", needs="joint_tv"),
    Column(
        "G-test",
        "p-values: the chance of such a G statistic, were the blocks the teacher's own; of the student, of the AR null",
        _p_values,
        needs="joint_g_test",
        terminal=False,
    ),
)


def quality_columns(stages: dict) -> list[Column]:
    """The columns that some stage has figures for."""
    return [c for c in _QUALITY if not c.needs or any(c.needs in stage for stage in stages.values())]


def speed_columns(stages: dict) -> list[Column]:
    """Of decoding: one column of ratios per number of requests. None before the first evaluation."""
    batches = speed_batches(stages)
    if not batches:
        return []

    return [
        _number("tokens/pass", "tokens_per_pass", 2, "tokens of the samples per forward pass"),
        _number("tokens/s", "tokens_per_second", 0, f"useful ones (up to EOS), {batches[-1]} requests at a time"),
        *(_ratio(versus(batch)) for batch in batches),
    ]


def _interval(name, key, meaning):
    return Column(name, meaning, lambda stage: interval_text(stage, key, 2), to_the_left=True)


# Of the rows of `stride_rows`.
STRIDE_COLUMNS = (
    _interval(
        "tokens/pass", "tokens_per_pass", "tokens of the samples per forward pass, and 95 % interval over prompts"
    ),
    _interval("NLL", "sample_nll", "of the samples under the AR teacher, nats per token"),
    _interval("entropy", "sample_entropy", "of the AR teacher there; take a row where both are near the teacher's own"),
)
STRIDES = (
    "c: tokens of a window are kept while the product of the student's own probabilities is at least c, the first one "
    "always; without c, all k are."
)


def stride_rows(stages: dict) -> dict[str, dict]:
    """Stages and confident strides by tokens per pass, by name: k4, k4 c=0.3. None before strides are measured."""
    confident = {
        f"{name} c={figures['confidence']:g}": figures
        for name, stage in stages.items()
        for figures in stage.get("confident") or []
        if figures["confidence"]  # at 0 it is the stage itself
    }
    if not confident:
        return {}
    measured = {name: stage for name, stage in stages.items() if is_number(stage.get("tokens_per_pass"))} | confident
    return dict(sorted(measured.items(), key=lambda item: item[1]["tokens_per_pass"]))


def _ratio(name):
    return Column(name, _VS_AR, lambda stage: ratio_text(stage.get(name)), to_the_left=True)


def speed_batches(stages: dict) -> list[str]:
    """The numbers of requests that decoding was timed with."""
    return sorted({batch for stage in stages.values() for batch in stage.get("speed", {})}, key=int)


def versus(batch: str) -> str:
    """What a stage's speed over AR's with so many requests at a time is called."""
    return f"vs AR, {batch}"


def table(summary: dict) -> str:
    """The stages of a run as plain-text tables with legends, within 120 columns at k <= 4.

    Args:
      summary: what summary.json holds. Keys may be missing and are shown as "-".
    """
    stages = stages_of(summary)
    quality = [column for column in quality_columns(stages) if column.terminal]
    origin = " - ".join(str(summary[key]) for key in ("device", "date") if summary.get(key))
    tau = [f"all sampled at {drawn_at(summary)}"] if is_number(summary.get("tau")) else []
    parts = ["\n".join(filter(None, [origin, *tau, _plain(stages, quality)]))]
    if speed_columns(stages):
        parts.append(f"{_plain(stages, speed_columns(stages))}\n{textwrap.fill(WHY_LITTLE_GAIN, 118)}")
    if rows := stride_rows(stages):
        parts.append(f"{_plain(rows, STRIDE_COLUMNS)}\n{textwrap.fill(STRIDES, 118)}")
    return "\n\n".join(parts)


def _plain(stages, columns):
    return "\n".join([*plain_rows(stages, columns), "", *plain_legend(columns)])


def plain_rows(rows: dict, columns: list[Column], first: str = "stage") -> list[str]:
    """The lines of a plain-text table: one row per entry, its name in the first column, which is called `first`."""
    texts = [[first, *(column.name for column in columns)], *table_rows(rows, columns)]
    return aligned(texts, [True, *(column.to_the_left for column in columns)])


def aligned(rows: list[list[str]], to_the_left: list[bool]) -> list[str]:
    """The lines of a plain-text table from its cells; the first row is its head."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(cells, widths, to_the_left, strict=True)
        ).rstrip()
        for cells in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def plain_legend(columns: list[Column]) -> list[str]:
    """The lines of `legend`."""
    return [textwrap.fill(f"{name:<11}  {text}", 118, subsequent_indent=" " * 13) for name, text in legend(columns)]


def legend(columns: list[Column]) -> list[tuple[str, str]]:
    """(names, meaning), each meaning once."""
    names: dict[str, str] = {}
    for column in columns:
        names.setdefault(column.meaning, column.name.split(",")[0])
    return [(name, meaning) for meaning, name in names.items()]


def drawn_at(summary: dict) -> str:
    """Temperature and truncation of the samples of a summary."""
    top_p = summary.get("top_p") or 1.0
    return f"tau = {summary.get('tau', 1.0):g}" + (f", top_p = {top_p:g}" if top_p < 1 else "")


def table_rows(stages: dict, columns: list[Column]) -> list[list[str]]:
    """One row of text per stage, its name first."""
    return [[name, *(column.show(stage) for column in columns)] for name, stage in stages.items()]


def stages_of(summary: dict) -> dict[str, dict]:
    """What summary.json holds of each stage in order, with its name, and its speeds over AR's by `versus`."""
    stages = in_order(summary.get("stages") or {})
    return {name: {"name": name} | (stage or {}) | _ratios(stage or {}) for name, stage in stages.items()}


def _ratios(stage):
    return {versus(batch): speed.get("vs_ar") for batch, speed in (stage.get("speed") or {}).items()}


def in_order(by_stage: dict) -> dict:
    """AR first, then students by window; at one window, the paper's recipe first."""
    return dict(sorted(by_stage.items(), key=lambda item: (item[0] != "ar", window_of(item[0]) or math.inf, item[0])))


def window_of(name: str) -> int | None:
    """The window in a stage's name; None for the AR teacher."""
    match = re.match(r"k(\d+)", name)
    return int(match[1]) if match else None
