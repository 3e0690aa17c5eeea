"""Whether fastmerge became slower: two runs' ratios to the same baselines, so that different machines compare.

``python -m benchmarks.compare BASE.json NEW.json`` prints a table and ends with 1 where a ratio grew beyond the tolerance,
where a step launches more than it did, where a contender that ran in BASE raised in NEW or is gone, or where the two have
nothing in common.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import EXACT, MEASURES, Contenders, Ratio, cases, ratio, read
from fastmerge.reporting.tables import table

TOLERANCE = 0.1


@dataclass(frozen=True)
class Change:
    """One contender's ratio to its case's reference, in both runs.

    Attributes:
        case, contender, reference, measure: what is compared.
        base, new: the ratios; None where there is none in that run.
        error: of the new run, if the contender raised there.
    """

    case: str
    contender: str
    reference: str
    measure: str
    base: Ratio
    new: Ratio | None
    error: str | None = None

    def verdict(self, tolerance: float) -> str:
        """One word: failed, missing, worse, better or same."""
        if self.error is not None:
            return "failed"
        if self.new is None:
            return "missing"
        tolerance = 0 if self.measure in EXACT else tolerance
        if self.new.value > self.base.value * (1 + tolerance):
            return "worse"
        return "better" if self.new.value * (1 + tolerance) < self.base.value else "same"


def compare(base: dict[str, Contenders], new: dict[str, Contenders]) -> Iterator[Change]:
    """Every contender of every case of BASE that NEW ran, by every measure that BASE has of it.

    The reference of a case is its first contender with a figure in both runs.
    """
    for case, before in base.items():
        after = new.get(case, {})
        if not any(key in contender for contender in after.values() for key in (*MEASURES.values(), "error")):
            continue  # another machine: it has no such device
        for measure, key in MEASURES.items():
            reference = next((n for n, c in before.items() if c.get(key) and after.get(n, {}).get(key)), None)
            for name in before:
                if reference is None or name == reference or "unavailable" in after.get(name, {}):
                    continue
                ratio_before = ratio(before, name, reference, measure)
                if ratio_before is not None:
                    error = after.get(name, {}).get("error")
                    yield Change(
                        case, name, reference, measure, ratio_before, ratio(after, name, reference, measure), error
                    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of a ratio's growth (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        base, new = (cases(read(path)) for path in (options.base, options.new))
    except (OSError, ValueError) as error:
        print(f"bench-check: {error}", file=sys.stderr)
        return 2
    changes = list(compare(base, new))
    if not changes:
        print("bench-check: the two runs have no case with two contenders in common", file=sys.stderr)
        return 1
    header = ["case", "contender", "over", "measure", "base", "new", "change", "verdict"]
    print(table(header, [_row(change, options.tolerance) for change in changes]))
    bad = [change for change in changes if change.verdict(options.tolerance) in ("failed", "missing", "worse")]
    for change in bad:
        if change.error:
            print(f"{change.case}, {change.contender}: {change.error}")
    print(f"{len(bad)} of {len(changes)} ratios are worse by more than {options.tolerance:.0%}, missing or failed.")
    return 1 if bad else 0


def _row(change: Change, tolerance: float) -> list[str]:
    new = change.new
    grown = "" if new is None else f"{new.value / change.base.value - 1:+.1%}"
    figures = [f"{change.base.value:.3f}", "–" if new is None else f"{new.value:.3f}", grown]
    return [change.case, change.contender, change.reference, change.measure, *figures, change.verdict(tolerance)]


if __name__ == "__main__":
    sys.exit(main())
