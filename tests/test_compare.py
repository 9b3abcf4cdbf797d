"""Several runs side by side: which keys differ, what the figures say, and a page that any parser can read."""

from __future__ import annotations

import copy
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

from rich.console import Console

from hpcprune.report.compare import compare, print_comparison, write_comparison
from hpcprune.report.format import Report
from hpcprune.report.units import as_ratio
from tests.commands import Command
from tests.test_report import HTML, SVG, sample


def sweep() -> list[Report]:
    """Three runs that differ in sparsity, the sparsest first."""
    reports = []
    for sparsity in (0.95, 0.8, 0.9):
        report = sample(sparsity=sparsity)
        report["job"] = copy.deepcopy(report["job"])
        report["job"].setdefault("prune", {})["sparsity"] = sparsity
        report["out"] = report["job"]["out"] = f"runs/sweep/{sparsity}"
        reports.append(report)
    return reports


def test_lines_are_by_sparsity_and_name_what_differs() -> None:
    lines = compare(sweep())
    assert [line.run for line in lines] == ["runs/sweep/0.8", "runs/sweep/0.9", "runs/sweep/0.95"]
    assert [line.differs for line in lines] == [f"prune.sparsity {sparsity}" for sparsity in (0.8, 0.9, 0.95)]


def test_figures_are_those_of_the_reports() -> None:
    reports = sweep()
    (line,) = compare(reports[:1])
    last = reports[0]["evaluations"][-1]
    costs = reports[0]["costs"]
    assert line.differs == ""
    assert line.pruned == f"{100 * last['metrics']['accuracy']:.2f} %"
    assert line.ratios[1] == as_ratio(costs["pruned"]["flops"] / costs["dense"]["flops"])


def test_the_page_has_a_line_and_a_point_for_each_run(tmp_path: Path) -> None:
    write_comparison(sweep(), tmp_path / "all.html")
    root = ET.parse(tmp_path / "all.html").getroot()
    cells = ["".join(cell.itertext()) for cell in root.iter(f"{HTML}th")]
    assert {"runs/sweep/0.8", "runs/sweep/0.9", "runs/sweep/0.95"} <= set(cells)
    (figure,) = root.iter(f"{SVG}svg")
    assert len(list(figure.iter(f"{SVG}use"))) >= 3
    assert "http" not in "".join(value for e in root.iter() for key, value in e.items() if key in ("src", "href"))


def test_the_terminal_shows_the_same() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_comparison(sweep(), console)
    text = console.file.getvalue()
    for line in compare(sweep()):
        assert line.differs in text and line.sparsity in text and line.pruned in text


def test_runs_that_are_not_complete_are_left_out_and_told(hpcprune: Command, tmp_path: Path) -> None:
    for report in sweep():
        folder = tmp_path / Path(report["out"]).name
        folder.mkdir()
        (folder / "job.yaml").write_text("# digest: 00\n")
        (folder / "report.json").write_text(json.dumps(report))
    page = tmp_path / "all.html"
    done = hpcprune("compare", str(tmp_path), "--out", str(page))
    assert done.code == 0 and "prune.sparsity 0.95" in done.out and page.exists()
    (tmp_path / "0.9/report.json").unlink()
    done = hpcprune("compare", str(tmp_path))
    assert done.code == 1 and f"{tmp_path / '0.9'}: not complete, left out" in done.out
    assert "prune.sparsity 0.9 " not in done.out
