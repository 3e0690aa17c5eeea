"""Writes the tables of README.md and of the pages in docs/ from committed results: no figure in them is typed by hand.

``python docs/render.py`` writes them; ``python docs/render.py --check`` only says whether they are up to date. What stands
between one of these lines and ``<!-- end -->`` is made anew:

* ``<!-- EXPERIMENT: NAME -->``: what a script in benchmarks/ makes of its results, as one of its ``blocks``;
* ``<!-- results: NAME -->``: the table of docs/results/NAME/results.json;
* ``<!-- evidence -->``: one row for each file of docs/results/evidence;
* ``<!-- coverage -->``: a summary of docs/coverage.json;
* ``<!-- building -->``: how long big students take to build;
* ``<!-- benchmarks -->``: the targets, with the results in benchmarks/results;
* ``<!-- loaders -->`` and ``<!-- hours -->``: the loaders' figures there, and how long ImageNet takes by them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))  # benchmarks/ is not installed

from benchmarks import (  # noqa: E402
    ablation_report,
    building,
    evidence_report,
    hours,
    label_sets,
    layerwise,
    loader_tables,
    many_teachers,
    report,
    trials,
    widths,
)
from fastmerge.reporting.results import read  # noqa: E402
from fastmerge.reporting.tables import caption, differences_table, results_table  # noqa: E402

README = DOCS.parent / "README.md"
COVERAGE = DOCS / "coverage.md"
_BLOCK = re.compile(r"(<!-- (?P<kind>[a-z-]+)(: (?P<name>[\w -]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
# The blocks of pages on one experiment each, by name.
_EXPERIMENTS: dict[str, Callable[[], dict[str, str]]] = {
    "ablations": cache(lambda: ablation_report.blocks(ablation_report.load())),
    "benchmarks": cache(lambda: report.blocks(report.load())),
    "evidence": cache(lambda: evidence_report.blocks(evidence_report.load())),
    "label-sets": cache(lambda: label_sets.blocks(label_sets.load())),
    "layerwise": cache(lambda: layerwise.blocks(*layerwise.load())),
    "many-teachers": cache(lambda: many_teachers.blocks(many_teachers.load())),
    "widths": cache(lambda: widths.blocks(trials.load_records(widths.OUT))),
}


def rendered(text: str) -> str:
    """The text with every block filled anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_content(block['kind'], block['name'])}\n{block[5]}", text)


def _content(kind: str, name: str | None) -> str:
    if kind == "results":
        return _results(DOCS / "results" / str(name))
    if name is not None:
        return _EXPERIMENTS[kind]()[name]
    if kind == "evidence":
        return evidence_report.summary(evidence_report.load())
    if kind == "coverage":
        return _coverage()
    if kind == "building":
        return building.sentence(json.loads(building.OUT.read_text(encoding="utf-8")))
    make = {"loaders": loader_tables.tables, "hours": hours.tables, "benchmarks": report.readme}[kind]
    return make(report.load())


def _results(run: Path) -> str:
    results, _ = read(run)
    made = results["environment"]
    where = f"{made['cpu']['name']}, {made['cpu']['cores']} cores, Python {made['python']}, PyTorch {made['torch']}"
    tables = [results_table(results, markdown=True), differences_table(results, markdown=True)]
    return "\n\n".join([*filter(None, tables), f"{caption(results)} {where}."])


_ROUNDED = 1e-8  # an error that float64 does not explain


def _coverage() -> str:
    networks = json.loads((DOCS / "coverage.json").read_text(encoding="utf-8"))["networks"]
    merged = {name: network for name, network in networks.items() if network.get("compress_error") is not None}
    errors = {name: max(network["open_error"], network["compress_error"]) for name, network in merged.items()}
    exact = {name for name, network in merged.items() if network["dtype"] == "float64" and errors[name] < _ROUNDED}
    casting = sorted(name for name in errors.keys() - exact if merged[name]["dtype"] == "float64")
    worst = [max(errors[name] for name in part) for part in (exact, errors.keys() - exact)]
    return (
        f"{_share(networks, lambda name: '/' not in name)} classification networks of torchvision that were measured can be "
        f"merged, and {_share(networks, lambda name: '/' in name)} networks of other libraries (timm, Hugging Face's "
        "transformers, segmentation_models_pytorch, Ultralytics' YOLO, MONAI). The largest relative error among them is "
        f"{worst[0]:.0e} in float64, and {worst[1]:.0e} in float32, in which {', '.join(casting)} normalise in any case."
    )


def _share(networks: dict[str, Any], chosen: Callable[[str], bool]) -> str:
    merged = [network.get("compress_error") is not None for name, network in networks.items() if chosen(name)]
    return f"{sum(merged)} of the {len(merged)}"


def main() -> None:
    """Writes or checks the files."""
    pages = sorted({README, *DOCS.glob("*.md")})
    files = {page: rendered(page.read_text(encoding="utf-8")) for page in pages}
    if "--check" in sys.argv[1:]:
        old = [
            path.name for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text
        ]
        sys.exit(f"{' and '.join(old)} differ from what docs/render.py makes of the results" if old else 0)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
