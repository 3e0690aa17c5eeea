"""The benchmark of the merge stage: what it times by epoch, and that early compaction has something to drop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_merge as merge
from benchmarks import names
from benchmarks.cases import Case
from benchmarks.effort import Effort
from fastmerge.merging import stages

CASE = Case("lenet", 8, 28)
EPOCHS = 4


def candidates(big: merge.ClosingBigStudent) -> dict[str, int]:
    return {name: len(gate.loc) for name, gate in big.gates.items()}


def test_every_stage_times_each_epochs_steps() -> None:
    for name, options in {names.NAIVE: None, **merge.OPTIONS}.items():
        loader = merge.TimedBatches(CASE.make_batch(), 2)
        if options is None:
            merge.naive_stage(CASE, EPOCHS, loader)
        else:
            merge.fastmerge_stage(CASE, EPOCHS, loader, **options)
        assert len(loader.seconds) == EPOCHS, name
        assert min(loader.seconds) > 0


def test_equally_many_gates_close_in_every_epoch() -> None:
    big = merge.ClosingBigStudent(*CASE.make_teachers(), example_inputs=CASE.make_batch()[0])
    big.link()
    big.epochs, whole = EPOCHS, candidates(big)
    for epoch in range(1, EPOCHS):
        big.compact(multiple=1)
        for name, count in candidates(big).items():
            assert count == whole[name] - int(whole[name] / 2 * epoch / EPOCHS), name


def test_compaction_has_something_to_drop_in_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    compact = merge.ClosingBigStudent.compact

    def counting(big: merge.ClosingBigStudent, *arguments: object, **options: object) -> object:
        done = compact(big, *arguments, **options)
        made.append(done.total)
        return done

    monkeypatch.setattr(merge.ClosingBigStudent, "compact", counting)
    before = stages.BigStudent
    merge.fastmerge_stage(
        CASE, EPOCHS, merge.TimedBatches(CASE.make_batch(), 1), **merge.OPTIONS[names.MERGE_COMPACTED]
    )
    assert len(made) == EPOCHS - 1
    assert all(made)
    assert stages.BigStudent is before


def test_an_interrupted_race_keeps_the_epochs_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five stages of the naive network, the first to warm up, and the interrupt in the sixth, after one of its epochs."""
    case, epochs = Case("lenet", 128, 28), 4
    benchmark = SimpleNamespace(extra_info={})

    def race(benchmark: SimpleNamespace, makers: dict[str, Any], *_: object, **options: object) -> None:
        contender: dict[str, Any] = {"samples": []}
        results = {names.NAIVE: contender, names.MERGE: {"error": "no"}, names.MERGE_COMPACTED: {"samples": []}}
        benchmark.extra_info["contenders"] = results
        times = iter([*[9.0] * epochs, *[1.0, 2.0, 3.0, 4.0] * 4, 7.0])
        monkeypatch.setattr(merge, "naive_stage", lambda case, epochs, loader: loader.seconds.extend(times))
        makers[names.NAIVE]().step()
        contender["samples"] += [0.1] * 4
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "race", race)
    with pytest.raises(KeyboardInterrupt):
        merge.bench_merge(benchmark, case, Effort(None, 1.0, 1.0, None))
    contenders = benchmark.extra_info["contenders"]
    assert contenders[names.NAIVE]["step_seconds"] == [1.0, 2.0, 3.0, 4.0]
    assert "step_seconds" not in contenders[names.MERGE] | contenders[names.MERGE_COMPACTED]


def test_epochs_are_medians_over_the_last_rounds() -> None:
    warm_up, rounds = [9.0, 9.0], [1.0, 4.0, 2.0, 5.0, 3.0, 9.0]
    assert merge.by_epoch(warm_up + rounds, 2, 3) == [2.0, 5.0]
