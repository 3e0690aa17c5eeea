"""Print the table of a run, and write report.md and the plots into its directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmerge.cli import resume
from fastmerge.reporting.report import write_report

SUMMARY = "table and plots of a run's directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastmerge report``."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the --out of a run, merge or comparison")


def command(options: argparse.Namespace) -> None:
    """Prints the table and says where the rest is.

    Raises:
        FileNotFoundError, ValueError: As ``write_report``; of a run without results yet the message says how to go on.
    """
    unfinished = resume.unfinished(options.directory)
    try:
        print(write_report(options.directory))
    except FileNotFoundError as error:
        raise FileNotFoundError(unfinished or str(error)) from None
    name = "compare.md" if (options.directory / "compare.json").is_file() else "report.md"
    print(f"\n{options.directory / name} and plots written")
    if unfinished:
        print(unfinished)
