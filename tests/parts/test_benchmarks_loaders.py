"""The loaders' table in docs/data.md."""

from __future__ import annotations

from pathlib import Path

from benchmark_reports import raced, report
from benchmarks import names
from benchmarks.loader_tables import NONE, tables

ROOT = Path(__file__).resolve().parents[2]


def test_images_per_second_by_loader_and_files() -> None:
    prepared = {
        names.DATALOADER: {"samples": [0.5, 1.0, 0.25], "items": 100},
        names.DALI: {"unavailable": "DALI is not installed"},
        names.DEVICE: {"error": "out of memory"},
    }
    originals = {names.DATALOADER: {"samples": [2.0], "items": 100}, names.DALI: {"samples": [1.0], "items": 300}}
    run = report([raced("data, prepared to 224px cpu", prepared), raced("data, photographs to 224px cpu", originals)])
    lines = tables({"loaders": run, "steps": report([raced("step, x cpu", {"a": [1.0]})])}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:-2]]
    assert cells == [
        ["images/s, median (quartiles)", "prepared to 224px cpu", "photographs to 224px cpu"],
        [names.DATALOADER, "200 (133 to 267)", "50 (50 to 50)"],
        [names.DALI, "–", "300 (300 to 300)"],
        [names.DEVICE, "failed", "–"],
    ]
    assert lines[-1].startswith("A CPU, 8 of 16 cores")


def test_without_figures_it_says_how_to_get_them() -> None:
    assert tables({}) == tables({"steps": report([raced("step, x cpu", {"a": [1.0]})])}) == NONE
    assert "bench-data:" in (ROOT / "Makefile").read_text(encoding="utf-8")
