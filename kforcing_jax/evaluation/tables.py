"""A run's figures as a table, and its samples aligned, for the terminal; report.py shows the same on a page.

What the summary does not hold yet is shown as "-".
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

from kforcing_jax.training.progress import clock

# Characters of a sample on one line, next to its label.
_SAMPLE_WIDTH = 96


@dataclasses.dataclass(frozen=True)
class _Column:
    """One figure per stage: `show(stage, ar)` gives its text."""

    name: str
    meaning: str
    show: Callable[[dict, dict], str]
    per_offset: bool = False  # aligned to the left, so that offset j is below offset j
    needs: str = ""  # the column is left out when no stage has this key
    terminal: bool = True  # the page has room for all columns, a terminal has not


def _value(key, digits):
    return lambda stage, ar: f"{stage[key]:,.{digits}f}" if is_number(stage.get(key)) else "-"


def is_number(value) -> bool:
    """Whether a value can be shown: measured, and finite."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _short(value):
    """A fraction in few characters: .70."""
    return f"{value:.2f}".removeprefix("0") if is_number(value) else "-"


def _per_offset(key):
    return lambda stage, ar: " ".join(map(_short, stage.get(key) or [])) or "-"


def _time(stage, ar):
    return clock(stage["seconds"]) if is_number(stage.get("seconds")) else "-"


def _speed_up(stage, ar):
    own, teacher = stage.get("tokens_per_second"), ar.get("tokens_per_second")
    return f"{own / teacher:.2f}x" if is_number(own) and is_number(teacher) and teacher > 0 else "-"


def gen_ppl_text(figures: dict) -> str:
    """A perplexity with its interval: 104.8 [98.1, 112.0]."""
    if not is_number(figures.get("gen_ppl")):
        return "-"
    interval = figures.get("gen_ppl_interval")
    return f"{figures['gen_ppl']:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def _p_value(key):
    return lambda stage, ar: _value("p_value", 3)(stage.get(key) or {}, ar)


_COLUMNS = (
    _Column("steps", "training steps", _value("steps", 0), terminal=False),
    _Column("time", "duration of the training", _time, terminal=False),
    _Column("loss", "validation loss, nats per token", _value("validation_loss", 3), terminal=False),
    _Column(
        "agreement",
        "per offset: how often the student's token is the one that the AR teacher draws from the same noise",
        _per_offset("agreement"),
        per_offset=True,
    ),
    _Column(
        "chance",
        "per offset: how often two independent draws of the AR teacher are equal",
        _per_offset("chance"),
        per_offset=True,
    ),
    _Column(
        "block",
        "how often all offsets of a window agree; 1 - block bounds its total variation from above",
        lambda stage, ar: _short(stage.get("block_agreement")),
    ),
    _Column("NLL", "of the samples under the AR teacher, nats per token", _value("sample_nll", 2)),
    _Column(
        "entropy",
        "of the AR teacher along the samples, nats per token; low NLL with low entropy is repetition, not quality",
        _value("sample_entropy", 2),
    ),
    _Column("token H", "entropy of the tokens within a sample, nats", _value("token_entropy", 2), terminal=False),
    _Column("distinct", "distinct bigrams over all bigrams of the samples", _value("distinct_2", 2)),
    _Column("repeat", "share of a sample's 4-grams that repeat an earlier one", _value("repetition_4", 2)),
    _Column(
        "Gen-PPL",
        "perplexity of the samples under the external scorer, and its 95 % interval over prompts",
        lambda stage, ar: gen_ppl_text(stage.get("external") or {}),
        needs="external",
    ),
    _Column("tokens/s", "useful tokens (up to EOS) per second of the compiled decoder", _value("tokens_per_second", 0)),
    _Column("vs AR", "tokens per second over those of the AR teacher", _speed_up),
    _Column(
        "TV",
        "total variation between the blocks' distribution and the AR teacher's exact joint",
        _value("joint_tv", 3),
        needs="joint_tv",
    ),
    _Column(
        "AR null",
        "TV of an AR sample of the same size; no student can be expected below it",
        _value("joint_tv_null", 3),
        needs="joint_tv",
    ),
    _Column(
        "G-test",
        "p-value: the chance of a G statistic this large, were the blocks the teacher's own",
        _p_value("joint_g_test"),
        needs="joint_g_test",
        terminal=False,
    ),
    _Column(
        "null G-test",
        "the same for the AR sample",
        _p_value("joint_g_test_null"),
        needs="joint_g_test",
        terminal=False,
    ),
)


def table(summary: dict) -> str:
    """The stages of a run as a plain-text table with a legend, within 120 columns at k <= 4.

    Args:
      summary: what summary.json holds. Keys may be missing and are shown as "-".
    """
    stages = stages_of(summary)
    columns = [column for column in columns_for(stages) if column.terminal]
    rows = [["stage", *(column.name for column in columns)], *table_rows(stages, columns)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    to_the_left = [True, *(column.per_offset for column in columns)]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(cells, widths, to_the_left, strict=True)
        ).rstrip()
        for cells in rows
    ]
    rule = "  ".join("-" * width for width in widths)
    legend = [f"{column.name:<9}  {column.meaning}" for column in columns]
    return "\n".join([*origin(summary), lines[0], rule, *lines[1:], "", *legend])


def figures_text(figures: dict) -> str:
    """The figures of a released checkpoint, a line each, with their intervals where they have one."""
    flat = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    for group in ("throughput", "external"):
        flat |= {f"{group}.{name}": value for name, value in figures.get(group, {}).items()}
    names = [name for name in flat if not name.endswith("_interval")]
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {_figure(flat[name], flat.get(f'{name}_interval'))}" for name in names)


def _figure(value, interval) -> str:
    if isinstance(value, list):
        return " ".join(map(_short, value))
    text = f"{value:,.4g}" if isinstance(value, float) else str(value if value is not None else "-")
    return text + (f"  [{interval[0]:,.4g}, {interval[1]:,.4g}]" if interval else "")


def samples_text(summary: dict) -> str:
    """The continuations of each prompt under the same noise, below each other, character under character.

    Long ones are wrapped in blocks of all stages. Line breaks, and whatever else would move a terminal's cursor, are
    shown as one visible character. Scripts whose characters are wider than one column do not align.
    """
    return "\n\n".join(_sample_text(sample) for sample in summary.get("samples") or [])


def stages_of(summary) -> dict[str, dict]:
    """What summary.json holds of each stage, in order."""
    return in_order(summary.get("stages") or {})


def in_order(by_stage: dict) -> dict:
    """AR first, then students by window."""
    return {name: by_stage[name] or {} for name in sorted(by_stage, key=_place)}


def _place(name):
    """A sort key: AR first, then students by window; at one window, the paper's recipe first."""
    return name != "ar", window_of(name) or math.inf, name


def window_of(name: str) -> int | None:
    """The window in a stage's name; None for the AR teacher."""
    match = re.match(r"k(\d+)", name)
    return int(match[1]) if match else None


def columns_for(stages) -> list[_Column]:
    """The columns that some stage has figures for."""
    return [c for c in _COLUMNS if not c.needs or any(c.needs in stage for stage in stages.values())]


def table_rows(stages, columns):
    """One row of text per stage, its name first."""
    ar = stages.get("ar", {})
    return [[name, *(column.show(stage, ar) for column in columns)] for name, stage in stages.items()]


def origin(summary) -> list[str]:
    """One line with device and date, without which figures mean nothing; none when they are not known."""
    known = [str(summary[key]) for key in ("device", "date") if summary.get(key)]
    return [" - ".join(known)] if known else []


def _sample_text(sample):
    width = label_width(sample)
    blocks = [
        "\n".join(f"{label:<{width}}  {chunk}".rstrip() for label, _, chunk in block) for block in sample_blocks(sample)
    ]
    return "\n\n".join([f"One prompt, one noise (seed {sample.get('seed', '-')}):", *blocks])


def sample_blocks(sample) -> Iterator[list[tuple[str, int, str]]]:
    """Blocks of lines (label, start, characters): those of the prompt, then those of all stages together."""
    for group in ({"prompt": _one_line(sample.get("prompt") or "")}, continuations(sample)):
        for start in range(0, max(map(len, group.values()), default=0), _SAMPLE_WIDTH):
            yield [(name, start, text[start : start + _SAMPLE_WIDTH]) for name, text in group.items()]


def continuations(sample) -> dict[str, str]:
    """The continuations by stage, in order, each as one visible line."""
    texts = sample.get("continuations") or {}
    return {name: _one_line(texts[name] or "") for name in sorted(texts, key=_place)}


def label_width(sample) -> int:
    """Width of the column of stage names."""
    return max(map(len, ["prompt", *continuations(sample)]))


def _one_line(text):
    """Character for character, visible: text can hold line breaks, and escape sequences that terminals obey."""
    visible = text.replace("\n", "⏎").replace("\t", " ")
    return "".join(character if character.isprintable() else "·" for character in visible)
