"""``python -m ekfac``: what the package does from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ekfac.kernels.status import status


def parser() -> argparse.ArgumentParser:
    """Return the parser; every subcommand sets ``run``."""
    main = argparse.ArgumentParser(
        prog="python -m ekfac", description="K-FAC and EKFAC for PyTorch."
    )
    commands = main.add_subparsers(title="commands", metavar="COMMAND")
    kernels = commands.add_parser(
        "kernels",
        help="show which CUDA kernels are available, compiled and used, and why not",
    )
    kernels.add_argument(
        "--compile",
        action="store_true",
        help="first compile and try every kernel on every CUDA device",
    )
    kernels.set_defaults(run=run_kernels)
    return main


def run_kernels(options: argparse.Namespace) -> int:
    """Print the state of the kernels; return the exit status."""
    print(status(compile_all=options.compile))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; without one, print help."""
    options = parser().parse_args(arguments)
    if not hasattr(options, "run"):
        parser().print_help()
        return 0
    result: int = options.run(options)
    return result


if __name__ == "__main__":
    sys.exit(main())
