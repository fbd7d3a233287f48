"""report.html: one self-contained page from the JSON files of a run directory.

What is not there yet is left out.
"""

import html
import itertools
import json
import math
import re
from pathlib import Path

from kforcing_jax.data.whole_file import write_text
from kforcing_jax.evaluation.aligned import prompt_text, sample_blocks
from kforcing_jax.evaluation.history import over, read_history
from kforcing_jax.evaluation.page import definitions, page, section, table
from kforcing_jax.evaluation.plots import BLUE, GREY, ORANGE, PALETTE, Line, panel
from kforcing_jax.evaluation.tables import (
    STRIDE_COLUMNS,
    STRIDES,
    WHY_LITTLE_GAIN,
    drawn_at,
    is_number,
    legend,
    quality_columns,
    speed_batches,
    speed_columns,
    stages_of,
    stride_rows,
    versus,
    window_of,
)
from kforcing_jax.evaluation.trade_off import trade_off
from kforcing_jax.training.progress import clock

_WHAT_THIS_IS = """<p>K-Forcing (<a href="https://arxiv.org/abs/2606.10820">arXiv 2606.10820</a>) distils an
autoregressive (AR) language model into students that give k tokens per forward pass: context and k noise tokens in, k
tokens out, jointly distributed as the teacher's. Teacher and students share their noise here, so they can be compared
token by token.</p>"""


def write_report(workdir: Path) -> Path:
    """Writes report.html, one page that needs nothing but itself, from the JSON files of a run directory.

    What the run has not produced yet is left out. The page is written whole or not at all.

    Returns:
      The path of the page.
    """
    workdir = Path(workdir)
    summary, config = (_read_json(workdir / name) for name in ("summary.json", "config.json"))
    history, stages = read_history(workdir / "metrics.jsonl"), stages_of(summary)
    sections = [
        _results_section(stages),
        _strides_section(stages),
        _samples_section(summary.get("samples") or []),
        _passes_section(stages),
        _training_section(history, stages),
        _validation_section(history),
        _config_section(config),
    ]
    head = f"{_WHAT_THIS_IS}\n{definitions(_facts(summary, stages))}"
    write_text(workdir / "report.html", page(f"K-Forcing run {workdir.resolve().name}", head, sections))
    return workdir / "report.html"


def _read_json(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _facts(summary, stages):
    """What figures mean nothing without, as far as it is known."""
    facts = {name: summary.get(name) for name in ("command", "revision", "device", "date", "data")}
    sizes = {name: stage["parameters"] for name, stage in stages.items() if "parameters" in stage}
    facts["parameters"] = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    facts["seed"] = summary.get("seed")
    seconds = [sum(s["seconds"] for s in stages.values() if is_number(s.get("seconds")))]
    if is_number(summary.get("evaluation_seconds")):
        seconds.append(summary["evaluation_seconds"])
        facts["time"] = f"{clock(sum(seconds))}: training {clock(seconds[0])}, evaluation {clock(seconds[1])}"
        facts["temperature"] = f"all stages are sampled at {drawn_at(summary)}"
    return [(name, str(fact)) for name, fact in facts.items() if fact not in (None, "")]


def _results_section(stages):
    if not stages:
        return section("Results", "<p>No stage has ended yet.</p>")
    speed = speed_columns(stages)
    speeds = [_table(stages, speed), f"<p>{html.escape(WHY_LITTLE_GAIN)}</p>"] if speed else []
    return section("Results", _table(stages, quality_columns(stages)), *speeds)


def _table(stages, columns):
    return f"{table(stages, columns)}\n{definitions(legend(columns))}"


def _strides_section(stages):
    """What to decode with: the largest student at several confidences, beside all students at a fixed stride."""
    rows = stride_rows(stages)
    if not rows:
        return ""
    note = (
        "Take the point furthest to the right whose NLL and entropy are both in the AR teacher's band: low NLL with "
        "low entropy is repetition, not quality. Bars and band: 95 % intervals over prompts."
    )
    strides = f"<p>{html.escape(STRIDES)}</p>"
    return section("Which stride to take", f"<p>{note}</p>", trade_off(stages), _table(rows, STRIDE_COLUMNS), strides)


def _samples_section(samples):
    if not samples:
        return ""
    note = (
        "Prompts of the validation text, each continued by every stage from the same noise. <mark>Marked</mark> is the "
        "first character that differs from the AR teacher's; <i>after it</i> the texts that are continued differ too."
    )
    return section("Samples", f"<p>{note}</p>", *map(_sample_html, samples))


def _sample_html(sample):
    blocks = [
        "\n".join(f"<b>{html.escape(label)}</b>  {_marked(text, same)}" for label, text, same in block)
        for block in sample_blocks(sample)
    ]
    return (
        f'<p class="note">{html.escape(prompt_text(sample))}</p>\n<pre class="wide">' + "\n\n".join(blocks) + "</pre>"
    )


def _marked(text, same):
    """Escaped, with the first difference marked and the rest grey; `same` characters come before it."""
    first, after = max(same, 0), max(same + 1, 0)
    marked = f"<mark>{_escape(text[first:after])}</mark>" if text[first:after] else ""
    return _escape(text[:first]) + marked + (f"<i>{_escape(text[after:])}</i>" if text[after:] else "")


def _escape(text):
    """Escaped; the line break's sign, which many monospace fonts lack, gets an element that holds it to one column."""
    return html.escape(text).replace("⏎", "<s>⏎</s>")


def _passes_section(stages):
    """What more tokens per pass cost in quality, and what they give in speed."""
    quality = [
        *_over_passes(stages, "sample_nll", "NLL", BLUE, "AR NLL"),
        *_over_passes(stages, "sample_entropy", "entropy", ORANGE, "AR entropy", "--"),
    ]
    fidelity = [
        *_over_passes(stages, "agreement", "mean", BLUE),
        *_over_passes(stages, "block_agreement", "block", ORANGE),
        *_over_passes(stages, "chance", "chance", GREY, dashes="--"),
    ]
    joint = [
        *_over_passes(stages, "joint_tv", "students", BLUE),
        *_over_passes(stages, "joint_tv_null", "AR null", GREY, dashes="--"),
    ]
    widest = max((window for name in stages if (window := window_of(name))), default=1)
    speed = [Line("AR", [(1, 1), (widest, 1)], GREY, ":")] if speed_batches(stages) else []
    for batch, colour in zip(speed_batches(stages), itertools.cycle(PALETTE), strict=False):
        speed += _over_passes(stages, versus(batch), batch, colour)
    panels = [
        panel("Samples under the AR teacher", "nats per token", quality, passes=True),
        panel("Agreement with the AR teacher", "share of tokens or blocks", fidelity, (0, 1), passes=True),
        panel("Decoding", "speed over AR, by requests at a time", speed, (0, None), passes=True),
        panel("Distance to the exact joint", "total variation", joint, (0, None), passes=True),
    ]
    hollow = " Hollow: distilled from the AR teacher itself." if any(map(_is_from_ar, stages)) else ""
    note = f"Filled: each student distilled from the one before it.{hollow} Dotted: the AR teacher."
    return _panels("Quality and speed over tokens per pass", note, panels)


def _training_section(history, stages):
    """Loss and agreement over the steps of every stage."""
    panels = [panel(name, "loss, nats", _loss_lines(records)) for name, records in history.items()] + [
        panel(name, "agreement", _agreement_lines(records, stages.get(name, {})), (0, 1))
        for name, records in history.items()
    ]
    note = (
        "On training batches. Loss: of the AR teacher on text, of each student on its teacher's tokens. Agreement: how "
        "often the student's token is the one of the teacher that it learns from. Chance: of two independent draws of "
        "the AR teacher."
    )
    return _panels("Training", note, panels)


def _validation_section(history):
    """What was seen of every stage while it trained, on rows that it is not trained on."""
    panels = [
        panel(name, "loss, nats", [Line("", over(records, "step", "validation_loss"), BLUE, marker=".")])
        for name, records in history.items()
    ] + [panel(name, "agreement with AR", _validated_agreement(records), (0, 1)) for name, records in history.items()]
    note = (
        "On the same few validation rows under the same noise at every point, with averaged weights. Agreement is with "
        "the AR teacher, whoever taught the stage."
    )
    return _panels("Validation while it trained", note, panels)


def _validated_agreement(records):
    offsets = _offset_lines(records, "validation_agreement")
    block = Line("block", over(records, "step", "validation_block_agreement"), "black", "--")
    return [*offsets, *([block] if len(offsets) > 1 else [])]


def _over_passes(stages, key, label, colour, ar_label="", dashes="-"):
    """A measure of the students over their window, and the AR teacher's as a level."""
    points = [(name, (w, _mean(stage.get(key)))) for name, stage in stages.items() if (w := window_of(name))]
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


def _mean(value):
    """Of a list, the median of a ratio, or a number itself; NaN when there is nothing to average."""
    value = value.get("median") if isinstance(value, dict) else value
    numbers = [v for v in (value if isinstance(value, list) else [value]) if is_number(v)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _loss_lines(records):
    offsets = _offset_lines(records, "loss")
    return offsets or [Line("", over(records, "step", "loss"), BLUE)]


def _agreement_lines(records, stage):
    offsets = _offset_lines(records, "agreement")
    if not offsets:
        return []
    block = Line("block", over(records, "step", "block_agreement"), "black", "--")
    ends = records[0]["step"], records[-1]["step"]
    chance = Line("chance", [(step, _mean(stage.get("chance"))) for step in ends], GREY, ":")
    return [*offsets, *([block] if len(offsets) > 1 else []), chance]


def _offset_lines(records, measure):
    """One line per offset of the window; none for the AR teacher."""
    keys = {key for record in records for key in record}
    count = sum(re.fullmatch(rf"{measure}_\d+", key) is not None for key in keys)
    return [
        Line(f"offset {j}", over(records, "step", f"{measure}_{j}"), PALETTE[(j - 1) % len(PALETTE)])
        for j in range(1, count + 1)
    ]


def _panels(heading, note, panels):
    panels = [panel for panel in panels if panel]
    return section(heading, f"<p>{note}</p>", '<div class="panels">', *panels, "</div>") if panels else ""


def _config_section(config):
    if not config:
        return ""
    fields = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    return section(
        "Configuration", f'<details><summary>All fields</summary>\n<pre class="wide">{fields}</pre></details>'
    )
