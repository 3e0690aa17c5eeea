"""Merges in parts of the depth: what each keeps in memory and costs, and paired trials beside whole merges at equal cost.

``python -m benchmarks.layerwise memory`` counts bytes and operations. ``python -m benchmarks.layerwise digits`` and
``mnist FOLDER``, which reads FOLDER/mnist.npz (``train_images, train_labels, test_images, test_labels``), train, and go on
where they were stopped. They write benchmarks/results/experiments/layerwise-*.json, of trials one record per replicate, and
docs/pictures/layerwise.png.

Every merge begins with the same two teachers of E epochs; its merge stage and fine-tuning together cost E epochs of a teacher,
by counted operations.
"""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils import _pytree as pytree

import fastmerge
from benchmarks.trials import (
    Data,
    Shuffled,
    accuracy,
    gaps_text,
    hash_of,
    load_records,
    mean_text,
    measure_missing,
    verdict_of,
)
from fastmerge import methods
from fastmerge.big_student import BigStudent
from fastmerge.data.arrays import load_npz
from fastmerge.data.dataset import load_digits
from fastmerge.environment import environment
from fastmerge.files import atomic
from fastmerge.lowering.programs import lowered
from fastmerge.merging.layerwise import phases, stage_networks
from fastmerge.merging.options import Options
from fastmerge.methods.cost import counted_step, kept_for_backward, step_operations
from fastmerge.networks import LeNet
from fastmerge.reporting.report import new_figure, save_figure
from fastmerge.reporting.tables import table

RESULTS = Path(__file__).resolve().parent / "results" / "experiments"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "layerwise.png"
BATCH, RATE, LINK_AT, MERGE_EPOCHS = 50, 0.02, 0.25, 8
TASKS = {"digits": "digits of scikit-learn", "mnist": "1,000 images of MNIST"}
WHOLE = "whole"
MERGES = {WHOLE: 1, "2 parts": 2, "4 parts": 4}
SEGMENTS = (4, 8, 16)
IMAGES = {"ResNet-18": 64, "ViT": 64}  # per step, for which memory is counted


def network(size: int) -> nn.Module:
    """A LeNet with 4 and 8 channels, 16 and 16 units."""
    return LeNet(1, size, 10, kernel_size=3 if size == 8 else 5, channels=(4, 8), units=(16, 16))


class Replicate:
    """Two teachers of one seed, and merges of them.

    Args:
        train, test: images (N, 1, H, W) and digits.
        epochs: E, of a teacher.
        seed: of everything.
    """

    def __init__(self, train: Data, test: Data, epochs: int, seed: int) -> None:
        self.train_data, self.test, self.epochs, self.seed = train, test, epochs, seed

    def results(self) -> dict[str, Any]:
        """Accuracies of the students on test images, before the fine-tuning and after it, and the merge stages' costs."""
        teachers = [self.teacher(number) for number in range(2)]
        found = {name: self.merged(teachers, parts) for name, parts in MERGES.items()}
        own = [accuracy(teacher, self.test) for teacher in teachers]
        return {"seed": self.seed, "epochs": self.epochs, "teachers": own, "merges": found}

    def loader(self, name: str) -> Shuffled:
        return Shuffled(self.train_data, BATCH, hash_of(self.seed, "order", name))

    def teacher(self, number: int) -> nn.Module:
        torch.manual_seed(hash_of(self.seed, "weights", number))
        model = network(self.train_data[0].shape[-1])
        methods.train(model, self.loader(f"teacher {number}"), epochs=self.epochs, lr=RATE)
        return model

    def merged(self, teachers: Sequence[nn.Module], parts: int) -> dict[str, float]:
        """A merge in so many parts, with a fine-tuning of what the merge stage leaves of E epochs."""
        spent = self.cost(teachers, Options(layerwise=parts, merge_epochs=MERGE_EPOCHS, link_at=LINK_AT))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gates that have not settled
            student, history = fastmerge.merge(
                teachers,
                self.loader("merge"),
                val_loader=[self.test],
                val_every=10_000,
                layerwise=parts,
                merge_epochs=MERGE_EPOCHS,
                finetune_epochs=max(1, round(self.epochs - spent)),
                link_at=LINK_AT,
                lr=RATE,
                gate_schedule="budget",
                seed=hash_of(self.seed, "merge"),
                progress=False,
            )
        at_once = history.borders["compressed"].accuracy
        assert at_once is not None
        return {"student": accuracy(student, self.test), "compressed": at_once, "cost": spent}

    def cost(self, teachers: Sequence[nn.Module], options: Options) -> float:
        """The merge stage's, in epochs of a teacher."""
        few, spent = [(self.train_data[0][:8], None)], 0.0
        for _, big, each in stage_networks(teachers, self.train_data[0][:2], options, verify=False):
            spent += sum(epochs * step_operations(big, few) for _, epochs in phases(big, each))
        return spent / step_operations(teachers[0], few)


class Segments(fx.Interpreter):
    """Runs a network in segments, and counts what activation checkpointing would keep between and within them.

    Attributes:
        between: bytes of the segments' inputs, by address.
        largest: the most that one segment keeps for its own backward, in bytes.
    """

    def __init__(self, big: BigStudent, count: int, x: Tensor) -> None:
        analysis = big._blueprint.analyse()
        graph, _ = lowered(analysis, big.network, "train", big._population, False, big.linked)
        nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        number = {node: place * count // len(nodes) for place, node in enumerate(nodes)}
        super().__init__(split_module(fx.GraphModule(big.network, graph), big.network, number.__getitem__))
        self.between: dict[int, int] = {}
        self.largest = 0
        self._known: list[Tensor] = [*big.parameters(), x]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in self._known}
        self.run(big._draw_gates([x]), x)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._own:
                self.between[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                self._known.append(tensor)
        with kept_for_backward(self._known) as saved:
            output = super().call_module(target, args, kwargs)
        self.largest = max(self.largest, sum(saved.values()))
        return output

    @property
    def total(self) -> int:
        return sum(self.between.values()) + self.largest


def memory(name: str, make: Any, x: Tensor) -> dict[str, Any]:
    """Bytes and operations of steps on two images.

    Args:
        name: of the network.
        make: builds it.
        x: two images.
    """
    teachers = [make() for _ in range(2)]
    found: dict[str, Any] = {"one": _counted(make(), x)}
    for parts in (1, 2, 4):
        options, steps = Options(layerwise=parts, merge_epochs=parts, link_at=1.0), []
        for _, big, _ in stage_networks(teachers, x, options, verify=False):
            if parts == 1:
                found["block-diagonal"] = [_counted(big, x)]
            big.link()
            steps.append(_counted(big, x))
        found[str(parts)] = steps
    return {"network": name, "images": len(x), **found}


def _counted(network: nn.Module, x: Tensor) -> dict[str, Any]:
    operations, kept = counted_step(network, [x])
    weights = sum(parameter.nbytes for parameter in network.parameters())
    found: dict[str, Any] = {"operations": operations, "kept": kept, "weights": weights}
    if isinstance(network, BigStudent):
        forward, _ = counted_step(network, [x], backward=False)
        network.requires_grad_(True)
        found |= {"forward": forward, "segments": {str(k): Segments(network, k, x).total for k in SEGMENTS}}
    gc.collect()  # graphs are cycles, which hold activations
    return found


def networks() -> dict[str, tuple[Any, Tensor]]:
    """What memory is counted of, and two images for each."""
    from torchvision.models import VisionTransformer, resnet18

    def vit() -> nn.Module:
        return VisionTransformer(224, 16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)

    images = torch.randn(2, 3, 224, 224)
    return {"ResNet-18": (resnet18, images), "ViT": (vit, images)}


def step_bytes(step: dict[str, Any], images: int, counted_on: int, kept: int | None = None) -> float:
    """Weights, gradients, momentum, and what the forward keeps for the backward."""
    return 3 * step["weights"] + (step["kept"] if kept is None else kept) * images / counted_on


def memory_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per way to run the merge stage of a network: bytes at the peak, and operations of a step on the average."""
    images, on, one = IMAGES[found["network"]], found["images"], found["one"]
    ways = {"block-diagonal": found["block-diagonal"], "linked": found["1"]}
    ways |= {f"`layerwise={parts}`": found[str(parts)] for parts in (2, 4)}
    rows = []

    def row(what: str, peak: float, operations: float) -> None:
        plain = step_bytes(one, images, on)
        relative, cost = peak / plain, operations / one["operations"]
        rows.append([found["network"], what, f"{peak / 2**30:.2f} GiB", f"{relative:.2f}", f"{cost:.2f}"])

    row("one network", step_bytes(one, images, on), one["operations"])
    for what, steps in ways.items():
        row(what, max(step_bytes(s, images, on) for s in steps), fmean(s["operations"] for s in steps))
    row(
        "linked, early compaction: first epochs",
        max(step_bytes(s, images, on) for s in found["1"]),
        found["1"][0]["operations"],
    )
    row("linked, early compaction: all gates decided", step_bytes(one, images, on), one["operations"])
    for what, steps in ways.items():
        best = [min(step["segments"].values()) for step in steps]
        peak = max(step_bytes(step, images, on, kept) for step, kept in zip(steps, best, strict=True))
        row(f"{what}, activation checkpointing", peak, fmean(s["operations"] + s["forward"] for s in steps))
    return rows


def plot(counted: dict[str, Any]) -> Any:
    """Memory over operations of each way to run the merge stage, in those of one network."""
    figure, panels = new_figure(6.4, 6.4, rows=len(counted["networks"]))
    for found, axes in zip(counted["networks"], np.atleast_1d(panels), strict=True):
        for number, (_, what, _, peak, cost) in enumerate(memory_rows(found)):
            at, checkpointed = (float(cost), float(peak)), "checkpointing" in what
            axes.plot(
                *at, "o", color="#D55E00" if checkpointed else "#0072B2", fillstyle="none" if checkpointed else "full"
            )
            if "compaction" not in what:
                label = what.replace("`", "").partition(",")[0]
                axes.annotate(
                    label, at, xytext=(6, -10 if number % 2 else 4), textcoords="offset points", fontsize="small"
                )
        axes.set_ylim(0)
        axes.margins(x=0.15)
        axes.set_title(f"{found['network']}; hollow: with activation checkpointing", loc="left", fontsize="medium")
        axes.set_ylabel("memory, of one network's")
    np.atleast_1d(panels)[-1].set_xlabel("operations of a step, of one network's")
    return figure


def blocks(counted: dict[str, Any], measured: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What docs/layerwise.md shows of the counts and the records."""
    rows = [row for found in counted["networks"] for row in memory_rows(found)]
    header = ["network", "merge stage", "peak memory", "times one network's", "operations per step"]
    memory = [
        table(header, rows, markdown=True),
        f"Two teachers, float32, {IMAGES['ResNet-18']} images of 224 × 224 a step; the ViT has 12 blocks of width 192. "
        "Memory is counted on a CPU, not measured on a GPU: weights, gradients, SGD's momentum, and what autograd keeps of "
        "the forward pass. For `layerwise` it is that of the largest part. Operations of a step are relative to one "
        "network's; for `layerwise` they are the mean over the parts, all linked. Early compaction (`compact_at`) begins "
        "with the whole big student, so its peak is the same. The rows with activation checkpointing count what "
        f"`torch.utils.checkpoint` would keep with the best of {', '.join(map(str, SEGMENTS))} segments, at the cost of "
        "another forward pass; fastmerge has no option for it.",
    ]
    parts = []
    for task, what in TASKS.items():
        records = measured[task]["replicates"]
        if not records:
            continue
        rows = []
        for name in MERGES:
            students = [100 * r["merges"][name]["student"] for r in records]
            at_once = [100 * r["merges"][name]["compressed"] for r in records]
            gap = "" if name == WHOLE else gaps_text(gaps(records, name))
            cost = fmean(r["merges"][name]["cost"] for r in records)
            rows.append([name, mean_text(students), gap, mean_text(at_once), f"{cost:.1f}"])
        teachers = [100 * value for r in records for value in r["teachers"]]
        header = ["merge", "student, %", "less whole", "before fine-tuning, %", "merge stage's cost"]
        parts += [
            f"## Accuracy: {what}",
            table(header, rows, markdown=True),
            f"Test accuracy ± its standard error, n = {len(records)} replicates; *less whole* is the difference within a "
            f"replicate. The network: {network.__doc__} A teacher trains for E = {records[0]['epochs']} epochs and has "
            f"{fmean(teachers):.2f}. Merge stage and fine-tuning together cost E epochs of a teacher, in counted operations; a "
            f"merge stage has {MERGE_EPOCHS} epochs, and its cost is in epochs of a teacher.",
        ]
    made = next((m["environment"] for m in (counted, *measured.values()) if "environment" in m), None)
    if made is not None:
        parts.append(
            f"PyTorch {made['torch']}, {made['cpu']['name']}, one core. Written by `make docs` from "
            "benchmarks/results/experiments/layerwise-*.json, which `python -m benchmarks.layerwise` fills."
        )
    return {
        "verdict": conclusion(counted, measured),
        "memory": "\n\n".join(memory),
        "accuracy": "\n\n".join(parts),
    }


def whole(records: Sequence[dict[str, Any]]) -> list[float]:
    return [100 * r["merges"][WHOLE]["student"] for r in records]


def gaps(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [100 * r["merges"][name]["student"] - base for r, base in zip(records, whole(records), strict=True)]


def conclusion(counted: dict[str, Any], measured: dict[str, dict[str, Any]]) -> str:
    """Where parts lose, first; then what they save."""
    sentences = []
    for task, what in TASKS.items():
        records = measured[task]["replicates"]
        if not records:
            sentences.append(f"* Accuracy on {what} has not been measured.")
            continue
        verdicts: dict[str, list[str]] = {"behind": [], "no clear difference": [], "ahead": []}
        for name in MERGES:
            if name != WHOLE:
                found = gaps(records, name)
                verdicts[verdict_of(found, "ahead", "behind")].append(f"{name} ({gaps_text(found)})")
        said = "; ".join(f"**{verdict}**: {', '.join(names)}" for verdict, names in verdicts.items() if names)
        sentences.append(
            f"* Accuracy on {what}, less that of a merge as a whole at equal cost, in points ± a standard error (more than two "
            f"make a clear difference): {said}."
        )
    for found in counted.get("networks", []):
        images, on = IMAGES[found["network"]], found["images"]
        base = step_bytes(found["1"][0], images, on)
        each = [
            f"{parts} parts {max(step_bytes(s, images, on) for s in found[str(parts)]) / base:.0%}" for parts in (2, 4)
        ]
        sentences.append(
            f"* Peak memory of {found['network']}, relative to its whole linked big student: {', '.join(each)}."
        )
        rows = [row for row in memory_rows(found)[1:] if "compaction" not in row[1]]
        with_it, without = (
            min(
                (row for row in rows if ("checkpointing" in row[1]) == wanted),
                key=lambda row: (float(row[3]), float(row[4])),
            )
            for wanted in (True, False)
        )
        sentences.append(
            f"* The least memory that merge() can have for {found['network']}: {without[1]} takes {without[3]} times the "
            f"memory of one network, and {without[4]} times its operations. With activation checkpointing, which merge() does "
            f"not offer, {with_it[1].partition(',')[0]} would take {with_it[3]} times the memory and {with_it[4]} times the "
            "operations."
        )
    return "\n".join(sentences)


def load() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What :func:`page` takes: the counts, and the records by task."""
    path = RESULTS / "layerwise-memory.json"
    counted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return counted, {task: load_records(RESULTS / f"layerwise-{task}.json") for task in TASKS}


def _digits() -> tuple[Data, Data]:
    arrays = load_digits()
    return _tensors(arrays, 240 / 2, 0.6)


def _mnist(folder: Path) -> tuple[Data, Data]:
    arrays = load_npz(folder / "mnist.npz")
    return _tensors(arrays, 255 * 0.3081, 0.1307 / 0.3081)


def _tensors(arrays: Any, scale: float, shift: float) -> tuple[Data, Data]:
    pairs = (arrays.train_images, arrays.train_labels), (arrays.test_images, arrays.test_labels)
    train, test = (
        (torch.from_numpy(i).permute(0, 3, 1, 2).float() / scale - shift, torch.from_numpy(y)) for i, y in pairs
    )
    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", *TASKS))
    parser.add_argument("folder", type=Path, nargs="?", help="with mnist.npz")
    parser.add_argument("--epochs", type=int, default=30, help="E, of a teacher (%(default)s)")
    parser.add_argument(
        "--images", type=int, default=1000, help="training images of MNIST, others in each replicate (%(default)s)"
    )
    parser.add_argument("--replicates", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "memory":
        found: dict[str, Any] = {"networks": [], "environment": environment()}
        for name, made in networks().items():
            found["networks"].append(memory(name, *made))
            with atomic(RESULTS / "layerwise-memory.json") as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        save_figure(plot(found), PICTURE)
        return
    train, test = _digits() if options.what == "digits" else _mnist(options.folder)

    def measure(seed: int) -> dict[str, Any]:
        chosen = torch.arange(len(train[1]))
        if options.what == "mnist":
            generator = torch.Generator().manual_seed(hash_of(seed, "images"))
            chosen = torch.randperm(len(train[1]), generator=generator)[: options.images]
        return Replicate((train[0][chosen], train[1][chosen]), test, options.epochs, seed).results()

    for record in measure_missing(RESULTS / f"layerwise-{options.what}.json", range(options.replicates), measure):
        print(
            record["seed"], {name: round(found["student"], 4) for name, found in record["merges"].items()}, flush=True
        )


if __name__ == "__main__":
    main()
