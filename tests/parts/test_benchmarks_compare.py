"""Two runs compared: ratios within each run, so that neither machine nor mood counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark_reports import alone, raced, report, write
from benchmarks.compare import compare, main
from benchmarks.results import cases, ratio, read

BASE = {"naive dense": [2.0, 4.0, 6.0], "unlinked": [1.0, 2.0, 3.0]}


def verdicts(base: list[dict], new: list[dict], tolerance: float = 0.1) -> dict[tuple[str, str], str]:
    changes = compare(cases(report(base)), cases(report(new)))
    return {(change.contender, change.measure): change.verdict(tolerance) for change in changes}


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "same"), (1.09, "same"), (1.12, "worse"), (0.8, "better")])
def test_only_the_ratio_within_a_run_counts(factor: float, expected: str) -> None:
    slower_machine = {"naive dense": [20.0, 20.0, 20.0], "unlinked": [10.0 * factor] * 3}
    assert verdicts([raced("a", BASE)], [raced("a", slower_machine)]) == {("unlinked", "time"): expected}


def test_ratios_are_taken_pair_by_pair() -> None:
    found = ratio(cases(report([raced("a", {"x": [1.0, 20.0, 300.0], "y": [2.0, 40.0, 600.0]})]))["a"], "x", "y")
    assert found is not None
    assert (found.low, found.value, found.high, found.n) == (0.5, 0.5, 0.5, 3)


def test_benchmarks_of_one_group_are_contenders_too() -> None:
    base = [alone("gate", "bench_gate[eager]", [4.0]), alone("gate", "bench_gate[fused]", [1.0])]
    new = [alone("gate", "bench_gate[eager]", [4.0]), alone("gate", "bench_gate[fused]", [2.0])]
    assert verdicts(base, new) == {("fused", "time"): "worse"}
    assert verdicts(base, base) == {("fused", "time"): "same"}


def test_memory_is_compared_as_well() -> None:
    def run(size: int) -> list[dict]:
        facts = {"naive dense": 100, "unlinked": size}
        return [raced("a", {name: {"samples": [1.0], "activation_bytes": size} for name, size in facts.items()})]

    assert verdicts(run(50), run(80))["unlinked", "activation memory"] == "worse"
    assert verdicts(run(50), run(50))["unlinked", "activation memory"] == "same"


def test_a_contender_that_fails_or_is_gone_is_a_regression() -> None:
    gone = {"naive dense": [2.0, 4.0, 6.0]}
    assert verdicts([raced("a", BASE)], [raced("a", gone)]) == {("unlinked", "time"): "missing"}
    failed = gone | {"unlinked": {"error": "RuntimeError: no"}}
    assert verdicts([raced("a", BASE)], [raced("a", failed)]) == {("unlinked", "time"): "failed"}
    elsewhere = gone | {"unlinked": {"unavailable": "needs a GPU"}}
    assert verdicts([raced("a", BASE)], [raced("a", elsewhere)]) == {}


def test_cases_that_the_new_machine_has_not_are_left_out() -> None:
    both = [raced("a", BASE), raced("b, cuda", BASE)]
    assert set(verdicts(both, [raced("a", BASE)])) == {("unlinked", "time")}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base.json", [raced("a", BASE)])
    slow = write(tmp_path / "slow.json", [raced("a", BASE | {"unlinked": [1.5, 3.0, 4.5]})])
    other = write(tmp_path / "other.json", [raced("b", BASE)])
    assert main([str(base), str(base)]) == 0
    assert "0 of 1 ratios" in capsys.readouterr().out
    assert main([str(base), str(slow)]) == 1
    printed = capsys.readouterr().out
    assert "+50.0%" in printed
    assert "worse" in printed
    assert main([str(base), str(slow), "--tolerance", "0.6"]) == 0
    assert main([str(base), str(other)]) == 1
    assert "nothing" not in capsys.readouterr().out
    (tmp_path / "text.json").write_text("{}")
    assert main([str(base), str(tmp_path / "text.json")]) == 2
    assert "text.json needs to be the JSON of a benchmark run" in capsys.readouterr().err


def test_reading_refuses_what_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("no")
    with pytest.raises(ValueError, match=r"a\.json is no JSON"):
        read(tmp_path / "a.json")
