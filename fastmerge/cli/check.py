"""Say whether trained networks can be merged: every problem at once, and how much there is to choose.

  fastmerge check --model resnet18 --model-args num_classes=10 --teachers a.safetensors b.pt
  fastmerge check --model mynets:SmallNet --teachers a.pt b.pt --input 3 32 32

The exit status is 1 where they can't be merged.
"""

from __future__ import annotations

import argparse

from fastmerge.channels.examples import example_batch
from fastmerge.cli.arguments import add_options, add_teachers, integer, load_teachers
from fastmerge.mergeability import check

SUMMARY = "whether networks can be merged, and every reason why not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastmerge check``."""
    add_teachers(parser.add_argument)
    parser.add_argument(
        "--input",
        nargs="+",
        type=integer(1),
        metavar="N",
        help="shape of one sample, such as 3 224 224, or 20 of a text; default fits the first layer",
    )
    add_options(parser.add_argument, names=("heads", "keep", "tie_streams"))


def command(options: argparse.Namespace) -> int:
    """Prints the report."""
    teachers = load_teachers(options)
    inputs = None if options.input is None else example_batch(teachers[0], options.input)
    asked = {"heads": options.heads, "keep": options.keep, "tie_streams": options.tie_streams}
    report = check(*teachers, example_inputs=inputs, **asked)
    print(report)
    return 0 if report.ok else 1
