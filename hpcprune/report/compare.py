"""Several runs side by side: a table on the terminal, and a page with the table and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpcprune.errors import show
from hpcprune.report.format import Report
from hpcprune.report.page import render
from hpcprune.report.units import as_change, as_metric, as_percent, plain
from hpcprune.report.verdicts import first_and_last, ratios
from hpcprune.report.write import write_text

__all__ = ["Line", "compare", "print_comparison", "write_comparison"]

SHOWN = ("file", "FLOPs a sample", "time a sample")  # of the result table's figures


class Line(NamedTuple):
    """A run: its folder, the keys of its job in which it is unlike others, and its figures, all as text."""

    run: str
    differs: str
    sparsity: str
    dense: str
    pruned: str
    change: str
    ratios: tuple[str, ...]


def compare(reports: Sequence[Report]) -> list[Line]:
    """A line for each run, by sparsity."""
    jobs = [_flat(report["job"]) for report in reports]
    everywhere = {key for job in jobs for key in job} - {"out"}
    differing = [key for key in sorted(everywhere) if len({show(job.get(key)) for job in jobs}) > 1]
    lines = []
    for report, job in sorted(zip(reports, jobs, strict=True), key=lambda each: sparsity_of(each[0])):
        name = report["primary"]
        dense, pruned = (metrics.get(name) for metrics in first_and_last(report))
        found = ratios(report)
        lines.append(
            Line(
                plain(report["out"]),
                plain(", ".join(f"{key} {show(job.get(key))}" for key in differing)),
                as_percent(sparsity_of(report)),
                as_metric(dense, name),
                as_metric(pruned, name),
                as_change(name, dense, pruned),
                tuple(found[label] for label in SHOWN),
            )
        )
    return lines


def sparsity_of(report: Report) -> float:
    """Of the result."""
    return report["evaluations"][-1]["sparsity"]


def _flat(job: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in job.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def print_comparison(reports: Sequence[Report], console: Console) -> None:
    """The table, on a terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    name = plain(reports[0]["primary"])
    table.add_column("", no_wrap=True)
    for heading in ("sparsity", f"{name} dense", "pruned", "change", *(label.split()[0] for label in SHOWN)):
        table.add_column(heading, justify="right")
    for line in compare(reports):
        table.add_row(*map(Text, (line.differs or line.run, *line[2:6], *line.ratios)))
    console.print(table)


def write_comparison(reports: Sequence[Report], path: Path) -> None:
    """The page, one file that loads nothing. Raises JobError if it cannot be written."""
    from hpcprune.report.plots import compared

    text = render(
        "compare.html.j2",
        lines=compare(reports),
        name=reports[0]["primary"],
        shown=SHOWN,
        figure=compared(reports),
    )
    write_text(path, text)
