"""Plots, drawn alike, and as images inside a page."""

import base64
import contextlib
import dataclasses
import html
import io
from collections.abc import Iterator, Sequence

from kforcing_jax.evaluation.tables import is_number

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE, ORANGE, GREY = PALETTE[0], PALETTE[1], "#555555"
_STYLE = {
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


def panel(title, y_label, lines, y_limits=(None, None), *, passes=False) -> str:
    """One plot as an HTML figure, over steps or over tokens per pass; "" when it would be empty."""
    lines = [dataclasses.replace(line, points=[p for p in line.points if is_number(p[1])]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    with new_figure(4.4, 2.6) as figure:
        axes = figure.subplots()
        for line in lines:
            style = dict(color=line.colour, linestyle=line.dashes or "none", markerfacecolor=line.face or line.colour)
            axes.plot(*zip(*line.points, strict=True), marker=line.marker, label=line.label, **style)
        axes.set_ylim(*y_limits)
        axes.set_title(y_label, loc="left", fontsize="medium")
        (_scale_passes if passes else _scale_steps)(axes, lines)
        if any(line.label for line in lines):
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), borderaxespad=0.2, handlelength=1.5)
        return on_page(figure, title, y_label)


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator:
    """An empty figure of matplotlib's, of so many inches, to be drawn and saved within the context."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def on_page(figure, title: str, what: str) -> str:
    """An HTML figure. The SVG is an image of its own: nothing in it can clash with another one on the page."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    title, what = html.escape(title), html.escape(what)
    return f'<figure><figcaption>{title}</figcaption>\n<img alt="{title}: {what}" src="{source}"></figure>'


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
