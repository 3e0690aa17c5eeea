"""merge() with another optimizer, clipped gradients, moving averages, metrics, and callbacks that end a stage."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fastmerge import merge
from fastmerge.evaluation import Setting
from fastmerge.merging import stages
from fastmerge.merging.options import Options
from fastmerge.merging.replayed_step import ReplayedStep
from fastmerge.stack import Stack
from small_task import SHORT, VAL, copies, train_loader, train_teachers

pytestmark = pytest.mark.filterwarnings("ignore:P.g>0.:UserWarning")


@pytest.fixture(scope="module")
def trained() -> list[nn.Module]:
    return train_teachers(2)


def run(trained: list[nn.Module], **options: Any) -> Any:
    return merge(copies(trained), train_loader(), val_loader=VAL, **SHORT | options)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_an_optimizer_of_the_users_trains_both_stages(trained: list[nn.Module]) -> None:
    made: list[Any] = []

    class Recorded(torch.optim.AdamW):
        def __init__(self, parameters: Any, **options: Any) -> None:
            super().__init__(parameters, **options)
            made.append(self)

    options = {"optimizer": functools.partial(Recorded, lr=1e-3), "merge_milestones": (1,), "link_at": 0.5}
    student, history = run(trained, **options)
    assert [record.lr for record in history.epochs] == pytest.approx([1e-3, 1e-4, 1e-3])
    assert len(made) == 3  # it is tried out first
    assert not same(student, run(trained)[0])
    for wrong in (lambda parameters: None, torch.optim.SGD):
        with pytest.raises(
            ValueError, match=r"merge needs an optimizer, a function (of parameters )?that makes an optimizer"
        ):
            run(trained, optimizer=wrong if wrong is not torch.optim.SGD else lambda: None)


def test_a_function_that_goes_through_the_parameters_twice_makes_an_optimizer_of_all(trained: list[nn.Module]) -> None:
    counts: list[list[int]] = []

    def of_two_groups(parameters: Any) -> torch.optim.Optimizer:
        groups = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]]
        counts.append([len(group) for group in groups])
        return torch.optim.SGD([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "lr": 0.02}], 0.01)

    def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.5**epoch, lambda epoch: 1.0])

    _, history = run(trained, optimizer=of_two_groups, schedule=halving, finetune_epochs=2)
    assert counts[-1] == [3, 5]
    assert [record.lr for record in history.stage("finetune")] == [0.01, 0.005]


def test_a_learning_rate_may_be_a_tensor_and_stays_the_users(trained: list[nn.Module]) -> None:
    rate = torch.tensor(1e-3)
    options: dict[str, Any] = {"optimizer": functools.partial(torch.optim.AdamW, lr=rate), "finetune_epochs": 2}
    _, history = run(trained, **options, milestones=(1,), merge_milestones=(1,))
    assert float(rate) == pytest.approx(1e-3)
    assert [record.lr for record in history.epochs] == pytest.approx([1e-3, 1e-4, 1e-3, 1e-4])
    assert json.loads(json.dumps(history.record()))["epochs"][0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_learning_rate_may_be_zero(trained: list[nn.Module], warmup: int) -> None:
    _, history = run(trained, optimizer=functools.partial(torch.optim.SGD, lr=0.0), warmup=warmup)
    assert {record.lr for record in history.epochs} == {0.0}


def test_gradients_are_clipped(trained: list[nn.Module]) -> None:
    plain, clipped, loose = (run(trained, clip_norm=norm)[0] for norm in (None, 0.05, 1e9))
    assert same(plain, loose)
    assert not same(plain, clipped)


def test_each_network_of_a_stack_is_clipped_by_itself() -> None:
    networks = [nn.Linear(3, 2) for _ in range(2)]
    x, y = torch.randn(2, 8, 3), torch.randn(2, 8, 2)
    x[1] *= 100  # its gradients alone are large
    stack = Stack(networks)
    optimizer = torch.optim.SGD(stack.parameters(), 0.1)
    step = ReplayedStep(stack, [optimizer], Setting(torch.device("cpu"), F.mse_loss), None, clip_norm=5.0)
    step.renew()
    step((x,), y)
    norms = []
    for network, inputs, target, trained in zip(networks, x, y, stack.networks(), strict=True):
        F.mse_loss(network(inputs), target).backward()
        norms.append(float(clip_grad_norm_(network.parameters(), 5.0)))
        torch.optim.SGD(network.parameters(), 0.1).step()
        for ours, theirs in zip(trained.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert norms[0] < 5.0 < norms[1]


def test_the_student_is_the_moving_average(trained: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[dict[str, Tensor]] = []
    finetune = stages.finetune

    def spy(student: nn.Module, options: Options, trainer: Any, teachers: Any) -> None:
        epoch = trainer.epoch

        def watched(stage: Any, network: Any, optimizers: Any, *rest: Any) -> None:
            def note(*_: Any) -> None:
                steps.append({name: value.detach().clone() for name, value in network.named_parameters()})

            optimizers[0].register_step_post_hook(note)
            epoch(stage, network, optimizers, *rest)

        trainer.epoch = watched
        finetune(student, options, trainer, teachers)

    monkeypatch.setattr(stages, "finetune", spy)
    student, history = run(trained, ema=0.5)
    expected = copy.deepcopy(steps[0])
    for state in steps[1:]:
        expected = {name: 0.5 * value + 0.5 * state[name] for name, value in expected.items()}
    for name, value in student.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert history.epochs[-1].val == history.borders["student"]
    assert not same(student, run(trained)[0])
    with pytest.raises(ValueError, match=r"ema, .* in 0\.\.1; got 2|a finite number"):
        run(trained, ema=2.0)


class Worst:
    """As torchmetrics' objects are."""

    def __init__(self) -> None:
        self.resets, self.value = 0, 0.0

    def reset(self) -> None:
        self.resets, self.value = self.resets + 1, 0.0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.value = max(self.value, F.cross_entropy(output, target, reduction="none").max().item())

    def compute(self) -> Tensor:
        return torch.tensor(self.value)


def test_metrics_are_measured_on_the_validation_data(trained: list[nn.Module]) -> None:
    worst = Worst()

    def accuracy(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).float().mean()

    student, history = run(trained, metrics={"right": accuracy, "worst": worst})
    (x, y), score = VAL[0], history.borders["student"]
    assert score.metrics["right"] == pytest.approx(score.accuracy)
    with torch.no_grad():
        losses = F.cross_entropy(student(x), y, reduction="none")
    assert score.metrics["worst"] == pytest.approx(losses.max().item(), rel=1e-4)
    assert all(record.val.metrics.keys() == {"right", "worst"} for record in history.epochs)
    assert worst.resets == 2 + 1 + 3 + 1  # teachers, open gates, epochs, compressed
    with pytest.raises(TypeError, match="'luck' is a int"):
        run(trained, metrics={"luck": 7})


@pytest.mark.parametrize("found", [(1.0, 2.0, 3.0), torch.ones(3), None, "high"])
def test_a_metric_that_gives_no_number_is_named_before_the_first_epoch(trained: list[nn.Module], found: Any) -> None:
    seen: list[Any] = []
    with pytest.raises(
        ValueError, match=r"metric 'odd' must give one number per batch, or \(number, samples\); it gave a"
    ):
        run(trained, metrics={"odd": lambda output, target: found}, callback=seen.append)
    assert not seen


def test_targets_that_are_ignored_are_not_counted(trained: list[nn.Module]) -> None:
    (x, y), ignored = VAL[0], torch.arange(len(VAL[0][1])) % 3 == 0
    val = [(x, y.masked_fill(ignored, -100))]
    student, history = merge(copies(trained), train_loader(), val_loader=val, **SHORT)
    with torch.no_grad():
        right = (student(x).argmax(1) == y)[~ignored].float().mean()
    assert history.borders["student"].accuracy == pytest.approx(float(right))


@pytest.mark.parametrize(("said", "epochs"), [(np.bool_(True), 1), (1, 2), (None, 2)])
def test_what_a_callback_says_to_end_a_stage(trained: list[nn.Module], said: Any, epochs: int) -> None:
    _, history = merge(copies(trained), train_loader(), callback=lambda record: said, **SHORT)
    assert len(history.stage("merge")) == epochs


def test_a_callback_ends_a_stage_and_a_merge_that_goes_on_leaves_it_ended(
    trained: list[nn.Module], tmp_path: Any
) -> None:
    def ends_merge(record: Any) -> bool:
        return bool(record.stage == "merge" and record.epoch == 2)

    options = {"merge_epochs": 5, "finetune_epochs": 2, "callback": ends_merge}
    student, history = run(trained, **options)
    assert [(record.stage, record.epoch) for record in history.epochs] == [
        ("merge", 1),
        ("merge", 2),
        ("finetune", 1),
        ("finetune", 2),
    ]

    def interrupted(record: Any) -> bool:
        if record.stage == "finetune":
            raise KeyboardInterrupt
        return ends_merge(record)

    kept = {"checkpoint_dir": tmp_path, "checkpoint_seconds": 1e9}
    with pytest.raises(KeyboardInterrupt):
        run(trained, **options | kept | {"callback": interrupted})
    again, history = run(trained, **options | kept | {"resume": True})
    assert [(record.stage, record.epoch) for record in history.epochs][:2] == [("merge", 1), ("merge", 2)]
    assert same(again, student)
