"""Plots, drawn alike, and as images inside a page."""

import base64
import contextlib
import dataclasses
import html
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kforcing_jax.evaluation.tables import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE, ORANGE, GREY = PALETTE[0], PALETTE[1], "#555555"
# What each colour of a plot becomes on a dark page.
_DARK = {
    "#000000": "#ececea",
    "#ffffff": "#141416",
    "#555555": "#a8a8a4",
    "#888888": "#8c8c88",
    "#e4e4e4": "#303035",
    "#0072b2": "#3d9be0",
    "#d55e00": "#ff8a3d",
    "#009e73": "#2cc79b",
    "#cc79a7": "#e39cc4",
    "#e69f00": "#f2b83a",
    "#56b4e9": "#9ad8ff",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # the reader's font: small and sharp
    "svg.hashsalt": "kforcing_jax",  # the same plot is the same file
    "font.size": 9,
    "text.parse_math": False,  # names may hold a $
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a plot."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashes: str = "-"  # matplotlib's; "" draws markers alone
    marker: str = ""
    face: str | None = None  # of the markers; the line's colour by default


def panel(
    title: str,
    y_label: str,
    lines: Sequence[Line],
    y_limits: tuple[float | None, float | None] = (None, None),
    *,
    passes: bool = False,
) -> str:
    """One plot as an HTML figure, over steps or over tokens per pass; "" when it would be empty."""
    lines = [dataclasses.replace(line, points=[p for p in line.points if is_number(p[1])]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    with new_figure(4.4, 2.6) as figure:
        axes = figure.subplots()
        for line in lines:
            style: dict[str, Any] = dict(
                color=line.colour, linestyle=line.dashes or "none", markerfacecolor=line.face or line.colour
            )
            axes.plot(*zip(*line.points, strict=True), marker=line.marker, label=line.label, **style)
        axes.set_ylim(*y_limits)
        axes.set_title(y_label, loc="left", fontsize="medium")
        (_scale_passes if passes else _scale_steps)(axes, lines)
        if any(line.label for line in lines):
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), borderaxespad=0.2, handlelength=1.5)
        return on_page(figure, title, y_label)


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator["Figure"]:
    """An empty figure of matplotlib's, of so many inches, to be drawn and saved within the context."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def on_page(figure: "Figure", title: str, what: str) -> str:
    """An HTML figure. The SVG is an image of its own: nothing in it can clash with another one on the page."""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>\n{image(figure, f'{title}: {what}')}</figure>"


def image(figure: "Figure", says: str) -> str:
    """The figure as an image of a page, light or dark as the page is; `says` is for readers who do not see it."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    source = base64.b64encode(_themed(drawn.getvalue()).encode()).decode()
    return f'<img alt="{html.escape(says)}" src="data:image/svg+xml;base64,{source}">'


def _themed(svg):
    """With colours that depend on the reader's scheme. What matplotlib leaves black has no colour of its own there."""

    def variables(of):
        return "".join(f"--c{light[1:]}:{of(light, dark)};" for light, dark in _DARK.items())

    style = (
        f"<style>svg{{{variables(lambda light, _: light)}fill:var(--c000000)}}"
        f"@media(prefers-color-scheme:dark){{svg{{{variables(lambda _, dark: dark)}}}}}</style>"
    )
    known = re.compile("|".join(_DARK))
    svg = re.sub('style="[^"]*"', lambda found: known.sub(lambda colour: f"var(--c{colour[0][1:]})", found[0]), svg)
    return re.sub(r"(<svg\b[^>]*>)", lambda opening: opening[1] + style, svg, count=1)


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


def draw_points(axes: "Axes", rows: Sequence[dict], key: str, **settings: Any) -> None:
    """A figure of rows over their tokens per pass, with bars for the intervals that they have."""
    x, y = ([row[name] for row in rows] for name in ("tokens_per_pass", key))
    axes.errorbar(x, y, xerr=_reach(rows, "tokens_per_pass"), yerr=_reach(rows, key), elinewidth=0.9, **settings)


def _reach(rows, key) -> np.ndarray:
    """How far intervals reach below and above their figures, (2, rows); 0 where there is none."""
    ends = np.array([row.get(f"{key}_interval") or [row[key]] * 2 for row in rows])
    value = np.array([row[key] for row in rows])
    return np.maximum([value - ends[:, 0], ends[:, 1] - value], 0)
