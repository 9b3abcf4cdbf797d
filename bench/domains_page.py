"""docs/results.md: a table a job, and below it where pruning fails, both from the results that are there."""

from __future__ import annotations

import ast
import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from domains_runs import DENSE, Domain, Result, Results, run_name

from hpcprune.report.units import as_change, as_metric
from hpcprune.report.write import write_text

HEAD = """# Results: how far each job can be pruned

The metric of each job under `jobs/` on its test data: the dense network's, and that of networks pruned from it in one
round, without retraining and with as much of it as the job's file has a round. Means over seeds, ± their standard
deviation. `random` is the control; the third criterion is the best of several others, in its own scope. In several
rounds, as the job files prune, networks keep more. `python bench/domains.py` makes this page, and
[results.jsonl](results.jsonl), which has the figures of every run.
"""


class Cell(NamedTuple):
    """A figure over the seeds that have it; `seeds` is how many the table has."""

    values: list[float]
    seeds: int

    @classmethod
    def of(cls, results: Sequence[Result], figure: str, seeds: int) -> Cell:
        values = [getattr(each, figure) for each in results]
        return cls([math.nan if value is None else value for value in values], seeds)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    def text(self, metric: str) -> str:
        number, unit, _ = as_metric(self.mean, metric).partition(" %")
        if len(self.values) > 1:
            spread = statistics.stdev(self.values)
            number += f" ± {100 * spread:.2f}" if unit else f" ± {spread:.2g}"
        return number + unit + (f" ({len(self.values)} of {self.seeds})" if 0 < len(self.values) < self.seeds else "")


class Row(NamedTuple):
    """A criterion, without or with retraining, at each sparsity."""

    criterion: str
    retraining: str
    cells: dict[float, Cell]

    def __str__(self) -> str:
        return f"{self.criterion} {self.retraining} retraining"


class Table(NamedTuple):
    """A job's figures."""

    domain: Domain
    metric: str
    higher_is_better: bool
    dense: Cell
    rows: list[Row]

    @classmethod
    def of(cls, results: Results, domain: Domain) -> Table:
        seeds = results.seeds(domain)
        dense = results.of(domain, DENSE)
        rows = []
        for criterion in results.criteria(domain, seeds[0]):
            found = {sparsity: results.of(domain, run_name(criterion, sparsity)) for sparsity in domain.sparsities}
            trained = any(each.trained for there in found.values() for each in there)
            for retraining, figure in (("without", "pruned"), ("with", "retrained"))[: 1 + trained]:
                cells = {sparsity: Cell.of(there, figure, len(seeds)) for sparsity, there in found.items()}
                if any(cell.values for cell in cells.values()):
                    rows.append(Row(criterion, retraining, cells))
        figure = Cell.of(dense, "retrained", len(seeds))
        return cls(domain, dense[0].metric, dense[0].higher_is_better, figure, rows)

    def lines(self) -> Iterator[str]:
        sparsities = self.domain.sparsities
        yield f"| {self.metric}, dense {self.dense.text(self.metric)} | retraining | {join(map(percent, sparsities))} |"
        yield "|---|---|" + "---|" * len(sparsities)
        for row in self.rows:
            figures = join(row.cells[sparsity].text(self.metric) for sparsity in sparsities)
            yield f"| {row.criterion} | {row.retraining} | {figures} |"

    def as_good(self, cell: Cell, limit: float) -> bool:
        return cell.mean is not None and (cell.mean >= limit if self.higher_is_better else cell.mean <= limit)

    def kept(self) -> Iterator[str]:
        """Up to which sparsity, from the lowest on, each criterion is about as good as dense."""
        assert self.dense.mean is not None
        tolerance = self.domain.tolerance
        bound = self.dense.mean - tolerance if self.higher_is_better else self.dense.mean + tolerance
        allowed = as_change(self.metric, 0.0, tolerance).lstrip("+")
        for retraining in dict.fromkeys(row.retraining for row in self.rows):
            told = []
            for row in self.rows:
                good = itertools.takewhile(lambda s, row=row: self.as_good(row.cells[s], bound), row.cells)
                highest = max(good, default=None)
                if row.retraining == retraining:
                    told.append(f"{row.criterion} {'nowhere' if highest is None else f'up to {percent(highest)}'}")
            yield f"- At most {allowed} worse than dense, {retraining} retraining: {', '.join(told) or 'none'}."

    def lost(self, constant: float) -> Iterator[str]:
        """Where a predictor would do that has learned nothing but what to say always."""
        told = []
        for row in self.rows:
            means = {sparsity: cell.mean for sparsity, cell in row.cells.items() if cell.mean is not None}
            worse = [
                percent(sparsity)
                for sparsity, mean in means.items()
                if math.isclose(mean, constant, rel_tol=1e-6) or not self.as_good(row.cells[sparsity], constant)
            ]
            if worse:
                told.append(f"{row} at {', '.join(worse)}")
        same = as_metric(constant, self.metric)
        yield f"- No better than a predictor that always says the same ({same}): {'; '.join(told) or 'none'}."


def write_page(results: Results, domains: Sequence[Domain], page: Path) -> None:
    """The results of all jobs of which there are any. Raises JobError if it cannot be written."""
    there = [domain for domain in domains if results.seeds(domain)]
    write_text(page, "\n".join([HEAD, *("\n".join(part(results, domain)) for domain in there)]))


def part(results: Results, domain: Domain) -> Iterator[str]:
    """The lines of a job."""
    table, seeds = Table.of(results, domain), results.seeds(domain)
    dense = results.of(domain, DENSE)
    first = dense[0]
    where = " and ".join(dict.fromkeys(f"{each.cpu}, torch {each.torch}" for each in dense))
    told = ast.get_docstring(ast.parse((domain.file.parent / "task.py").read_text())) or ""
    yield f"## {domain.name}\n"
    yield " ".join(told.partition("\n\n")[0].split())
    yield f"{first.parameters:,} parameters, {first.prunable:,} of them prunable;"
    yield f"{count(len(seeds), 'seed')}, on {count(first.ranks, 'rank')} ({where}):"
    given = f" (with {' '.join(f'`{each}`' for each in domain.given)})" if domain.given else ""
    yield f"`python bench/domains.py --jobs {domain.name} --seeds {len(seeds)} --ranks {first.ranks}`{given}\n"
    yield from table.lines()
    yield ""
    yield from table.kept()
    if first.constant is not None:
        yield from table.lost(first.constant)
    sought = results.sought(domain, seeds[0])
    if len(sought) > 1:
        figures = ", ".join(f"{each} {as_metric(result.retrained, table.metric)}" for each, result in sought.items())
        yield f"- Other criteria at {percent(domain.sought_at)}, seed {seeds[0]}, with retraining: {figures}."
    yield ""


def join(cells: Iterator[str]) -> str:
    return " | ".join(cells)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"


def percent(share: float) -> str:
    return f"{100 * share:g} %"
