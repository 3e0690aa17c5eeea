"""The log of epochs where the disk is full: it has a gap, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastmerge.reporting.results as module
from cli_files import arguments
from fastmerge.cli import main
from fastmerge.reporting.results import EpochLog
from full_disk import files_of_at_most


def epochs_in(path: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in path.read_text().splitlines()]


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "log.jsonl"
    log = EpochLog(path, ("epoch",), resume=False)
    log.write({"epoch": 1, "loss": 0.5}, 1)
    size = path.stat().st_size
    with (
        files_of_at_most(size + 5),
        pytest.warns(UserWarning, match=r"could not write to .*log.jsonl .*its log has a gap"),
    ):
        log.write({"epoch": 2, "loss": 0.5}, 2)
    assert path.stat().st_size == size
    log.write({"epoch": 3, "loss": 0.5}, 3)
    assert epochs_in(path) == [1, 3]
    log = EpochLog(path, ("epoch",), resume=True)
    log.write({"epoch": 2, "loss": 0.5}, 2)  # of a run that goes on and comes to it again
    log.write({"epoch": 3, "loss": 0.5}, 3)
    assert epochs_in(path) == [1, 3, 2]


def test_event_files_that_can_not_be_written_cost_no_run(tmp_path):
    class Full:
        log_dir = str(tmp_path / "tensorboard")

        def add_scalar(self, *scalar):
            raise OSError(28, "No space left on device")

        close = add_scalar

    log = EpochLog(tmp_path / "log.jsonl", ("epoch",), resume=False)
    log._board = Full()
    with pytest.warns(UserWarning, match=r"could not write to .*tensorboard .*No space left"):
        log.write({"epoch": 1, "loss": 0.5}, 1)
    with pytest.warns(UserWarning, match=r"could not write to .*tensorboard .*No space left"):
        log.close()
    assert epochs_in(tmp_path / "log.jsonl") == [1]


@pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")
@pytest.mark.filterwarnings("always:could not write to out/log.jsonl:UserWarning")
def test_a_merge_goes_on_without_its_log(place, monkeypatch, capsys):
    def full(path, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_append", full)
    assert main(arguments()) == 0
    assert "could not write to out/log.jsonl" in capsys.readouterr().err
    assert Path("out/student.safetensors").is_file()
