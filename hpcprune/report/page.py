"""report.html: one page that loads nothing, from report.html.j2 and the figures of plots.py."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from hpcprune.report.format import Report
from hpcprune.report.units import as_bytes, as_count, as_metric, as_percent, as_seconds, plain
from hpcprune.report.verdicts import findings, headline, layers_of_weights, metric_names, rows
from hpcprune.report.write import finite, write_text

__all__ = ["render", "write_html"]


def write_html(report: Report, path: Path) -> None:
    """Write report.html, one file that loads nothing. Raises JobError if it cannot be written."""
    from hpcprune.report import plots  # matplotlib takes half a second to import, and is needed here alone

    figures = {name: getattr(plots, name)(report) for name in plots.FIGURES}
    page = render(
        "report.html.j2",
        report=report,
        title=plain(Path(report["out"]).name or report["out"]),
        headline=headline(report),
        rows=rows(report),
        findings=findings(report),
        layers=layers_of_weights(report),
        figures=figures,
        metrics=metric_names(report),
        of_graph=list(report["evaluations"][0].get("graph", ())) if report["evaluations"] else [],
        job=yaml.safe_dump(finite(report["job"]), sort_keys=False, allow_unicode=True),
        again=_again(report),
    )
    write_text(path, page)


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file. Texts are escaped, and control characters taken out."""
    environment = Environment(
        loader=PackageLoader("hpcprune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value, keep="\n") if type(value) is str else value,
    )
    formats = (as_bytes, as_count, as_metric, as_percent, as_seconds)
    environment.filters.update({f.__name__.removeprefix("as_"): f for f in formats})
    return environment.get_template(template).render(**values)


def _again(report: Report) -> list[str]:
    """The commands that repeat the run and compare."""
    out = Path(report["out"])
    job, new = shlex.quote(f"{out}/job.yaml"), shlex.quote(f"{out}-again")
    models = " ".join(shlex.quote(f"{folder}/model.h5") for folder in (out, f"{out}-again"))
    return [
        f"OMP_NUM_THREADS={report['threads']} mpirun -n {report['ranks']} hpcprune run {job} --out {new}",
        f"hpcprune diff {models}",
    ]
