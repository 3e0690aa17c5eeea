"""The command line as a whole: help, exit codes, warnings, and the commands that need little."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from fastmerge import cli
from fastmerge.cli import arguments, main
from fastmerge.environment import environment
from fastmerge.processes import ProcessLostError
from fastmerge.reporting.results import write

RESULTS = {
    "recipe": "sine",
    "metric": "test_loss",
    "strategies": {"student": {"values": [0.1, 0.2], "epochs": 900, "seconds": 1.5}},
    "environment": {"torch": "2"},
    "config": {"budget": 1.0},
}


def run(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fastmerge", *words], capture_output=True, text=True, **options)


def test_python_m_fastmerge_helps():
    done = run("--help")
    assert done.returncode == 0
    for command in ("run", "merge", "report", "info"):
        assert f"\n    {command} " in done.stdout


@pytest.mark.parametrize("command", ["run", "merge", "report", "info"])
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["dance"], ["merge"], ["run", "no-such-recipe"], ["run", "sine", "--budget", "0"]]
)
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_info_says_what_is_there(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    found = environment()
    for part in (found["python"], found["torch"], found["cpu"]["name"], "kernels", "extension", "DALI", "GPU"):
        assert part in printed
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(environment()))


def test_report_prints_and_writes_a_runs_table(tmp_path, capsys):
    write(tmp_path, RESULTS)
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "paper's mean" in printed
    assert "0.1500" in printed
    assert "**0.1500**" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "strategies.png").is_file()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, "", "holds no results.json"),
        ("results.json", "{", "is not JSON"),
        ("results.json", "{}", "lacks recipe, metric"),
        ("history.json", "[]", "is not the history of a merge"),
        ("history.json", '{"kept": {}}', "is not the history of a merge; it lacks borders"),
    ],
)
def test_report_refuses_what_is_no_run(tmp_path, capsys, name, text, message):
    if name:
        (tmp_path / name).write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_report_says_that_a_run_is_not_finished(tmp_path, capsys):
    command = f"go on with: fastmerge compare --out {tmp_path} --resume\n"
    (tmp_path / "command.json").write_text('{"words": ["compare"], "finished": false}')
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"fastmerge: error: {tmp_path} holds a run that is not finished; {command}"
    (tmp_path / "compare.json").write_text('{"rows": []}')
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"plots written\n{tmp_path} holds a run that is not finished; {command}")
    assert main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"fastmerge: error: there is no directory {tmp_path / 'none'}\n"


def raising(error: BaseException):
    def command(options):
        raise error

    return command


def test_debug_shows_where(monkeypatch, capsys):
    monkeypatch.setattr(cli.info, "command", raising(ValueError("bad\nthing")))
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "fastmerge: error: bad thing\n"
    assert main(["info", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError("x"), 2),
        (TypeError("x"), 2),
        (FloatingPointError("x"), 1),
        (MemoryError("x"), 1),
        (ProcessLostError("x"), 1),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch, error, code):
    monkeypatch.setattr(cli.info, "command", raising(error))
    assert main(["info"]) == code


def test_too_little_memory_is_a_line(tmp_path, capsys):
    for name in ("a", "b"):
        torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / f"{name}.pt")
    teachers = ["--teachers", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    model = ["--model", "torch.nn:Linear", "--model-args", "in_features=2", "out_features=2"]
    assert main(["check", *model, *teachers, "--input", str(10**9), str(10**9)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastmerge: error: there is not enough memory: can't allocate memory: ")
    assert error.count("\n") == 1


def test_our_own_faults_are_not_hidden(monkeypatch):
    monkeypatch.setattr(cli.info, "command", raising(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        main(["info"])


def test_warnings_are_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(cli.info, "command", lambda options: warnings.warn("take care", stacklevel=1))
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["info"]) == 0
    assert capsys.readouterr().err == "fastmerge: warning: take care\n"
    assert warnings.showwarning is shown


def test_ctrl_c_ends_a_run_with_130(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmerge", "run", "sine", "--replicates", "1", "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        log = tmp_path / "run" / "log.jsonl"
        while not (log.is_file() and log.stat().st_size):  # it is not training yet
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert told.endswith(f"interrupted; go on with: fastmerge run --out {tmp_path / 'run'} --resume\n")
    assert "Traceback" not in told
    assert not (tmp_path / "run" / "results.json").exists()


def test_argument_types():
    assert arguments.key_value("num_classes=10") == ("num_classes", 10)
    assert arguments.key_value("norm=batch") == ("norm", "batch")
    assert arguments.key_value("sizes=(1, 2)") == ("sizes", (1, 2))
    assert arguments.names("a, b,,c") == ["a", "b", "c"]
    assert arguments.integer(1)("3") == 3
    assert arguments.fraction("0.5") == 0.5
    assert arguments.seconds("inf") == float("inf")


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (arguments.key_value, "width"),
        (arguments.key_value, "1x=2"),
        (arguments.names, " ,"),
        (arguments.integer(1), "0"),
        (arguments.integer(0), "1.5"),
        (arguments.integer(0), "9" * 20),
        (arguments.seconds, "-5"),
        (arguments.seconds, "nan"),
        (arguments.fraction, "1.5"),
        (arguments.fraction, "nan"),
    ],
)
def test_argument_types_refuse(parse, text):
    with pytest.raises(arguments.argparse.ArgumentTypeError, match=r"needs .*got"):
        parse(text)
