"""The one command for a GPU machine: no part costs another its results, and nothing but the basics is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark_reports import raced, report
from benchmarks import gpu_session
from benchmarks.gpu_parts import KINDS, Part, gpu_tests, parts, selected
from benchmarks.gpu_session import joined, main, session
from benchmarks.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent
# What a GPU machine with torch and pytest may lack.
LACKING = ("hypothesis", "matplotlib", "nvidia.dali", "safetensors", "sklearn", "tqdm", "xdist")


def writing(case: str) -> str:
    """Code of a part that writes a report of one case."""
    text = json.dumps(report([raced(case, {"a": [1.0]})]))
    return f"import sys; open(sys.argv[1], 'w').write({text!r})"


def test_a_failing_or_endless_part_does_not_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "GRACE", 5.0)
    endless = f"import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    {writing('interrupted')}"
    todo = [
        Part("first", 30, ("-c", writing("one"), "{json}")),
        Part("failing", 30, ("-c", "import sys; print('a reason'); sys.exit(3)")),
        Part("endless", 2, ("-c", "import signal; signal.signal(2, signal.default_int_handler)\n" + endless, "{json}")),
        Part("absent", 30, ("no-such-tool",), interpreter=False),
        Part("last", 30, ("-c", writing("two"), "{json}")),
    ]
    outcomes = {outcome.name: outcome for outcome in session(todo, tmp_path / "out", 600)}
    assert [outcome.code for outcome in outcomes.values()] == [0, 3, None, 127, 0]
    assert outcomes["failing"].says == "a reason"
    assert outcomes["endless"].says.startswith("ran over its 2 s")
    assert [outcome.state for outcome in outcomes.values()] == ["ok", "exit 3", "over time", "exit 127", "ok"]
    assert outcomes["absent"].says == "no-such-tool is not there"
    found = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    assert [b["group"] for b in found["benchmarks"]] == ["one", "interrupted", "two"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [outcome["name"] for outcome in summary] == [part.name for part in todo]


def test_tests_run_beside_each_other_and_benchmarks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    code = "import sys, time; t = time.time(); time.sleep(1.5); open(sys.argv[1], 'w').write(f'[{t}, {time.time()}]')"
    kinds = {"a": "tests", "b": "tests", "c": "sanitizer", "d": "tests", "e": "bench", "f": "bench"}
    todo = [Part(name, 30, ("-c", code, str(tmp_path / name)), kind) for name, kind in kinds.items()]
    assert all(outcome.good for outcome in session(todo, tmp_path / "out", 600))
    ran = {name: json.loads((tmp_path / name).read_text()) for name in kinds}
    for name, (start, _) in ran.items():
        others = {other for other, (begun, ended) in ran.items() if other != name and begun < start < ended}
        assert len(others) < 3  # three at once on six cores
        assert not others or {name, *others} <= set("abcd")
    assert len({name for name in "abc" if ran[name][0] < min(ran[other][1] for other in "abc")}) == 3


def test_tests_leave_half_of_the_time_to_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "GRACE", 1.0)
    monkeypatch.setattr(gpu_session, "LEAST", 1.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    slow = [Part(name, 420, ("-c", "import time; time.sleep(60)"), "tests") for name in ("slow", "too late")]
    quick = Part("quick", 240, ("-c", writing("case"), "{json}"))
    outcomes = {outcome.name: outcome for outcome in session([*slow, quick], tmp_path, 12)}
    assert outcomes["slow"].state == "over time"
    assert 5 < outcomes["slow"].seconds < 9
    assert outcomes["too late"].says == "no time left"
    assert outcomes["quick"].good


def test_a_benchmark_plans_with_the_time_that_it_is_given(tmp_path: Path) -> None:
    code = "import sys; open('{json}', 'w').write(repr(sys.argv[1:]))"
    part = Part("a", 240, ("-c", code, "--seconds={samples}", "--patience={patience}"))
    assert gpu_session.run(part, tmp_path, 80.0).good
    assert (tmp_path / "a.json").read_text() == "['--seconds=20', '--patience=40']"


def test_an_optional_program_may_be_absent(tmp_path: Path) -> None:
    absent = Part("sanitizer", 30, ("no-such-tool",), "sanitizer", interpreter=False, optional=True)
    (outcome,) = session([absent], tmp_path, 600)
    assert (outcome.good, outcome.state) == (True, "skipped")


def test_parts_are_selected_by_kind_or_name() -> None:
    todo = parts()
    assert {part.kind for part in todo} == set(KINDS)
    assert [part.name for part in selected(todo, [])] == [part.name for part in todo]
    assert {part.kind for part in selected(todo, ["tests,sanitizer"])} == {"tests", "sanitizer"}
    assert [part.name for part in selected(todo, ["build", "batch-norm,step-resnet18-bf16"])] == [
        "build",
        "compile",
        "step-resnet18-bf16",
        "batch-norm",
    ]
    with pytest.raises(ValueError, match=r"got nothing-such$"):
        selected(todo, ["tests", "nothing-such"])


def test_the_last_word_is_a_short_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = next(target for target in TARGETS if target.at_least)
    text = json.dumps(report([raced(target.case, {target.numerator: [3.0], target.denominator: [1.0]})], gpu=True))
    made = Part("made", 30, ("-c", f"import sys; open(sys.argv[1], 'w').write({text!r})", "{json}"))
    monkeypatch.setattr(gpu_session, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_session, "parts", lambda: [made, Part("failing", 30, ("-c", "raise SystemExit('why')"))])
    assert main([str(tmp_path / "out"), "--minutes", "5", "--only", "bench"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if target.name in line]
    assert "3.00" in row
    assert row.rstrip().endswith("met, stretch too")
    assert lines[-2].split() == ["failing", "exit", "1", "0", "s", "why"]


def test_parts_without_time_are_not_begun(tmp_path: Path) -> None:
    (outcome,) = session([Part("late", 30, ("-c", "open('ran', 'w')"))], tmp_path, 5)
    assert (outcome.code, outcome.says) == (None, "no time left")


def test_half_a_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    assert joined([tmp_path / "a.json", tmp_path / "b.json"]) is None


def test_every_part_names_files_that_exist() -> None:
    for part in parts():
        modules = [f"{name.replace('.', '/')}.py" for name in part.command if name.startswith("benchmarks.")]
        files = [argument for argument in part.command if argument.endswith(".py")] + modules
        assert files, part
        assert all((ROOT / file).exists() for file in files), part


# Collects with each of several options in one process, so that what tests import is imported once.
_COLLECTING = """
import json, sys, pytest
for options in json.loads(sys.argv[1]):
    print("next")
    pytest.main(["-p", "no:cacheprovider", "--collect-only", "-q", "-m", "gpu", *options])
"""


def test_slices_of_a_file_are_all_of_it_and_none_is_empty() -> None:
    sliced = [part for part in parts() if part.kind == "tests" and part.command[-1].endswith("block_conv_gpu.py")]
    assert len(sliced) > 1
    options = [[*part.command[part.command.index("-k") :][:2], part.command[-1]] for part in sliced]
    command = [sys.executable, "-c", _COLLECTING, json.dumps([*options, [sliced[0].command[-1]]])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    *found, whole = ({line for line in run.splitlines() if "::" in line} for run in done.stdout.split("next\n")[1:])
    assert len(found) == len(sliced)
    assert all(found)
    assert set().union(*found) == whole
    assert sum(map(len, found)) == len(whole)


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_session, "has_gpu", lambda: False)
    assert main([str(tmp_path / "out")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpu_tests_and_benchmarks_collect_where_little_is_installed(tmp_path: Path) -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in LACKING)
    (tmp_path / "bare_machine.py").write_text(f"import sys\n{blocked}")
    plugins = ["-p", "bare_machine", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "--collect-only", "-q", "-m", "gpu", *gpu_tests(), "benchmarks"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench_step.py::bench_step[resnet18-224px-batch-256-bf16-cuda]" in done.stdout
    assert "test_kernels_gate_gpu.py" in done.stdout
