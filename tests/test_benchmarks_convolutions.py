"""Convolutions by shape and pass: who won, in the JSON and on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmark_reports import raced, report
from benchmarks.convolution_tables import convolutions, fastest
from benchmarks.journal import joined
from benchmarks.report import page

CONTENDERS: dict[str, dict[str, Any]] = {
    "split": {"samples": [2.0, 2.0], "device_ms": 0.25},
    "groups": {"samples": [3.0, 3.0], "device_ms": 0.5},
    "triton": {"samples": [1.0, 1.0], "device_ms": 0.125, "tile": "triton 128x64x64 w4 s4"},
}
CHOICE = {
    "key": "A Card | weight gradient bfloat16 | 2 streams | 256x64x56x56 to 64, kernel 3x3, stride 1, padding 1x1",
    "winner": "triton 64x64x3 p264 w4 s4",
    "milliseconds": {"split": 0.5, "triton 64x64x3 p264 w4 s4": 0.375, "triton 64x64 p264 w4 s4": 0.75},
}


def convolution(contenders: dict[str, dict[str, Any]], step: str = "forward") -> dict[str, Any]:
    made = raced(f"block convolution, {step}, a layer bf16 cuda", contenders)
    found = {"pass": step, "layer": "a layer", "dtype": "bf16", "winner": fastest(contenders)}
    made["extra_info"]["convolution"] = found
    return made


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_least_time_on_the_device_wins() -> None:
    assert fastest(CONTENDERS) == "triton"
    slower = CONTENDERS | {"triton": CONTENDERS["triton"] | {"device_ms": 0.3}}
    assert fastest(slower) == "split"
    assert fastest(CONTENDERS | {"triton": {"error": "RuntimeError: no"}}) == "split"
    assert fastest({"split": {"error": "RuntimeError: no"}}) is None


def test_a_row_for_each_shape_and_pass_with_the_winner() -> None:
    text = page({"a-card": report([convolution(CONTENDERS), convolution(CONTENDERS, "input gradient")], gpu=True)})
    rows = [cells(line) for line in text.splitlines() if "a layer bf16 " in line and "Triton /" not in line]
    assert [row[0] for row in rows] == ["forward", "input gradient"]
    assert rows[0][1:] == ["a layer bf16", "0.25", "0.5", "0.125", "triton", "128x64x64 w4 s4", "0.50"]
    # One table in place of one for each case.
    assert "### block convolution, forward" not in text
    assert text.count("### Block convolutions") == 1


def test_who_could_not_run_is_named_once() -> None:
    failing = CONTENDERS | {"triton": {"unavailable": "needs compute capability 9.0"}}
    found = convolutions(report([convolution(failing), convolution(failing, "weight gradient")], gpu=True))
    (line,) = [part for part in found if "did not run" in part]
    assert line == (
        "*triton* did not run: needs compute capability 9.0, in forward, a layer bf16 cuda; weight gradient, a layer bf16 cuda."
    )
    (row,) = [cells(line) for line in found[2].splitlines() if line.startswith("| forward")]
    assert row[4:] == ["–", "split", "–", "–"]


def test_what_whole_steps_chose_is_published() -> None:
    made = report([], gpu=True)
    made["machine_info"]["convolution_choices"] = [CHOICE]
    (row,) = [cells(line) for line in page({"a-card": made}).splitlines() if line.startswith("| weight gradient")]
    assert row[1].startswith("2 streams of 256x64x56x56 to 64, kernel 3x3, stride 1")
    assert row[1].endswith("bfloat16")
    assert row[2:] == ["0.5", "–", "0.375", "triton 64x64x3 p264 w4 s4"]


def test_without_a_gpu_there_is_no_table() -> None:
    assert convolutions(report([raced("a case", {"a": [1.0]})])) == []


def test_choices_of_all_parts_of_a_session_are_kept(tmp_path: Path) -> None:
    files = []
    for number in range(2):
        made = report([], gpu=True)
        made["machine_info"]["convolution_choices"] = [CHOICE | {"key": f"{number}"}]
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(made))
    whole = joined(files)
    assert whole is not None
    assert [choice["key"] for choice in whole["machine_info"]["convolution_choices"]] == ["0", "1"]
