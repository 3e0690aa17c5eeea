"""Merging two teachers of disjoint classes, as paired trials at equal cost beside other uses of it.

``python -m benchmarks.label_sets mnist FOLDER`` and ``cifar100 FOLDER`` read FOLDER/mnist.npz or FOLDER/cifar100.npz
(``train_images, train_labels, test_images, test_labels``), write one record per replicate to
benchmarks/results/experiments/label-sets-*.json, go on where they were stopped, and draw docs/pictures/label-sets.png.

A replicate halves the task's classes by chance and trains one teacher on each half. All that follows begins with these
teachers, has the same images and costs what both teachers together cost, half as much again: B = 3/2 of the teachers' cost in
all. Joint training from fresh weights has all of B; one teacher that is trained on has what the other teacher would have cost,
too. Costs are counted operations of forward and backward passes.

Training is of each sample among the classes of its own half (*own*) or among all (*all*); both are done by all.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import fastmerge
from benchmarks.trials import (
    Data,
    Shuffled,
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
from fastmerge.data.arrays import load_npz
from fastmerge.merging.label_sets import LabelSets, PartCriterion
from fastmerge.merging.options import Options
from fastmerge.methods.cost import step_operations
from fastmerge.networks import LeNet, ResNetCifar
from fastmerge.reporting.report import new_figure, save_figure
from fastmerge.reporting.tables import table

RESULTS = Path(__file__).resolve().parent / "results" / "experiments"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "label-sets.png"
BATCH = 50  # images per step; half as many for a teacher, which sees half of the images
LINK_AT, DISTILL, DECAY = 0.25, 0.5, 5e-4
COLOURS = ("#0072B2", "#D55E00")  # of the tasks


def lenet(classes: int) -> nn.Module:
    """A LeNet for 28×28 images with 4 and 8 channels, 32 and 24 units."""
    return LeNet(1, 28, classes, channels=(4, 8), units=(32, 24))


def resnet(classes: int) -> nn.Module:
    """A ResNet-8 with 8, 16 and 32 channels, one block each."""
    return ResNetCifar(1, classes, channels=8)


@dataclass(frozen=True)
class Task:
    """What is learned, by which network, and how.

    Attributes:
        name: of the data set, for the page.
        network: built for a number of classes.
        classes: of the data set.
        half: classes of each teacher; they are drawn from the data set's.
        images: training images of each teacher.
        epochs: of a teacher, over its half.
        merge_epochs: of the merge stage, over both.
        rate: learning rate of fresh weights.
        rate_on: of what begins with trained weights.
        mean, std: of pixels in 0..1.
        pool: side of the squares of pixels that are averaged.
        remark: on the page.
    """

    name: str
    network: Callable[[int], nn.Module]
    classes: int
    half: int
    images: int
    epochs: int
    merge_epochs: int
    rate: float
    rate_on: float
    mean: float
    std: float
    pool: int = 1
    remark: str = ""


TASKS = {
    "mnist": Task("MNIST", lenet, 10, 5, 1000, 60, 5, 0.02, 0.01, 0.1307, 0.3081),
    "cifar100": Task(
        *("CIFAR-100", resnet, 100, 10, 1500, 32, 3, 0.4, 0.2, 0.48, 0.27, 2),
        remark="Images are averaged to 16×16 pixels, and twenty of the hundred classes are drawn for each replicate. Halves of "
        "fifty classes, with as many images of each, would take five times as long and have not been tried.",
    ),
}


class Replicate:
    """Two teachers of disjoint halves of the classes, and what is made of them.

    Args:
        task: which.
        train, test: images (N, C, H, W) and classes, of the whole data set.
        seed: of everything.
    """

    def __init__(self, task: Task, train: Data, test: Data, seed: int) -> None:
        self.task, self.seed = task, seed
        self._costs: list[float] = []
        generator = torch.Generator().manual_seed(hash_of(seed, "halves"))
        self.classes = torch.randperm(task.classes, generator=generator)[
            : 2 * task.half
        ].tolist()  # in the student's order
        self.sets = LabelSets((task.half, task.half))
        x, y = self.chosen(train)
        self.halves: list[Data] = []
        for number in range(2):
            own = (y // task.half == number).nonzero().flatten()
            own = own[torch.randperm(len(own), generator=generator)[: task.images]]
            self.halves.append((x[own], y[own] - task.half * number))
        (x, y), (x_2, y_2) = self.halves
        self.joint = torch.cat([x, x_2]), torch.cat([y, y_2 + task.half])
        self.test = self.chosen(test)

    def chosen(self, data: Data) -> Data:
        """The images of the replicate's classes, with these counted in the student's order."""
        place = torch.full((self.task.classes,), -1)
        place[self.classes] = torch.arange(len(self.classes))
        y = place[data[1]]
        return data[0][y >= 0], y[y >= 0]

    def new(self, classes: int, name: str) -> nn.Module:
        torch.manual_seed(hash_of(self.seed, "weights", name))
        return self.task.network(classes)

    def loader(self, data: Data, name: str, batch: int = BATCH) -> Shuffled:
        return Shuffled(data, batch, hash_of(self.seed, "order", name))

    def trained(self, model: nn.Module, epochs: int, name: str, own: bool) -> nn.Module:
        """Trains on the images of both halves."""
        torch.manual_seed(hash_of(self.seed, name))
        criterion = PartCriterion(cross_entropy, self.sets, all_classes=not own)
        loader = self.loader(self.joint, "joint")
        rate = self.task.rate if name == "joint" else self.task.rate_on
        methods.train(model, loader, epochs=epochs, lr=rate, weight_decay=DECAY, criterion=criterion)
        return model

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Accuracies on test images: among the classes of each image's half, and among all."""
        x, y = self.test
        logits = torch.cat([model.eval()(part) for part in x.split(500)])
        own = self.sets.own_logits(logits, y).argmax(1) == y
        per_task = [float(own[y // self.task.half == number].float().mean()) for number in range(2)]
        return {"task": fmean(per_task), "all": float((logits.argmax(1) == y).float().mean())}

    def results(self) -> dict[str, Any]:
        """Scores by strategy."""
        teachers = []
        for number, half in enumerate(self.halves):
            teacher = self.new(self.task.half, f"teacher {number}")
            loader = self.loader(half, f"half {number}", BATCH // 2)
            methods.train(teacher, loader, epochs=self.task.epochs, lr=self.task.rate, weight_decay=DECAY)
            teachers.append(teacher)
        joined, _ = methods.join_heads(teachers, self.joint[0][:2])
        left = self.task.epochs // 2  # epochs over both halves of one network, that cost what one teacher did
        found: dict[str, Any] = {"ensemble": self.score(methods.ensemble(joined))}
        notes: dict[str, Any] = {}
        for own in (True, False):
            kind = "own" if own else "all"
            found[f"joint, {kind}"] = self.score(
                self.trained(self.new(len(self.classes), "joint"), 3 * left, "joint", own)
            )
            found[f"one on, {kind}"] = self.score(self.trained(self.extended(teachers[0]), 2 * left, "on", own))
            for name in ("average", "rebasin", "zipit"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    made = methods.apply(name, joined, self.loader(self.joint, "samples")).network
                notes[name] = self.score(made)
                found[f"{name}, {kind}"] = self.score(self.trained(made, left, name, own))
            for distill in (0.0, DISTILL):
                name = f"merged{' + distil' if distill else ''}, {kind}"
                found[name], notes[name] = self.merged(teachers, distill, own, left)
        return {"seed": self.seed, "classes": self.classes, "scores": found, "notes": notes}

    @torch.no_grad()
    def extended(self, teacher: nn.Module) -> nn.Module:
        """A network of all classes with a teacher's weights, and fresh rows of the last layer for the other half."""
        model, own = self.new(len(self.classes), "extended"), teacher.state_dict()
        for name, tensor in model.state_dict().items():
            tensor[tuple(map(slice, own[name].shape))] = own[name]
        return model

    def merged(
        self, teachers: Sequence[nn.Module], distill: float, own: bool, left: int
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """A merge of so many epochs of one network's cost."""
        costs, merge_epochs = self.costs(teachers), self.task.merge_epochs
        linked = Options(merge_epochs=merge_epochs, link_at=LINK_AT).linked_epochs
        spent = (merge_epochs - linked) * costs[0] + linked * costs[1]
        epochs = max(1, round((left - spent) / (1 + (len(teachers) / 3 if distill else 0))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gates that have not settled
            student, history = fastmerge.merge(
                teachers,
                [self.loader(half, f"half {number}", BATCH // 2) for number, half in enumerate(self.halves)],
                val_loader=[[self.test_of(number)] for number in range(2)],
                val_every=10_000,
                merge_epochs=merge_epochs,
                finetune_epochs=epochs,
                link_at=LINK_AT,
                lr=self.task.rate_on,
                weight_decay=DECAY,
                gate_schedule="budget",
                heads="concatenate",
                all_classes=not own,
                distill=distill,
                seed=hash_of(self.seed, "merge"),
                progress=False,
            )
        at = history.borders["compressed"]
        once = {"task": (at.metrics or {})["own part"], "all": at.accuracy}
        return self.score(student), {**once, "finetune epochs": epochs, "costs": costs}

    def costs(self, teachers: Sequence[nn.Module]) -> list[float]:
        """Of an epoch of the merge stage before and after linking, in epochs of one network."""
        if not self._costs:
            few = [(self.joint[0][:8], None)]
            big = fastmerge.BigStudent(*teachers, example_inputs=self.joint[0][:2], heads="concatenate")
            one = step_operations(self.task.network(len(self.classes)), few)
            self._costs.append(step_operations(big, few) / one)
            big.link()
            self._costs.append(step_operations(big, few) / one)
        return self._costs

    def test_of(self, number: int) -> Data:
        own = self.test[1] // self.task.half == number
        return self.test[0][own], self.test[1][own] - self.task.half * number


WHAT = {
    "ensemble": "both teachers side by side, each for its own half (twice the size)",
    "joint": "one network, trained on all classes from fresh weights",
    "one on": "one teacher, trained further on all classes",
    "average": "`average`, then trained",
    "rebasin": "`rebasin`, then trained",
    "zipit": "`zipit`, then trained",
    "merged": "merged",
    "merged + distil": "merged, distilled into the other half's classes",
}
BASE = "merged"
OTHERS = {strategy: what for strategy, what in WHAT.items() if strategy not in (BASE, "ensemble")}
KINDS = (
    ("all", "all classes", "all"),
    ("own", "the classes of each image's half", "task"),
)  # training, and its measure


def blocks(measured: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What docs/label-sets.md shows of the records by task."""
    there = {name: found for name, found in measured.items() if found["replicates"]}
    tables = [
        part for n, found in there.items() for part in _section(TASKS[n], found["replicates"], found["environment"])
    ]
    verdicts = [conclusion(TASKS[n], found["replicates"]) for n, found in there.items()]
    return {"verdict": "\n\n".join(verdicts), "tables": "\n\n".join(tables)}


def _section(task: Task, records: Sequence[dict[str, Any]], made: dict[str, Any]) -> list[str]:
    """A task's tables."""
    parts = []
    for kind, title in (
        ("all", "trained among all classes"),
        ("own", "trained among the classes of each image's half"),
    ):
        rows = []
        for strategy, what in WHAT.items():
            key = strategy if strategy == "ensemble" else f"{strategy}, {kind}"
            once = [note for r in records if (note := r["notes"].get(key, r["notes"].get(strategy)))]
            cells = []
            for score in ("task", "all"):
                cells += [mean_text(values(records, key, score)), _gap(records, key, f"{BASE}, {kind}", score)]
            cells.append(
                f"{100 * fmean(note['task'] for note in once):.1f} / {100 * fmean(note['all'] for note in once):.1f}"
                if once
                else ""
            )
            rows.append([what, *cells])
        header = ["", "per task, %", "difference", "over all classes, %", "difference", "at once"]
        parts += [f"## {task.name}, {title}", table(header, rows, markdown=True)]
    first = records[0]
    costs = first["notes"][f"{BASE}, own"]["costs"]
    parts.append(
        f"The network: {task.network.__doc__} The data: {len(records)} replicates of {task.name}, with {task.half} classes and "
        f"{first['images']:,} training images in each half, drawn anew for each replicate. A teacher trains for "
        f"{first['epochs']} epochs. A merge stage has {first['merge_epochs']} epochs, each of which costs {costs[0]:.1f} "
        f"epochs of one network until it is linked and {costs[1]:.1f} afterwards. The fine-tuning has "
        f"{first['notes'][f'{BASE}, own']['finetune epochs']} epochs. {task.remark}".strip()
    )
    parts.append(f"{made_with(made)}.")
    return parts


def values(records: Sequence[dict[str, Any]], strategy: str, score: str) -> list[float]:
    return [100 * record["scores"][strategy][score] for record in records]


def gaps(records: Sequence[dict[str, Any]], strategy: str, base: str, score: str) -> list[float]:
    return [a - b for a, b in zip(values(records, strategy, score), values(records, base, score), strict=True)]


def _gap(records: Sequence[dict[str, Any]], strategy: str, base: str, score: str) -> str:
    return "" if strategy == base else gaps_text(gaps(records, strategy, base, score))


def conclusion(task: Task, records: Sequence[dict[str, Any]]) -> str:
    """Where the merge does not help, then where it does: strategies that differ by more than two standard errors."""
    sentences = []
    for kind, how, score in KINDS:
        verdicts: dict[str, list[str]] = {"better": [], "no clear difference": [], "worse": []}
        for strategy, what in OTHERS.items():
            found = gaps(records, f"{strategy}, {kind}", f"{BASE}, {kind}", score)
            verdicts[verdict_of(found, "better", "worse")].append(f"{what} ({gaps_text(found)})")
        measure = "per task" if score == "task" else "over all classes"
        said = "; ".join(f"**{verdict}**: {', '.join(found)}" for verdict, found in verdicts.items() if found)
        sentences.append(f"* Trained among {how}, accuracy {measure}: {said}.")
    return (
        f"Where a merge does not help on {task.name}. These are other uses of the same cost: their accuracy less that of "
        "*merged*, in points; *better* and *worse* mean by more than two standard errors.\n\n" + "\n".join(sentences)
    )


def plot(measured: dict[str, dict[str, Any]]) -> Any:
    """By how much other uses of the same cost are better than the merge, a panel for each way to train."""
    there = {name: found["replicates"] for name, found in measured.items() if found["replicates"]}
    figure, panels = new_figure(6.4, 4.6, rows=len(KINDS), sharex=True)
    for (kind, how, score), axes in zip(KINDS, panels, strict=True):
        for row, (name, records) in enumerate(there.items()):
            found = [gaps(records, f"{strategy}, {kind}", f"{BASE}, {kind}", score) for strategy in OTHERS]
            axes.errorbar(
                [fmean(values) for values in found],
                [place + 0.2 * row for place in range(len(OTHERS))],
                xerr=[2 * error(values) for values in found],
                fmt="o",
                color=COLOURS[row],
                capsize=3,
                label=TASKS[name].name,
            )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(
            range(len(OTHERS)), [re.split(", t| into", what.replace("`", ""))[0] for what in OTHERS.values()]
        )
        axes.invert_yaxis()
        axes.set_title(f"trained among {how}", loc="left", fontsize="medium")
    panels[-1].set_xlabel("points better than the merge, ± two standard errors")
    panels[0].legend(frameon=False, fontsize="small")
    return figure


def load() -> dict[str, dict[str, Any]]:
    """What :func:`page` takes: the records by task."""
    return {name: load_records(RESULTS / f"label-sets-{name}.json") for name in TASKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path, help="with mnist.npz or cifar100.npz")
    parser.add_argument("--replicates", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[options.task]
    arrays = load_npz(options.folder / f"{options.task}.npz")
    train = _images(task, arrays.train_images), torch.from_numpy(arrays.train_labels)
    test = _images(task, arrays.test_images), torch.from_numpy(arrays.test_labels)
    planned = {"images": task.images, "epochs": task.epochs, "merge_epochs": task.merge_epochs}

    def measure(seed: int) -> dict[str, Any]:
        return Replicate(task, train, test, seed).results() | planned

    seeds = range(1, options.replicates + 1)  # 0 was looked at to choose rates
    for record in measure_missing(RESULTS / f"label-sets-{options.task}.json", seeds, measure):
        scores = {k: (round(v["task"], 4), round(v["all"], 4)) for k, v in record["scores"].items()}
        print(record["seed"], scores, flush=True)
    save_figure(plot(load()), PICTURE)


def _images(task: Task, images: Any) -> Tensor:
    """Images (N, C, H, W) of uint8 ones (N, H, W, C), some at a time."""
    parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(1000)
    return torch.cat([(avg_pool2d(part.float(), task.pool) / 255 - task.mean) / task.std for part in parts])


if __name__ == "__main__":
    main()
