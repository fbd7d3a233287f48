"""report.html: one self-contained page from the JSON files of a run directory.

What is not there yet is left out.
"""

import collections
import html
import itertools
import json
import math
import os
import re
from pathlib import Path

from kforcing_jax.evaluation.plots import Line, panel
from kforcing_jax.evaluation.tables import (
    columns_for,
    continuations,
    in_order,
    is_number,
    label_width,
    origin,
    sample_blocks,
    stages_of,
    table_rows,
    window_of,
)

# Points of a plotted line; longer histories are averaged down to this many.
_MOST_POINTS = 250


# Okabe and Ito's palette, which colour-blind readers can tell apart.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


_BLUE, _ORANGE, _GREY = _PALETTE[0], _PALETTE[1], "#555555"


def write_report(workdir: Path) -> Path:
    """Writes report.html, one page that needs nothing but itself, from the JSON files of a run directory.

    What the run has not produced yet is left out. The page is written whole or not at all.

    Returns:
      The path of the page.
    """
    workdir = Path(workdir)
    summary = _read_json(workdir / "summary.json")
    history = _read_metrics(workdir / "metrics.jsonl")
    stages = stages_of(summary)
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
        origin="".join(f"<p>{html.escape(line)}</p>" for line in origin(summary)),
        style=_STYLE,
        sections="\n".join(filter(None, sections)),
    )
    temporary = workdir / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, workdir / "report.html")
    return workdir / "report.html"


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
    return in_order(history)


def _results_section(stages):
    if not stages:
        return _section("Results", "<p>No stage has ended yet.</p>")
    columns = columns_for(stages)
    sides = [' class="left"' if column.per_offset else "" for column in columns]
    head = "".join(
        f'<th scope="col"{side}>{html.escape(column.name)}</th>' for column, side in zip(columns, sides, strict=True)
    )
    rows = [
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td{side}>{html.escape(cell)}</td>" for cell, side in zip(cells, sides, strict=True))
        + "</tr>"
        for name, *cells in table_rows(stages, columns)
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
    width, teacher = label_width(sample), continuations(sample).get("ar")
    blocks = [
        "\n".join(
            f"<b>{html.escape(label)}</b>{' ' * (width - len(label))}  "
            + (_marked(chunk, teacher[start:]) if teacher is not None and label != "prompt" else _escape(chunk))
            for label, start, chunk in block
        )
        for block in sample_blocks(sample)
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
        panel("quality", "Samples under the AR teacher", "nats per token", quality, passes=True),
        panel("fidelity", "Agreement with the AR teacher", "share of tokens or blocks", fidelity, (0, 1), passes=True),
        panel("speed", "Decoding", "useful tokens per second", speed, (0, None), passes=True),
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
    panels = [panel("joint", "Distance to the exact joint", "total variation", lines, (0, None), passes=True)]
    note = "AR null: a sample of the same size from the teacher's joint. A perfect student lies on it."
    return _panels("Joint distribution of blocks", note, panels)


def _training_section(history, stages):
    """Loss and agreement over the steps of every stage."""
    losses = [panel(f"loss-{name}", name, "loss, nats", _loss_lines(records)) for name, records in history.items()]
    agreements = [
        panel(f"agreement-{name}", name, "agreement", _agreement_lines(records, stages.get(name, {})), (0, 1))
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
    points = [(name, (window_of(name), _mean(stage.get(key)))) for name, stage in stages.items() if window_of(name)]
    chain = [point for name, point in points if not _is_from_ar(name)]
    from_ar = [point for name, point in points if _is_from_ar(name)]
    level = _mean(stages.get("ar", {}).get(key))
    widest = max((window for _, (window, _) in points), default=1)
    return [
        Line(ar_label, [(1, level), (widest, level)], colour, ":"),
        Line(label, chain, colour, dashes, "o"),
        Line("" if chain else label, from_ar, colour, "", "o", "white"),
    ]


def _is_from_ar(name):
    return name.endswith("-from-ar")


def _mean(values):
    """Of a list, or of one value; NaN when there is nothing to average."""
    numbers = [v for v in (values if isinstance(values, list) else [values]) if is_number(v)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _loss_lines(records):
    offsets = _offset_lines(records, "loss")
    return offsets or [Line("", _over_steps(records, "loss"), _BLUE)]


def _agreement_lines(records, stage):
    offsets = _offset_lines(records, "agreement")
    if not offsets:
        return []
    block = Line("block", _over_steps(records, "block_agreement"), "black", "--")
    ends = records[0]["step"], records[-1]["step"]
    chance = Line("chance", [(step, _mean(stage.get("chance"))) for step in ends], _GREY, ":")
    return [*offsets, *([block] if len(offsets) > 1 else []), chance]


def _offset_lines(records, measure):
    """One line per offset of the window; none for the AR teacher."""
    count = sum(re.fullmatch(rf"{measure}_\d+", key) is not None for key in records[0])
    return [
        Line(f"offset {j}", _over_steps(records, f"{measure}_{j}"), _PALETTE[(j - 1) % len(_PALETTE)])
        for j in range(1, count + 1)
    ]


def _over_steps(records, key):
    """Points (step, value), averaged in equal groups when there are too many to see."""
    points = [(record["step"], record[key]) for record in records if is_number(record.get(key))]
    size = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups]


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
