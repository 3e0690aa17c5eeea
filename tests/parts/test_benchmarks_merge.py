"""The benchmark of the merge stage: equal conditions for all contenders, and what it writes down beside their times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastmerge
from benchmarks import bench_merge
from benchmarks.baselines.naive_dense import naive_dense
from benchmarks.cases import Case
from benchmarks.learnable import TimedBatches, images_of
from benchmarks.merge_task import MergeTask
from teachers import OPEN, relative_error

CASES = [Case("resnet20", 4, 8), Case("lenet", 8, 28)]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.network)


def small(case: Case, epochs: int = 4, **options: int) -> MergeTask:
    return MergeTask(case, epochs, 2, **{"teacher_epochs": 1, "finetune_epochs": 1, "test": 20} | options)


def flat(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@by_case
def test_images_are_the_same_in_every_call_and_all_classes_are_there(case: Case) -> None:
    (train, test), (again, _) = images_of(case, 200, 100), images_of(case, 200, 100)
    assert torch.equal(train.pixels, again.pixels)
    assert (len(train), len(test)) == (200, 100)
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    x, target = train.batch(torch.arange(4))
    assert x.shape == (4, 3, case.side, case.side)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(target, train.labels[:4])
    assert not torch.equal(train.pixels[:100], test.pixels)


def test_made_images_can_be_learned_but_not_without_mistakes() -> None:
    """By the distance to each class's mean, which is the best that there is for such noise."""
    train, test = images_of(Case("resnet20", 4, 8), 4_000, 1_000)
    centres = torch.stack([train.pixels[train.labels == label].mean(0) for label in range(10)])
    found = torch.cdist(test.pixels.flatten(1), centres.flatten(1)).argmin(1)
    assert 0.85 < (found == test.labels).float().mean() < 0.999


def test_a_seed_fixes_the_order_which_differs_from_pass_to_pass() -> None:
    images, _ = images_of(CASES[0], 22, 1)
    first, second, other = (TimedBatches(images, 4, seed) for seed in (3, 3, 4))
    next(iter(first))  # what merge() looks at before it begins is no pass
    passes = [[torch.stack([y for _, y in loader]) for _ in range(2)] for loader in (first, second, other)]
    assert len(first) == len(passes[0][0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(passes[0], passes[1], strict=True))
    assert not torch.equal(passes[0][0], passes[0][1])
    assert not torch.equal(passes[0][0], passes[2][0])
    assert len(first.seconds) == 2
    assert min(first.seconds) > 0


@by_case
def test_the_naive_networks_student_has_its_most_open_channels(case: Case) -> None:
    task = small(case)
    naive = case.place(naive_dense(task.teachers)).train()
    x = task.images[0].batch(torch.arange(6))[0]
    naive(x)  # statistics move
    with torch.no_grad():
        for parameter in naive.weight_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for gate in naive.gate_parameters():
            gate.copy_(torch.where(torch.randperm(len(gate)) < len(gate) // 2, OPEN, -OPEN))
        expected = naive.eval()(x)
        student = task.student_of(naive).eval()
        assert type(student) is type(task.teachers[0])
        assert relative_error(student(x), expected) < 1e-4


def test_all_contenders_see_the_same_batches_and_leave_the_teachers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task = small(CASES[1])
    before = [flat(teacher) for teacher in task.teachers]
    seen: list[list[int]] = []
    batch = type(task.images[0]).batch

    def watched(images: Any, index: torch.Tensor) -> Any:
        seen[-1].append(int(index.sum()))
        return batch(images, index)

    monkeypatch.setattr(type(task.images[0]), "batch", watched)
    for options in (None, *bench_merge.OPTIONS.values()):
        seen.append([])
        stages = bench_merge.Stages(task, options)
        stages.run()
        assert len(stages.loaders[0].seconds) == task.epochs
    # merge() looks at the first batch once more, before it begins.
    assert [batches[-8:] for batches in seen] == 4 * [seen[0]]
    after = [flat(teacher) for teacher in task.teachers]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_early_compaction_drops_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few steps close no gate by themselves, so a quarter of each group's is closed here before every compaction."""
    compact = fastmerge.BigStudent.compact

    @torch.no_grad()
    def closing(big: fastmerge.BigStudent, *arguments: Any, **options: Any) -> Any:
        for group in big.groups:
            gate = big.gates[group.name]
            gate.loc[: len(gate.loc) - 3 * group.size // 2] = -40.0
        return compact(big, *arguments, **options)

    monkeypatch.setattr(fastmerge.BigStudent, "compact", closing)
    stages = bench_merge.Stages(small(CASES[0]), {"compact_at": 0.0})
    stages.run()
    assert stages.dropped == [0.25]
    stages = bench_merge.Stages(small(CASES[0]), {})
    stages.run()
    assert stages.dropped == [0.0]


def test_facts_are_of_the_last_stages_and_students_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = small(CASES[1], epochs=2)
    stages = bench_merge.Stages(task, None)
    scored: list[int] = []
    monkeypatch.setattr(MergeTask, "accuracy", lambda task, student, seed: scored.append(seed) or float(seed))
    for _ in range(3):
        stages.settle()
        stages.run()
    stages.settle()
    stages.settle()
    assert scored == [0, 1, 2]
    for loader, seconds in zip(stages.loaders, ([9.0, 9.0], [1.0, 2.0], [2.0, 4.0, 0.5]), strict=True):
        loader.seconds = seconds
    facts = stages.facts([7.0, 15.0])  # of two epochs of two steps
    assert facts["step_seconds"] == [1.5, 3.0]
    assert facts["fixed_seconds"] == [1.0, 3.0]
    assert facts["stage_seconds"] == [1.0 + 1.5 * bench_merge.PAPER["lenet"], 3.0 + 3.0 * bench_merge.PAPER["lenet"]]
    assert facts["accuracies"] == [1.0, 2.0]
    assert facts["dropped"] == [0.0, 0.0]


def test_what_happens_once_in_an_epoch_is_not_in_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as capturing a graph: it would count a thousand times in a stage of the paper's length."""
    clock = iter([0.0, 30.0, 31.0, 33.0, 34.0, 35.0])
    loader = TimedBatches(images_of(CASES[0], 22, 1)[0], 4, 0)
    monkeypatch.setattr(loader, "_now", lambda: next(clock))
    assert len(list(loader)) == 5
    assert loader.seconds == [1.0]
