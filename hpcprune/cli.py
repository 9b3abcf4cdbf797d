"""The commands. Each imports what it needs when it runs, so that those that need no torch start at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpcprune.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["cli"]

STOPPED = 75  # the exit status of a run that was told to stop: "temporary failure, try again" in sysexits.h
UNLIMITED = 1000  # characters in a line

JOB = click.argument("job", type=click.Path(path_type=Path))
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Prune trained PyTorch networks across MPI ranks, and retrain them sending the survivors alone."""


@cli.command()
@JOB
@OVERRIDES
@click.option("--out", help="The run's folder; wins over the job file's.")
@click.option("-v", "--verbose", is_flag=True, help="Show every rank, with its number.")
def run(job: Path, overrides: tuple[str, ...], out: str | None, verbose: bool) -> None:
    """Run JOB, on all ranks that mpirun or srun has started; go on if it was cut.

    Keys of the job file can be given as KEY=VALUE: prune.sparsity=0.98
    """
    from hpcprune.job_file import load_job
    from hpcprune.world import World

    world = World.of(None)
    with world.guard():
        world.check_size()
        loaded = world.lead(lambda: load_job(job, overrides, out), "reading the job file")
        world.timeout = loaded.world.timeout

        from hpcprune.stop import StopFlag

        stop = StopFlag(loaded.world.stop_signal)

        from hpcprune.folder import RunFolder
        from hpcprune.progress import Display
        from hpcprune.report.verdicts import check_goal

        folder, display = RunFolder(loaded.out), Display(world, verbose)
        world.lead(lambda: folder.check(loaded), "looking at the run's folder")
        if not world.bcast(folder.complete, "asking whether the run is complete"):
            from hpcprune.run import Run, StoppedError

            try:
                Run(loaded, world, display, stop, folder).go()
            except StoppedError as stopped:
                display.say(str(stopped))
                sys.exit(STOPPED)
        else:
            display.say(
                f"{folder.path} holds this run, complete; its result is below. To start afresh: rm -r {folder.path}"
            )
        if world.rank == 0:
            from hpcprune.report.table import print_table

            print_table(folder.read_report(), display.console)
        world.lead(lambda: check_goal(folder.read_report()), "asking whether the goal is met")


@cli.command()
@JOB
@OVERRIDES
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Plan for this many ranks.")
def plan(job: Path, overrides: tuple[str, ...], ranks: int) -> None:
    """Show which rank would score what, what would travel, and the memory a rank needs."""
    from hpcprune.job_file import load_job
    from hpcprune.world import World

    world = World.alone()
    with world.guard():
        loaded = load_job(job, overrides)

        from hpcprune.plan import make_plan, print_plan
        from hpcprune.prepare import prepare

        print_plan(make_plan(loaded, prepare(loaded, world), ranks), _console())


def _console() -> Console:
    """Standard output; a file or a pipe gets lines as long as they come."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else UNLIMITED)


class _WithFlags(click.Command):
    """A command that leaves what is behind `--` to another program, as ctx.meta["flags"]."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta["flags"] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- SBATCH FLAGS]"]


@cli.command(cls=_WithFlags)
@JOB
@OVERRIDES
@click.option("--nodes", type=click.IntRange(1), help="On how many nodes; flags behind -- say the rest.")
@click.option("--sweep", metavar="KEY=A,B,...", help="A run for each value of a key, and a comparison of all.")
@click.option("--dry-run", is_flag=True, help="Print the batch script, and submit nothing.")
@click.pass_context
def submit(
    ctx: click.Context, job: Path, overrides: tuple[str, ...], nodes: int | None, sweep: str | None, dry_run: bool
) -> None:
    """Submit JOB to Slurm, in a batch script.

    What is behind -- goes to sbatch: -- --ntasks-per-node=2 --time=2:00:00
    """
    from hpcprune import submit as slurm

    swept = slurm.parse_sweep(sweep) if sweep else None
    out = slurm.run_folder(job, overrides, swept)
    flags = [*([f"--nodes={nodes}"] if nodes else []), *ctx.meta["flags"]]
    text = slurm.batch_text(slurm.template("prune.sh"), [str(job), *overrides], flags, swept, out)
    after, page = slurm.account_flags(flags), f"{out}/comparison.html"

    def comparison(number: str) -> str:
        assert swept is not None
        folders = [swept.folder(out, value) for value in swept.values]
        arguments, dependency = [*folders, "--out", page], f"--dependency=afterany:{number}"
        return slurm.batch_text(slurm.template("compare.sh"), arguments, [dependency, *after])

    if dry_run:
        print(text + (comparison("JOB") if swept else ""), end="")
        return
    number = slurm.sbatch(text, flags)
    log = f"hpcprune-{number}{'_*' if swept else ''}.out"
    print(f"job {number}; it writes into {log}, and `hpcprune status {out}` says how far it is")
    if swept:
        last = slurm.sbatch(comparison(number), after)
        print(f"job {last} compares the runs when all have ended: hpcprune-compare-{last}.out, {page}")


@cli.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[DIR]...")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def status(folders: tuple[Path, ...], as_json: bool) -> None:
    """Show how far runs are.

    DIR is a run's folder, or one with runs in it; runs/ if none is given.
    """
    from hpcprune import status as runs

    statuses = runs.look(runs.find_runs(folders or (Path("runs"),)))
    if as_json:
        print(runs.as_json(statuses))
    else:
        runs.print_statuses(statuses, _console())


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(path: Path, as_json: bool) -> None:
    """Verify a run's folder, a checkpoint's, or a file. Exit status 0: all is well; 1: something is not."""
    from hpcprune.checkpoint.verify import print_findings, verify

    sys.exit(0 if print_findings(verify(path), as_json) else 1)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
def show(path: Path) -> None:
    """Show what a checkpoint holds."""
    from hpcprune.checkpoint.show import show

    show(path)


@cli.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
def diff(first: Path, second: Path) -> None:
    """Compare two checkpoints. Exit status 0: they hold the same; 1: they differ."""
    from hpcprune.checkpoint.diff import diff

    sys.exit(diff(first, second))


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write a page with the table and a plot, such as all.html."
)
def compare(folders: tuple[Path, ...], out: Path | None) -> None:
    """Show the results of several runs side by side.

    DIR is a run's folder, or one with runs in it. Exit status 1: some are not complete.
    """
    from hpcprune.folder import RunFolder
    from hpcprune.report.compare import print_comparison, write_comparison
    from hpcprune.status import find_runs

    there = [folder for folder in folders if folder.is_dir()]
    for folder in set(folders) - set(there):
        print(f"{folder}: no such folder, left out")
    runs = [RunFolder(path) for path in find_runs(there)]
    reports = [run.read_report() for run in runs if run.complete]
    for run in runs:
        if not run.complete:
            print(f"{run.path}: not complete, left out")
    if reports:
        print_comparison(reports, _console())
    if reports and out is not None:
        write_comparison(reports, out)
    sys.exit(0 if len(reports) == len(runs) and len(there) == len(folders) else 1)


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", "kind", required=True, help="safetensors, torch, h5, or hf: a folder for transformers.")
@click.argument("target", type=click.Path(path_type=Path))
def export(source: Path, kind: str, target: Path) -> None:
    """Write a checkpoint's weights, dense, for other programs to read."""
    from hpcprune.export import export

    export(source, kind, target)


@cli.command()
@click.option("--launch", is_flag=True, help="Only see whether the ranks that were started find each other.")
def doctor(launch: bool) -> None:
    """Try one of each thing that a run needs, and say what works, what does not, and the fix."""
    from hpcprune.world import World

    world = World.of(None, timeout=60)
    with world.guard():
        if launch:
            world.check_size()
            world.barrier("launch")
            return

        from hpcprune.doctor.finding import exit_code, print_findings
        from hpcprune.doctor.visit import run_doctor

        findings = run_doctor(world)
        if world.rank == 0:
            print_findings(findings, _console())
        sys.exit(exit_code(findings))
