"""The figures of report.html: a function each, from the report to an `<svg>` element, or "" where nothing is to draw.

Blue is the pruned network, grey the dense one; what is compared differs in lightness and form as well as in hue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from hpcprune.report.curve import loss
from hpcprune.report.format import Evaluation, Report
from hpcprune.report.svg import BAND, DASHES, DENSE, INK, LINE, MUTED, OTHER, PRUNED, note, svg
from hpcprune.report.units import as_count, as_percent, as_seconds, is_share, plain
from hpcprune.report.verdicts import layers_of_weights

__all__ = ["FIGURES", "compared", "layers", "load", "loss", "over_rounds", "over_sparsity", "stages", "weights"]

FIGURES = ("layers", "load", "loss", "over_rounds", "over_sparsity", "stages", "weights")  # of a report's page

Column = npt.NDArray[np.float64]
# From here on bars stand side by side with an index below them instead of a name beside each.
NAMED_LAYERS = 32


def over_sparsity(report: Report) -> str:
    """The primary metric after retraining, over sparsity; the dense network is the dashed line."""
    name = report["primary"]
    scale, unit = (100, ", %") if is_share(name) else (1, "")
    found = [
        (e["sparsity"], value)
        for e in report["evaluations"]
        if (value := _metric(e, name)) is not None and e["when"] not in ("pruned", "best")
    ]
    if not found:
        return ""
    found.sort()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(plain(name) + unit)
        axes.set_xlabel("sparsity, %")
        axes.plot([100 * s for s, _ in found], [scale * v for _, v in found], color=PRUNED, marker="o")
        _baseline(axes, report, scale)
        axes.margins(x=0.04, y=0.18)
        if len({s for s, _ in found}) == 1:
            axes.set_xlim(-4, 104)

    return svg("over-sparsity", f"{name} over sparsity, after retraining", draw)


def compared(reports: Sequence[Report]) -> str:
    """The primary metric of several runs after their last round, over sparsity, with the dense network of each."""
    name = reports[0]["primary"]
    scale, unit = (100, ", %") if is_share(name) else (1, "")
    found = [(e["sparsity"], v) for r in reports if (v := _metric(e := r["evaluations"][-1], name)) is not None]
    if not found:
        return ""
    found.sort()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(plain(name) + unit)
        axes.set_xlabel("sparsity, %")
        axes.plot([100 * s for s, _ in found], [scale * v for _, v in found], color=PRUNED, marker="o")
        for report in reports:
            _baseline(axes, report, scale)
        axes.margins(x=0.04, y=0.18)

    return svg("compared", f"{name} of {len(reports)} runs over sparsity", draw, width=900, height=300)


def over_rounds(report: Report) -> str:
    """The primary metric right after pruning and after retraining, round by round."""
    name = report["primary"]
    scale, unit = (100, ", %") if is_share(name) else (1, "")
    kinds: tuple[tuple[str, str, str, str, str], ...] = (
        ("pruned", "pruned", OTHER, "v", "none"),
        ("retrained", "retrained", PRUNED, "o", "-"),
    )
    found = {
        when: [
            (e["round"], scale * v)
            for e in report["evaluations"]
            if e["when"] == when and (v := _metric(e, name)) is not None
        ]
        for when, *_ in kinds
    }
    if not any(found.values()):
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title(plain(name) + unit)
        axes.set_xlabel("round")
        after = dict(found["retrained"])
        for number, value in found["pruned"]:
            if number in after:  # what retraining won back
                axes.plot([number, number], [value, after[number]], color=LINE, linewidth=1.2, zorder=1)
        for when, label, colour, marker, line in kinds:
            if found[when]:
                face = colour if when == "retrained" else "none"
                axes.plot(
                    *zip(*found[when], strict=True),
                    color=colour,
                    marker=marker,
                    linestyle=line,
                    label=label,
                    markerfacecolor=face,
                )
        _baseline(axes, report, scale)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
        axes.margins(x=0.06, y=0.14)
        figure.legend(loc="outside upper left", ncols=3)

    return svg("over-rounds", f"{name} by round, before and after retraining", draw)


def layers(report: Report) -> str:
    """Sparsity of every layer, in the order of the model, with its number of weights while there is room for it."""
    found = report["layers"]
    if not found:
        return ""
    names = [plain(layer["name"]) for layer in found]
    values = [100 * layer["sparsity"] for layer in found]
    weights = layers_of_weights(report)
    gone = sum(layer["weights"] - layer["nonzeros"] for layer in weights)
    whole = gone / max(1, sum(layer["weights"] for layer in weights))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = list(range(len(found)))
        if len(found) <= NAMED_LAYERS:
            bars = axes.barh(places, values, color=PRUNED, height=0.62)
            axes.set_yticks(places, [_short(name, 34) for name in names], color=INK)
            axes.set_ylim(len(found) - 0.4, -0.6)
            axes.set_xlim(0, 100)
            axes.set_xlabel("sparsity, %")
            axes.grid(axis="y", visible=False)
            axes.grid(axis="x", visible=True)
            axes.axvline(100 * whole, color=INK, linewidth=1, linestyle=DASHES)
            for place, layer in zip(places, found, strict=True):
                text = f"{as_percent(layer['sparsity'])} of {as_count(layer['weights'])}"
                note(axes, text, (1, place), ("axes fraction", "data"), (8, 0), va="center")
        else:
            bars = axes.bar(places, values, color=PRUNED, width=0.8)
            axes.set_title("sparsity, %")
            axes.set_xlabel("layer, in the order of the model; the table below has the names")
            axes.set_ylim(0, 100)
            axes.set_xlim(-0.8, len(found) - 0.2)
            axes.axhline(100 * whole, color=INK, linewidth=1, linestyle=DASHES)
        for bar, name, value in zip(bars, names, values, strict=True):
            bar.set_gid(f"tip {name}: {value:.2f} %")

    height = 64 + 20 * len(found) if len(found) <= NAMED_LAYERS else 260
    return svg("layers", "sparsity of each layer", draw, width=900, height=height)


def weights(report: Report) -> str:
    """Histograms of the prunable weights: all of the dense network, and the survivors."""
    edges = np.array(report["histograms"]["edges"], dtype=float)
    dense = np.array(report["histograms"]["dense"], dtype=float)
    pruned = np.array(report["histograms"]["pruned"], dtype=float)
    if len(edges) < 2 or not (dense.any() or pruned.any()):
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_title("weights in a bin, logarithmic")
        axes.set_xlabel("value")
        # A bin of one weight must still be seen on a logarithmic axis, so the axis starts below one.
        axes.stairs(np.maximum(pruned, 0.5), edges, baseline=0.5, fill=True, color=PRUNED, label="survivors, retrained")
        axes.stairs(np.maximum(dense, 0.5), edges, baseline=0.5, color=DENSE, linewidth=1.4, label="dense")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.margins(x=0.01)
        figure.legend(loc="outside upper left", ncols=2)

    return svg("weights", "histogram of the weights, dense and survivors", draw, height=300)


def stages(report: Report) -> str:
    """Wall time of each stage, all rounds together."""
    sums: dict[str, float] = {}
    for stage in report["stages"]:
        sums[plain(stage["name"])] = sums.get(plain(stage["name"]), 0.0) + stage["seconds"]
    if not sums:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(list(sums), list(sums.values()), color=PRUNED, height=0.55)
        axes.bar_label(bars, [as_seconds(value) for value in sums.values()], padding=5, color=MUTED)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlim(0, 1.22 * max(*sums.values(), 1e-9))
        axes.xaxis.set_visible(False)
        axes.spines.bottom.set_visible(False)

    return svg("stages", "wall time of each stage", draw, height=max(130, 40 + 26 * len(sums)))


def load(report: Report) -> str:
    """What each rank scored, and how long it worked and waited."""
    ranks = report["rank_loads"]
    if not ranks:
        return ""
    scored = np.array([rank["weights_scored"] for rank in ranks], dtype=float)
    worked = np.array([(rank["score_seconds"] or 0) + (rank["train_seconds"] or 0) for rank in ranks], dtype=float)
    waited = np.array([rank["wait_seconds"] or 0 for rank in ranks], dtype=float)
    places = np.arange(len(ranks))

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, sharex=True)
        _columns(top, scored, color=PRUNED)
        top.axhline(scored.mean(), color=INK, linewidth=1, linestyle=DASHES)
        top.set_title("weights scored; the dashed line is the mean")
        top.yaxis.set_major_formatter(EngFormatter(sep=" "))
        _columns(bottom, worked, color=PRUNED, label="worked")
        _columns(bottom, waited, worked, facecolor=BAND, edgecolor=DENSE, hatch="////", label="waited")
        bottom.set_title("seconds")
        bottom.set_xlabel("rank")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
        bottom.set_xlim(places.min() - 0.6, places.max() + 0.6)
        for axes in (top, bottom):
            axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
            axes.margins(y=0.1)
            axes.set_ylim(bottom=0)
        bottom.legend(loc="lower right", bbox_to_anchor=(1, 1.04), ncols=2)

    return svg("load", "load of each rank", draw, height=300)


def _columns(axes: Axes, heights: Column, bottom: Column | None = None, **style: Any) -> None:
    """A bar for each rank; above 64 one outline around all, since bars as thin as a pixel shimmer."""
    base = np.zeros(len(heights)) if bottom is None else bottom
    if len(heights) <= 64:
        axes.bar(np.arange(len(heights)), heights, bottom=base, width=min(0.62, 0.1 * len(heights)), **style)
    else:
        edges = np.arange(len(heights) + 1) - 0.5
        axes.stairs(base + heights, edges, baseline=base, fill=True, linewidth=0, **style)


def _metric(evaluation: Evaluation, name: str) -> float | None:
    value = evaluation["metrics"].get(name)
    return value if value is not None and math.isfinite(value) else None


def _baseline(axes: Axes, report: Report, scale: float) -> None:
    """The dense network's figure as a dashed line with its name on it."""
    for evaluation in report["evaluations"]:
        value = _metric(evaluation, report["primary"])
        if evaluation["when"] == "dense" and value is not None:
            axes.axhline(scale * value, color=DENSE, linewidth=1.2, linestyle=DASHES, zorder=1)
            note(axes, "dense", (1, scale * value), ("axes fraction", "data"), (5, 0), va="center")


def _short(name: str, length: int) -> str:
    """The end of a name says more than its beginning: model.encoder.layers.0.attention.weight."""
    return name if len(name) <= length else "…" + name[1 - length :]
