"""``fastmerge merge`` that is killed and goes on, and what DIR says to a command that does not fit it."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli_files import arguments
from fastmerge.cli import main
from fastmerge.files import held
from fastmerge.reporting.results import EpochLog
from killing import die

pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")


def log_of(out: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def interrupt_after(monkeypatch, epochs: int, number: int = signal.SIGINT) -> None:
    """Sends this process a signal when so many epochs are told of."""
    original, told = EpochLog.write, []

    def writing(log, values, step, tag=""):
        original(log, values, step, tag)
        told.append(step)
        if len(told) == epochs:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(EpochLog, "write", writing)


@contextlib.contextmanager
def running(*words: str) -> Iterator[subprocess.Popen]:
    """A run of far more epochs than it gets to in out/, the leader of a group of processes, that has trained one."""
    command = [sys.executable, "-m", "fastmerge", *words, "--merge-epochs", "400"]
    out = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **out, env=_environment(), start_new_session=True) as process:
        try:
            while not (Path("out/log.jsonl").is_file() and Path("out/log.jsonl").stat().st_size):
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def test_sigterm_exits_with_143_and_the_line_it_prints_goes_on(place):
    with running(*arguments()) as process:
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error.endswith("interrupted; go on with: fastmerge merge --out out --resume\n")
    assert list(Path("out/checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("loader", ["torch", "device", "dali"])
def test_sigterm_to_all_processes_of_a_run_is_one(tree, loader):
    """As SLURM, systemd and timeout send it: to the processes that read images, too."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    with running(*tree, "--loader", loader, "--augmentation", "none") as process:
        os.killpg(process.pid, signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error == "fastmerge: interrupted; go on with: fastmerge merge --out out --resume\n"
    assert list(Path("out/checkpoints").glob("*.safetensors"))


def test_a_reader_that_is_killed_while_the_run_computes_is_one_line(tree):
    with running(*tree) as process:
        reader = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        os.kill(int(reader), signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("fastmerge: error: a process that reads images ended: DataLoader worker (pid")
    assert f" {reader}) " in error
    assert error.count("\n") == 1


def test_a_second_run_is_kept_out_until_the_first_is_dead(place, capsys):
    """Both would write one log and one set of checkpoints, and the first to end would remove the other's."""
    with running(*arguments(), "--checkpoint-seconds", "0") as first:
        before = Path("out/command.json").read_bytes()
        others = [
            [*arguments(), "--seed", "2"],
            ["merge", "--out", "out", "--resume"],
            ["run", "digits", "--out", "out"],
        ]
        for words in others:
            assert main(words) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"fastmerge: error: out is in use by another run, process {first.pid} on ")
            assert error.endswith("; wait for its end, or choose another --out\n")
            assert error.count("\n") == 1
        assert Path("out/command.json").read_bytes() == before
        while len(log_of("out")) < 2:  # then the first epoch's checkpoint is written
            time.sleep(0.05)
        first.kill()
        first.wait()
        assert main(["merge", "--out", "out", "--resume", "--merge-epochs", "3"]) == 2
        assert "the run in out has --merge-epochs 400, not 3" in capsys.readouterr().err
        log, epochs = len(log_of("out")), []
        write = EpochLog.write

    def interrupt(log, values, step, tag=""):
        epochs.append(step)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochLog, "write", interrupt)
        assert main(["merge", "--out", "out", "--resume"]) == 130
    assert EpochLog.write is write
    assert 1 < epochs[0] <= log + 1


def hold_fork_and_die(path: Path, end: Connection) -> None:
    with held(path):
        if os.fork() == 0:
            end.send(os.getpid())
            time.sleep(60)
            os._exit(0)
        end.poll(60)  # the child runs
        die()


def test_a_reader_does_not_hold_what_its_dead_parent_held(tmp_path):
    """DataLoader's workers are forked, and outlive a parent that is killed by some seconds."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=hold_fork_and_die, args=(tmp_path / "lock", there))
    process.start()
    child = here.recv()
    with pytest.raises(BlockingIOError), held(tmp_path / "lock"):
        pass
    here.send("go on")
    process.join()
    try:
        with held(tmp_path / "lock"):
            os.kill(child, 0)  # it is there
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.filterwarnings("always:out is on a file system:UserWarning")  # the command prints it
def test_a_file_system_without_locks_is_warned_of(place, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fastmerge.files.fcntl.flock", flock)
    assert main(arguments()) == 0
    assert "out is on a file system without locks: see that no other run writes there" in capsys.readouterr().err


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.getcwd()])}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_merge_goes_on_from_its_directory_alone(place, monkeypatch, capsys, number, code):
    assert main(arguments(out=["whole"])) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, number)
        assert main([*arguments(), "--checkpoint-seconds", "0"]) == code
    assert capsys.readouterr().err == "fastmerge: interrupted; go on with: fastmerge merge --out out --resume\n"
    with Path("out/log.jsonl").open("a") as file:
        file.write('{"stage": "fine')  # as a crash leaves it
    assert main(["merge", "--out", "out", "--resume"]) == 0
    whole, student = load_file("whole/student.safetensors"), load_file("out/student.safetensors")
    assert all(torch.equal(whole[name], student[name]) for name in whole)
    logs = [[(each["stage"], each["epoch"], each["train"]["loss"]) for each in log_of(out)] for out in ("whole", "out")]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3
    assert not Path("out/checkpoints").exists()

    before = Path("out/student.safetensors").stat().st_mtime_ns
    assert main(["merge", "--out", "out", "--resume"]) == 0
    assert "the merge in out is finished" in capsys.readouterr().out
    assert main(arguments()) == 2
    assert (
        "out holds a finished run, which would be replaced; add --resume to see its report" in capsys.readouterr().err
    )
    assert Path("out/student.safetensors").stat().st_mtime_ns == before


def test_what_does_not_fit_an_unfinished_run_is_refused(place, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert main(arguments()) == 130
    capsys.readouterr()
    for words, message in [
        (arguments(), "out holds a run that is not finished; add --resume to continue it, remove out/checkpoints"),
        ([*arguments(), "--dry-run"], "out holds a run that is not finished; add --resume to continue it"),
        ([*arguments(), "--resume", "--lr", "0.5"], "the run in out has --lr 0.01, not 0.5; leave out --lr"),
    ]:
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_a_damaged_command_is_named_and_does_without(place, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert main(arguments(out=["my out"])) == 130
    assert capsys.readouterr().err.endswith("go on with: fastmerge merge --out 'my out' --resume\n")
    record = Path("my out/command.json")
    record.write_text(record.read_text()[:20])
    assert main(["merge", "--out", "my out", "--resume"]) == 2
    assert "my out/command.json is damaged" in capsys.readouterr().err
    record.write_text('{"words": [1, 2], "finished": false}')
    assert main(["merge", "--out", "my out", "--resume"]) == 2
    assert "my out/command.json is damaged (its words are no strings)" in capsys.readouterr().err
    record.unlink()
    assert main([*arguments(out=["my out"]), "--resume"]) == 0
    assert [(each["stage"], each["epoch"]) for each in log_of("my out")] == [
        ("merge", 1),
        ("merge", 2),
        ("finetune", 1),
    ]


def test_resume_needs_options_where_there_is_no_run(capsys, tmp_path):
    assert main(["merge", "--out", str(tmp_path), "--resume"]) == 2
    assert f"{tmp_path} holds no run to continue; to begin one there, give --model, --te" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["merge", "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert "the following arguments are required: --model, --teachers, --data" in capsys.readouterr().err


def test_a_resume_before_the_first_checkpoint_begins(place):
    assert main([*arguments(), "--resume"]) == 0
    assert Path("out/student.safetensors").is_file()


def test_tensorboard_is_missed_before_the_run(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([*arguments(), "--tensorboard"]) == 2
    assert "needs the package tensorboard" in capsys.readouterr().err
    assert not Path("out/command.json").exists()
    assert main([*arguments(), "--tensorboard", "--dry-run"]) == 2
    assert "needs the package tensorboard" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_the_log(place, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert main([*arguments(), "--tensorboard"]) == 130
    assert main([*arguments(), "--tensorboard", "--resume"]) == 0
    events = EventAccumulator("out/tensorboard").Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(step + 1, pytest.approx(line["train"]["loss"])) for step, line in enumerate(log_of("out"))]
    assert {"lr", "lam", "val/accuracy", "open_probability/0"} <= set(events.Tags()["scalars"])
