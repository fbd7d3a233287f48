"""The picture of a training: loss and agreement of every stage over its steps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kforcing_jax.errors import RunError
from kforcing_jax.evaluation.history import over, read_history
from kforcing_jax.evaluation.plots import BLUE, GREY, ORANGE, new_figure
from kforcing_jax.evaluation.tables import stages_of, window_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Offsets of a window have the colours of a scale, since there may be many; so many have one each.
_SCALE, _SHADES = "viridis", 8
_DOTS: dict[str, Any] = {"marker": "o", "markersize": 3}


def write_curves(workdir: str | Path, path: str | Path) -> Path:
    """Writes the picture of a run directory as a file, on white: .svg, .png, or what else matplotlib writes.

    Above, the loss of each stage in nats per token, in training and on validation text. Below, how often a student's
    token is the AR teacher's, on validation text: per offset, and for whole blocks.

    Raises:
      RunError: metrics.jsonl is not there, or holds no step.
    """
    metrics, summary = (Path(workdir) / name for name in ("metrics.jsonl", "summary.json"))
    history = read_history(metrics)
    if not history:
        raise RunError(f"{metrics} has no steps yet; run kforcing_jax.main first")
    stages = stages_of(json.loads(summary.read_text(encoding="utf-8"))) if summary.exists() else {}
    names = ["ar", *(name for name in history if name != "ar")]
    with new_figure(1 + 2 * len(names), 4.8) as figure:
        grid = figure.subplots(2, len(names), sharex="col", sharey="row", squeeze=False)
        for name, above, below in zip(names, *grid, strict=True):
            above.set_title(name, loc="left", fontsize="medium")
            _draw_loss(above, history.get(name, []))
            _draw_agreement(below, name, history.get(name, []), stages.get(name, {}))
        _label(grid)
        metadata = {"Date": None} if Path(path).suffix == ".svg" else None  # the same figures are the same file
        figure.savefig(path, dpi=160, metadata=metadata)
    return Path(path)


def _draw_loss(axes, records):
    _draw(axes, records, "loss", color=BLUE, label="training")
    _draw(axes, records, "validation_loss", color=ORANGE, label="validation", **_DOTS)
    axes.set_xlim(0)
    axes.set_ylim(0)


def _draw_agreement(axes, name, records, stage):
    import matplotlib

    shades = matplotlib.colormaps[_SCALE]
    window = window_of(name) or 0
    for j in range(1, window + 1):
        colour = shades((j - 1) / max(window, _SHADES))
        _draw(axes, records, f"validation_agreement_{j}", color=colour, label=f"offset {j}", **_DOTS)
    if window > 1:
        _draw(axes, records, "validation_block_agreement", color="black", linestyle="--", label="whole block")
    if chance := stage.get("chance"):
        axes.axhline(sum(chance) / len(chance), color=GREY, linestyle=":", label="chance")
    axes.set_xlim(0)
    axes.set_ylim(0, 1)


def _draw(axes: "Axes", records: Sequence[dict], measure: str, **style: Any):
    points = over(records, "step", measure)
    axes.plot([step for step, _ in points], [value for _, value in points], **style)


def _label(grid):
    """Axes get their names; the place below the AR teacher, which agrees with nobody, has the legend of all."""
    grid[0, 0].set_ylabel("loss, nats per token")
    for axes in (grid[0, 0], *grid[1, 1:]):
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
    if len(grid[1]) > 1:
        grid[1, 1].set_ylabel("agreement with the AR teacher")
        grid[1, 1].tick_params(labelleft=True)
    entries: dict[str, Any] = {}
    for axes in (grid[0, 0], grid[1, -1]):
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    grid[1, 0].axis("off")
    grid[1, 0].legend(entries.values(), entries.keys(), loc="center")
