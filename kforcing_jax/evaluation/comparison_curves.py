"""Curves of several runs over each other: in all of them a run has its own colour, dashes and marker."""

import dataclasses
import functools
import html
import itertools
from collections.abc import Callable, Sequence

from kforcing_jax.evaluation.comparison import Run
from kforcing_jax.evaluation.history import over
from kforcing_jax.evaluation.plots import PALETTE, draw_points, image, new_figure, on_page
from kforcing_jax.evaluation.tables import in_order, is_number, window_of

_DASHES: tuple[str | tuple, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Lines with fewer points have a marker on each of them.
_FEW = 12
# Where a stage starts, as a share of the longest one, says nothing of where it ends, and would set the scale.
_BEGINNING = 0.05
_UNITS = (("seconds", 1), ("minutes", 60), ("hours", 3600), ("days", 86400))


@dataclasses.dataclass(frozen=True)
class Look:
    """How a run is drawn: told apart without colour too."""

    colour: str
    dashes: str | tuple
    marker: str

    @classmethod
    def of(cls, index: int) -> "Look":
        """That of the index-th run; the first 210 differ."""
        return cls(PALETTE[index % len(PALETTE)], _DASHES[index % len(_DASHES)], _MARKERS[index % len(_MARKERS)])

    @property
    def style(self) -> dict:
        """Settings of matplotlib's `plot`."""
        return dict(color=self.colour, linestyle=self.dashes, marker=self.marker, markersize=5)


def key(runs: Sequence[Run], shown: Sequence[str]) -> str:
    """Which line is whose, as an HTML list of the runs whose names are shown."""
    items = [
        f"<li>{_swatch(Look.of(index))}<span>{html.escape(run.name)}</span></li>"
        for index, run in enumerate(runs)
        if run.name in shown
    ]
    return f'<ul class="key">{"".join(items)}</ul>'


def training_panels(runs: Sequence[Run]) -> dict[str, tuple[list[str], list[str]]]:
    """By stage: the names of the runs that have curves of it, and figures in pairs, over steps and over time."""
    stages = in_order(dict.fromkeys(stage for run in runs for stage in run.history))
    return {stage: drawn for stage in stages if (drawn := _stage_panels(runs, stage))[1]}


def stride_panels(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """NLL and entropy over tokens per pass: every student at full windows, the largest at its confidences.

    Returns the names of the runs that have such figures, and the figures in HTML.
    """
    titles = (("sample_nll", "NLL, nats per token"), ("sample_entropy", "entropy, nats per token"))
    drawn = [_stride_panel(runs, key, title) for key, title in titles]
    names = [run.name for run in runs if any(run.name in having for having, _ in drawn)]
    return names, [panel for having, panel in drawn if having]


def _stage_panels(runs, stage):
    measures = _MEASURES if window_of(stage) else _MEASURES_OF_AR
    records = {index: run.history[stage] for index, run in enumerate(runs) if stage in run.history}
    panels = []
    for measure in measures:
        steps, seconds = (_curves(records, axis, measure.key) for axis in ("step", "seconds"))
        limits = measure.limits(steps) if steps else None
        panels += [_overlaid(stage, measure, limits, steps, _scale_steps)] if steps else []
        panels += [_overlaid(stage, measure, limits, seconds, _scale_time)] if seconds else []
    return [runs[index].name for index in records], panels


def _curves(records, axis, key):
    curves = {index: over(of_run, axis, key) for index, of_run in records.items()}
    return {index: points for index, points in curves.items() if points}


@dataclasses.dataclass(frozen=True)
class _Measure:
    key: str
    title: str
    y_label: str
    limits: Callable[[dict], tuple[float | None, float | None]]


def _without_beginning(curves):
    """(lowest, highest) after the beginning, with some room."""
    start = _BEGINNING * max(points[-1][0] for points in curves.values())
    values = [y for points in curves.values() for x, y in points if x >= start]
    room = 0.06 * (max(values) - min(values)) or 0.1
    return min(values) - room, max(values) + room


def _share(curves):
    return 0, None


_MEASURES_OF_AR = (
    _Measure("loss", "training loss", "nats per token", _without_beginning),
    _Measure("validation_loss", "validation loss", "nats per token", _without_beginning),
)
_MEASURES = (
    *_MEASURES_OF_AR,
    _Measure("block_agreement", "block agreement with its teacher, in training", "share of blocks", _share),
    _Measure(
        "validation_block_agreement", "block agreement with the AR teacher, validation", "share of blocks", _share
    ),
)


def _overlaid(stage, measure, limits, curves, scale):
    with new_figure(4.7, 2.7) as figure:
        axes = figure.subplots()
        for index, points in curves.items():
            # Each run's markers a little further along, so that equal lines show both.
            every = 1 if len(points) < _FEW else (0.04 + 0.03 * (index % 5), 0.16)
            axes.plot(*zip(*points, strict=True), markevery=every, **Look.of(index).style)
        longest = max(points[-1][0] for points in curves.values())
        axes.set_xlim(0, 1.02 * longest)
        axes.set_ylim(*limits)
        axes.set_ylabel(measure.y_label)
        axes.set_xlabel(scale(axes, longest))
        return on_page(figure, f"{stage}: {measure.title}", f"{measure.y_label}, over {axes.get_xlabel()}")


def _scale_steps(axes, longest):
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    return "steps"


def _scale_time(axes, longest):
    """In the unit in which the longest run has few digits, with ticks that are round in it."""
    from matplotlib.ticker import MaxNLocator

    name, size = next((unit for unit, larger in itertools.pairwise(_UNITS) if longest < 3 * larger[1]), _UNITS[-1])
    ticks = MaxNLocator(nbins=5).tick_values(0, longest / size)
    axes.set_xticks([tick * size for tick in ticks if tick * size <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds / size:g}")
    return f"{name} of this stage"


def _stride_panel(runs, key, title):
    with new_figure(4.7, 3.2) as figure:
        axes = figure.subplots()
        having = [run.name for index, run in enumerate(runs) if _draw_strides(axes, run, key, Look.of(index))]
        axes.set_ylabel(title)
        axes.set_xlabel("tokens per pass")
        axes.margins(x=0.06, y=0.1)
        return having, on_page(figure, title.split(",")[0] + " over tokens per pass", title)


def _draw_strides(axes, run, key, look) -> bool:
    """A run's points: filled and joined at confidences, hollow at full windows; dotted, the level of its AR teacher."""
    fixed = [row for row in run.stages.values() if _has(row, key)]
    confident = [row for stage in run.stages.values() for row in stage.get("confident") or [] if _has(row, key)]
    if not fixed and not confident:
        return False
    teacher = run.stages.get("ar", {})
    if _has(teacher, key):
        axes.axhline(teacher[key], color=look.colour, linestyle=(0, (1, 3)), linewidth=1)
    whole = dict(linestyle="none", markerfacecolor="none", markersize=6.5)
    for rows, settings in ((fixed, whole), (confident, dict(zorder=3))):
        if rows:
            draw_points(axes, rows, key, **look.style | settings)
    return True


def _has(row, key):
    return is_number(row.get(key)) and is_number(row.get("tokens_per_pass"))


@functools.cache
def _swatch(look):
    with new_figure(0.8, 0.22) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], **look.style)
        axes.set(xlim=(0, 1), ylim=(-1, 1))
        return image(figure, "")
