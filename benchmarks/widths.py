"""Merges into students of several widths, as paired trials beside pruned teachers and fresh networks of these widths.

``python -m benchmarks.widths`` trains on scikit-learn's digits, writes one record per replicate to
benchmarks/results/experiments/widths.json, goes on where it was stopped, and draws docs/pictures/widths.png.

Each strategy has 3 E epochs in all: a merge two teachers of E, and a merge stage and a fine-tuning that together cost E,
counted by operations of the teachers' network; a pruned teacher E, and 2 E after pruning; a fresh network 3 E. Epochs of
narrower and wider networks count as others do.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import fastmerge
from benchmarks.trials import (
    Data,
    Shuffled,
    accuracy,
    error,
    gaps_text,
    hash_of,
    load_records,
    made_with,
    mean_text,
    measure_missing,
    verdict_of,
)
from fastmerge import methods
from fastmerge.data.dataset import load_digits
from fastmerge.merging.options import Options
from fastmerge.methods.cost import step_operations
from fastmerge.networks import LeNet
from fastmerge.reporting.report import new_figure, save_figure
from fastmerge.reporting.tables import table

OUT = Path(__file__).resolve().parent / "results" / "experiments" / "widths.json"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "widths.png"
WIDTHS = (0.25, 0.5, 1.0, 1.5, 2.0)
CHANNELS, UNITS = (4, 8), (16, 16)
BATCH, RATE, LINK_AT = 60, 0.02, 0.25


def network(width: float = 1.0) -> nn.Module:
    """A LeNet for 8×8 images with 4 and 8 channels, 16 and 16 units."""
    first, second, third, fourth = (max(1, round(width * size)) for size in (*CHANNELS, *UNITS))
    return LeNet(1, 8, 10, kernel_size=3, channels=(first, second), units=(third, fourth))


class Replicate:
    """Two teachers of one seed, and networks of several widths.

    Args:
        train, test: images (N, 1, 8, 8) and digits.
        epochs: E, of a teacher.
        merge_epochs: of a merge stage.
        seed: of everything.
        widths: of students, in those of a teacher.
    """

    def __init__(
        self, train: Data, test: Data, epochs: int, merge_epochs: int, seed: int, widths: Sequence[float] = WIDTHS
    ) -> None:
        self.widths = widths
        self.train_data, self.test, self.seed = train, test, seed
        self.epochs, self.merge_epochs = epochs, merge_epochs

    def trained(self, model: nn.Module, epochs: int, name: str) -> nn.Module:
        torch.manual_seed(hash_of(self.seed, name))
        loader = Shuffled(self.train_data, BATCH, hash_of(self.seed, "order", name))
        methods.train(model, loader, epochs=epochs, lr=RATE)
        return model

    def fresh(self, name: str, width: float = 1.0) -> nn.Module:
        torch.manual_seed(hash_of(self.seed, "weights", name))
        return network(width)

    def results(self) -> dict[str, Any]:
        """Accuracies on test images by strategy and width."""
        teachers = [self.trained(self.fresh(f"{t}"), self.epochs, f"teacher {t}") for t in range(2)]
        found: dict[str, dict[str, float]] = {"merged": {}, "pruned": {}, "fresh": {}}
        for width in self.widths:
            key = f"{width:g}"
            found["merged"][key] = accuracy(self.merged(teachers, width), self.test)
            if width <= 1:
                pruned = self.trained(pruned_to(teachers, width), 2 * self.epochs, "prune")
                found["pruned"][key] = accuracy(pruned, self.test)
            whole = self.trained(self.fresh("fresh", width), 3 * self.epochs, "fresh")
            found["fresh"][key] = accuracy(whole, self.test)
        return {"seed": self.seed, "teachers": [accuracy(t, self.test) for t in teachers], "accuracy": found}

    def merged(self, teachers: Sequence[nn.Module], width: float) -> nn.Module:
        """A merge stage with gates that a budget steers, compression to the width, and a fine-tuning."""
        few = [(self.train_data[0][:8], None)]
        big = fastmerge.BigStudent(*teachers, example_inputs=self.train_data[0][:2], keep=width)
        apart = step_operations(big, few)
        big.link()
        before = self.merge_epochs - Options(merge_epochs=self.merge_epochs, link_at=LINK_AT).linked_epochs
        spent = before * apart + (self.merge_epochs - before) * step_operations(big, few)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gates that have not settled
            student, _ = fastmerge.merge(
                teachers,
                Shuffled(self.train_data, BATCH, hash_of(self.seed, "order", "merge")),
                keep=width,
                merge_epochs=self.merge_epochs,
                finetune_epochs=max(1, round(self.epochs - spent / step_operations(teachers[0], few))),
                link_at=LINK_AT,
                lr=RATE,
                gate_schedule="budget",
                seed=hash_of(self.seed, "merge"),
                progress=False,
            )
        return student


@torch.no_grad()
def pruned_to(teachers: Sequence[nn.Module], width: float) -> nn.Module:
    """The first teacher with the channels of the largest norms of what is read of them times what they read."""
    big = fastmerge.BigStudent(*teachers, keep=width, example_inputs=torch.zeros(2, 1, 8, 8), verify=False)
    layers = list(dict(teachers[0].named_modules()).values())[1:]
    keep = {}
    for group, (writes, reads) in zip(big.groups, pairwise(layers), strict=True):
        own = writes.weight.flatten(1).norm(dim=1)
        read = reads.weight.flatten(2) if reads.weight.dim() > 2 else reads.weight.unflatten(1, (group.size, -1))
        keep[group.name] = (own * read.transpose(0, 1).flatten(1).norm(dim=1)).topk(big.widths[group.name]).indices
    student: Any = big.compress(keep=keep)
    teacher: Any = teachers[0]
    student.fc3.weight *= len(teachers)  # of the mean, only this teacher's part is there
    student.fc3.bias.copy_(teacher.fc3.bias)
    return student


WHAT = {"merged": "merged", "pruned": "one teacher, pruned", "fresh": "fresh network"}
COLOURS = {"merged": "#D55E00", "pruned": "#0072B2", "fresh": "#009E73"}


def blocks(measured: dict[str, Any]) -> dict[str, str]:
    """What docs/widths.md shows of the records."""
    records = measured["replicates"]
    first = records[0]
    rows = []
    for key in first["accuracy"]["merged"]:
        cells = []
        for strategy in WHAT:
            cells.append(mean_text(_values(records, strategy, key)))
        for strategy in ("pruned", "fresh"):
            cells.append(gaps_text(_gaps(records, strategy, key)))
        rows.append([key, *cells])
    header = ["width", *WHAT.values(), "merged less pruned", "merged less fresh"]
    teachers = [100 * value for record in records for value in record["teachers"]]
    made = measured["environment"]
    parts = [
        table(header, rows, markdown=True),
        f"Test accuracy in %, ± its standard error; differences are within a replicate. The network: {network.__doc__} The "
        f"data: scikit-learn's digits, n = {len(records)} replicates. Each strategy has 3E epochs, E = {first['epochs']}. "
        f"*merged*: two teachers train for E each; a merge stage of {first['merge_epochs']} epochs and a fine-tuning together "
        "cost E. *one teacher, pruned*: E epochs, then pruning by the norms of weights, then 2E epochs. *fresh network*: 3E "
        f"epochs. A teacher's accuracy is {fmean(teachers):.2f}. Networks with BatchNorm have not been tried.",
        f"{made_with(made)}. Written by `make docs` from "
        "benchmarks/results/experiments/widths.json, which `python -m benchmarks.widths` fills.",
    ]
    return {"verdict": conclusion(records), "table": "\n\n".join(parts)}


def _values(records: Sequence[dict[str, Any]], strategy: str, key: str) -> list[float]:
    return [100 * r["accuracy"][strategy][key] for r in records if key in r["accuracy"][strategy]]


def plot(records: Sequence[dict[str, Any]]) -> Any:
    """Accuracy by width, a line for each strategy."""
    figure, axes = new_figure(4.8, 3.4)
    for strategy, label in WHAT.items():
        keys = list(records[0]["accuracy"][strategy])
        found = [_values(records, strategy, key) for key in keys]
        axes.errorbar(
            [float(key) for key in keys],
            [fmean(values) for values in found],
            [error(values) for values in found],
            color=COLOURS[strategy],
            marker="o",
            capsize=3,
            label=label,
        )
    axes.set_xlabel("width, of a teacher's")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False, fontsize="small")
    return figure


def _gaps(records: Sequence[dict[str, Any]], strategy: str, key: str) -> list[float]:
    pairs = [(r["accuracy"]["merged"][key], r["accuracy"][strategy].get(key)) for r in records]
    return [100 * (a - b) for a, b in pairs if b is not None]


def conclusion(records: Sequence[dict[str, Any]]) -> str:
    """At which widths a merge is ahead, or behind, by more than two standard errors."""
    sentences = []
    for strategy in ("pruned", "fresh"):
        verdicts: dict[str, list[str]] = {"behind": [], "no clear difference": [], "ahead": []}
        for key in records[0]["accuracy"]["merged"]:
            found = _gaps(records, strategy, key)
            if found:
                verdicts[verdict_of(found, "ahead", "behind")].append(key)
        said = "; ".join(f"{verdict} at {', '.join(found)}" for verdict, found in verdicts.items() if found)
        sentences.append(f"* A merge compared with *{WHAT[strategy]}* of the same width: {said}.")
    return "\n".join(sentences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="E, of a teacher (%(default)s)")
    parser.add_argument("--merge-epochs", type=int, default=8, help="of a merge stage (%(default)s)")
    parser.add_argument("--widths", type=float, nargs="+", default=WIDTHS, help="in those of a teacher")
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    arrays = load_digits()
    data = [
        (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 240 * 2 - 0.6, torch.from_numpy(labels))
        for images, labels in (
            (arrays.train_images, arrays.train_labels),
            (arrays.test_images, arrays.test_labels),
        )
    ]
    planned = {"epochs": options.epochs, "merge_epochs": options.merge_epochs}

    def measure(seed: int) -> dict[str, Any]:
        return Replicate(data[0], data[1], **planned, seed=seed, widths=options.widths).results() | planned

    for record in measure_missing(options.out, range(options.replicates), measure):
        print(record["seed"], record["teachers"], record["accuracy"], flush=True)
    if options.out == OUT:
        save_figure(plot(load_records(OUT)["replicates"]), PICTURE)


if __name__ == "__main__":
    main()
