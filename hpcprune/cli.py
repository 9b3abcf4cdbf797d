"""The commands. Each imports what it needs when it runs, so that those that need no torch start at once."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from hpcprune.version import __version__

__all__ = ["cli"]

STOPPED = 75  # the exit status of a run that was told to stop: "temporary failure, try again" in sysexits.h

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


@cli.command()
@JOB
@OVERRIDES
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Plan for this many ranks.")
def plan(job: Path, overrides: tuple[str, ...], ranks: int) -> None:
    """Show which rank would score what, what would travel, and the memory a rank needs."""
    from rich.console import Console

    from hpcprune.job_file import load_job
    from hpcprune.world import World

    world = World.alone()
    with world.guard():
        loaded = load_job(job, overrides)

        from hpcprune.plan import make_plan, print_plan
        from hpcprune.prepare import prepare

        print_plan(make_plan(loaded, prepare(loaded, world), ranks), Console())


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
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", "kind", required=True, help="safetensors, torch or h5.")
@click.argument("target", type=click.Path(path_type=Path))
def export(source: Path, kind: str, target: Path) -> None:
    """Write a checkpoint's weights, dense, for other programs to read."""
    from hpcprune.export import export

    export(source, kind, target)


@cli.command()
def doctor() -> None:
    """Try one of each thing that a run needs, and say what works, what does not, and the fix."""
    from rich.console import Console

    from hpcprune.doctor.finding import exit_code, print_findings
    from hpcprune.doctor.visit import run_doctor
    from hpcprune.world import World

    world = World.of(None, timeout=60)
    with world.guard():
        findings = run_doctor(world)
        if world.rank == 0:
            print_findings(findings, Console())
        sys.exit(exit_code(findings))
