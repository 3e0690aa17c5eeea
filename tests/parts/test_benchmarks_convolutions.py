"""Convolutions by shape and pass, as whole steps chose them: on the page, and beside their targets."""

from __future__ import annotations

import json
from pathlib import Path

from benchmark_reports import raced, report, text_of
from benchmarks.convolution_tables import convolutions
from benchmarks.journal import joined

CHOICE = {
    "key": "A Card | weight gradient bfloat16 | 2 streams | 256x64x56x56 to 64, kernel 3x3, stride 1, padding 1x1",
    "winner": "triton 64x64x3 p264 w4 s4",
    "milliseconds": {"split": 0.5, "triton 64x64x3 p264 w4 s4": 0.375, "triton 64x64 p264 w4 s4": 0.75},
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_whole_steps_chose_is_published() -> None:
    made = report([], gpu=True)
    made["machine_info"]["convolution_choices"] = [CHOICE]
    (row,) = [cells(line) for line in text_of({"a-card": made}).splitlines() if line.startswith("| weight gradient")]
    assert row[1].startswith("2 streams of 256x64x56x56 to 64, kernel 3x3, stride 1")
    assert row[1].endswith("bfloat16")
    assert row[2:] == ["0.5", "0.375", "triton 64x64x3 p264 w4 s4"]
    (target,) = [
        line
        for line in text_of({"a-card": made}).splitlines()
        if line.startswith("| Triton / T cuDNN conv") and "0.75" in line
    ]
    assert cells(target)[0].endswith("weight gradient")
    assert cells(target)[-1] == "met, stretch too"


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
