"""How far each job under jobs/ can be pruned, by chance, by magnitude and by the best other criterion: docs/results.md.

    python bench/domains.py                                 # all jobs and seeds: hours
    python bench/domains.py --jobs mnist,news --seeds 1     # some of it
    python bench/domains.py --table                         # only docs/results.md, from docs/results.jsonl

A job's dense network is trained once a seed. Each other run prunes it in one round to one sparsity and retrains it as
the job's own file says, which gives the metric without and with retraining. It may be ended at any time: what has a
line in docs/results.jsonl is not run again, and what was cut goes on. A seed of which runs are missing is begun anew
where its dense network is no longer there.
"""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from domains_page import write_page
from domains_runs import Domain, Results, Runs, launch

from tests.conftest import ROOT

PAGE, FIGURES = ROOT / "docs/results.md", ROOT / "docs/results.jsonl"

# Not among the others: l1 and movement, which follow the dense training, and that is the same for all here.
DOMAINS = {
    domain.name: domain
    for domain in (
        Domain("mnist", ("lamp", "sensitivity", "fisher", "wanda"), 0.01),
        Domain("news", ("lamp", "sensitivity", "fisher"), 0.01),
        Domain("movielens", ("lamp", "sensitivity", "fisher"), 0.01),
        Domain("glosses", ("lamp", "sensitivity", "fisher"), 0.015),
        Domain("minilm", ("lamp", "sensitivity", "fisher", "wanda"), 0.01),
        Domain("cora", ("lamp", "sensitivity", "fisher"), 0.01),
        Domain("smollm2", ("wanda",), 3.0, sought_at=0.5, given=("task=task.py:Brief",)),
        Domain("smollm2", ("wanda",), 3.0, sparsities=(0.5,), sought_at=0.5, called="smollm2-long"),
        Domain("fashion", ("lamp", "sensitivity", "fisher", "wanda"), 0.005),
    )
}


@click.command()
@click.option("--jobs", default=",".join(DOMAINS), show_default=True, help="Which, with commas between them.")
@click.option("--seeds", default=3, type=click.IntRange(1), show_default=True, help="How many: 1, 2, ...")
@click.option("--ranks", default=2, type=click.IntRange(1), show_default=True)
@click.option("--out", default=ROOT / "runs/domains", type=click.Path(path_type=Path), help="The folder of the runs.")
@click.option("--table", is_flag=True, help="Run nothing, write docs/results.md again.")
def main(jobs: str, seeds: int, ranks: int, out: Path, table: bool) -> None:
    """Prune the jobs under jobs/ by several criteria, and write docs/results.md."""
    names = jobs.split(",")
    if unknown := [name for name in names if name not in DOMAINS]:
        raise click.BadParameter(f"--jobs: {', '.join(unknown)}: not among {', '.join(DOMAINS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    results = Results(FIGURES)
    runs = Runs(out, results, partial(launch, ranks), partial(print, flush=True))
    for seed in range(1, 1 if table else seeds + 1):
        for name in names:
            runs.measure(DOMAINS[name], seed, first=1)
            write_page(results, [*DOMAINS.values()], PAGE)
    write_page(results, [*DOMAINS.values()], PAGE)


if __name__ == "__main__":
    main()
