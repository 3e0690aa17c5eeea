"""The hours in docs/scaling.md, from made-up JSON, and without a measured step."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmark_reports import raced, report
from benchmarks import names
from benchmarks.cases import Case
from benchmarks.counting import step_work
from benchmarks.hours import IMAGES, MEASURED, RATE, SHEET, SOURCE, efficiency, expected, tables
from fastmerge.experiments.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
CASE = "step, resnet18 224px batch 256 bf16 cuda"
STEPS = 5005  # of an epoch
STEP = {
    names.TEACHERS: {"samples": [0.03, 0.032, 0.05], "peak_bytes": 9 * 2**30},  # of two networks
    names.LINKED: {"samples": [0.036], "peak_bytes": 2**34},
    names.UNLINKED: {"samples": [0.024]},
    names.NAIVE: {"samples": [0.072]},
}


@cache
def of_none() -> str:
    """Of no measured step."""
    return tables({})


def rows(text: str) -> dict[str, list[str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in ([cell.strip() for cell in line] for line in lines)}


def hours(*parts: tuple[int, float]) -> float:
    return sum(epochs * STEPS * seconds for epochs, seconds in parts) / 3600


def test_one_gpu_takes_the_measured_steps() -> None:
    found = rows(tables({"x": report([raced(CASE, STEP)], gpu=True)}))
    assert -(-IMAGES // 256) == STEPS
    assert found["part"] == ["epochs", "images/s", "memory", "1 GPU, hours", "8 GPUs, hours", "64 GPUs, hours"]
    assert found["teachers"][:4] == ["40", "16000", "9.0 GiB", f"{hours((40, 0.016)):.2g}"]
    assert found["merge, linked"][:4] == ["20", "7111", "16.0 GiB", f"{hours((20, 0.036)):.2g}"]
    assert found["merge, block-diagonal"][:4] == ["20", "10667", "–", f"{hours((20, 0.024)):.2g}"]
    assert found["merge, naive dense"][3] == f"{hours((20, 0.072)):.2g}"
    assert found["fine-tune"][:4] == ["90", "16000", "9.0 GiB", f"{hours((90, 0.016)):.2g}"]
    assert found["student, in all (`--link-at 0`)"] == ["150", "–", "–", *found["student, in all (`--link-at 0`)"][3:]]
    assert found["student, in all (`--link-at 0`)"][3] == f"{hours((130, 0.016), (20, 0.036)):.2g}"
    assert found["student, in all (`--link-at 0.25`)"][3] == f"{hours((130, 0.016), (5, 0.024), (15, 0.036)):.2g}"
    assert found["`one`, for comparison"][3] == f"{hours((150, 0.016)):.2g}"


def test_several_gpus_take_their_share_and_at_worst_all_messages_more() -> None:
    found = rows(tables({"x": report([raced(CASE, STEP)], gpu=True)}))
    nbytes = 4 * sum(p.numel() for p in RECIPES["resnet18-imagenet"]().make_network(1000, 1).parameters())
    for place, count in ((4, 8), (5, 64)):
        best = hours((90, 0.016)) / count
        worst = best + 90 * STEPS * 2 * (count - 1) / count * nbytes / 1e10 / 3600
        assert found["fine-tune"][place] == f"{best:.2g} to {worst:.2g}"


def test_reading_bounds_it() -> None:
    reading = {names.DALI: {"samples": [0.5], "items": 4000}, names.DATALOADER: {"samples": [1.0], "items": 4000}}
    run = report([raced(CASE, STEP), raced("data, prepared to 224px cuda", reading)], gpu=True)
    text = tables({"x": run})
    assert "DALI gave 8000 prepared images per second" in text
    assert f"150 epochs take no less than {150 * IMAGES / 8000 / 3600:.2g} hours" in text
    assert text.splitlines()[-1].startswith("A Card (140 GiB), driver 580.1")
    assert "Reading" not in tables({"x": report([raced(CASE, STEP)], gpu=True)})


def test_what_was_not_measured_is_said_to_be_so() -> None:
    interrupted: dict[str, Any] = {n: c for n, c in STEP.items() if n in (names.TEACHERS, names.UNLINKED)}
    found = rows(
        tables({"x": report([raced(CASE, interrupted | {names.LINKED: {"error": "out of memory"}})], gpu=True)})
    )
    assert found["merge, linked"] == ["–", "not measured", "–", "–", "–", "–"]
    assert found["student, in all (`--link-at 0`)"] == ["–"] * 6
    assert found["`one`, for comparison"][0] == "150"


@pytest.mark.parametrize("case", ["step, resnet18 64px batch 16 fp32 cpu", "step, resnet50 224px batch 256 bf16 cuda"])
def test_other_steps_are_no_figures_of_it(case: str) -> None:
    text = of_none()
    assert text == tables({"x": report([raced(case, STEP)])})
    assert text.startswith("Not measured yet: no GPU has run it. `make gpu OUT=folder`")
    found = rows(text)
    rates = [float(found[name][1]) for name in ("teachers", "merge, block-diagonal", "merge, linked")]
    assert rates[0] == pytest.approx(2 * rates[1], abs=1)
    assert 1 < rates[1] / rates[2] < 4  # of the products there are at most four times as many
    # A ResNet-18 of 224 pixels takes 3 x 3.6 GFLOP and more to train on an image, which no card of 312 TFLOP/s does faster.
    assert rates[0] < 312e12 / 10.8e9
    assert float(found["fine-tune"][2]) == pytest.approx(90 * STEPS * 256 / rates[0] / 3600, rel=0.02)
    assert "gpu:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_what_others_measured_says_what_to_expect() -> None:
    assert 0 < efficiency() < 1  # nobody is faster than the data sheet
    assert expected(MEASURED, dense=False) == pytest.approx(MEASURED.batch / RATE)
    text = of_none()
    assert f"{RATE:,} images/s" in text
    assert SOURCE in text
    found = rows(text)
    assert "merge, naive dense" not in found
    # Linked, as much slower than a plain network as its work on that card is more.
    case = Case("resnet18", 256, 224, "bf16", "cuda")
    least = [SHEET.seconds(step_work(case, dense)) for dense in (False, True)]
    rates = [float(found[name][1]) for name in ("merge, block-diagonal", "merge, linked")]
    assert rates[0] / rates[1] == pytest.approx(least[1] / least[0], rel=2e-3)


def test_each_precision_has_a_table() -> None:
    text = tables({"x": report([raced(CASE, STEP), raced(CASE.replace("bf16", "fp16"), STEP)], gpu=True)})
    assert "A step of 256 images in bf16" in text
    assert "A step of 256 images in fp16" in text
