"""Compiling ahead of benchmarks: every candidate runs, none is timed, and nothing is remembered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fastmerge.kernels.block_conv.choice import choices
from torch import Tensor

from benchmarks import compile_kernels
from benchmarks.cases import Case


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "_prepare", lambda runs: None)  # for CPU tensors there is nothing to synchronise
    return tmp_path


def test_candidates_run_and_nothing_is_kept(own_cache: Path) -> None:
    ran = []

    def candidate(name: str) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            ran.append(name)
            return [torch.ones(1, dtype=torch.float16)]

        return run

    made = {name: candidate(name) for name in ("split", "triton a", "triton b")}
    before = choices.table()
    with compile_kernels.untimed():
        assert choices.measures()
        assert choices.pick("a layer", made, lambda: made) == "split"
    assert set(ran) == set(made)
    assert choices.table() == before
    assert not choices.measures()
    assert not list(own_cache.rglob("*.json"))


def test_a_case_takes_steps_before_linking_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    linked = []
    step = compile_kernels.Step.__call__

    def counted(self: compile_kernels.Step) -> None:
        linked.append(self.networks[0].linked)
        step(self)

    monkeypatch.setattr(compile_kernels.Step, "__call__", counted)
    compile_kernels.compile_case(Case("lenet", 4, 28))
    assert linked == [False, False, True, True]


def test_a_case_that_cannot_run_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def failing(case: Case) -> None:
        seen.append(case)
        if len(seen) == 1:
            raise RuntimeError("no memory")

    monkeypatch.setattr(compile_kernels, "compile_case", failing)
    assert compile_kernels.main() == 1
    assert len(seen) > 1
    assert {case.device for case in seen} == {"cuda"}
    assert "RuntimeError: no memory" in capsys.readouterr().out
    seen[1:] = []
    assert compile_kernels.main(["bf16"]) == 0
    assert {case.precision for case in seen[1:]} == {"bf16"}
