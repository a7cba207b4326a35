"""Command line of the package, ``python -m ekfac``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ekfac.bench import RATES, BenchError, compare, read_problem, summary
from ekfac.kernels.cuda.dispatch import status
from ekfac.matrices.eigen import DampingMode
from ekfac.report import ReportError, read_subject, write_report
from ekfac.report.report_input import require_other_file


def parser() -> argparse.ArgumentParser:
    """Return the parser; every subcommand sets ``run``."""
    main = argparse.ArgumentParser(
        prog="python -m ekfac", description="K-FAC and EKFAC for PyTorch."
    )
    commands = main.add_subparsers(title="commands", metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="write an HTML page about an optimizer's curvature",
        description=(
            "Write one self-contained HTML page about the curvature that a KFAC or "
            "EKFAC optimizer has gathered, layer by layer. SUBJECT is a checkpoint "
            "(optimizer.state_dict(), or anything nested that contains it, saved with "
            "torch.save), or a Python script that leaves 'optimizer' as a global name, "
            "or steps one, and optionally 'data' (batches of inputs and targets), "
            "'loss_fn' and 'monitor'. The script runs with the arguments after '--'. "
            "Needs matplotlib."
        ),
    )
    report.add_argument("subject", type=Path, metavar="SUBJECT")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    report.add_argument(
        "--damping-mode",
        choices=get_args(DampingMode),
        default="adaptive",
        help="how the optimizer of a checkpoint means its damping (default: adaptive)",
    )
    report.set_defaults(run=run_report)
    bench = commands.add_parser(
        "bench",
        help="compare AdamW, Muon and EKFAC on a model of your own for a minute",
        description=(
            "Train copies of a model with AdamW, Muon and EKFAC, at a few learning "
            "rates each, for equal shares of the time, and print loss, time and memory "
            "of the best. PROBLEM is MODULE:FACTORY or FILE.py:FACTORY, which "
            "returns the model, the batches (x, y) and a loss of (outputs, y)."
        ),
    )
    bench.add_argument("problem", metavar="PROBLEM")
    bench.add_argument(
        "--seconds", type=float, default=60.0, help="time of all runs (default: 60)"
    )
    bench.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=list(RATES),
        help="rates to try, in AdamW's units",
    )
    bench.set_defaults(run=run_bench)
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


def run_report(options: argparse.Namespace) -> int:
    """Write the report; return the exit status."""
    try:
        require_other_file(options.subject, options.output)
        subject = read_subject(
            options.subject,
            damping_mode=options.damping_mode,
            arguments=options.arguments,
        )
        write_report(subject, options.output, progress=sys.stderr.isatty())
    except (ReportError, ModuleNotFoundError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != "matplotlib":
            text = str(error.__cause__ or "")
            if "matplotlib" not in text and "matplotlib" not in str(error):
                raise
        print(f"python -m ekfac report: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Print the comparison; return the exit status."""
    if not options.seconds > 0 or not all(lr > 0 for lr in options.lr):
        print(
            "python -m ekfac bench: --seconds and --lr must be positive.",
            file=sys.stderr,
        )
        return 2
    try:
        problem = read_problem(options.problem)
    except BenchError as error:
        print(f"python -m ekfac bench: {error}", file=sys.stderr)
        return 2
    print(summary(compare(problem, options.seconds, options.lr)))
    return 0


def run_kernels(options: argparse.Namespace) -> int:
    """Print the state of the kernels; return the exit status."""
    print(status(compile_all=options.compile))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; without one, print help."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Arguments after "--" are the script's.
    end = given.index("--") if "--" in given else len(given)
    options = parser().parse_args(given[:end])
    options.arguments = given[end + 1 :]
    if not hasattr(options, "run"):
        parser().print_help()
        return 0
    result: int = options.run(options)
    return result


if __name__ == "__main__":
    sys.exit(main())
