"""Compared runs as tables: what the page shows, and the same as text for a terminal."""

import collections
import dataclasses
import textwrap
from collections.abc import Sequence

from kforcing_jax.evaluation.comparison import (
    HELD,
    Run,
    differing_settings,
    figures,
    progress,
    remarks,
    stages_of_some,
    verdicts,
)
from kforcing_jax.evaluation.tables import (
    STRIDE_COLUMNS,
    STRIDES,
    Column,
    aligned,
    interval_text,
    is_number,
    plain_legend,
    plain_rows,
    quality_columns,
    speed_columns,
    stride_rows,
)
from kforcing_jax.training.progress import clock

_MARKS = {"above": "▲", "below": "▼", "overlaps": "≈"}
MARKS = (
    "[low, high]: 95 % over prompts, of block over validation rows. Beside the first run's interval: ▲ above it, ▼ "
    "below it, ≈ they overlap, and the runs may or may not differ. No mark: not to be compared, or no interval."
)
_DIGITS = {"block_agreement": 3, "sample_nll": 2, "sample_entropy": 2}
# Columns of a terminal.
_WIDTH = 120
_TERMINAL = ("steps", "agreement", "block", "NLL", "entropy", "tokens/pass")


def stage_rows(runs: Sequence[Run], stage: str) -> dict[str, dict]:
    """The figures of a stage by run, each with its `marks` beside the first run's: what `stage_columns` show."""
    marks = verdicts(runs, stage)
    return {name: row | {"marks": marks.get(name, {})} for name, row in figures(runs)[stage].items()}


def stage_columns(rows: dict[str, dict]) -> list[Column]:
    """The columns that some run has figures for, those that are held against the first run's with mark and interval."""
    held = dict(zip(("block", "NLL", "entropy"), HELD, strict=True))
    quality = [
        _marked(column, held[column.name]) if column.name in held else column for column in quality_columns(rows)
    ]
    speed = [STRIDE_COLUMNS[0] if column.name == "tokens/pass" else column for column in speed_columns(rows)]
    columns = quality + (speed or [STRIDE_COLUMNS[0]])
    return [column for column in columns if any(column.show(row) != "-" for row in rows.values())]


def all_stride_rows(runs: Sequence[Run]) -> dict[str, dict]:
    """The rows of `stride_rows` of all runs, each named by its run first."""
    return {f"{run.name}: {name}": row for run in runs for name, row in stride_rows(run.stages).items()}


def settings_table(runs: Sequence[Run]) -> list[list[str]]:
    """Head and rows: every setting that differs, and its value in each run."""
    rows = [[name, *map(setting_text, values)] for name, values in differing_settings(runs).items()]
    return [["setting", *(run.name for run in runs)], *rows] if rows else []


def setting_text(value: object) -> str:
    """The value of a field as a flag would have it; "-" where a run has no such stage."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(setting_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def stages_text(runs: Sequence[Run]) -> list[str]:
    """A sentence for every stage that not all runs have."""
    return [f"{stage} is in {', '.join(having)} alone." for stage, having in stages_of_some(runs).items()]


def runs_table(runs: Sequence[Run]) -> list[list[str]]:
    """Head and rows: where each run is, how far, how long it took, and where its figures come from."""
    return [["run", "steps", "training", "evaluated", "directory"], *map(_run_row, runs)]


def comparison_text(runs: Sequence[Run]) -> str:
    """All of it but the curves, for a terminal."""
    found = figures(runs)
    narrow = [[*row[:3], row[-1]] for row in runs_table(runs)]
    parts = ["\n".join(aligned(narrow, [True] * 4))]
    parts += ["\n".join(_wrapped(remark) for remark in remarks(runs))]
    parts += ["\n".join(_settings_text(runs) + stages_text(runs))]
    shown = [_stage_text(runs, stage) for stage in found]
    parts += shown
    if strides := all_stride_rows(runs):
        parts.append("\n".join([*plain_rows(strides, list(STRIDE_COLUMNS), "stride"), textwrap.fill(STRIDES, 118)]))
    if shown:
        columns = {c.name: c for stage in reversed(found) for c in _terminal_columns(stage_rows(runs, stage))}
        parts.append("\n".join([textwrap.fill(MARKS, 118), *plain_legend(list(columns.values()))]))
    return "\n\n".join(filter(None, parts))


def _settings_text(runs):
    """A table, or where it would be too wide, who has which value."""
    rows = settings_table(runs)
    if not rows:
        return ["No settings differ."]
    lines = aligned(rows, [True] * (len(runs) + 1))
    if max(map(len, lines)) <= _WIDTH:
        return lines
    return [_by_value(name, values, rows[0][1:]) for name, *values in rows[1:]]


def _by_value(setting, values, names):
    having = collections.defaultdict(list)
    for name, value in zip(names, values, strict=True):
        having[value].append(name)
    told = ["", *(f"  {value}: {', '.join(names)}" for value, names in having.items())]
    return setting + "\n".join(textwrap.fill(line, _WIDTH, subsequent_indent="    ") for line in told)


def _stage_text(runs, stage):
    rows = stage_rows(runs, stage)
    return "\n".join(plain_rows(rows, _terminal_columns(rows), stage))


def _terminal_columns(rows):
    return [column for column in stage_columns(rows) if column.name in _TERMINAL]


def _marked(column, key):
    def show(row):
        mark = _MARKS.get(row["marks"].get(key))
        return interval_text(row, key, _DIGITS[key]) + (f" {mark}" if mark else "")

    return dataclasses.replace(column, show=show, to_the_left=True)


def _run_row(run):
    steps = ", ".join(f"{stage} {text}" for stage, text in progress(run).items())
    said = (
        (run.history.get(name) or [{}])[-1].get("seconds", run.stages.get(name, {}).get("seconds"))
        for name in run.config.stages
    )
    seconds = sum(value for value in said if is_number(value))
    where = [str(run.summary[key]) for key in ("date", "device") if run.summary.get(key)]
    return [run.name, steps, clock(seconds), ", ".join(where) or "-", str(run.path)]


def _wrapped(remark):
    return textwrap.fill(f"{'Warning: ' if remark.is_warning else ''}{remark.text}", 118, break_long_words=False)
