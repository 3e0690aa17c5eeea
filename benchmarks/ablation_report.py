"""What docs/ablations.md shows of the results of benchmarks/ablations.py."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from benchmarks.ablation_variants import BASE
from fastmerge.reporting.tables import table

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "ablations"
_CHANCE = 0.02  # at most so often differences of zero are in bold


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All results, in the order of the files' names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def blocks(every: list[dict[str, Any]]) -> dict[str, str]:
    """What docs/ablations.md shows of the results."""
    return {"overview": overview(every), "recipes": "\n\n".join(map(section, every))}


def overview(every: list[dict[str, Any]]) -> str:
    """A row per choice, with what it changes of the student in each recipe."""
    titles = [title(results) for results in every]
    cells: dict[str, dict[str, str]] = {}
    for column, results in zip(titles, every, strict=True):
        for name, variant in results["variants"].items():
            if name.split(" (")[0] != BASE:
                row = cells.setdefault(_choice(name), {})
                row[column] = _difference(variant["replicates"], _compared(results["variants"], variant), "student")
    rows = [[name, *(row.get(column, "–") for column in titles)] for name, row in cells.items()]
    return table(["choice", *titles], rows, markdown=True)


def title(results: dict[str, Any]) -> str:
    """The recipe and its length."""
    return f"{results['config']['name']}, {results['config']['epochs']:,} epochs"


def _choice(name: str) -> str:
    """The name of a variant, where it has a number that depends on the recipe without it."""
    return "gate_lr fitted" if name.startswith("gate_lr ") else name


def _compared(found: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    """The replicates that a variant is compared with."""
    shared = variant.get("compared_with")
    replicates: dict[str, Any] = found[shared]["replicates"] if shared else base_of(found)
    return replicates


def section(results: dict[str, Any]) -> str:
    """One recipe: what was run, and a row per variant."""
    config, made = results["config"], results["environment"]
    higher = config["metric"] == "test_accuracy"
    header = ["variant", "n", "student", "difference", "compressed", "P[g > 0]", "seconds"]
    rows = []
    for name, variant in results["variants"].items():
        found = variant["replicates"]
        base = _compared(results["variants"], variant)
        opened = [value for replicate in found.values() for value in replicate["open_probability"].values()]
        rows.append(
            [
                name,
                str(len(found)),
                f"{statistics.fmean(replicate['student'] for replicate in found.values()):.4f}",
                _difference(found, base, "student"),
                _difference(found, base, "compressed"),
                f"{min(opened):.2f}–{max(opened):.2f}",
                f"{statistics.fmean(replicate['seconds'] for replicate in found.values()):.1f}",
            ]
        )
    teachers = statistics.fmean(value for pair in results["teachers"].values() for value in pair)
    meanings = "\n".join(f"- `{name}`: {variant['what']}." for name, variant in results["variants"].items())
    dtype = f", {config['autocast']}" if "autocast" in config else ""
    ran = (
        f"Test {'accuracy, higher' if higher else 'loss, lower'} is better. {config['epochs']} epochs in all, "
        f"{config['budget']:g} of the recipe's, {config['train_samples']} training samples in batches of "
        f"{config['batch_size']}{dtype}. The teachers' mean is "
        f"{teachers:.4f}. *seconds* is the time of merge stage and fine-tuning per replicate, on one core of a shared "
        f"{made['cpu']['name']}, PyTorch {made['torch']}."
    )
    return "\n\n".join([f"## {title(results)}", ran, table(header, rows, markdown=True), meanings])


def base_of(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each replicate the mean over the runs of the paper's setting that it has."""
    runs = [variant["replicates"] for name, variant in found.items() if name.split(" (")[0] == BASE]
    return {
        key: {
            score: statistics.fmean(run[key][score] for run in runs if key in run)
            for score in ("student", "compressed")
        }
        for key in runs[0]
    }


def _difference(found: dict[str, Any], base: dict[str, Any], score: str) -> str:
    """Mean and standard error of the paired differences to the base."""
    mean, error = paired(found, base, score)
    if math.isnan(error):
        return f"{mean:+.4f}"
    text = f"{mean:+.4f} ± {error:.4f}"
    clear = student_t.isf(_CHANCE / 2, sum(key in base for key in found) - 1)  # standard errors
    return f"**{text}**" if abs(mean) >= clear * error > 0 else text


def paired(found: dict[str, Any], base: dict[str, Any], score: str) -> tuple[float, float]:
    """Mean over the replicates that both have of ``found - base``, and its standard error, NaN for one replicate."""
    differences = [found[key][score] - base[key][score] for key in found if key in base]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), error
