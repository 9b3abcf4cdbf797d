"""Figures as text: bytes, seconds, counts, per cent; in a few digits, and the same on the page and on the terminal."""

from __future__ import annotations

import math

__all__ = [
    "DASH",
    "TIMES",
    "as_bytes",
    "as_change",
    "as_count",
    "as_metric",
    "as_percent",
    "as_ratio",
    "as_seconds",
    "as_short",
    "is_share",
    "plain",
]

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def plain(text: object, keep: str = "") -> str:
    """Text without control characters (terminal escapes, NUL, line ends), for a page or a terminal."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def is_share(name: str) -> bool:
    """Whether a metric is a part of one, shown in per cent; a higher one is better."""
    return name.lower() in ("accuracy", "f1", "precision", "recall") or name.startswith("f1 of ")


def as_metric(value: float | None, name: str) -> str:
    if value is None or not math.isfinite(value):
        return DASH if value is None else str(value)
    return f"{100 * value:.2f} %" if is_share(name) else f"{value:#.4g}".rstrip(".")


def as_change(name: str, old: float | None, new: float | None) -> str:
    """The difference, as a signed text; "" where there is none to give."""
    if old is None or new is None or not math.isfinite(new - old):
        return ""
    text = f"{100 * (new - old):+.2f} points" if is_share(name) else f"{new - old:+.3g}"
    return text.replace("-", MINUS, 1)


def as_percent(share: float) -> str:
    """Two decimals, or as many as it takes for what is not quite 100 % not to look so."""
    digits = 2
    while 0 < share < 1 and digits < 12 and f"{100 * share:.{digits}f}" in (f"{100:.{digits}f}", f"{0:.{digits}f}"):
        digits += 1
    return f"{100 * share:.{digits}f} %"


def as_count(value: float | None) -> str:
    """All digits, up to the nine that a column has room for."""
    return as_short(value) if value is None or value >= 1e9 else f"{value:,.0f}"


def as_short(value: float | None, base: str = "") -> str:
    """Three digits and a decimal prefix: 5.62 M."""
    if value is None:
        return DASH
    power = 0
    while abs(value) >= 999.5 and power < 5:
        value, power = value / 1000, power + 1
    digits = 0 if not power or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {['', 'k', 'M', 'G', 'T', 'P'][power]}{base}".rstrip()


def as_bytes(value: float | None) -> str:
    return as_short(value, "B")


def as_seconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    if value >= 3600:
        minutes = round(value / 60)
        return f"{minutes // 60} h {minutes % 60:02} min"
    if value >= 120:
        return f"{round(value) // 60} min {round(value) % 60:02} s"
    scale, unit = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "\N{MICRO SIGN}s")
    return f"{value * scale:#.3g}".rstrip(".") + f" {unit}"


def as_ratio(value: float) -> str:
    return f"{TIMES}{value:.2f}" if value >= 0.0995 else f"{TIMES}{value:#.2g}"
