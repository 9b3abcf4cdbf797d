"""The figure of the training loss: steps as many as there were, points no more than it has pixels."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from hpcprune.report.format import CurvePoint, Report
from hpcprune.report.svg import BAND, PRUNED, note, svg
from hpcprune.report.units import plain

__all__ = ["loss", "thinned"]

Column = npt.NDArray[np.float64]
# A wider curve than this has more points than its figure has pixels.
CURVE_POINTS = 400


def loss(report: Report) -> str:
    """The training loss over steps, the rounds told apart by shading; long curves as mean and range of their parts."""
    points = [p for p in report["curve"] if p["loss"] is not None and math.isfinite(p["loss"])]
    if len(points) < 2:
        return ""
    steps = np.array([p["step"] for p in points], dtype=float)
    if (np.diff(steps) < 0).any():  # steps that start again with each stage
        steps = np.arange(len(points), dtype=float)
    values = np.array([p["loss"] for p in points], dtype=float)
    starts = [0, *(i for i in range(1, len(points)) if _part(points[i]) != _part(points[i - 1])), len(points)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title("training loss", pad=20 if len(starts) > 2 else 8)
        axes.set_xlabel("step")
        if values.min() > 0 and values.max() > 100 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        edges = [steps[0], *(steps[i] for i in starts[1:-1]), steps[-1]]
        for number, (first, stop) in enumerate(pairwise(starts)):
            buckets = max(2, CURVE_POINTS * (stop - first) // len(points))
            x, low, mean, high = thinned(steps[first:stop], values[first:stop], buckets)
            if stop - first > buckets:
                axes.fill_between(x, low, high, color=PRUNED, alpha=0.18, linewidth=0)
            axes.plot(x, mean, color=PRUNED, linewidth=1.3, marker="o" if stop - first == 1 else "")
            if number % 2:
                axes.axvspan(edges[number], edges[number + 1], color=BAND, linewidth=0, zorder=0)
            if edges[number + 1] - edges[number] > 0.055 * (edges[-1] - edges[0]):
                middle = (edges[number] + edges[number + 1]) / 2
                note(axes, _part_name(points[first]), (middle, 1), ("data", "axes fraction"), (0, 3), ha="center")
        axes.margins(x=0.01)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))

    return svg("loss", "training loss over steps", draw, width=900, height=270)


def thinned(x: Column, y: Column, buckets: int) -> tuple[Column, Column, Column, Column]:
    """A curve in at most `buckets` points: x, and the lowest, mean and highest y around it; all 1-D float64.

    Every spike stays within the range, which picking every n-th point would lose.
    """
    if len(x) <= buckets:
        return x, y, y, y
    cuts = np.linspace(0, len(x), buckets + 1).astype(int)
    sizes = np.diff(cuts)
    return (
        np.add.reduceat(x, cuts[:-1]) / sizes,
        np.minimum.reduceat(y, cuts[:-1]),
        np.add.reduceat(y, cuts[:-1]) / sizes,
        np.maximum.reduceat(y, cuts[:-1]),
    )


def _part(point: CurvePoint) -> tuple[str, int | None]:
    return point["stage"], point["round"]


def _part_name(point: CurvePoint) -> str:
    return plain(point["stage"]) if not point["round"] else f"round {point['round']}"
