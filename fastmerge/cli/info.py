"""Show what fastmerge finds here: versions, GPU, kernels, extension, DALI."""

from __future__ import annotations

import argparse
import json

from fastmerge.environment import info

SUMMARY = "versions, GPU, kernels, extension, DALI: what is there and what is not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastmerge info``."""
    parser.add_argument("--json", action="store_true", help="print JSON, as results.json holds it")


def command(options: argparse.Namespace) -> None:
    """Prints the environment."""
    found = info()
    print(json.dumps(found.data, indent=1) if options.json else found)
