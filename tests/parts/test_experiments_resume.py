"""Runs of stacked replicates that are killed or interrupted, and go on."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import killed_run
from fastmerge.checkpoints import Interrupted, Snapshots, read_snapshot
from killed_run import recipe, train
from killing import assert_killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run to which nothing happened."""
    directory = tmp_path_factory.mktemp("whole")
    train(directory, checkpoint_dir=None)
    return directory


def places(directory) -> dict[str, tuple[str, int, int]]:
    """Where the training of each directory was last written down: stage, epoch, step."""
    found = {}
    for job in sorted((directory / "checkpoints").iterdir()):
        _, state = read_snapshot(Snapshots(job, {}).files()[-1])
        found[job.name] = state["stage"], state["epoch"], state["step"]
    return found


def assert_same(directory, whole) -> None:
    for name in ("student-0", "student-1"):
        ours, theirs = (load_file(each / f"{name}.safetensors") for each in (directory, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((directory / "history.json").read_text()) == json.loads((whole / "history.json").read_text())
    ours, theirs = (json.loads((each / "results.json").read_text())["strategies"] for each in (directory, whole))
    assert {name: each["values"] for name, each in ours.items()} == {
        name: each["values"] for name, each in theirs.items()
    }


def test_killed_in_every_stage_it_ends_as_if_it_had_not_been(whole, tmp_path):
    # An epoch is told of before its last checkpoint is written, and a step that was done is not done again.
    for epochs, path, where in [
        (3, "teacher-0-0", ("finetune", 2, 3)),
        (4, "teacher-0-1", ("finetune", 1, 3)),
        (9, "one-0-0", ("finetune", 5, 3)),
        (8, "student-0-0", ("merge", 0, 3)),
        (3, "student-0-0", ("finetune", 0, 3)),
    ]:
        assert_killed(train, tmp_path, epochs)
        assert places(tmp_path)[path] == where
    train(tmp_path)
    assert places(tmp_path)["student-0-0"] == ("finetune", 2, 0)
    assert_same(tmp_path, whole)


def test_a_signal_ends_it_after_the_step_with_a_checkpoint(whole, tmp_path):
    with pytest.raises(Interrupted) as caught:
        train(tmp_path, 21, lambda: os.kill(os.getpid(), signal.SIGTERM), checkpoint_seconds=1e9)
    assert caught.value.number == signal.SIGTERM
    assert places(tmp_path)["student-0-0"] == ("merge", 1, 1)
    train(tmp_path)
    assert_same(tmp_path, whole)


def test_a_signal_ends_both_processes_with_checkpoints(whole, tmp_path, forked_jobs):
    heard = set()

    def note(values):
        if len(heard) < 2:
            heard.add(values["network"])
            if len(heard) == 2:  # before, one of the processes may still be importing
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        train(tmp_path, checkpoint_seconds=1e9, workers=2, note=note)
    assert caught.value.number == signal.SIGTERM
    assert {"teacher-0-0", "teacher-0-1"} <= places(tmp_path).keys()
    train(tmp_path)
    assert_same(tmp_path, whole)


def test_a_finished_run_trains_nothing_anew(whole, tmp_path):
    train(tmp_path)
    epochs = []
    train(tmp_path, note=epochs.append)
    assert not epochs
    assert_same(tmp_path, whole)


def interrupted_and_gone_on(tmp_path, epochs: int, where, **options) -> None:
    """Two teachers of four epochs each come first."""
    train(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        train(tmp_path / "other", epochs, lambda: os.kill(os.getpid(), signal.SIGINT), **options)
    assert places(tmp_path / "other")["student-0-0"] == where
    train(tmp_path / "other", **options)
    assert_same(tmp_path / "other", tmp_path / "whole")


def test_a_budgets_multipliers_go_on(tmp_path):
    options = {"recipe": recipe(gate_schedule="budget"), "strategies": ("student",)}
    interrupted_and_gone_on(tmp_path, 9, ("merge", 1, 1), **options)


def test_compacted_replicates_go_on(tmp_path):
    """Interrupted before the compaction, and after it; they train one after another from the start of the merge."""
    changes = {"compact_at": 0.0, "link_at": 0.0, "make_network": killed_run.wide_net, "gate_lr": 300.0}
    options = {"recipe": recipe(lam_start=30.0, **changes), "strategies": ("student",)}
    train(tmp_path / "whole", **options)
    history = json.loads((tmp_path / "whole" / "history.json").read_text())
    assert [[each["epoch"], each["left"]["conv"] < 24] for (each,) in history["compactions"]] == [[1, True]] * 2
    for epochs, where in ((9, ("merge", 1, 1)), (2, ("finetune", 1, 1))):
        with pytest.raises(Interrupted):
            train(tmp_path / "other", epochs, lambda: os.kill(os.getpid(), signal.SIGINT), **options)
        assert places(tmp_path / "other")["student-0-0"] == where
    train(tmp_path / "other", **options)
    assert_same(tmp_path / "other", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"with seed \d+; this one has \d+"),
        ({"replicates": 1}, r"with replicates \[0, 1\]; this one has \[0\]"),
        ({"recipe": recipe(momentum=0.5)}, r"with momentum 0\.9; this one has 0\.5"),
        ({"data": 1.0}, r"with data '[0-9a-f]{16}'; this one has"),
    ],
)
def test_checkpoints_of_another_run_are_refused(tmp_path, monkeypatch, changes, message):
    with pytest.raises(Interrupted):
        train(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGINT), strategies=("student",))
    if "data" in changes:
        monkeypatch.setattr(killed_run, "BRIGHTNESS", changes.pop("data"))
    with pytest.raises(ValueError, match=message):
        train(tmp_path, strategies=("student",), **changes)
