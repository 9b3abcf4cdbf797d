"""python -m hpcprune, and the `hpcprune` command."""

from __future__ import annotations

import sys

from hpcprune.cli import cli
from hpcprune.errors import HpcpruneError

__all__ = ["main"]


def main() -> None:
    """Run the command line; a user's mistake is one line, and the exit status says what kind it was."""
    try:
        cli.main(prog_name="hpcprune")
    except HpcpruneError as error:
        print(f"hpcprune: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
