"""A figure as SVG text for a page that may be light or dark.

matplotlib draws in stand-in colours, one a role, which become CSS variables afterwards; text stays text, in the page's
font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcprune.report.units import plain

__all__ = ["BAND", "DASHES", "DENSE", "INK", "LINE", "MUTED", "OTHER", "PRUNED", "note", "svg"]

_ROLES = ("ink", "muted", "line", "dense", "pruned", "other", "band")
INK, MUTED, LINE, DENSE, PRUNED, OTHER, BAND = COLOURS = [f"#0102{i:02x}" for i, _ in enumerate(_ROLES)]
DASHES = (0, (4, 3))
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hpcprune",
    "text.parse_math": False,
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "hatch.linewidth": 0.7,
}


def note(
    axes: Axes, text: str, at: tuple[float, float], of: tuple[str, str], offset: tuple[int, int], **align: Any
) -> None:
    """Quiet text at a point in the coordinates `of`, moved by `offset` points."""
    axes.annotate(text, at, xycoords=of, xytext=offset, textcoords="offset points", color=MUTED, **align)


def svg(name: str, title: str, draw: Callable[[Figure], None], *, width: int = 440, height: int = 250) -> str:
    """Draw, and make the SVG part of a page: unique ids, CSS variables for colours, the page's font, a spoken title."""
    out = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has the glyphs that matplotlib's font lacks
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg")
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for role, colour in zip(_ROLES, COLOURS, strict=True):
        text = text.replace(colour, f"var(--{role})")
    text = re.sub(r"font: (?:\d+ )?([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'<g id="tip ([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    spoken = f'role="img" aria-label="{escape(plain(title))}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {spoken}>'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
