"""matplotlib figures as SVG text that takes its colours from the page, so that they follow its light and dark scheme.

The page calls histogram() and lines(). Text stays text, set in the page's own font; nothing is embedded or linked.
"""

from __future__ import annotations

import io
import re
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from kun_ray.report.survey import Histogram

Array = np.ndarray[Any, Any]

INK, GRID, MARK = "#010203", "#010204", "#010205"
SERIES: Final = tuple(f"#02030{n}" for n in range(6))
"""Stand-ins that matplotlib draws with; `_themed` puts CSS variables in their place. More than six runs share colours."""
DASHES: Final = ("solid", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
NUM_BINS: Final = 40
SIZE: Final = (4.6, 2.3)
"""Inches; the page scales the figure to its column."""
_STYLE: Final[Any] = {
    "svg.fonttype": "none", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": GRID, "axes.axisbelow": True, "lines.linewidth": 1.4, "legend.frameon": False,
}  # fmt: skip


def histogram(xlabel: str, series: list[Histogram], log: bool = False) -> str:
    """Shares of rows over a value, one outline per run; an empty histogram keeps its run's colour free.

    Args:
        xlabel: what is measured, with its unit.
        series: one per run, all with the same edges.
        log: logarithmic axis.
    """
    low = min(h.percentile(0) for h in series if h.total)
    high = max(h.percentile(99.5) for h in series if h.total)
    fine = series[0].edges
    first = int(np.searchsorted(fine, low))
    last = max(min(int(np.searchsorted(fine, high)) + 1, len(fine) - 1), first + 1)
    # Coarse bins are whole numbers of fine ones, or whole numbers would pile up in every other bin.
    width = max(1, -(-(last - first) // NUM_BINS))
    starts: Array = np.arange(first, last, width)
    edges = fine[np.minimum([*starts, starts[-1] + width], len(fine) - 1)]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        for number, one in enumerate(series):
            if not one.total:
                continue
            counts = np.add.reduceat(one.counts, starts)
            counts[-1] = one.counts[starts[-1] :].sum()  # the tail stands in the last bin
            share = 100 * counts / one.total
            colour = SERIES[number % len(SERIES)]
            if len(series) == 1:
                axes.stairs(share, edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(share, edges, color=colour, linewidth=1.4, linestyle=DASHES[number % len(DASHES)])
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(_plain)
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("% of rows")
        return _svg(figure, f"histogram of {xlabel}")


def lines(
    ylabel: str, series: list[list[tuple[Array, Array]]], restarts: list[list[float]], losses: list[list[float]]
) -> str:
    """Curves over running time: a colour per run, a dash per curve of it; restarts and lost replicas as vertical lines.

    Args:
        ylabel: what is measured, with its unit.
        series: for each run its curves: (seconds, values).
        restarts: for each run the seconds at which the job was started again.
        losses: for each run the seconds at which a replica was lost.
    """
    longest = max((float(x[-1]) for curves in series for x, _ in curves), default=0.0)
    unit, divisor = ("h", 3600.0) if longest > 7200 else ("min", 60.0) if longest > 120 else ("s", 1.0)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        for number, curves in enumerate(series):
            colour = SERIES[number % len(SERIES)]
            for kind, (x, y) in enumerate(curves):
                axes.plot(x / divisor, y, color=colour, linestyle=DASHES[kind % len(DASHES)])
            for at in restarts[number]:
                axes.axvline(at / divisor, color=colour, linewidth=1.0, linestyle=(0, (2, 2)), gid=f"restart-{number}")
            for at in losses[number]:
                axes.axvline(at / divisor, color=MARK, linewidth=0.8, linestyle=(0, (1, 2)), gid=f"loss-{number}")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"running time, {unit}")
        axes.set_ylabel(ylabel)
        return _svg(figure, f"{ylabel} over running time")


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_formatter(_plain)
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    return figure, axes


def _plain(value: float, position: float) -> str:
    return f"{value:,.6g}"


def _svg(figure: Figure, label: str) -> str:
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids that differ between figures, but not between two calls
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = target.getvalue()
    return _themed(svg[svg.index("<svg") :], label)


def _themed(svg: str, label: str) -> str:
    """The SVG for use inside a page: its colours by CSS, without a fixed size or ids that two figures would share."""
    for stand_in, name in ((INK, "currentColor"), (GRID, "var(--grid)"), (MARK, "var(--bad)")):
        svg = svg.replace(stand_in, name)
    for number, stand_in in enumerate(SERIES):
        svg = svg.replace(stand_in, f"var(--series-{number})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="(?:figure|axes|patch|text|xtick|ytick|line2d|matplotlib\.axis|LineCollection|StepPatch)_\d+"', "", svg
    )
    svg = re.sub(r"font: [^;\"]*;", "", svg)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" role="img" aria-label="{label}">',
        svg,
        count=1,
    )
