"""Rendered benchmarks: results beside targets, misses as plain as hits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark_reports import raced, report, text_of
from benchmarks import bench_compress as compress
from benchmarks import bench_launches as launches
from benchmarks import bench_merge as merge
from benchmarks import names
from benchmarks.cases import CASES
from benchmarks.report import load, readme, verdict
from benchmarks.targets import TARGETS, Target
from docs_renderer import docs_renderer

ROOT = Path(__file__).resolve().parents[2]
CPU_CASE = next(target.case for target in TARGETS if target.case.startswith("step, ") and target.device == "cpu")
GPU_CASE = next(target.case for target in TARGETS if target.device == "cuda")


def run(case: str, naive: float, unlinked: float, gpu: bool = False) -> dict:
    contenders = {names.NAIVE: [naive, naive], names.UNLINKED: [unlinked, unlinked]}
    return report([raced(case, contenders)], gpu)


@pytest.mark.parametrize(
    ("at_least", "value", "expected"),
    [
        (True, 1.4, "**missed**"),
        (True, 1.5, "met"),
        (True, 2.0, "met, stretch too"),
        (False, 2.1, "**missed**"),
        (False, 1.5, "met, stretch too"),
    ],
)
def test_verdicts(at_least: bool, value: float, expected: str) -> None:
    bounds = (1.5, 2.0) if at_least else (2.0, 1.5)
    assert verdict(Target("a", "b cpu", "x", "y", *bounds, at_least), value) == expected


def test_a_miss_is_shown_as_plainly_as_a_hit() -> None:
    for naive, word in ((2.0, "met"), (1.2, "**missed**")):
        text = text_of({"some-cpu": run(CPU_CASE, naive, 1.0)})
        (row,) = [line for line in text.splitlines() if CPU_CASE in line and "naive dense /" in line]
        assert row.rstrip(" |").endswith(word)
        assert f" {naive:.2f} " in row
        assert word in readme({"some-cpu": run(CPU_CASE, naive, 1.0)})


def test_without_a_gpu_it_says_so_and_shows_the_cpus_figures() -> None:
    runs = {"some-cpu": run(CPU_CASE, 2.0, 1.0)}
    for text in (text_of(runs), readme(runs)):
        assert "No GPU has been measured yet" in text
        assert (
            "A CPU, 8 of 16 cores, Python 3.12.1, PyTorch 2.11.0, Triton 3.6.0, commit 0123456789, 2030-01-02." in text
        )
    assert "not measured" in text_of(runs)
    assert "No GPU has been measured yet" in readme({})


def test_what_is_to_be_said_of_a_run_stands_under_it(tmp_path: Path) -> None:
    made = run(CPU_CASE, 2.0, 1.0)
    made["machine_info"]["load_average"] = 7.25
    (tmp_path / "some-cpu.json").write_text(json.dumps(made))
    (tmp_path / "some-cpu.txt").write_text("Others ran beside it.\n")
    assert "2030-01-02. Load average 7.2. Others ran beside it.\n" in text_of(load(tmp_path))


def test_with_a_gpu_it_names_card_and_driver() -> None:
    runs = {"some-gpu": run(GPU_CASE, 2.0, 1.0, gpu=True)}
    for text in (text_of(runs), readme(runs)):
        assert "No GPU has been measured yet" not in text
        assert "A Card (140 GiB), driver 580.1, cuDNN 91900" in text


def test_a_target_over_several_cases_counts_them() -> None:
    target = next(target for target in TARGETS if "*" in target.case)
    runs = [raced(target.case.replace("*", str(n)), {"split": [1.0], "triton": [0.9 + 0.2 * n]}) for n in range(3)]
    assert "met in 1 of 3 cases" in text_of({"x": report(runs, gpu=True)})


def test_what_failed_or_did_not_run_is_named() -> None:
    contenders = {"a": [1.0], "b": {"error": "RuntimeError: no"}, "c": {"unavailable": "needs two"}}
    text = text_of({"x": report([raced("case", contenders)])})
    assert "*b* failed: RuntimeError: no." in text
    assert "*c* did not run: needs two." in text


@pytest.mark.parametrize(
    ("ratio", "accuracies", "expected"),
    [
        (2.5, [0.8, 0.9, 0.85], "met; students no worse: +0.0 ± 0.0 points"),
        (1.5, [0.9, 0.9, 0.95], "**missed**; students no worse: +6.7 ± 3.3 points"),
        (2.5, [0.75, 0.8, 0.78], "**missed**; students worse: -7.3 ± 1.5 points"),
        (2.5, [0.7, 0.95, 0.85], "met; students no worse: -1.7 ± 4.4 points"),
        (2.5, [0.8], "**missed**; accuracy not measured"),
        (2.5, None, "**missed**; accuracy not measured"),
    ],
)
def test_a_stage_counts_only_with_students_that_are_no_worse(
    ratio: float, accuracies: list[float] | None, expected: str
) -> None:
    """The least significant difference is two standard errors of the pairs' differences. Not how long a short stage takes."""
    target = next(target for target in TARGETS if target.same_accuracy and target.target == 2.0 < target.stretch == 3.0)
    contenders = {
        target.numerator: {"samples": [1.0, 1.0], "stage_seconds": [ratio, ratio], "accuracies": [0.8, 0.9, 0.85]},
        target.denominator: {"samples": [2.0, 2.0], "stage_seconds": [1.0, 1.0]}
        | ({"accuracies": accuracies} if accuracies else {}),
    }
    text = text_of({"x": report([raced(target.case, contenders)], gpu=True)})
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {target.name} ") and f" {ratio:.2f} " in line]
    assert row.strip("| ").endswith(expected)


def test_students_stand_beside_what_a_stage_costs() -> None:
    stage = {"samples": [2.0, 2.0], "fixed_seconds": [0.25, 0.25], "dropped": [0.0, 0.0], "accuracies": [0.5, 0.7]}
    stage["stage_seconds"] = [1234.0, 1236.0]
    other = stage | {"fixed_seconds": [0.5, 0.5], "dropped": [0.125, 0.375], "accuracies": [0.51, 0.69]}
    text = text_of({"x": report([raced("merge, a case", {"a": stage, "b": other, "c": {"error": "no"}})])})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["a", "0.25", "1235", "0%", "0.600 ± 0.141", "2", "–"] in rows
    assert ["b", "0.5", "1235", "25%", "0.600 ± 0.127", "2", "students no worse: +0.0 ± 1.0 points"] in rows


def test_stages_show_a_steps_time_by_epoch() -> None:
    contenders = {
        "a": {"samples": [1.0], "step_seconds": [0.5, 0.25]},
        "b": {"samples": [1.0], "step_seconds": [0.125]},
    }
    text = text_of({"x": report([raced("merge, a case", contenders)])})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["a", "500", "250"] in rows
    assert ["b", "125", "–"] in rows
    assert "The time of a step, by epoch" not in text_of({"x": report([raced("case", {"a": [1.0]})])})


def test_targets_name_cases_and_contenders_that_exist() -> None:
    known = {f"step, {case.name}" for case in CASES} | {f"merge, {case.name}" for case in merge.TASKS}
    known |= {f"launches, {param.values[0].name}" for param in launches.CASES}
    known |= {f"compress, {case.network} {case.device}" for case in compress.CASES}
    called = {value for key, value in vars(names).items() if key.isupper()}
    for target in TARGETS:
        if target.case.startswith(("step, ", "merge, ", "compress, ", "launches, ")):
            assert target.case in known
            assert {target.numerator, target.denominator} <= called
    assert len({(target.name, target.case) for target in TARGETS}) == len(TARGETS)


def test_the_readme_has_a_place_for_them() -> None:
    render = docs_renderer()
    text = render.rendered("before\n<!-- benchmarks -->\nold\n<!-- end -->\nafter")
    assert text == f"before\n<!-- benchmarks -->\n{readme(load())}\n<!-- end -->\nafter"
