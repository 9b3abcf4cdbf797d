"""What a check finds, and how findings are printed and summed up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Finding", "exit_code", "print_findings"]

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, what was found, and unless it is ok, the fix."""

    status: Status
    what: str
    found: str
    fix: str = ""


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if anything failed, else 0; warnings are no failure."""
    return int(any(finding.status == "FAIL" for finding in findings))


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """A line for each finding, with the fix below it; and the sum of it all."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        found = Text(finding.found)
        if finding.fix:
            found.append(f"\nfix: {finding.fix}", style="bold")
        table.add_row(Text(finding.status, style=styles[finding.status]), Text(finding.what), found)
    console.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in styles}
    ready = "hpcprune cannot run as it should here" if counts["FAIL"] else "hpcprune can run here"
    console.print(Text(f"{ready}: {counts['ok']} ok, {counts['warn']} warn, {counts['FAIL']} FAIL"))
