"""The soak: a minute of it, and that it finds what must not happen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import soak


def fail(words: list[str]) -> int:
    raise ZeroDivisionError


def leave_a_process(words: list[str]) -> int:
    if os.fork() == 0:
        time.sleep(30)
    return 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (fail, "a traceback: ZeroDivisionError"),
        (lambda words: 3, "exit status 3"),
        (lambda words: 2, "exit status 2 without a message"),
        (lambda words: time.sleep(30), "hangs"),
        (leave_a_process, "a process is left over"),
    ],
)
def test_what_must_not_happen_is_a_loss(
    command: Callable[[list[str]], int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "fastmerge", command)
    monkeypatch.setattr(soak, "PATIENCE", 0.5)
    with pytest.raises(soak.Loss, match=message):
        soak.Running([], tmp_path).end({0, 2})


def test_other_results_are_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(words: list[str]) -> int:
        Path("out").mkdir()
        Path("out/student.safetensors").write_bytes(os.urandom(8))
        return 0

    monkeypatch.setattr(soak, "fastmerge", command)
    for name in ("write_tree", "build_network", "save_weights"):
        monkeypatch.setattr(soak, name, lambda *a, **k: soak.torch.nn.Identity())
    soaking = soak.Soak(tmp_path, 1)
    with pytest.raises(soak.Loss, match=r"run sine: student.safetensors of 1 files differ"):
        soaking.finish("run sine", soaking.folder("other"))


@pytest.mark.slow
def test_a_minute_of_it() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", soak.__file__, "--minutes", "1", "--seed", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "     0 LOSSES" in done.stdout
