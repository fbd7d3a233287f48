"""The picture that a stride is chosen by: what the AR teacher thinks of samples, over their tokens per pass."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kforcing_jax.errors import RunError
from kforcing_jax.evaluation.plots import BLUE, GREY, ORANGE, draw_points, new_figure, on_page
from kforcing_jax.evaluation.tables import is_number, stages_of, window_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (("sample_nll", "NLL, nats per token"), ("sample_entropy", "entropy, nats per token"))


def trade_off(stages: dict) -> str:
    """The picture as an HTML figure, stages as of `stages_of`; "" when no confident stride was measured."""
    with _drawn(stages) as figure:
        if figure is None:
            return ""
        return on_page(figure, "Quality over tokens per pass", "NLL and entropy under the AR teacher")


def write_trade_off(workdir: str | Path, path: str | Path) -> Path:
    """Writes the picture of a run directory as a file, on white: .svg, .png, or what else matplotlib writes.

    Raises:
      RunError: summary.json is not there, or holds no confident stride.
    """
    summary = Path(workdir) / "summary.json"
    stages = stages_of(json.loads(summary.read_text(encoding="utf-8"))) if summary.exists() else {}
    with _drawn(stages) as figure:
        if figure is None:
            raise RunError(f"{summary} has no figures of confident strides; run kforcing_jax.evaluate first")
        metadata = {"Date": None} if Path(path).suffix == ".svg" else None  # the same figures are the same file
        figure.savefig(path, dpi=200, metadata=metadata)
    return Path(path)


@contextlib.contextmanager
def _drawn(stages) -> "Iterator[Figure | None]":
    """The figure; None without confident strides."""
    confident = {name: rows for name, stage in stages.items() if (rows := stage.get("confident"))}
    if not confident:
        yield None
        return
    with new_figure(8.2, 3.4) as figure:
        for axes, (key, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
            _draw_level(axes, stages.get("ar", {}), key)
            _draw_fixed(axes, stages, key)
            for name, rows in confident.items():
                draw_points(axes, rows, key, label=f"{name}, confident at c", color=BLUE, fmt="o-", zorder=3)
                _label(axes, rows, key, [f"{row['confidence']:g}" for row in rows], BLUE, "left", (5, -11))
            axes.set_title(title, loc="left", fontsize="medium")
            axes.set_xlabel("tokens per pass")
            axes.margins(x=0.1)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        yield figure


def _draw_level(axes, teacher, key):
    if is_number(teacher.get(key)):
        axes.axhline(teacher[key], color=GREY, linestyle=":", label="AR, 95 %")
        axes.axhspan(*(teacher.get(f"{key}_interval") or [teacher[key]] * 2), color=GREY, alpha=0.12, linewidth=0)


def _draw_fixed(axes, stages, key):
    """Students that keep all of a window; hollow, those that the AR teacher taught itself."""
    students = {name: s for name, s in stages.items() if window_of(name) and is_number(s.get(key))}
    chain = [name for name in students if not name.endswith("-from-ar")]
    for names, label, face in (
        (chain, "all k tokens", ORANGE),
        ([name for name in students if name not in chain], "all k, from AR", "white"),
    ):
        rows = [students[name] for name in names]
        if rows:
            draw_points(axes, rows, key, label=label, color=ORANGE, fmt="s", markerfacecolor=face, markersize=7)
            _label(axes, rows, key, names, ORANGE, "right", (-5, 5))


def _label(axes, rows, key, texts, colour, side, offset):
    for row, text in zip(rows, texts, strict=True):
        at = row["tokens_per_pass"], row[key]
        axes.annotate(text, at, xytext=offset, textcoords="offset points", ha=side, color=colour, fontsize=8)
