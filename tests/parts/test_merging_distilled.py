"""Fine-tuning with what the teachers say, beside the labels."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss

import fastmerge
from fastmerge.evaluation import Setting, class_dimension
from fastmerge.merging.api import merge_by
from fastmerge.merging.distillation import TaughtSetting, divergence
from fastmerge.merging.options import Options
from fastmerge.stack import Stack
from small_task import SHORT, VAL, SmallNet, X, Y, train_loader, train_teachers

pytestmark = pytest.mark.filterwarnings("ignore:.*P.g>0. (is|did not move):UserWarning")
CPU = torch.device("cpu")


def test_the_loss_is_hintons() -> None:
    torch.manual_seed(0)
    teachers, student = [SmallNet().eval() for _ in range(2)], SmallNet()
    setting = TaughtSetting.of(Setting(CPU, cross_entropy), teachers, weight=0.3, temperature=2.0)
    x, y = X[:8], Y[:8]
    output, loss = setting.apply(student.train(), (x,), y)
    with torch.no_grad():
        wanted = (teachers[0](x) + teachers[1](x)) / 2
    soft = kl_div((output / 2).log_softmax(1), (wanted / 2).softmax(1), reduction="batchmean") * 4
    assert torch.allclose(loss, 0.3 * soft + 0.7 * cross_entropy(output, y))
    assert setting.apply(student.eval(), (x,), y)[1] == cross_entropy(student(x), y)  # scores are of the labels alone
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.parameters())


def test_networks_of_a_stack_learn_from_their_own_teachers() -> None:
    torch.manual_seed(0)
    students, teachers = ([SmallNet().eval() for _ in range(3)] for _ in range(2))
    x, y = torch.stack([X[:8], X[8:16], X[16:24]]), torch.stack([Y[:8], Y[8:16], Y[16:24]])
    setting = TaughtSetting.of(Setting(CPU, cross_entropy), [Stack(teachers)], weight=0.5, temperature=3.0)
    _, losses = setting.apply(Stack(students).train(), (x,), y)
    for r, loss in enumerate(losses):
        alone = TaughtSetting.of(Setting(CPU, cross_entropy), [teachers[r]], weight=0.5, temperature=3.0)
        assert torch.allclose(alone.apply(students[r].train(), (x[r],), y[r])[1], loss, rtol=1e-4)


def test_a_stack_of_merges_is_taught_as_well() -> None:
    """Its steps are traced, and what the teachers say comes into them beside the targets."""
    torch.manual_seed(0)
    teachers = [Stack([SmallNet().eval() for _ in range(2)]) for _ in range(2)]
    batches = [(torch.stack([X[i : i + 64]] * 2), torch.stack([Y[i : i + 64]] * 2)) for i in range(0, 256, 64)]
    x = torch.stack([X, X])
    with torch.no_grad():
        wanted = (teachers[0](x) + teachers[1](x)) / 2
    far = []
    for weight in (0.0, 1.0):
        options = Options(**SHORT | {"finetune_epochs": 4, "lr": 0.02}, distill=weight, temperature=1.0)
        students, _ = merge_by(options, teachers, batches)
        with torch.no_grad():
            far.append(torch.stack([divergence(a, b, 1.0) for a, b in zip(students(x), wanted, strict=True)]))
    assert (far[1] < 0.8 * far[0]).all()


def test_divergence_of_maps_is_a_mean_over_positions() -> None:
    output, wanted = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    flat = [z.movedim(1, -1).reshape(-1, 3) for z in (output, wanted)]
    assert torch.allclose(divergence(output, wanted, 2.0), divergence(flat[0], flat[1], 2.0))


def test_classes_lie_where_the_targets_lack_a_dimension() -> None:
    """As of a language model, (N, L, K), whose criterion flattens both."""

    def flat(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output.flatten(0, 1), target.flatten())

    words, target = torch.randn(4, 6, 11), torch.randint(11, (4, 6))
    assert class_dimension(words, target, flat) == 2
    assert class_dimension(words.movedim(2, 1), target, cross_entropy) == 1
    soft = torch.rand(4, 11)
    assert class_dimension(soft, soft, partial(cross_entropy, label_smoothing=0.1)) == 1
    teacher, student = nn.Linear(3, 11), nn.Linear(3, 11)
    setting = TaughtSetting.of(Setting(CPU, flat), [teacher], weight=1.0, temperature=2.0)
    x = torch.randn(4, 6, 3)
    _, loss = setting.apply(student.train(), (x,), target)
    rows = divergence(student(x).flatten(0, 1), teacher(x).flatten(0, 1), 2.0)
    assert torch.allclose(loss, rows)


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((4, 1), torch.zeros(4, 1)),
        ((4, 3), torch.zeros(4, 3)),
        ((4, 1), torch.zeros(4, dtype=torch.long)),
        ((4, 6, 6), torch.zeros(4, 6, dtype=torch.long)),
        ((4, 6, 11), torch.zeros(24, dtype=torch.long)),
    ],
    ids=["one value", "several values", "one class", "two dimensions alike", "targets of another shape"],
)
def test_what_has_no_classes_is_not_distilled(shape: tuple[int, ...], target: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="distillation needs logits of classes"):
        class_dimension(torch.zeros(shape), target, mse_loss)


def test_a_merge_of_regressions_is_not_distilled() -> None:
    """Which is known before the merge stage is trained."""
    torch.manual_seed(0)
    teachers = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(2)]
    batches = [(torch.randn(8, 3), torch.randn(8, 1))] * 2
    with pytest.raises(ValueError, match="distillation needs logits of classes"):
        fastmerge.merge(teachers, batches, criterion=mse_loss, distill=0.5, **SHORT)


def test_a_distilled_student_is_nearer_to_what_its_teachers_say() -> None:
    teachers = train_teachers(2)
    before = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
    options = SHORT | {"finetune_epochs": 4, "lr": 0.02}
    plain, taught = (
        fastmerge.merge(teachers, train_loader(), val_loader=VAL, distill=w, temperature=1.0, **options)
        for w in (0.0, 1.0)
    )
    with torch.no_grad():
        wanted = (teachers[0](X) + teachers[1](X)) / 2
        far = [divergence(student(X), wanted, 1.0).item() for student, _ in (plain, taught)]
    assert far[1] < 0.8 * far[0]
    assert plain[1].stage("merge") == taught[1].stage("merge") or [
        record.train for record in plain[1].stage("merge")
    ] == [record.train for record in taught[1].stage("merge")]
    assert taught[1].stage("finetune")[-1].train.accuracy is not None
    for teacher, state in zip(teachers, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())


def test_what_can_not_be_distilled_is_said() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    setting = TaughtSetting.of(Setting(CPU, lambda output, target: output[0].sum()), [Two()], 0.5, 2.0)
    with pytest.raises(ValueError, match="distillation needs networks with one output, logits"):
        setting.apply(Two().train(), (torch.ones(2, 3),), None)
    for wrong in ({"distill": 1.5}, {"distill": -0.1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fastmerge.merge(train_teachers(2), train_loader(), **SHORT, **wrong)
