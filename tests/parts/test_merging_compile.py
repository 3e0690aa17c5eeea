"""merge() under torch.compile: the same student, said in the log, and eager where compiling fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastmerge
from fastmerge.merging import compiling
from small_task import VAL, copies, train_loader, train_teachers

pytestmark = [
    pytest.mark.filterwarnings("ignore:P.g>0.:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]
OPTIONS: dict[str, Any] = {"merge_epochs": 2, "finetune_epochs": 1, "link_at": 0.5, "seed": 0, "progress": False}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def teachers() -> list[torch.nn.Module]:
    return train_teachers(2)


def merge(teachers: list[torch.nn.Module], **options: Any) -> torch.nn.Module:
    student, _ = fastmerge.merge(copies(teachers), train_loader(60), val_loader=VAL, **OPTIONS, **options)
    return student


def assert_equal(found: torch.nn.Module, expected: torch.nn.Module, **tolerance: float) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, **tolerance)


def test_a_compiled_merge_is_the_eager_one(teachers, monkeypatch, caplog) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    with caplog.at_level(logging.INFO, logger="fastmerge"):
        student = merge(teachers, compile=True)
    assert_equal(student, merge(teachers), rtol=1e-3, atol=1e-4)
    assert [record.message for record in caplog.records] == [
        "compiled the big student, block-diagonal: 1 graph",
        "compiled the big student, linked: 1 graph",
        "compiled SmallNet: 1 graph",
    ]
    assert student._compiled_call_impl is None


def test_batches_of_every_shape_are_compiled_once(teachers, monkeypatch) -> None:
    calls: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    merge(teachers, compile=True)
    # training with batches of 60 and 16, and scoring: of the big student block-diagonal and linked, and of the student
    assert len(calls) == 9


def test_what_can_not_be_compiled_runs_eagerly_and_says_so(teachers, monkeypatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    with pytest.warns(UserWarning, match="the big student, block-diagonal can't be compiled and runs eagerly: "):
        student = merge(teachers, compile=True)
    assert_equal(student, merge(teachers), rtol=0, atol=0)


@pytest.mark.slow
def test_by_torchs_default_backend(teachers, recwarn) -> None:
    # its random numbers, and with them the gates drawn, are others
    assert_equal(merge(teachers, compile=True), merge(teachers), rtol=0.1, atol=0.05)
    assert not [warning for warning in recwarn if "can't be compiled" in str(warning.message)]
