"""Which statistics a big student's LayerNorms should take, as paired trials beside other uses of the same cost.

``python -m benchmarks.layer_norms IMAGES.npz`` (``train_images, train_labels, test_images, test_labels``, uint8, N x H x W x 3)
writes one record per replicate to docs/results/layer-norms.json and goes on where it was stopped.

*weighted* is what the library does: a teacher's mean and variance weigh the channels of all teachers by their gates. *tied*
keeps each residual stream whole, one gate for all its channels, so that the student takes it from one teacher. Both are exact
with open gates and after compression.

Within a replicate all strategies start from the same teachers, and every strategy costs as much as 6 U epochs of one network,
counted by the operations of forward and backward passes (the ensemble less). bo3 and the better teacher are chosen on held-out
training images; test images only score.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer

import fastmerge
from benchmarks.trials import accuracy, gaps_text, hash_of, made_with, mean_text
from fastmerge.channels import rules
from fastmerge.data.arrays import load_npz
from fastmerge.environment import environment
from fastmerge.files import atomic
from fastmerge.merging.distillation import divergence
from fastmerge.methods.cost import step_operations
from fastmerge.reporting.tables import table

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "layer-norms.json"
TEMPERATURE = 2.0


def vit(classes: int) -> nn.Module:
    """16 tokens of 48 channels, three blocks; 28 x 28 images."""
    return VisionTransformer(28, 7, 3, 4, 48, 96, num_classes=classes)


def convnext(classes: int) -> nn.Module:
    """Three stages of one block, 16 to 64 channels."""
    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 1)]
    return ConvNeXt(blocks, num_classes=classes)


NETWORKS = {"vit": vit, "convnext": convnext}


@contextmanager
def tied_streams() -> Iterator[None]:
    """Has every LayerNorm tie the channels that it normalises, in place of weighing them by gates."""
    weighted = rules.layer_norm

    def tied(run: Any, func: Any, args: Any, kwargs: Any) -> Any:
        made = weighted(run, func, args, kwargs)
        run.record.normalised.pop((run.mode, run.node.name), None)
        channels = made.ids.flatten(0, -2)[0]
        run.record.tie(channels[:1], channels)
        return made

    with (
        mock.patch.object(rules, "layer_norm", tied),
        mock.patch("fastmerge.wide.blueprint._KNOWN", type(fastmerge.wide.blueprint._KNOWN)()),
    ):
        yield


class Replicate:
    """Teachers of one seed and what is made of them.

    Args:
        make: the network.
        images: (N, 3, H, W) float training images, then validation and test images, each with labels.
        unit: U, epochs.
        batch: images per step.
        seed: of teachers and of the order of data.
    """

    def __init__(
        self, make: Callable[[], nn.Module], images: list[tuple[Tensor, Tensor]], unit: int, batch: int, seed: int
    ) -> None:
        (self.x, self.y), self.val, self.test = images
        self.make, self.unit, self.batch, self.seed = make, unit, batch, seed
        self.few = [(self.x[:8], None)]  # to count operations on
        self.plain = step_operations(make(), self.few)

    def epochs(self, budget: float, cost: float = 1.0) -> int:
        """Epochs that a budget in units U buys, at a cost relative to one network's."""
        return max(1, round(budget * self.unit / cost))

    def train(
        self,
        model: nn.Module,
        epochs: int,
        name: str,
        teachers: list[nn.Module] | None = None,
        each_step: Callable[[int, int, torch.optim.Optimizer], None] | None = None,
        gates: fastmerge.GateBudget | None = None,
    ) -> nn.Module:
        """AdamW under one cosine with warm-up; with teachers, half the loss is distillation from their mean."""
        generator = torch.Generator().manual_seed(hash_of(self.seed, name))
        weights = model.weight_parameters() if gates is not None else model.parameters()  # type: ignore[operator]
        optimizers = [torch.optim.AdamW(weights, 2e-3, weight_decay=0.05)]
        steps = epochs * (len(self.x) // self.batch)
        if gates is not None:
            optimizers.append(torch.optim.SGD(model.gate_parameters(), gates.gate_lr, gates.momentum))  # type: ignore[operator]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizers[0],
            lambda t: min(1.0, (t + 1) / (0.1 * steps)) * (0.01 + 0.99 * (1 + math.cos(math.pi * t / steps)) / 2),
        )
        model.train()
        torch.manual_seed(hash_of(self.seed, name, "gates"))
        for step in range(steps):
            if step % (steps // epochs) == 0:
                order = torch.randperm(len(self.x), generator=generator)
            if each_step is not None:
                each_step(step, steps, optimizers[0])
            index = order[step % (steps // epochs) * self.batch :][: self.batch]
            x = self.x[index]
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
            out = model(x)
            loss = F.cross_entropy(out, self.y[index])
            if teachers is not None:
                with torch.no_grad():
                    mean = torch.stack([t(x) for t in teachers]).mean(0)
                loss = (loss + divergence(out, mean, TEMPERATURE)) / 2
            if gates is not None:
                loss = loss + gates.loss(model)  # type: ignore[arg-type]
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
            schedule.step()
            if gates is not None:
                gates.step()
        return model.eval()

    def new(self, index: int) -> nn.Module:
        torch.manual_seed(hash_of(self.seed, "weights", index))
        return self.make()

    def merged(self, teachers: list[nn.Module], distil: bool) -> tuple[nn.Module, dict[str, float]]:
        """A merge stage of a third of a unit, linked after a quarter of it; the rest of 2 U to fine-tuning."""
        big = fastmerge.BigStudent(*teachers, example_inputs=self.x[:2])
        epochs = self.epochs(1 / 3)
        costs = {}

        def link(step: int, steps: int, optimizer: torch.optim.Optimizer) -> None:
            if step == 0:
                costs["unlinked"] = step_operations(big, self.few) / self.plain
            if step == steps // 4:
                big.link(optimizer)
                costs["linked"] = step_operations(big, self.few) / self.plain

        budget = fastmerge.GateBudget(epochs * (len(self.x) // self.batch))
        self.train(big, epochs, "merge", each_step=link, gates=budget)
        spent = epochs * (costs["unlinked"] + 3 * costs["linked"]) / 4
        at_once = {"big": accuracy(big, self.test)}
        student = big.compress()
        at_once["compressed"] = accuracy(student, self.test)
        left = (2 * self.unit - spent) / self.unit
        cost = 1 + len(teachers) / 3 if distil else 1.0
        self.train(student, self.epochs(left, cost), "finetune", teachers if distil else None)
        return student, {**at_once, **{f"cost {k}": v for k, v in costs.items()}, "merge epochs": epochs}

    def results(self) -> dict[str, Any]:
        """Accuracies on test images by strategy."""
        trained = [self.train(self.new(i), self.epochs(2), f"teacher {i}") for i in range(3)]
        scores = [accuracy(t, self.val) for t in trained]
        teachers, better = trained[:2], trained[max(range(2), key=scores.__getitem__)]
        found: dict[str, float] = {
            "teacher": sum(accuracy(t, self.test) for t in teachers) / 2,
            "ensemble": accuracy(lambda x: sum(t(x) for t in teachers), self.test),
            "bo3": accuracy(trained[max(range(3), key=scores.__getitem__)], self.test),
            "one": accuracy(self.train(self.new(0), self.epochs(6), "one"), self.test),
            "restart": accuracy(self.train(copy.deepcopy(better), self.epochs(2), "finetune"), self.test),
            "distil": accuracy(
                self.train(copy.deepcopy(better), self.epochs(2, 1 + 2 / 3), "finetune", teachers), self.test
            ),
        }
        notes: dict[str, Any] = {}
        for distil in (False, True):
            name = " + distil" if distil else ""
            student, notes["weighted" + name] = self.merged(teachers, distil)
            found["weighted" + name] = accuracy(student, self.test)
            with tied_streams():
                student, notes["tied" + name] = self.merged(teachers, distil)
            found["tied" + name] = accuracy(student, self.test)
        return {"seed": self.seed, "accuracy": found, "notes": notes}


WHAT = {
    "teacher": "one teacher (a third of the cost)",
    "one": "one network, trained all along",
    "bo3": "best of three teachers",
    "restart": "the better of two teachers, its learning rate restarted",
    "distil": "the same, distilled from both teachers",
    "tied": "merged, streams tied",
    "weighted": "merged, weighted statistics",
    "tied + distil": "merged, streams tied, fine-tuned by distillation",
    "weighted + distil": "merged, weighted statistics, fine-tuned by distillation",
    "ensemble": "the ensemble of two teachers (twice the size)",
}


def page(measured: dict[str, Any]) -> str:
    """docs/layer-norms.md from the records."""
    parts = [
        "# LayerNorm: which statistics, and what merging brings",
        "A LayerNorm in a big student sees the channels of all teachers. This page compares two ways to take its mean and "
        "deviation. *Weighted statistics*, the library's way, weight each channel by its gate "
        "([how](how-it-works.md#normalisations)). *Streams tied* gives one gate to all channels of a residual stream, so that "
        "the student takes the stream from one teacher.",
        "First, where merging does not help. At equal cost, both networks gain less from a merge than from training the better "
        "teacher again with a restarted learning rate. Distillation in the fine-tuning does not help merged networks. These "
        "networks have not converged, so more training is worth much, and the merge stages have only two epochs.",
        "After fine-tuning there is no clear difference between tied and weighted statistics. Before it, tied ones are better "
        "in both networks, since their residual stream comes from one teacher. The library keeps weighted ones, because with "
        "them the stream's channels can be chosen. A longer merge stage has not been tried.",
        "All rows but the first and the last cost 6U epochs of one network, in operations of forward and backward passes. "
        "Within a replicate they have the same teachers, order of data and test images. *difference* is the row's accuracy "
        "less that of *merged, weighted statistics* in the same replicate, in points, ± its standard error. *at once* is the "
        "accuracy before fine-tuning. Written by `make docs` from docs/results/layer-norms.json, which "
        "`python -m benchmarks.layer_norms IMAGES.npz --network vit` and `--network convnext` fill.",
    ]
    for setting, records in sorted(measured["settings"].items()):
        rows = []
        for strategy, what in WHAT.items():
            values = [100 * record["accuracy"][strategy] for record in records]
            gaps = [100 * (record["accuracy"][strategy] - record["accuracy"]["weighted"]) for record in records]
            notes = [record["notes"][strategy]["compressed"] for record in records if strategy in record["notes"]]
            rows.append(
                [
                    what,
                    mean_text(values),
                    "" if strategy == "weighted" else gaps_text(gaps),
                    f"{100 * fmean(notes):.2f}" if notes else "",
                ]
            )
        first = records[0]
        linked = first["notes"]["weighted"]["cost linked"]
        parts += [
            f"## {setting}",
            table(["", "test accuracy, %", "difference", "at once"], rows, markdown=True),
            f"The network: {NETWORKS[first['network']].__doc__} The data: {first['images']}, {first['train']:,} training "
            f"images in batches of {first['batch']}. U = {first['unit']} epochs, n = {len(records)} replicates. An epoch of "
            f"the linked big student costs {linked:.1f} epochs of one network.",
        ]
    made = measured["environment"]
    parts.append(f"{made_with(made)}.")
    return "\n\n".join(parts) + "\n"


def load(path: Path, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Training, validation (500 images) and test images, normalised."""
    arrays = load_npz(path)
    order = torch.randperm(len(arrays.train_labels), generator=torch.Generator().manual_seed(seed))
    split = []
    for images, labels, index in (
        (arrays.train_images, arrays.train_labels, order[500:]),
        (arrays.train_images, arrays.train_labels, order[:500]),
        (arrays.test_images, arrays.test_labels, slice(None)),
    ):
        x = torch.from_numpy(images).permute(0, 3, 1, 2)[index].float() / 255
        split.append(((x - 0.45) / 0.25, torch.from_numpy(labels)[index]))
    return split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--network", choices=NETWORKS, default="vit")
    parser.add_argument("--unit", type=int, default=6, help="U in epochs (%(default)s)")
    parser.add_argument("--batch", type=int, default=50, help="images per step (%(default)s)")
    parser.add_argument("--train", type=int, default=3000, help="training images (%(default)s)")
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.images)
    data[0] = (data[0][0][: options.train], data[0][1][: options.train])
    classes = int(data[0][1].max()) + 1
    setting = f"{options.network}, {options.train:,} images"
    for seed in range(options.replicates):
        kept = json.loads(options.out.read_text()) if options.out.exists() else {"settings": {}}
        of_network = kept["settings"].setdefault(setting, [])
        if any(record["seed"] == seed for record in of_network):
            continue
        record = Replicate(
            lambda: NETWORKS[options.network](classes), data, options.unit, options.batch, seed
        ).results()
        record |= {
            "network": options.network,
            "unit": options.unit,
            "batch": options.batch,
            "train": options.train,
            "images": options.images.stem,
        }
        kept = json.loads(options.out.read_text()) if options.out.exists() else kept  # another setting may run beside
        kept["settings"].setdefault(setting, []).append(record)
        kept["environment"] = environment()
        with atomic(options.out) as path:
            path.write_text(json.dumps(kept, indent=1))
        print(options.network, seed, {k: round(v, 4) for k, v in record["accuracy"].items()}, flush=True)


if __name__ == "__main__":
    main()
