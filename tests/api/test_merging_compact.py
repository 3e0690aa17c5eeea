"""merge(compact_at=...): closed channels leave during the merge stage, and the history says which and when."""

from __future__ import annotations

import copy

import pytest
import torch

import fastmerge
from fastmerge import merge
from small_task import SHORT, VAL, copies, train_loader, train_teachers

OPTIONS = SHORT | {"merge_epochs": 6, "gate_lr": 20.0, "lam_step": 30.0}
SIZES = {"conv": 6, "hidden": 16}


@pytest.fixture(scope="module")
def trained():
    return train_teachers(2)


@pytest.fixture
def teachers(trained):
    return copies(trained)


@pytest.mark.parametrize(("compact_at", "epochs"), [(None, []), (0.5, [3, 4, 5]), (1.0, []), (0.0, [1, 2, 3, 4, 5])])
def test_the_history_says_what_was_dropped_when(teachers, compact_at, epochs):
    _, history = merge(teachers, train_loader(), compact_at=compact_at, **OPTIONS)
    assert [each["epoch"] for each in history.compactions] == epochs
    left = {name: 2 * size for name, size in SIZES.items()}
    for each in history.compactions:
        left = {name: count - each["dropped"][name] for name, count in left.items()}
        assert each["left"] == left
        assert all(count >= SIZES[name] for name, count in left.items())
        assert not each["whole"]
    assert not epochs or left["hidden"] < 32
    again = fastmerge.history.History(2)
    again.restore(history.record())
    assert again.compactions == history.compactions


def test_settled_waits_for_a_whole_group(teachers):
    _, history = merge(teachers, train_loader(), compact_at="settled", **OPTIONS)
    assert [each["epoch"] for each in history.compactions] == [1, 2, 3, 4, 5]
    first = next(each for each in history.compactions if each["whole"])
    assert all("not settled" in why and first["dropped"][name] == 0 for name, why in first["whole"].items())


def test_the_rest_of_the_merge_goes_on_as_before(teachers):
    """Few samples open what is dropped, and the gate loss counts it as closed."""
    histories = [merge(teachers, train_loader(), val_loader=VAL, compact_at=at, **OPTIONS)[1] for at in (None, 0.5)]
    before, after = (history.stage("merge")[-1] for history in histories)
    for name in SIZES:
        assert after.open_probability[name] == pytest.approx(before.open_probability[name], abs=0.1)
    assert after.train.loss == pytest.approx(before.train.loss, abs=0.2)


@pytest.mark.parametrize("link_at", [0.0, 0.7])
def test_a_merge_that_goes_on_has_dropped_the_same(teachers, link_at, tmp_path):
    options = OPTIONS | {"compact_at": 0.4, "link_at": link_at, "checkpoint_seconds": 0.0}
    expected, whole = merge(teachers, train_loader(), checkpoint_dir=tmp_path / "whole", **options)

    def crash(record):
        if (record.stage, record.epoch) == ("merge", 5):
            raise OSError("crashed")

    with pytest.raises(OSError, match="crashed"):
        merge(teachers, train_loader(), checkpoint_dir=tmp_path / "parts", callback=crash, **options)
    student, history = merge(teachers, train_loader(), checkpoint_dir=tmp_path / "parts", resume=True, **options)
    assert sum(each["dropped"]["hidden"] for each in history.compactions) > 0
    assert history.compactions == whole.compactions
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in student.state_dict().items())


def test_the_teachers_are_not_changed(teachers):
    before = copy.deepcopy([teacher.state_dict() for teacher in teachers])
    merge(teachers, train_loader(), compact_at=0.0, **OPTIONS)
    for teacher, state in zip(teachers, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
