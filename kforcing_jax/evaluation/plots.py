"""Plots as inline SVG: small lines with their names at the end."""

import dataclasses
import html
import io
import re
from collections.abc import Sequence

from kforcing_jax.evaluation.tables import is_number

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


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a plot, named at its right end."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashes: str = "-"  # matplotlib's; "" draws markers alone
    marker: str = ""
    face: str | None = None  # of the markers; the line's colour by default


def panel(name, title, y_label, lines, y_limits=(None, None), *, passes=False) -> str:
    """One plot as an HTML figure with inline SVG, over steps or over tokens per pass; "" when it would be empty.

    Args:
      name: what sets the ids of this plot apart from those of all others on the page.
    """
    lines = [dataclasses.replace(line, points=[p for p in line.points if is_number(p[1])]) for line in lines]
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
