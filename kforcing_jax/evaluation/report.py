"""What a run shows for itself: a table and samples for the terminal, and report.html.

Everything comes from the JSON files of the run directory; what is not there yet is shown as "-" or left out.
"""

import collections
import dataclasses
import html
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kforcing_jax.training.progress import clock

# Characters of a sample on one line, next to its label.
_SAMPLE_WIDTH = 96
# Points of a plotted line; longer histories are averaged down to this many.
_MOST_POINTS = 250

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BLUE, _ORANGE, _GREY = _PALETTE[0], _PALETTE[1], "#555555"


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
    return lambda stage, ar: f"{stage[key]:,.{digits}f}" if _is_number(stage.get(key)) else "-"


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def _short(value):
    """A fraction in few characters: .70."""
    return f"{value:.2f}".removeprefix("0") if _is_number(value) else "-"


def _per_offset(key):
    return lambda stage, ar: " ".join(map(_short, stage.get(key) or [])) or "-"


def _time(stage, ar):
    return clock(stage["seconds"]) if _is_number(stage.get("seconds")) else "-"


def _speed_up(stage, ar):
    own, teacher = stage.get("tokens_per_second"), ar.get("tokens_per_second")
    return f"{own / teacher:.2f}x" if _is_number(own) and _is_number(teacher) and teacher > 0 else "-"


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
    stages = _stages(summary)
    columns = [column for column in _columns(stages) if column.terminal]
    rows = [["stage", *(column.name for column in columns)], *_cells(stages, columns)]
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
    return "\n".join([*_origin(summary), lines[0], rule, *lines[1:], "", *legend])


def samples_text(summary: dict) -> str:
    """The continuations of each prompt under the same noise, below each other, character under character.

    Long ones are wrapped in blocks of all stages. Line breaks, and whatever else would move a terminal's cursor, are
    shown as one visible character. Scripts whose characters are wider than one column do not align.
    """
    return "\n\n".join(_sample_text(sample) for sample in summary.get("samples") or [])


def write_report(workdir: Path) -> Path:
    """Writes report.html, one page that needs nothing but itself, from the JSON files of a run directory.

    What the run has not produced yet is left out. The page is written whole or not at all.

    Returns:
      The path of the page.
    """
    workdir = Path(workdir)
    summary = _read_json(workdir / "summary.json")
    history = _read_metrics(workdir / "metrics.jsonl")
    stages = _stages(summary)
    sections = [
        _results_section(stages),
        _samples_section(summary.get("samples") or []),
        _quality_section(stages),
        _joint_section(stages),
        _training_section(history, stages),
        _config_section(_read_json(workdir / "config.json")),
    ]
    page = _PAGE.format(
        title=html.escape(f"K-Forcing run {workdir.resolve().name}"),
        origin="".join(f"<p>{html.escape(line)}</p>" for line in _origin(summary)),
        style=_STYLE,
        sections="\n".join(filter(None, sections)),
    )
    temporary = workdir / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, workdir / "report.html")
    return workdir / "report.html"


def _stages(summary) -> dict[str, dict]:
    return _in_order(summary.get("stages") or {})


def _in_order(by_stage):
    return {name: by_stage[name] or {} for name in sorted(by_stage, key=_place)}


def _place(name):
    """A sort key: AR first, then students by window; at one window, the paper's recipe first."""
    return name != "ar", _window(name) or math.inf, name


def _window(name):
    match = re.match(r"k(\d+)", name)
    return int(match[1]) if match else None


def _columns(stages):
    return [c for c in _COLUMNS if not c.needs or any(c.needs in stage for stage in stages.values())]


def _cells(stages, columns):
    """One row of text per stage, its name first."""
    ar = stages.get("ar", {})
    return [[name, *(column.show(stage, ar) for column in columns)] for name, stage in stages.items()]


def _origin(summary):
    """One line with device and date, without which figures mean nothing; none when they are not known."""
    known = [str(summary[key]) for key in ("device", "date") if summary.get(key)]
    return [" - ".join(known)] if known else []


def _sample_text(sample):
    width = _label_width(sample)
    blocks = [
        "\n".join(f"{label:<{width}}  {chunk}".rstrip() for label, _, chunk in block)
        for block in _sample_blocks(sample)
    ]
    return "\n\n".join([f"One prompt, one noise (seed {sample.get('seed', '-')}):", *blocks])


def _sample_blocks(sample) -> Iterator[list[tuple[str, int, str]]]:
    """Blocks of lines (label, start, characters): those of the prompt, then those of all stages together."""
    for group in ({"prompt": _one_line(sample.get("prompt") or "")}, _continuations(sample)):
        for start in range(0, max(map(len, group.values()), default=0), _SAMPLE_WIDTH):
            yield [(name, start, text[start : start + _SAMPLE_WIDTH]) for name, text in group.items()]


def _continuations(sample):
    texts = sample.get("continuations") or {}
    return {name: _one_line(texts[name] or "") for name in sorted(texts, key=_place)}


def _label_width(sample):
    return max(map(len, ["prompt", *_continuations(sample)]))


def _one_line(text):
    """Character for character, visible: text can hold line breaks, and escape sequences that terminals obey."""
    visible = text.replace("\n", "⏎").replace("\t", " ")
    return "".join(character if character.isprintable() else "·" for character in visible)


def _read_json(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read_metrics(path) -> dict[str, list[dict]]:
    """The records of each stage, in the order of their steps.

    A run that resumes from a checkpoint reports steps again; the records that it had after that checkpoint belong to
    no model any more. A line that a kill cut short is not JSON and is skipped.
    """
    history = collections.defaultdict(list)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            stage, step = str(record["stage"]), int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        while history[stage] and history[stage][-1]["step"] >= step:
            history[stage].pop()
        history[stage].append(record)
    return _in_order(history)


def _results_section(stages):
    if not stages:
        return _section("Results", "<p>No stage has ended yet.</p>")
    columns = _columns(stages)
    sides = [' class="left"' if column.per_offset else "" for column in columns]
    head = "".join(
        f'<th scope="col"{side}>{html.escape(column.name)}</th>' for column, side in zip(columns, sides, strict=True)
    )
    rows = [
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td{side}>{html.escape(cell)}</td>" for cell, side in zip(cells, sides, strict=True))
        + "</tr>"
        for name, *cells in _cells(stages, columns)
    ]
    legend = "".join(f"<div><dt>{html.escape(c.name)}</dt><dd>{html.escape(c.meaning)}</dd></div>" for c in columns)
    return _section(
        "Results",
        f'<div class="wide"><table>\n<thead><tr><th scope="col">stage</th>{head}</tr></thead>',
        "<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>",
        f"<dl>{legend}</dl>",
    )


def _samples_section(samples):
    if not samples:
        return ""
    return _section(
        "Samples",
        "<p>One prompt, continued by every stage from the same noise. <mark>Marked</mark> characters differ from the "
        "AR teacher's at the same place.</p>",
        *map(_sample_html, samples),
    )


def _sample_html(sample):
    width, teacher = _label_width(sample), _continuations(sample).get("ar")
    blocks = [
        "\n".join(
            f"<b>{html.escape(label)}</b>{' ' * (width - len(label))}  "
            + (_marked(chunk, teacher[start:]) if teacher is not None and label != "prompt" else _escape(chunk))
            for label, start, chunk in block
        )
        for block in _sample_blocks(sample)
    ]
    seed = html.escape(str(sample.get("seed", "-")))
    return f'<p class="note">Seed {seed}</p>\n<pre class="wide">' + "\n\n".join(blocks) + "</pre>"


def _marked(chunk, reference):
    """Escaped text in which the runs of characters that differ from the reference are marked."""
    differs = [character != reference[i : i + 1] for i, character in enumerate(chunk)]
    runs = itertools.groupby(zip(differs, chunk, strict=True), key=lambda pair: pair[0])
    texts = [(marked, _escape("".join(character for _, character in run))) for marked, run in runs]
    return "".join(f"<mark>{text}</mark>" if marked else text for marked, text in texts)


def _escape(text):
    """Escaped; the line break's sign, which many monospace fonts lack, gets an element that holds it to one column."""
    return html.escape(text).replace("⏎", "<i>⏎</i>")


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of a plot, named at its right end."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashes: str = "-"  # matplotlib's; "" draws markers alone
    marker: str = ""
    face: str | None = None  # of the markers; the line's colour by default


def _quality_section(stages):
    """What more tokens per pass cost in quality, and what they give in speed."""
    quality = [
        *_over_passes(stages, "sample_nll", "NLL", _BLUE, "AR NLL"),
        *_over_passes(stages, "sample_entropy", "entropy", _ORANGE, "AR entropy", "--"),
    ]
    fidelity = [
        *_over_passes(stages, "agreement", "mean", _BLUE),
        *_over_passes(stages, "block_agreement", "block", _ORANGE),
        *_over_passes(stages, "chance", "chance", _GREY, dashes="--"),
    ]
    speed = _over_passes(stages, "tokens_per_second", "students", _BLUE, "AR")
    panels = [
        _panel("quality", "Samples under the AR teacher", "nats per token", quality, passes=True),
        _panel("fidelity", "Agreement with the AR teacher", "share of tokens or blocks", fidelity, (0, 1), passes=True),
        _panel("speed", "Decoding", "useful tokens per second", speed, (0, None), passes=True),
    ]
    hollow = " Hollow: distilled from the AR teacher itself." if any(map(_is_from_ar, stages)) else ""
    note = f"Filled: each student distilled from the one before it.{hollow} Dotted: the AR teacher, at 1."
    return _panels("Quality and speed over tokens per pass", note, panels)


def _joint_section(stages):
    """The distribution itself, for teachers whose joint can be enumerated."""
    lines = [
        *_over_passes(stages, "joint_tv", "students", _BLUE),
        *_over_passes(stages, "joint_tv_null", "AR null", _GREY, dashes="--"),
    ]
    panels = [_panel("joint", "Distance to the exact joint", "total variation", lines, (0, None), passes=True)]
    note = "AR null: a sample of the same size from the teacher's joint. A perfect student lies on it."
    return _panels("Joint distribution of blocks", note, panels)


def _training_section(history, stages):
    """Loss and agreement over the steps of every stage."""
    losses = [_panel(f"loss-{name}", name, "loss, nats", _loss_lines(records)) for name, records in history.items()]
    agreements = [
        _panel(f"agreement-{name}", name, "agreement", _agreement_lines(records, stages.get(name, {})), (0, 1))
        for name, records in history.items()
    ]
    loss_note = "On training batches: of the AR teacher on text, of each student on its teacher's tokens."
    note = (
        "On training batches: how often the student's token is the one of the teacher that it learns from. "
        "Chance is that of two independent draws of the AR teacher."
    )
    return _panels("Training loss", loss_note, losses) + _panels("Training agreement", note, agreements)


def _over_passes(stages, key, label, colour, ar_label="", dashes="-"):
    """A measure of the students over their window, and the AR teacher's as a level."""
    points = [(name, (_window(name), _mean(stage.get(key)))) for name, stage in stages.items() if _window(name)]
    chain = [point for name, point in points if not _is_from_ar(name)]
    from_ar = [point for name, point in points if _is_from_ar(name)]
    level = _mean(stages.get("ar", {}).get(key))
    widest = max((window for _, (window, _) in points), default=1)
    return [
        _Line(ar_label, [(1, level), (widest, level)], colour, ":"),
        _Line(label, chain, colour, dashes, "o"),
        _Line("" if chain else label, from_ar, colour, "", "o", "white"),
    ]


def _is_from_ar(name):
    return name.endswith("-from-ar")


def _mean(values):
    """Of a list, or of one value; NaN when there is nothing to average."""
    numbers = [v for v in (values if isinstance(values, list) else [values]) if _is_number(v)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _loss_lines(records):
    offsets = _offset_lines(records, "loss")
    return offsets or [_Line("", _over_steps(records, "loss"), _BLUE)]


def _agreement_lines(records, stage):
    offsets = _offset_lines(records, "agreement")
    if not offsets:
        return []
    block = _Line("block", _over_steps(records, "block_agreement"), "black", "--")
    ends = records[0]["step"], records[-1]["step"]
    chance = _Line("chance", [(step, _mean(stage.get("chance"))) for step in ends], _GREY, ":")
    return [*offsets, *([block] if len(offsets) > 1 else []), chance]


def _offset_lines(records, measure):
    """One line per offset of the window; none for the AR teacher."""
    count = sum(re.fullmatch(rf"{measure}_\d+", key) is not None for key in records[0])
    return [
        _Line(f"offset {j}", _over_steps(records, f"{measure}_{j}"), _PALETTE[(j - 1) % len(_PALETTE)])
        for j in range(1, count + 1)
    ]


def _over_steps(records, key):
    """Points (step, value), averaged in equal groups when there are too many to see."""
    points = [(record["step"], record[key]) for record in records if _is_number(record.get(key))]
    size = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups]


def _panel(name, title, y_label, lines, y_limits=(None, None), *, passes=False) -> str:
    """One plot as an HTML figure with inline SVG, over steps or over tokens per pass; "" when it would be empty.

    Args:
      name: what sets the ids of this plot apart from those of all others on the page.
    """
    lines = [dataclasses.replace(line, points=[p for p in line.points if _is_number(p[1])]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_PLOT_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(4.0, 2.7))
        axes = figure.add_axes((0.135, 0.16, 0.635, 0.73))
        _draw(axes, lines, y_limits, y_label)
        (_scale_passes if passes else _scale_steps)(axes, lines)
        _label_ends(axes, lines)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True)
    title = html.escape(title)
    svg = _inline_svg(drawn.getvalue(), name, f"{title}: {html.escape(y_label)}")
    return f"<figure><figcaption>{title}</figcaption>\n{svg}</figure>"


def _draw(axes, lines, y_limits, y_label):
    for line in lines:
        style = dict(color=line.colour, linestyle=line.dashes or "none", markerfacecolor=line.face or line.colour)
        axes.plot(*zip(*line.points, strict=True), marker=line.marker, **style)
    if y_limits != (None, None):
        axes.set_ylim(*y_limits)
    axes.set_title(y_label, loc="left")
    axes.locator_params(axis="y", nbins=5)


def _scale_steps(axes, lines):
    axes.margins(x=0)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlabel("step")


def _scale_passes(axes, lines):
    """Windows double, so they are equally far apart."""
    windows = sorted({x for line in lines for x, _ in line.points})
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(windows, [f"{window:g}" for window in windows])
    axes.set_xlim(windows[0] / 1.15, windows[-1] * 1.15)
    axes.set_xlabel("tokens per pass")


def _label_ends(axes, lines, gap=0.085):
    """Names the lines at the right border, at their last values or as near as the other names allow."""
    bottom, top = axes.get_ylim()
    named = sorted((line for line in lines if line.label), key=lambda line: line.points[-1][1])
    heights, least = [], 0.0
    for line in named:
        heights.append(max(least, (line.points[-1][1] - bottom) / (top - bottom)))
        least = heights[-1] + gap
    most = 1.0
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], most)
        most = heights[index] - gap
    for line, height in zip(named, heights, strict=True):
        axes.text(1.03, height, line.label, transform=axes.transAxes, va="center", color=_darker(line.colour))


def _darker(colour):
    """Lines may be light, text has to be read."""
    from matplotlib.colors import to_rgb

    return tuple(0.72 * channel for channel in to_rgb(colour))


def _inline_svg(svg, name, title) -> str:
    """An SVG file as an element of a page: ids made unique, a title for screen readers, styles left to the page."""
    body = re.search(r"<svg[^>]*>(.*)</svg>", svg, re.DOTALL)[1]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    view = re.search(r'viewBox="[^"]*"', svg)[0]
    return f'<svg {view} role="img" aria-labelledby="{name}-title"><title id="{name}-title">{title}</title>{body}</svg>'


def _panels(heading, note, panels):
    panels = [panel for panel in panels if panel]
    if not panels:
        return ""
    return _section(heading, f"<p>{note}</p>", '<div class="panels">', *panels, "</div>")


def _config_section(config):
    if not config:
        return ""
    fields = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    return _section(
        "Configuration", f'<details><summary>All fields</summary>\n<pre class="wide">{fields}</pre></details>'
    )


def _section(heading, *content):
    return "\n".join([f"<section>\n<h2>{heading}</h2>", *content, "</section>\n"])


_PLOT_STYLE = {
    "svg.fonttype": "none",  # the page's font: small, sharp and searchable
    "font.size": 10,
    "text.parse_math": False,  # names may hold a $
    "text.color": "#222222",
    "axes.titlesize": 10,
    "axes.titlepad": 8,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#444444",
    "axes.titlecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
}

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: #fff; color: #1c1c1c;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid #d5d5d5; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
header p, .note, dl, figcaption { color: #4a4a4a; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; white-space: nowrap; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e2e2e2; }
th { font-weight: 600; }
thead th { border-bottom: 2px solid #1c1c1c; }
th:first-child, .left { text-align: left; }
dl { columns: 2 26rem; column-gap: 2.5rem; font-size: .85rem; margin: 1rem 0; }
dl div { display: flex; gap: .75rem; break-inside: avoid; padding: .1rem 0; }
dt { flex: 0 0 5.2rem; font-weight: 600; color: #1c1c1c; }
dd { margin: 0; }
pre { margin: 0 0 1.5rem; padding: 1rem; background: #f6f6f4; border-radius: 4px; line-height: 1.5;
      font: .85rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre i { display: inline-block; width: 1ch; overflow: hidden; vertical-align: bottom; font-style: normal; }
mark { background: #ffe3b8; color: inherit; box-shadow: inset 0 -2px #d55e00; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.25rem; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .25rem; }
svg { display: block; width: 100%; max-width: 26rem; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif !important; }
summary { cursor: pointer; margin-bottom: .5rem; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{origin}</header>
<main>
{sections}
</main>
</body>
</html>
"""
