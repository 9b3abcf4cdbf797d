"""The result as a table on the terminal, and where its files are."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpcprune.report.format import Report
from hpcprune.report.units import plain
from hpcprune.report.verdicts import findings, rows

__all__ = ["print_table"]


def print_table(report: Report, console: Console) -> None:
    """Print the result to a terminal, in 80 columns; plain text where the console is no terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=21)
    for heading in ("dense", "pruned", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows(report):
        style = {True: "green", False: "yellow", None: ""}[row.good]
        verdict = Text(row.verdict, style=style)
        if row.label.startswith("goal: "):  # as long as the user has written it
            console.print(Text(f"{row.label} ({row.pruned}): ") + verdict, soft_wrap=True)
        else:
            table.add_row(*map(Text, row[:4]), verdict)
    console.print(table)
    console.print()
    kept = [f"{finding.what} {finding.ratio}" for finding in findings(report) if not finding.partly]
    if kept:
        console.print(Text("Not smaller or faster: " + ", ".join(kept) + "; the report says why."))
    out = Path(report["out"])
    for path in (report["model_file"]["path"], out / "report.html", out / "report.json"):
        console.print(Text(plain(path)), soft_wrap=True)
