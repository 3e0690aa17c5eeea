"""The one command for a GPU machine: no part costs another its results, and nothing but the basics is needed."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from _pytest.mark.expression import Expression

from benchmark_reports import raced, report
from benchmarks import gpu_parts, gpu_session, names
from benchmarks.gpu_parts import RESNET18, Part, Stage, plan
from benchmarks.gpu_session import SECONDS, Session, main, packed, reds
from benchmarks.gpu_summary import MOST, summary
from benchmarks.rehearsal import WAYS

ROOT = Path(__file__).resolve().parents[2]
with mock.patch.object(gpu_parts, "find_sanitizer", return_value="/bin/compute-sanitizer"):
    PLANS = {name: plan(name, data="images.npz") for name in SECONDS}
run = Session.run
# What a GPU machine with torch and pytest may lack.
LACKING = ("hypothesis", "matplotlib", "nvidia.dali", "safetensors", "sklearn", "tqdm", "xdist")


@pytest.fixture(autouse=True)
def own_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sessions keep for one another stays with the test."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))


def python(name: str, code: str, seconds: float = 30.0) -> Part:
    return Part(name, ("-c", code), seconds)


def logs_of(out: Path) -> dict[str, str]:
    with tarfile.open(out / "session.tar.gz") as archive:
        members = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        return {name: file.read().decode() for name, file in members.items() if file is not None}


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def test_a_rehearsal_spares_what_others_have_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside parts that fail, hang, die, flood and leave processes behind, and a race whose contenders do."""
    out = tmp_path / "out"
    assert main([str(out), "--rehearse", "--only", "stand-ins"]) == 1
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"benchmarks.json", "session.tar.gz", "summary.json", "summary.txt"}
    assert len(files) <= 8
    assert all(path.stat().st_size <= 16 * 2**20 and path.parent == out for path in files)
    outcomes = {part["name"]: part for part in json.loads((out / "summary.json").read_text())["parts"]}
    states = {name: outcomes[name]["state"] for name in WAYS}
    assert states == {"fails": "failed", "hangs": "over time", "dies": "SIGSEGV", "floods": "ok", "leaves": "ok"}
    logs = logs_of(out)
    assert "RuntimeError: a reason" in logs["fails.log"]
    assert "Segmentation fault" in logs["dies.log"]
    assert len(logs["floods.log"]) < 2**20
    (left,) = [int(line) for line in logs["leaves.log"].splitlines() if line.isdigit()]
    assert not is_running(left)
    assert "Timeout (" in logs["race.log"]
    assert "bench_rehearsal" in logs["race.log"].partition("Timeout (")[2]  # where it hung
    (benchmark,) = json.loads((out / "benchmarks.json").read_text())["benchmarks"]
    contenders = benchmark["extra_info"]["contenders"]
    assert len(contenders["first"]["samples"]) == len(contenders["last"]["samples"]) == 3
    assert contenders["fails"]["error"] == "RuntimeError: a reason"
    assert "out of memory" in contenders["out of memory"]["error"]
    assert contenders["dies"] == contenders["hangs"] == {"error": "it ended the process"}
    printed = capsys.readouterr().out
    text = (out / "summary.txt").read_text()
    assert printed.endswith(text)
    for line in (
        "DIED rehearsal | dies: SIGSEGV",
        "DIED rehearsal | hangs: hung",
        "FAILED rehearsal | fails: RuntimeError",
    ):
        assert line in text


def test_parts_run_beside_each_other_only_where_they_may(tmp_path: Path) -> None:
    code = "import time; t = time.time(); time.sleep(0.7); open({!r}, 'w').write(f'[{{t}}, {{time.time()}}]')"
    parts = {name: python(name, code.format(str(tmp_path / name))) for name in "abcde"}
    stages = [Stage("tests", 30, tuple(parts[name] for name in "abc"), 2), Stage("timed", 30, (parts["d"], parts["e"]))]
    session = Session(tmp_path / "out", 60, {})
    session.run(stages)
    assert all(outcome.good for outcome in session.outcomes)
    ran = {name: json.loads((tmp_path / name).read_text()) for name in "abcde"}
    beside = {
        name: "".join(other for other, (begun, ended) in ran.items() if other != name and begun < start < ended)
        for name, (start, _) in ran.items()
    }
    assert max(map(len, beside.values())) == 1
    assert beside["d"] == beside["e"] == ""


def test_what_a_stage_leaves_of_its_time_goes_to_the_next_and_what_is_late_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_session, "GRACE", 0.0)
    monkeypatch.setattr(gpu_session, "LEAST", 0.5)
    until = "import sys; print(sys.argv[1])"
    given = Part("given", ("-c", until, "{until}"))
    slow = python("slow", "import time; time.sleep(60)")
    stages = [Stage("quick", 3, (given,)), Stage("slow", 1, (slow, replace(given, name="late")))]
    session = Session(tmp_path, 4, {})
    session.run(stages)
    found = {outcome.name: outcome for outcome in session.outcomes}
    states = {name: outcome.state for name, outcome in found.items()}
    assert states == {"given": "ok", "slow": "over time", "late": "no time left"}
    assert float(session.logs["given"]) == pytest.approx(session.start + 3, abs=0.1)
    assert found["slow"].seconds > 2  # of the first stage's time too


def test_where_convolutions_died_steps_run_those_of_cudnn(tmp_path: Path) -> None:
    step = Part("step", ("-c", "import sys; print(sys.argv[1:])"), careful=True)
    dies = ("-c", "import os; from benchmarks.events import emit; emit('begin', 'a tile'); os.abort()")
    for name, options in (("smoke-gates", "[]"), ("smoke-convolution-bf16", "['--careful']")):
        session = Session(tmp_path / name, 60, {})
        session.run([Stage("smoke", 30, (Part(name, dies),)), Stage("step", 30, (step,))])
        assert session.outcomes[0].says == "at a tile"
        assert session.outcomes[1].says == options


def test_tests_go_on_after_one_that_ended_the_process(tmp_path: Path) -> None:
    file = tmp_path / "test_four.py"
    body = "import os, pytest, time\n"
    for name, code in {
        "a": "raise ValueError('not close\\n\\nby 3 %')",
        "b": "os._exit(9)",
        "c": "time.sleep(60)",
        "d": "pass",
    }.items():
        body += f"def test_{name}():\n    {code}\n"
    file.write_text(body)
    options = (
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.events",
        "-c",
        "/dev/null",
        f"--rootdir={tmp_path}",
    )
    broken = tmp_path / "test_broken.py"
    broken.write_text("import nothing_such\n")
    part = Part(
        "four",
        ("-m", "pytest", *options, "--limit=1", "--benchmark-disable", "-s", "--tb=short", str(broken), str(file)),
    )
    session = Session(tmp_path / "out", 60, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "", "PYTEST_ADDOPTS": ""})
    session.run([Stage("tests", 60, (part,))])
    (outcome,) = session.outcomes
    ended = {event["name"][-6:]: event["outcome"] for event in outcome.events if event["kind"] == "end"}
    assert ended == {"ken.py": "failed", "test_a": "failed", "test_b": "died", "test_c": "died", "test_d": "passed"}
    assert reds(session.scratch) == [f"test_four.py::test_{name}" for name in "abc"]
    log = session.logs["four"].decode()
    assert "Timeout (" in log
    assert "test_four.py:3: in test_a" in log  # the traceback, though what came next ended the process
    says = {event["name"]: event["says"] for event in outcome.events if event.get("outcome") == "failed"}
    assert says["test_four.py::test_a"] == "ValueError: not close; by 3 %"
    assert "nothing_such" in says["test_broken.py"]
    folder = session.folder
    del session
    assert not folder.exists()


def test_files_that_cannot_be_written_cost_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gpu_session.write_whole

    def full_once(path: Path, content: bytes) -> None:
        monkeypatch.setattr(gpu_session, "write_whole", whole)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_session, "write_whole", full_once)
    session = Session(tmp_path / "out", 60, {})
    session.run([Stage("two", 60, (python("a", "print('first')"), python("b", "print('second')")))])
    assert [outcome.says for outcome in session.outcomes] == ["first", "second"]
    assert set(logs_of(tmp_path / "out")) == {"a.log", "b.log"}


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file"), "--plan", "second", "--rehearse", "--only", "sanitizer"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "gpu_session needs a folder OUT that it can write to" in printed.err


def test_what_cannot_be_written_is_printed_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills_the_disk(*arguments: object) -> list[Stage]:
        monkeypatch.setattr(gpu_session, "write_whole", mock.Mock(side_effect=OSError(28, "No space left on device")))
        return [Stage("one", 60, (python("one", "print('so far')"),))]

    monkeypatch.setattr(Session, "run", lambda self, stages: run(self, fills_the_disk()))
    assert main([str(tmp_path), "--plan", "second", "--rehearse", "--only", "sanitizer"]) == 0
    assert "one" in capsys.readouterr().out.splitlines()[-1]


def test_files_of_an_earlier_session_do_not_pass_for_this_one_s(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.json").write_text("of another card")
    (tmp_path / "mine.txt").touch()
    assert main([str(tmp_path), "--plan", "second", "--rehearse", "--only", "sanitizer"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        *("mine.txt", "session.tar.gz", "summary.json", "summary.txt")
    ]


def test_no_part_outlives_the_session(tmp_path: Path) -> None:
    """Though it is killed, and can end nothing any more."""
    code = "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(60)".format(str(tmp_path / "child"))
    parent = f"""
from benchmarks.gpu_parts import Part, Stage
from benchmarks.gpu_session import Session
Session({str(tmp_path)!r} and __import__("pathlib").Path({str(tmp_path / "out")!r}), 60, {{}}).run(
    [Stage("one", 60, (Part("one", ("-c", {code!r})),))]
)
"""
    session = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    end = time.monotonic() + 30
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    child = int((tmp_path / "child").read_text())
    assert is_running(child)
    session.kill()
    session.wait()
    while is_running(child):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM])
def test_a_session_that_must_end_writes_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    code = f"import os, signal; print('so far', flush=True); os.kill(os.getppid(), {int(number)}); signal.pause()"
    monkeypatch.setattr(gpu_session, "plan", lambda *arguments: [Stage("one", 60, (python("one", code),))])
    monkeypatch.setattr(gpu_session, "has_gpu", lambda: True)
    assert main([str(tmp_path / "out")]) == 3
    assert "ended early" in capsys.readouterr().out
    assert "so far" in logs_of(tmp_path / "out")["one.log"]


def test_parts_that_do_not_listen_end_together(tmp_path: Path) -> None:
    session = Session(tmp_path, 60, {}, rehearsed=True)
    deaf = "import signal; signal.signal(signal.SIGABRT, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    for number in range(4):
        session._begin(python(str(number), deaf), session.end)
    while any(b"deaf" not in job.log for job in session.running):
        time.sleep(0.01)
    start = time.monotonic()
    session.stop()
    assert 1 <= time.monotonic() - start < 3
    assert [outcome.state for outcome in session.outcomes] == ["over time"] * 4


def test_an_archive_keeps_to_its_size_and_each_log_its_ends() -> None:
    noise = random.Random(0).randbytes(2**19)
    whole = packed({"a.log": noise, "b.log": b"short"}, 2**18)
    assert len(whole) <= 2**18
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        a, b = (archive.extractfile(name).read() for name in ("a.log", "b.log"))  # type: ignore[union-attr]
    assert b == b"short"
    assert noise.startswith(a[: len(a) // 2])
    assert noise.endswith(a[len(a) // 2 :])


def ended(name: str, outcome: str, says: str) -> dict[str, Any]:
    return {"kind": "end", "name": name, "outcome": outcome, "says": says, "at": 1.0}


def test_a_summary_is_short_names_failures_and_has_the_ratios_last() -> None:
    case = f"step, {RESNET18.replace('-', ' ')}"
    profile = {"busy_seconds": 0.5, "kernels": 764, "launches": 765, "top": [["a_kernel", 12.5, 3]]}
    naive = {"samples": [2.0] * 5, "process": 1, "queue_seconds": 0.25, "cpu_seconds": 0.125, "profile": profile}
    contenders = {names.NAIVE: naive, names.TEACHERS: naive, names.UNLINKED: naive | {"samples": [1.0] * 5}}
    norms = {"copy": {"samples": [0.25], "bytes": 1e12}, "fused": {"samples": [0.5], "bytes": 1e12}}
    made = report(
        [
            raced("BatchNorm, a layer", norms),
            raced(case, contenders | {names.LINKED: {"error": "RuntimeError: illegal address"}}),
        ],
        gpu=True,
    )
    keys = [f"A Card | forward bfloat16 | 2 streams | {n}" for n in range(3)]
    times = ({"split": 2.0, "triton 64x64": 1.0 + 2 * n, "triton 128x64": 9.0} for n in range(3))
    choices = [{"key": key, "winner": "split", "milliseconds": each} for key, each in zip(keys, times, strict=True)]
    made["machine_info"]["convolution_choices"] = choices
    events = [
        ended(f"tests/parts/test_a.py::test_{n}", "failed", "AssertionError: why " + "x" * 300) for n in range(500)
    ]
    parts = [
        {
            "name": "tests",
            "state": "failed",
            "seconds": 9.0,
            "says": "",
            "events": [*events, ended("t", "died", "SIGSEGV")],
        }
    ]
    text = summary({"seconds": 10.0, "parts": parts}, made)
    assert len(text) <= MOST
    lines = text.splitlines()
    assert lines[0] == "DIED t: SIGSEGV"
    assert lines[1].startswith("FAILED test_a.py::test_0: AssertionError: why")
    assert any("more in summary.json" in line for line in lines)
    (row,) = [line for line in lines if line.startswith(f"{names.UNLINKED:<24}")]
    assert row.split()[1:] == ["1000.00", "250.00", "125.00", "500.00", "764", "765", "-"]
    assert any("a_kernel" in line for line in lines)
    assert "BatchNorm, a layer, TB/s: copy 4.00, fused 2.00" in lines
    (linked,) = [line for line in lines if line.startswith(f"{names.LINKED:<24}")]
    assert linked.endswith("RuntimeError: illegal address")
    (convolutions,) = [line for line in lines if line.startswith("Triton / T cuDNN convolutions, forward")]
    assert convolutions.endswith("1.500 (0.50 to 2.50) met in 1 of 3 layers")
    assert any(line.startswith("naive dense / block-diagonal") and line.endswith(">= 1.80 met") for line in lines[-4:])
    assert any(line.endswith("<= 0.85 met") for line in lines[-4:])


@pytest.mark.parametrize("name", SECONDS)
def test_a_plan_fits_its_time_and_names_what_exists(name: str) -> None:
    stages = PLANS[name]
    assert SECONDS[name] - 40 <= sum(stage.seconds for stage in stages) <= SECONDS[name]
    parts = [part for stage in stages for part in stage.parts]
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        files = [word.partition("::")[0] for word in part.command if ".py" in word]
        files += [f"{word.replace('.', '/')}.py" for word in part.command if word.startswith("benchmarks.")]
        assert all((ROOT / file).exists() for file in files), part
        assert files or part.name == "imagewoof"
    assert [stage.name for stage in stages].index("reds" if name == "second" else "device") == 0
    if name != "second":
        assert [stage.name for stage in stages[1:3]] == ["smoke", "tests"]


def test_the_second_plan_runs_again_what_was_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "find_sanitizer", lambda: "/bin/compute-sanitizer")
    red = "tests/parts/test_kernels_gate_gpu.py::test_against_float64[a b]"
    stages = {stage.name: stage for stage in plan("second", [red], "images.npz")}
    assert [part.command[-1] for part in (*stages["reds"].parts, *stages["sanitizer"].parts)] == [red, red]
    assert "imagewoof" not in stages


def test_gpu_tests_and_benchmarks_collect_where_little_is_installed_and_the_full_plan_runs_every_test(
    tmp_path: Path,
) -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in LACKING)
    (tmp_path / "bare_machine.py").write_text(f"import sys\n{blocked}")
    plugins = ["-p", "bare_machine", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider"]
    files = sorted(
        {word for stage in PLANS["full"] for part in stage.parts for word in part.command if word[:6] == "tests/"}
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "--collect-only", "-q", "-m", "gpu", *files, "benchmarks"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert {file.partition("::")[0] for file in found if file.startswith("tests/")} == set(files)
    marked = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("*/test_*.py") if "mark.gpu" in path.read_text()
    }
    assert marked - set(files) == {"tests/parts/test_benchmarks_gpu_session.py"}
    parts = [
        part for stage in PLANS["full"] for part in stage.parts if part.name.startswith(("smoke", "tests", "step"))
    ]
    selected = [select(part, found) for part in parts]
    assert all(selected), [part.name for part, tests in zip(parts, selected, strict=True) if not tests]
    assert {test for test in found if test.startswith("tests/")} <= set().union(*selected)
    assert f"benchmarks/bench_step.py::bench_step[{RESNET18}]" in set().union(*selected)


def select(part: Part, found: list[str]) -> set[str]:
    """What a part's ``-k`` takes of its files' tests."""
    command = list(part.command)
    chosen = Expression.compile(command[command.index("-k") + 1] if "-k" in command else "not nothing")
    return {
        test
        for test in found
        if test.partition("::")[0] in command and chosen.evaluate(lambda name, test=test: name.lower() in test.lower())
    }


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_session, "has_gpu", lambda: False)
    assert main([str(tmp_path / "out")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stage_that_is_in_no_plan_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--only", "smoke,nothing-such"])
    assert capsys.readouterr().err.rstrip().endswith("got nothing-such")
