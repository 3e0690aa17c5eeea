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
from benchmarks.gpu_session import Part, _gpu_tests, joined, main, parts, session

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
    assert outcomes["endless"].says == "ran over its 2 s"
    assert outcomes["absent"].says == "no-such-tool is not there"
    found = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    assert [b["group"] for b in found["benchmarks"]] == ["one", "interrupted", "two"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [outcome["name"] for outcome in summary] == [part.name for part in todo]


def test_parts_without_time_are_not_begun(tmp_path: Path) -> None:
    (outcome,) = session([Part("late", 30, ("-c", "open('ran', 'w')"))], tmp_path, 5)
    assert (outcome.code, outcome.says) == (None, "no time left")


def test_half_a_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    assert joined([tmp_path / "a.json", tmp_path / "b.json"]) is None


def test_every_part_names_files_that_exist() -> None:
    for part in parts(sanitizer=True):
        files = [argument for argument in part.command if argument.endswith(".py")]
        assert files, part
        assert all((ROOT / file).exists() for file in files), part


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
        [sys.executable, "-m", "pytest", *plugins, "--collect-only", "-q", "-m", "gpu", *_gpu_tests(), "benchmarks"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench_step.py::bench_step[resnet18-224px-batch-256-bf16-cuda]" in done.stdout
    assert "test_kernels_gate_gpu.py" in done.stdout
