"""Writes the tables of README.md from committed results, so that no figure in it is typed by hand.

``python docs/render.py`` writes them; ``python docs/render.py --check`` only says whether they are up to date. A block
between ``<!-- results: NAME -->`` and ``<!-- end -->`` becomes the table of docs/results/NAME/results.json, one between
``<!-- coverage -->`` and ``<!-- end -->`` a summary of docs/coverage.json.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from fastmerge.reporting.results import read
from fastmerge.reporting.tables import caption, results_table

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
_BLOCK = re.compile(r"(<!-- (?:results: (?P<name>[\w-]+)|coverage) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """The text with every block filled anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_content(block['name'])}\n{block[3]}", text)


def _content(name: str | None) -> str:
    return _coverage() if name is None else _results(DOCS / "results" / name)


def _results(run: Path) -> str:
    results, _ = read(run)
    made = results["environment"]
    where = f"{made['cpu']['name']}, {made['cpu']['cores']} cores, Python {made['python']}, PyTorch {made['torch']}"
    return f"{results_table(results, markdown=True)}\n\n{caption(results)} {where}."


def _coverage() -> str:
    networks = json.loads((DOCS / "coverage.json").read_text(encoding="utf-8"))["networks"]
    merged = [network for network in networks.values() if network.get("compress_error") is not None]
    worst = max(max(network["open_error"], network["compress_error"]) for network in merged)
    return (
        f"{len(merged)} of the {len(networks)} torchvision classification networks measured so far merge; "
        f"the largest relative error over them is {worst:.0e}."
    )


def main() -> None:
    """Writes or checks README.md."""
    text = README.read_text(encoding="utf-8")
    new = rendered(text)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md differs from what docs/render.py makes of the results" if new != text else 0)
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
