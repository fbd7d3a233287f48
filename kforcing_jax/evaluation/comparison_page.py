"""One self-contained page that compares runs."""

import html
from collections.abc import Sequence
from pathlib import Path

from kforcing_jax.data.whole_file import write_text
from kforcing_jax.evaluation.comparison import Run, figures, remarks
from kforcing_jax.evaluation.comparison_curves import key, stride_panels, training_panels
from kforcing_jax.evaluation.comparison_tables import (
    MARKS,
    all_stride_rows,
    runs_table,
    settings_table,
    stage_columns,
    stage_rows,
    stages_text,
)
from kforcing_jax.evaluation.page import definitions, page, paragraph, section, table, text_table
from kforcing_jax.evaluation.tables import STRIDE_COLUMNS, STRIDES, Column, legend


def write_comparison(runs: Sequence[Run], path: Path) -> Path:
    """Writes the page, whole or not at all. What no run has produced yet is left out. Raises OSError."""
    sections = [
        _runs_section(runs),
        _settings_section(runs),
        _figures_section(runs),
        _strides_section(runs),
        _curves_section(runs),
    ]
    title = f"{len(runs)} K-Forcing runs compared"
    write_text(Path(path), page(title, key(runs, [run.name for run in runs]), sections))
    return Path(path)


def _runs_section(runs):
    names, *rows = runs_table(runs)
    said = [
        f'<p class="warning"><b>Not comparable.</b> {html.escape(remark.text)}</p>'
        if remark.is_warning
        else paragraph(remark.text)
        for remark in remarks(runs)
    ]
    return section("Runs", *said, text_table(names, rows, [True] * len(names)))


def _settings_section(runs):
    rows = settings_table(runs)
    drawn = text_table(rows[0], rows[1:], [True] * len(rows[0])) if rows else paragraph("No settings differ.")
    return section("Settings that differ", drawn, *map(paragraph, stages_text(runs)))


def _figures_section(runs):
    stages = figures(runs)
    if not stages:
        return section("Figures", paragraph("No stage of any run has ended yet."))
    parts: list[str] = []
    shown: list[Column] = []
    for stage in stages:
        rows = stage_rows(runs, stage)
        columns = stage_columns(rows)
        parts += [f"<h3>{html.escape(stage)}</h3>", table(rows, columns, "run")]
        shown = columns + shown  # students have what the teacher has, and more
    return section("Figures", paragraph(MARKS), *parts, definitions(legend(shown)))


def _strides_section(runs):
    having, panels = stride_panels(runs)
    if not panels:
        return ""
    note = (
        "Filled: the largest student at several confidences. Hollow: whole windows. Dotted: the AR teacher, which "
        "gives one token a pass. Further to the right at the teacher's NLL and entropy is better. Bars: 95 % intervals "
        "over prompts."
    )
    rows = all_stride_rows(runs)
    listed = (
        f"<details><summary>In figures</summary>\n{table(rows, list(STRIDE_COLUMNS), 'run and stride')}\n</details>"
    )
    return section(
        "Quality over tokens per pass",
        paragraph(note),
        key(runs, having),
        *_pairs(panels),
        *([listed, paragraph(STRIDES)] if rows else []),
    )


def _curves_section(runs):
    stages = training_panels(runs)
    note = (
        "Loss: of the AR teacher on text, of each student on its own teacher's tokens, so students of different "
        "teachers have different tasks. The first twentieth of a stage may lie outside of a plot of losses. Time is "
        "what the stage itself took, compiling and saving included, interruptions not."
    )
    parts = [
        f"<section>\n<h3>{html.escape(stage)}</h3>\n{key(runs, having)}\n{''.join(_pairs(panels))}\n</section>"
        for stage, (having, panels) in stages.items()
    ]
    return section("Training", paragraph(note), *parts) if parts else ""


def _pairs(panels):
    return ['<div class="pairs">', *panels, "</div>"]
