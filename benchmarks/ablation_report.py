"""docs/ablations.md from the results of benchmarks/ablations.py."""

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

_INTRODUCTION = f"""\
What each choice of the merge is worth. Each *variant* changes one choice of the paper's setting (`{BASE}`). Every replicate has
two teachers of its own. All variants share them, and start with the same gates. `{BASE}` may be run several times with other
random draws of batches and gates, because chance alone changes a student by more than most choices do.

* *difference* is the variant's student less the mean of the `{BASE}` runs in the same replicate, as a mean over replicates ±
  its standard error. It is bold where Student's t-test gives p < {_CHANCE:g}. The rows of `{BASE}` have it too, and show the
  size of chance. Variants that only change the compressed student, or drop channels late, share the draws of the first `{BASE}`
  run until then, and are compared with that run.
* *compressed* is the same difference before fine-tuning.
* *P[g > 0]* is the range of the mean probability of an open gate, over channel groups and replicates, at the end of the merge
  stage. It should be 1/2.

Written by `python docs/render.py` from docs/results/ablations/, which `python -m benchmarks.ablations` fills. ResNet-20's
figures are older (commit 9851da4)."""

_SHORT = "How much each choice changes the student's score after fine-tuning; what each is stands below the tables."

_DEFAULTS = """\
**Defaults.** The paper's choice is the default unless another is clearly better in more than one recipe, or as good for less.
So the defaults are: λ, a draw for every sample, the head and the weights as compression gives them, and no early compaction
(which saves time). There are four exceptions. The recipes share the first two, which `--paper` turns off:

* Gates learn faster in a short stage (`gate_lr` is fitted to its steps), so that they open or close for good, and compression
  does not choose by chance. Here no difference is sure after fine-tuning. In the [evidence](evidence.md), where `paper` lacks
  it, the student on Imagewoof is surely better with it, and that on ResNet-20 nearly so.
* BatchNorm's statistics are estimated again at compression. This makes up for the accuracy that compression costs before
  fine-tuning (*compressed* below). After fine-tuning it changes nothing, since fine-tuning estimates them too.
* `merge()` links after a quarter of the merge stage, which costs less.
* `merge()` spends a sixth of its epochs on the merge stage, not half of them, which costs less, too, and is surely better on
  two data sets of the [evidence](evidence.md), which has measured both."""


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All results, in the order of the files' names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def page(every: list[dict[str, Any]]) -> str:
    """The whole file."""
    return "\n\n".join(["# Ablations", _INTRODUCTION, overview(every), *map(section, every)]) + "\n"


def overview(every: list[dict[str, Any]]) -> str:
    """A row per choice, with what it changes of the student in each recipe; and the defaults that follow."""
    titles = [title(results) for results in every]
    cells: dict[str, dict[str, str]] = {}
    for column, results in zip(titles, every, strict=True):
        for name, variant in results["variants"].items():
            if name.split(" (")[0] != BASE:
                row = cells.setdefault(_choice(name), {})
                row[column] = _difference(variant["replicates"], _compared(results["variants"], variant), "student")
    rows = [[name, *(row.get(column, "–") for column in titles)] for name, row in cells.items()]
    return "\n\n".join(["## In short", _SHORT, table(["choice", *titles], rows, markdown=True), _DEFAULTS])


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
