"""Trials of label sets, widths and parts of the depth: a small replicate runs, and the page shows where merging is no help."""

import copy
import re
from dataclasses import replace

import torch

from benchmarks import label_sets, layerwise, trials, widths
from fastmerge.environment import environment


def _images(side: int, count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 10
    x = torch.randn(count, 1, side, side, generator=generator) * 0.1
    x[torch.arange(count), 0, 2 + y // 5, 2 + y % 5] += 3
    return x, y


def test_label_sets() -> None:
    data, small = _images(28), {"images": 100, "epochs": 2, "merge_epochs": 1}
    record = label_sets.Replicate(replace(label_sets.TASKS["mnist"], **small), data, data, seed=0).results()
    assert set(record["scores"]) == {
        "ensemble",
        *(f"{name}, {kind}" for name in label_sets.WHAT if name != "ensemble" for kind in ("own", "all")),
    }
    record |= small
    better, worse = copy.deepcopy(record), copy.deepcopy(record)
    for one, by in ((better, 0.5), (worse, 0.501)):
        one["scores"]["merged, own"]["task"] = one["scores"]["joint, own"]["task"] + by
    found = {"replicates": [better, worse], "environment": environment()}
    measured = {"mnist": found, "cifar100": {"replicates": []}}
    blocks = label_sets.blocks(measured)
    assert [text.get_text() for text in label_sets.plot(measured).axes[0].get_yticklabels()][::5] == [
        "one network",
        "merged, distilled",
    ]
    assert re.search(
        r"\*\*worse\*\*: .*one network, trained on all classes from fresh weights \(-50.05 ± 0.05\)", blocks["verdict"]
    )
    assert blocks["tables"].count("\n| merged ") == 2


def test_widths() -> None:
    train, test = _images(8), _images(8, 100)
    record = widths.Replicate(train, test, epochs=1, merge_epochs=1, seed=0).results()
    assert set(record["accuracy"]["merged"]) == {f"{width:g}" for width in widths.WIDTHS}
    record |= {"epochs": 1, "merge_epochs": 1}
    for key in record["accuracy"]["merged"]:
        record["accuracy"]["merged"][key] = record["accuracy"]["fresh"][key] - 0.1
    blocks = widths.blocks({"replicates": [record, copy.deepcopy(record)], "environment": environment()})
    assert len(widths.plot([record, copy.deepcopy(record)]).axes[0].lines) >= len(widths.WHAT)
    assert (
        "A merge compared with *fresh network* of the same width: behind at 0.25, 0.5, 1, 1.5, 2." in blocks["verdict"]
    )
    assert blocks["table"].splitlines()[2].startswith("| 0.25 ")


def test_parts_of_the_depth() -> None:
    train, test = _images(8, 100), _images(8, 100)
    record = layerwise.Replicate(train, test, epochs=1, seed=0).results()
    assert set(record["merges"]) == set(layerwise.MERGES)
    costs = [record["merges"][name]["cost"] for name in ("4 parts", "2 parts", "whole")]
    assert costs == sorted(costs)
    for name in layerwise.MERGES:
        record["merges"][name]["student"] = 0.9 if name == "whole" else 0.8
    records = {"replicates": [record, copy.deepcopy(record)], "environment": environment()}
    torch.manual_seed(0)
    counted = layerwise.memory("ResNet-18", lambda: layerwise.network(28), torch.randn(2, 1, 28, 28))
    blocks = layerwise.blocks({"networks": [counted]}, {"digits": records, "mnist": {"replicates": []}})
    assert "**behind**: 2 parts (-10.00 ± 0.00), 4 parts (-10.00 ± 0.00)" in blocks["verdict"]
    assert "on 1,000 images of MNIST has not been measured" in blocks["verdict"]
    assert "| 2 parts " in blocks["accuracy"]
    assert [text.get_text() for text in layerwise.plot({"networks": [counted]}).axes[0].texts][3:5] == [
        "layerwise=2",
        "layerwise=4",
    ]
    peaks = {row[1]: float(row[3]) for row in layerwise.memory_rows(counted)}
    assert 1 < peaks["`layerwise=4`"] <= peaks["`layerwise=2`"] < peaks["linked"]
    assert peaks["linked, activation checkpointing"] < peaks["linked"]


def test_a_pruned_teacher_of_full_width_is_the_teacher() -> None:
    torch.manual_seed(0)
    teachers = [widths.network() for _ in range(2)]
    x = _images(8, 10)[0]
    assert torch.allclose(widths.pruned_to(teachers, 1.0)(x), teachers[0](x), atol=1e-5)
    assert widths.pruned_to(teachers, 0.5).fc2.weight.shape == (8, 8)


def test_records_that_are_there_are_not_measured_again(tmp_path) -> None:
    path = tmp_path / "records.json"
    assert list(trials.measure_missing(path, range(2), lambda seed: {"seed": seed})) == [{"seed": 0}, {"seed": 1}]
    assert list(trials.measure_missing(path, range(3), lambda seed: {"seed": seed})) == [{"seed": 2}]
    assert [record["seed"] for record in trials.load_records(path)["replicates"]] == [0, 1, 2]
    assert trials.verdict_of([1.0], "ahead", "behind") == "no clear difference"
