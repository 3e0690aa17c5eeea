"""Is merging worth what it costs? Every strategy at equal cost, on data sets that a CPU can train.

``python -m benchmarks.evidence DATA`` or ``make evidence DATA=folder``

The folder holds mnist.npz, imagewoof28.npz (as ``fastmerge data`` writes it, 28 pixels a side) and cifar100.npz; parts whose
file is missing are left out. Each part is one run of fastmerge's strategies: within a replicate all start from the same
teachers. A part that is finished is kept, in docs/results/evidence/PART.json, and gets the strategies and replicates that it
lacks. One that was stopped goes on from its checkpoints in runs/evidence/. docs/render.py fills docs/evidence.md from them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.evidence_report import OWN, RESULTS, WARM
from fastmerge.big_student import BigStudent
from fastmerge.channels.grouping import channel_groups
from fastmerge.data.arrays import ImageArrays, load_npz
from fastmerge.data.augmentation import flip_and_shift
from fastmerge.data.dataset import Dataset, image_dataset
from fastmerge.data.decoding import OnBadImage
from fastmerge.experiments.column import Column
from fastmerge.experiments.lab import Lab
from fastmerge.experiments.recipes import LoadData, Recipe, digits
from fastmerge.experiments.run import run
from fastmerge.experiments.strategies import STRATEGIES, short, strategy
from fastmerge.gates import draw_gates
from fastmerge.lock_step import Family
from fastmerge.merging import stages
from fastmerge.merging.options import Options, Plan
from fastmerge.methods.distill import DISTILL
from fastmerge.methods.reconstruct import refit, rescale
from fastmerge.methods.transplant import magnitudes
from fastmerge.networks import LeNet, ResNetCifar
from fastmerge.reporting.results import write_json

ROOT = Path(__file__).resolve().parent.parent
AT_EQUAL_COST = [
    *("ours", "one", "one-cosine", "bo3", "restart", "cyclic-swa", "distill", "distill-fresh"),
    *("average", "rebasin", "repair", "zipit", "transplant", "reconstruct"),
    *("rebasin-distill", "repair-distill", "zipit-distill", "transplant-distill", "reconstruct-distill"),
    *("ours-plain", "ours-3", "ensemble", "ensemble-3"),
]
AT_EQUAL_EPOCHS = [
    *("paper", OWN, "choice: distill", "choice: link late", "choice: third", "choice: all"),
    *("choice: magnitude", "choice: magnitude, strong"),
]
LEAST_SQUARES = "choice: least squares"
TIED = "choice: tied streams"
WARMED = ["ours", "restart", "reconstruct-distill", "repair-distill"]
ALL = (*AT_EQUAL_COST, *AT_EQUAL_EPOCHS, LEAST_SQUARES, *(f"{WARM}{name}" for name in WARMED))


def _choice(name: str, choose: Callable[[Recipe], dict[str, Any]]) -> None:
    """A merge at equal epochs that differs from the recipe's in one choice."""

    @strategy(f"choice: {name}", classifies=True)
    def chosen(lab: Lab, teachers: Sequence[Column]) -> Column:
        return lab.merge(teachers, f"choice-{name.replace(' ', '-')}", **choose(lab.recipe))


def _third(recipe: Recipe) -> dict[str, Any]:
    """The merge stage a third as long, and the rest of its epochs to fine-tuning."""
    options = {name: value for name, value in short(recipe).items() if name != "link_at"}
    whole, saved = recipe.merge.finetune_plan, recipe.merge.merge_epochs - options["merge_epochs"]
    plan = whole.scaled((whole.epochs + saved) / whole.epochs)
    return options | {"finetune_epochs": plan.epochs, "milestones": tuple(plan.milestones)}


_choice("distill", lambda recipe: {"distill": DISTILL})
_choice("link late", lambda recipe: {"link_at": 0.25})
_choice("third", _third)
_choice("tied streams", lambda recipe: {"tie_streams": True})
_choice("all", lambda recipe: _third(recipe) | {"link_at": 0.25, "distill": DISTILL})


class ByMagnitude(BigStudent):
    """A big student whose gates begin the more open the larger the weights of their channels are.

    ``loc`` gets ``strength`` times by how many standard deviations the logarithm of a channel's magnitude, as in Neuron
    Transplantation, is above the mean of its group.
    """

    strength = 0.5

    def __init__(self, *teachers: nn.Module, **options: Any) -> None:
        super().__init__(*teachers, **options)
        for name, each in magnitudes(teachers, self.groups).items():
            sizes = each.flatten().clamp(min=1e-30).log()
            gate: Any = self.gates[name]
            with torch.no_grad():
                gate.loc += self.strength * ((sizes - sizes.mean()) / sizes.std().clamp(min=1e-6)).to(gate.loc)


class ByMagnitudeStrongly(ByMagnitude):
    """The same, twice as much."""

    strength = 1.0


def _with(name: str, big: type[BigStudent]) -> None:
    """The recipe's merge by another big student."""

    @strategy(f"choice: {name}")
    def merged(lab: Lab, teachers: Sequence[Column]) -> Column:
        with patch.object(stages, "BigStudent", big):
            return lab.merge(teachers, f"choice-{name.replace(', ', '-')}")


_with("magnitude", ByMagnitude)
_with("magnitude, strong", ByMagnitudeStrongly)


class Compensated(BigStudent):
    """A big student whose compression makes up for what it drops, as ``methods.reconstruct`` does.

    Layers are fitted by least squares to compute from the kept channels what this network computes from all, each times its
    gate.
    """

    samples: ClassVar[Iterator[Tensor]]  # of the networks of a stack, one after another

    def __init__(self, *teachers: nn.Module, **options: Any) -> None:
        super().__init__(*teachers, **options)
        self.begun = teachers, options["example_inputs"]

    @torch.no_grad()
    def compress(self, *arguments: Any, **options: Any) -> Any:
        """The student, refitted; plain while a new big student checks itself."""
        if not hasattr(self, "begun"):
            return super().compress(*arguments, **options)
        kept, inputs = self.keep(), next(self.samples)
        family = Family.of([self._whole().eval()], inputs)
        student = super().compress(*arguments, **options).eval()
        refit(student, family.networks, family, kept, ridge=0.03)
        return student.train()

    def _whole(self) -> nn.Module:
        """A network of the teachers' class that computes what this one does in eval mode, with the channels of all."""
        teachers, inputs = self.begun
        other = BigStudent(*teachers, example_inputs=inputs, keep=float(len(teachers)), verify=False)
        other.link()
        other.adopt(self)
        whole = other.compress(keep={group.name: range(len(teachers) * group.size) for group in self.groups})
        groups = channel_groups(whole, inputs)
        gates = [draw_gates([self._gate(group.name)], None, False).flatten() for group in groups]
        rescale(dict(whole.named_parameters()), groups, written=[torch.ones_like(gate) for gate in gates], read=gates)
        return whole


@strategy(LEAST_SQUARES)
def compensated(lab: Lab, teachers: Sequence[Column]) -> Column:
    """A merge at equal epochs whose compression makes up for dropped channels by least squares."""
    inputs = torch.cat([inputs for inputs, _ in lab.loaders("samples").train], 1)
    Compensated.samples = iter(inputs[:, :512])
    with patch.object(stages, "BigStudent", Compensated):
        return lab.merge(teachers, "choice-least-squares")


def _warmed(name: str) -> None:
    """A strategy whose fine-tuning begins with a tenth of its epochs in which the learning rate rises."""

    @strategy(f"{WARM}{name}", classifies=True)
    def warmed(lab: Lab, teachers: Sequence[Column]) -> Column:
        other, merge = copy.copy(lab), lab.recipe.merge
        other.recipe = replace(lab.recipe, merge=replace(merge, warmup=round(merge.finetune_plan.epochs / 10)))
        if lab.place.checkpoints is not None:
            other.place = replace(lab.place, checkpoints=lab.place.checkpoints / "warm")
        return STRATEGIES[name].run(other, teachers)


for _name in WARMED:
    _warmed(_name)


def recipe_of(
    name: str,
    make_network: Callable[[int, int], nn.Module],
    load_data: LoadData,
    unit: int,
    batch_size: int,
    **more: Any,
) -> Recipe:
    """An experiment in the form of the paper's: teachers of 2U epochs, a merge stage of U, fine-tuning of U, in all 6U."""
    lr = 0.02
    return Recipe(
        name=name,
        make_network=make_network,
        load_data=load_data,
        teacher=Plan(epochs=2 * unit, lr=lr, milestones=(round(4 / 3 * unit),)),
        long=Plan(epochs=6 * unit, lr=lr, milestones=(5 * unit,)),
        merge=Options(
            merge_epochs=unit,
            finetune_epochs=unit,
            link_at=0.0,
            milestones=(round(2 / 3 * unit),),
            lr=lr,
            lam_step=45 / unit,
        ),
        batch_size=batch_size,
        test_every=2 * unit,
        source="our own",
        **more,
    )


def subset(arrays: ImageArrays, train: int, test: int, classes: int | None = None) -> ImageArrays:
    """A balanced part of the training images and a random one of the test images, the same in every run."""
    classes, random = classes or arrays.classes, np.random.default_rng(0)
    drawn = [random.permutation(np.flatnonzero(arrays.train_labels == c))[: train // classes] for c in range(classes)]
    chosen, known = np.concatenate(drawn), np.flatnonzero(arrays.test_labels < classes)
    tested = np.sort(random.permutation(known)[:test])
    return replace(
        arrays,
        train_images=arrays.train_images[chosen],
        train_labels=arrays.train_labels[chosen],
        test_images=arrays.test_images[tested],
        test_labels=arrays.test_labels[tested],
    )


def halved(arrays: ImageArrays) -> ImageArrays:
    """Half as high and as wide, by means of 2×2 pixels."""

    def pooled(images: np.ndarray) -> np.ndarray:
        means = F.avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2).float(), 2).round()
        return means.to(torch.uint8).permute(0, 2, 3, 1).numpy()

    return replace(arrays, train_images=pooled(arrays.train_images), test_images=pooled(arrays.test_images))


class NormedLeNet(LeNet):
    """LeNet with a BatchNorm after each convolution."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.norm1, self.norm2 = nn.BatchNorm2d(self.conv1.out_channels), nn.BatchNorm2d(self.conv2.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, in_channels, image_size, image_size) to logits (N, classes)."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class SmallViT(nn.Module):
    """A vision transformer: patches of 4×4 pixels, 48 channels, three heads, four blocks.

    Args:
        classes: outputs.
        width: multiplies the channels and heads.
        size: height and width of the images.
    """

    def __init__(self, classes: int = 10, width: int = 1, size: int = 16) -> None:
        super().__init__()
        channels = 48 * width
        self.patches = nn.Conv2d(3, channels, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // 4) ** 2, channels))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                channels, 3 * width, 2 * channels, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(4)
        )
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, size, size) to logits (N, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def _mnist_network(classes: int, width: int) -> nn.Module:
    return LeNet(1, 14, classes, width, kernel_size=3, channels=(4, 8), units=(24, 24))


def _mnist_data(path: Path | None, seed: int, on_bad_image: OnBadImage = "raise") -> Dataset:
    return image_dataset(subset(halved(load_npz(str(path))), 1000, 4000))


def _woof_network(classes: int, width: int) -> nn.Module:
    return NormedLeNet(3, 28, classes, width)


def _woof_data(path: Path | None, seed: int, on_bad_image: OnBadImage = "raise") -> Dataset:
    return image_dataset(subset(load_npz(str(path)), 1000, 2000))


def _resnet(classes: int, width: int) -> nn.Module:
    return ResNetCifar(3, classes, width, channels=8)


def _vit(classes: int, width: int) -> nn.Module:
    return SmallViT(classes, width)


def _cifar_data(path: Path | None, seed: int, on_bad_image: OnBadImage = "raise") -> Dataset:
    """The first 10 classes of CIFAR-100, 100 images of each, and their 1,000 test images, at half their height and width."""
    return image_dataset(halved(subset(load_npz(str(path)), 1000, 1000, classes=10)))


@dataclass(frozen=True)
class Part:
    """One data set and network.

    Attributes:
        what: for the page.
        recipe: makes its recipe.
        replicates: of every strategy.
        minutes: that one core takes.
        data: what the file of its images is called in the folder; None for none.
        strategies: what is measured.
    """

    what: str
    recipe: Callable[[], Recipe]
    replicates: int
    minutes: int
    data: str | None = None
    strategies: Sequence[str] = (*AT_EQUAL_COST, *AT_EQUAL_EPOCHS)

    def images(self, folder: Path | None) -> Path | None:
        """The file of its images in a folder."""
        return None if self.data is None or folder is None else folder / self.data

    def run(
        self,
        folder: Path | None,
        checkpoints: Path,
        strategies: Sequence[str],
        replicates: range,
        budget: float = 1.0,
    ) -> dict[str, Any]:
        """What strategies came to, with the minutes that it took.

        Args:
            folder: of the images.
            checkpoints: a directory, from which it goes on where it was stopped.
            strategies: their names.
            replicates: their numbers.
            budget: fraction of the recipe's epochs.
        """
        started = time.perf_counter()
        found = run(
            self.recipe(),
            strategies,
            replicates=len(replicates),
            first=replicates.start,
            budget=budget,
            data_path=self.images(folder),
            workers=1,
            checkpoint_dir=checkpoints,
            resume=checkpoints.is_dir(),
        )
        for each in found["strategies"].values():
            del each["seconds"]  # others used the machine, too
        return {**found, "what": self.what, "minutes": round((time.perf_counter() - started) / 60, 1)}


PARTS = {
    "digits": Part(
        "scikit-learn's digits, 1,080 images of 8×8, small LeNet",
        lambda: replace(digits(), stack=12),
        24,
        35,
        strategies=ALL,
    ),
    "mnist1k": Part(
        "900 images of MNIST at 14×14, LeNet",
        lambda: recipe_of("mnist1k", _mnist_network, _mnist_data, 20, 50, stack=10),
        20,
        45,
        "mnist.npz",
        ALL,
    ),
    "imagewoof28": Part(
        "900 images of Imagewoof at 28×28, LeNet with BatchNorm",
        lambda: recipe_of("imagewoof28", _woof_network, _woof_data, 10, 50, stack=5, augment=flip_and_shift),
        12,
        130,
        "imagewoof28.npz",
        (*AT_EQUAL_COST, *AT_EQUAL_EPOCHS, LEAST_SQUARES),
    ),
    "resnet20": Part(
        "900 images of 10 classes of CIFAR-100 at 16×16, ResNet-20 with 8, 16 and 32 channels",
        lambda: recipe_of("resnet20", _resnet, _cifar_data, 10, 50, stack=4, augment=flip_and_shift),
        12,
        155,
        "cifar100.npz",
    ),
    "vit": Part(
        "900 images of 10 classes of CIFAR-100 at 16×16, a small vision transformer",
        lambda: recipe_of("vit", _vit, _cifar_data, 10, 50, stack=4, augment=flip_and_shift),
        12,
        150,
        "cifar100.npz",
        (*AT_EQUAL_COST, *AT_EQUAL_EPOCHS, TIED),
    ),
    # By then a transformer's teachers have converged. Merges without training are left out, but for the best two.
    "vit-long": Part(
        "900 images of 10 classes of CIFAR-100 at 16×16, the transformer, all three times as long",
        lambda: recipe_of("vit-long", _vit, _cifar_data, 30, 50, stack=5, augment=flip_and_shift),
        5,
        140,
        "cifar100.npz",
        [
            *("ours", "ours-plain", "one", "one-cosine", "bo3", "restart", "cyclic-swa", "distill"),
            *("rebasin", "reconstruct", "ensemble", "ensemble-3", OWN, "choice: all"),
        ],
    ),
}


def missing(name: str) -> list[str]:
    """Strategies that a part's file lacks."""
    known = _kept(name)["strategies"]
    return [each for each in PARTS[name].strategies if each not in known]


def is_done(name: str) -> bool:
    """Whether a part's file has all its strategies and replicates."""
    return not missing(name) and _kept(name)["config"]["replicates"] >= PARTS[name].replicates


def _kept(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"strategies": {}}


def measure(name: str, folder: Path | None) -> None:
    """Runs what a part lacks on the folder's images, from its checkpoints if there are any, and writes what came of it.

    Raises:
        ValueError: A part can't be added to, since this machine or code gives other values.
    """
    part, file, kept = PARTS[name], RESULTS / f"{name}.json", _kept(name)
    where = folder, ROOT / "runs" / "evidence" / name
    if not kept["strategies"]:
        write(file, part.run(*where, part.strategies, range(part.replicates)))
        return
    have = kept["config"]["replicates"]
    if lacking := missing(name):
        # What is added has the same teachers if a strategy that is there has the same values.
        found = part.run(*where, [OWN, *(each for each in lacking if each != OWN)], range(have))
        if found["strategies"].pop(OWN)["values"] != kept["strategies"][OWN]["values"]:
            raise ValueError(
                f"{name}: {OWN} has other values here than in its file; move it away, and measure all anew"
            )
        kept["strategies"] |= found["strategies"]
        kept["minutes"] = round(kept["minutes"] + found["minutes"], 1)
        write(file, kept)
    if have < part.replicates:
        write(file, joined(kept, part.run(*where, list(kept["strategies"]), range(have, part.replicates))))


def joined(kept: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Results with further replicates of the same strategies; the environment stays the first ones'."""
    strategies = {}
    for each, known in kept["strategies"].items():
        new = more["strategies"][each]
        lists = {key: known[key] + new[key] for key in ("values", "losses", "at_once") if key in known}
        strategies[each] = {**known, **lists, "cost": max(known["cost"], new["cost"])}
    count = kept["config"]["replicates"] + more["config"]["replicates"]
    added = {"from": kept["config"]["replicates"], "environment": more["environment"]}
    return {
        **kept,
        "strategies": strategies,
        "config": {**kept["config"], "replicates": count},
        "minutes": round(kept["minutes"] + more["minutes"], 1),
        "added": [*kept.get("added", []), added],
    }


def write(file: Path, results: dict[str, Any]) -> None:
    """Writes a part's results."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, results)
    print(f"{file.stem}: {results['minutes']} minutes", flush=True)


def asked(
    doc: str | None, files: Mapping[str, str | None], is_done: Callable[[str], bool], results: str
) -> Iterator[tuple[str, Path | None]]:
    """The parts that the command line asks for and that can be measured, each with the folder of the images.

    Args:
        doc: of the script, for its help.
        files: per part what the file of its images is called in the folder; None for none.
        is_done: whether there is nothing left to measure of a part.
        results: the folder of the files of parts that are done.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="the folder of the images")
    parser.add_argument("--parts", nargs="+", choices=files, default=list(files), help="some of them; default all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.parts:
        file = files[name]
        if is_done(name):
            print(f"{name}: done before, {results}/{name}.json")
        elif file is not None and (options.data is None or not (options.data / file).exists()):
            print(f"{name}: left out; it needs {file} in the folder of the images")
        else:
            yield name, options.data


def main() -> None:
    """Runs what is not there yet."""
    files = {name: part.data for name, part in PARTS.items()}
    for name, folder in asked(__doc__, files, is_done, "docs/results/evidence"):
        print(f"{name}: about {PARTS[name].minutes} minutes", flush=True)
        measure(name, folder)


if __name__ == "__main__":
    main()
