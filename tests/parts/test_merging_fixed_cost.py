"""What a merge costs besides its steps: nothing is traced, run, lowered or scored twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

import fastmerge
from architectures import BY_NAME
from fastmerge import gated_network, merge
from fastmerge.lowering import programs
from fastmerge.wide import blueprint
from fastmerge.wide.analysis import Analysis
from small_task import SHORT, VAL, SmallNet, train_loader
from teachers import make_teachers

pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. did not move")  # in so few steps


class CountedLoader(list):
    """Counts the passes over it."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


class CountedNet(SmallNet):
    """Counts forwards, those of its copies too; tracing is one."""

    forwards: ClassVar[Counter[str]] = Counter()

    def forward(self, x: Any) -> Any:
        self.forwards["traced" if isinstance(x, FakeTensor) else "run"] += 1
        return super().forward(x)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], Counter[str]]:
    """Counts the calls of an attribute from here on."""
    calls: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> Counter[str]:
        original = getattr(owner, name)

        def calling(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, calling)
        return calls

    return counted


@pytest.mark.parametrize(("finetune_epochs", "passes"), [(0, 6), (1, 7), (3, 9)])
def test_each_network_is_scored_once(finetune_epochs: int, passes: int) -> None:
    """Two teachers, their mean, the big student after each of two epochs, the student before and after each epoch."""
    loader = CountedLoader(VAL)
    torch.manual_seed(0)
    teachers = [SmallNet().eval() for _ in range(2)]
    student, history = merge(
        teachers, train_loader(), val_loader=loader, **SHORT | {"finetune_epochs": finetune_epochs}
    )
    assert loader.passes == 1 + passes  # the first batch is looked at before
    assert history.borders["big student"] == history.stage("merge")[-1].val
    before = history.borders["compressed"] if finetune_epochs == 0 else history.epochs[-1].val
    assert history.borders["student"] == before
    with torch.no_grad():
        loss = nn.functional.cross_entropy(student(VAL[0][0]), VAL[0][1])
    assert history.borders["student"].loss == pytest.approx(loss.item(), rel=1e-5)


def test_a_teacher_runs_once_on_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_network, "check_exact", lambda *_: None)
    CountedNet.forwards.clear()
    merge([CountedNet().eval() for _ in range(2)], train_loader(), recalibrate=False, **SHORT | {"finetune_epochs": 0})
    # The first teacher runs in both modes to see whether the inputs fit, again to compare the modes, once on one sample, in
    # both modes for the criterion, and is traced once for both modes; the second is known by then.
    assert CountedNet.forwards == {"traced": 1, "run": 2 + 2 + 1 + 2}


@pytest.mark.parametrize(("name", "graphs"), [("resnet_projected_shortcut", 1), ("squeezenet", 1), ("recurrent", 2)])
def test_a_big_student_is_made_of_few_runs(name: str, graphs: int, count: Callable[[Any, str], Counter[str]]) -> None:
    """The first teacher is traced once, in both modes, and each graph that differs runs once, on channel ids."""
    architecture = BY_NAME[name]
    x = architecture.inputs(2)
    teachers = make_teachers(architecture.make, x, 2)
    for owner, attribute in (
        (fx.Interpreter, "run"),
        (blueprint, "trace"),
        (Analysis, "_find_streams"),
        (programs, "lower"),
    ):
        calls = count(owner, attribute)
    blueprint._KNOWN.clear()
    big = fastmerge.BigStudent(*teachers, example_inputs=x, verify=False)
    each = 2 if big._blueprint.each else 1
    expected = {"run": graphs, "trace": 1, "_find_streams": 2 * each, "lower": 4 * each}
    assert calls == expected
    # Of an architecture that is known nothing is read again, for a batch of another size neither.
    fastmerge.BigStudent(*teachers, example_inputs=architecture.inputs(3), verify=False)
    assert calls == {name: number if name in ("run", "trace") else 2 * number for name, number in expected.items()}


def test_a_linked_network_is_lowered_for_linked_steps_alone(count: Callable[[Any, str], Counter[str]]) -> None:
    architecture = BY_NAME["resnet_projected_shortcut"]
    x = architecture.inputs(2)
    big = fastmerge.BigStudent(*make_teachers(architecture.make, x, 2), example_inputs=x)
    with torch.no_grad():
        for gate in big.gates.values():
            gate.loc[::4] = -40.0
    calls = count(programs, "lower")
    big.compact()
    assert calls["lower"] == 4
    big.link()
    with torch.no_grad():
        for gate in big.gates.values():
            gate.loc[::5] = -40.0
    assert big.compact().total
    assert calls["lower"] == 6
    big(*x)
    big.eval()(*x)
