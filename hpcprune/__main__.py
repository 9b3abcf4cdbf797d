"""python -m hpcprune, and the `hpcprune` command."""

from __future__ import annotations

import os
import sys

import click

from hpcprune.cli import cli
from hpcprune.errors import HpcpruneError, JobError

__all__ = ["main"]


def main() -> None:
    """Run the command line; a user's mistake is one line, and the exit status says what kind it was."""
    try:
        sys.exit(cli.main(prog_name="hpcprune", standalone_mode=False))
    except HpcpruneError as error:
        print(f"hpcprune: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except click.UsageError as mistake:
        if "\n" in mistake.format_message():  # of `hpcprune` alone it is the whole help
            mistake.show()
            sys.exit(mistake.exit_code)
        _refuse(mistake)
    except click.Abort:
        sys.exit("hpcprune: interrupted")


def _refuse(mistake: click.UsageError) -> None:
    """Say what is wrong with the command line, once for all ranks, and exit."""
    from hpcprune.world import World, promised_size

    text = mistake.format_message().rstrip(".")
    if mistake.ctx is not None:
        usage = " ".join(mistake.ctx.get_usage().split()).removeprefix("Usage: ")
        text += f"; write: {usage} ({mistake.ctx.command_path} --help says more)"

    def refuse() -> None:
        raise JobError(text)

    several = (promised_size(os.environ)[1] or 1) > 1
    world = World.of(None) if several else World.alone()
    with world.guard():
        world.together(refuse, "reading the command line")


if __name__ == "__main__":
    main()
