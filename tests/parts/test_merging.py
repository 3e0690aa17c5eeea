"""merge(): the whole journey on a small task, its history and its options."""

import json
import math
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fastmerge.merging.options as options_module
from fastmerge.big_student import BigStudent
from fastmerge.data.dataset import load_digits
from fastmerge.evaluation import Setting, evaluate
from fastmerge.merging import merge
from fastmerge.merging.checks import examples_of
from fastmerge.merging.stages import gate_warnings, origins, undecided_warnings
from fastmerge.methods import train
from fastmerge.schedules import QuadraticLambda, fitting_gate_lr, fitting_lam_step
from small_task import SHORT, TRAIN, VAL, SmallNet, X, Y, copies, train_loader, train_teachers

# Stages this short leave the gates where they are, which only some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")


@pytest.fixture(scope="module")
def trained():
    return train_teachers(3)


@pytest.fixture
def teachers(trained):
    return copies(trained[:2])


def state_of(network: nn.Module):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("count", [2, 3])
def test_the_student_is_of_the_teachers_class_and_holds_the_task(trained, count):
    teachers = copies(trained[:count])
    teachers[0].train().norm.eval()
    before = [state_of(teacher) for teacher in teachers]
    modes = [[part.training for part in teacher.modules()] for teacher in teachers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every group arrives near 1/T, with λ fitted to so short a stage
        student, history = merge(teachers, train_loader(), val_loader=VAL, merge_epochs=12, finetune_epochs=4, seed=0)
    assert type(student) is SmallNet
    assert not student.training
    assert all(parameter.grad is None for parameter in student.parameters())
    SmallNet().load_state_dict(student.state_dict())
    assert all(same(state, teacher.state_dict()) for state, teacher in zip(before, teachers, strict=True))
    assert [[part.training for part in teacher.modules()] for teacher in teachers] == modes
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.parameters())

    accuracies = [history.borders[f"teacher {number}"].accuracy for number in range(count)]
    assert history.borders["student"].accuracy > sum(accuracies) / count - 0.03
    setting = Setting(torch.device("cpu"), cross_entropy)
    assert evaluate(student.train(), VAL, setting) == history.borders["student"]
    assert student.training


def test_the_history_tells_what_happened(teachers):
    _, history = merge(
        teachers, train_loader(), val_loader=VAL, merge_epochs=4, finetune_epochs=3, lam_start=0.5, lam_step=9.0, seed=0
    )
    assert [(record.stage, record.epoch) for record in history.epochs] == (
        [("merge", n) for n in (1, 2, 3, 4)] + [("finetune", n) for n in (1, 2, 3)]
    )
    lam = QuadraticLambda(0.5, 9.0)
    assert [record.lam for record in history.stage("merge")] == [0.5, lam.step(), lam.step(), lam.step()]
    last = history.stage("merge")[-1]
    assert last.gate_loss > 0
    assert set(last.open_probability) == set(history.kept)
    assert all(0 < value < 0.8 for value in last.open_probability.values())  # they start at 0.93
    assert all(record.open_probability is None for record in history.stage("finetune"))
    assert {sum(counts) for counts in history.kept.values()} == {6, 16}
    assert all(len(counts) == 2 for counts in history.kept.values())
    assert [record.lr for record in history.stage("finetune")] == pytest.approx([0.01, 0.01, 0.001])

    borders = "teacher 0", "teacher 1", "big student, gates open", "big student", "compressed", "student"
    assert tuple(history.borders) == borders
    with torch.no_grad():
        mean = torch.stack([teacher(VAL[0][0]) for teacher in teachers]).mean(0)
    assert history.borders["big student, gates open"].loss == pytest.approx(cross_entropy(mean, VAL[0][1]).item(), 1e-4)
    assert history.borders["big student"] == last.val
    assert history.borders["student"] == history.epochs[-1].val

    written = json.loads(json.dumps(history.to_dict()))
    assert written["gates"]["lam"] == [record.lam for record in history.stage("merge")]
    assert written["gates"]["target"] == 0.5
    assert written["curves"]["student"]["train_loss"] == [record.train.loss for record in history.epochs]
    assert written["stages"]["student"] == {"merge": 0, "fine-tune": 4}


def test_the_first_epochs_figures_are_those_of_the_plain_loop(teachers):
    seen = []

    def criterion(output, target):
        loss = cross_entropy(output, target)
        if output.requires_grad:
            seen.append((loss.item(), (output.argmax(1) == target).float().mean().item(), len(target)))
        return loss

    _, history = merge(teachers, train_loader(batch_size=100), criterion=criterion, **SHORT)
    first, total = seen[:3], 256
    assert history.epochs[0].train.loss == pytest.approx(sum(loss * n for loss, _, n in first) / total)
    assert history.epochs[0].train.accuracy == pytest.approx(sum(right * n for _, right, n in first) / total)


def test_both_stages_train_in_training_mode_whatever_mode_the_teachers_are_in(teachers):
    student, _ = merge(teachers, train_loader(), recalibrate=False, **SHORT)
    assert student.norm.num_batches_tracked == teachers[0].norm.num_batches_tracked + 3 * 8


def test_origins_count_the_teachers_of_the_kept_channels():
    kept = {"a": torch.tensor([0, 2, 3, 11]), "b": torch.tensor([2])}
    groups = [SimpleNamespace(name="a", size=4), SimpleNamespace(name="b", size=1)]
    big = SimpleNamespace(num_teachers=3, groups=groups, keep=lambda: kept)
    assert origins(big) == {"a": [3, 0, 1], "b": [0, 0, 1]}


def test_a_seed_repeats_the_merge_and_leaves_the_callers_random_state(teachers):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first, _ = merge(teachers, train_loader(), **SHORT)
    assert torch.equal(torch.rand(3), expected)
    second, _ = merge(teachers, train_loader(), **SHORT)
    other, _ = merge(teachers, train_loader(), **SHORT | {"seed": 1})
    assert same(first.state_dict(), second.state_dict())
    assert not same(first.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("link_at", "linked"),
    [
        (0, [1, 1, 1, 1]),
        (0.5, [0, 0, 1, 1]),
        (0.6, [0, 0, 0, 1]),
        (0.9, [0, 0, 0, 1]),
        (1, [0] * 4),
        (0.25, [1]),
        (1, [0]),
    ],
)
def test_link_at_says_when_the_big_student_becomes_dense(teachers, link_at, linked):
    _, history = merge(teachers, train_loader(64), link_at=link_at, **SHORT | {"merge_epochs": len(linked)})
    assert [record.linked for record in history.stage("merge")] == linked


def test_weights_and_gates_have_their_own_optimizers(teachers, monkeypatch):
    made = []

    class Recorded(torch.optim.SGD):
        def __init__(self, parameters, lr, momentum=0.0, **options):
            super().__init__(parameters, lr, momentum, **options)
            group = self.param_groups[0]
            count = sum(parameter.numel() for parameter in group["params"])
            made.append((count, group["lr"], group["momentum"], group["weight_decay"]))

    monkeypatch.setattr(options_module, "SGD", Recorded)
    merge(teachers, train_loader(), lr=0.02, momentum=0.8, weight_decay=1e-3, finetune_lr=0.03, gate_lr=0.4, **SHORT)
    _, weights, gates, student = made  # the first is tried out
    assert gates == (2 * (6 + 16), 0.4, 0.9, 0)
    assert weights[1:] == (0.02, 0.8, 1e-3)
    assert student == (sum(p.numel() for p in SmallNet().parameters()), 0.03, 0.8, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_of_the_process_does_not_matter(teachers, dtype):
    options = SHORT | {"compact_at": 0.5, "gate_lr": 20.0, "keep": 5 / 6}
    expected, history = merge(teachers, train_loader(), **options)
    torch.set_default_dtype(dtype)
    try:
        student, other = merge(teachers, train_loader(), **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(student.state_dict(), expected.state_dict())
    assert [record.open_probability for record in other.epochs] == [
        record.open_probability for record in history.epochs
    ]


def test_the_default_device_of_the_process_does_not_matter(teachers):
    """As torch.set_default_device("cuda") is set in notebooks; whatever came to the meta device here would have no values."""
    batches = list(zip(X.split(32), Y.split(32), strict=True))
    options = SHORT | {"compact_at": 0.5, "gate_lr": 20.0, "keep": 5 / 6, "gate_schedule": "budget"}
    expected, _ = merge(teachers, batches, **options)
    torch.set_default_device("meta")
    try:
        student, _ = merge(teachers, batches, **options)
    finally:
        torch.set_default_device(None)
    assert same(student.state_dict(), expected.state_dict())


def test_a_schedule_replaces_the_milestones(teachers):
    short = SHORT | {"finetune_epochs": 4}
    _, history = merge(teachers, train_loader(), schedule=lambda optimizer: CosineAnnealingLR(optimizer, 4), **short)
    assert [record.lr for record in history.stage("finetune")] == pytest.approx(
        [0.01, 0.00853553, 0.005, 0.00146447], 1e-4
    )
    _, history = merge(teachers, train_loader(), milestones=[1, 3], **short)
    assert [record.lr for record in history.stage("finetune")] == pytest.approx([1e-2, 1e-3, 1e-3, 1e-4])


def test_the_merge_stages_learning_rate_drops_at_its_milestones_before_and_after_linking(teachers):
    options = {"merge_epochs": 4, "finetune_epochs": 1, "lr": 0.1, "link_at": 0.5, "lam_step": 5.0, "seed": 0}
    _, history = merge(teachers, train_loader(), merge_milestones=(1, 3), **options)
    assert [record.lr for record in history.epochs] == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.1])
    assert [record.linked for record in history.stage("merge")] == [False, False, True, True]


def test_epochs_in_between_need_not_be_scored(teachers):
    options = {"val_loader": VAL, "merge_epochs": 5, "finetune_epochs": 3, "lam_step": 5.0, "seed": 0}
    student, history = merge(teachers, train_loader(), val_every=2, **options)
    assert [record.val is not None for record in history.epochs] == [False, True, False, True, True, False, True, True]
    curves = history.to_dict()["curves"]["student"]
    assert [value is None for value in curves["val_accuracy"]] == [record.val is None for record in history.epochs]
    every, _ = merge(teachers, train_loader(), **options)
    assert same(student.state_dict(), every.state_dict())


def test_without_validation_or_fine_tuning(teachers):
    student, history = merge(teachers, train_loader(), **SHORT | {"finetune_epochs": 0})
    assert history.borders == {}
    assert {record.val for record in history.epochs} == {None}
    assert len(history.epochs) == 2
    assert json.dumps(history.to_dict())
    assert type(student) is SmallNet


def test_regression_has_no_accuracy_and_inputs_may_be_several():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.out = nn.Linear(2, 8), nn.Linear(3, 8), nn.Linear(8, 1)

        def forward(self, a, b):
            return self.out((self.left(a) + self.right(b)).relu())

    a, b = torch.randn(64, 2), torch.randn(64, 3)
    loader = [((a[i : i + 16], b[i : i + 16]), (a[i : i + 16].sum(1) * 2)[:, None]) for i in range(0, 64, 16)]
    student, history = merge([Sum(), Sum()], loader, val_loader=loader, criterion=mse_loss, **SHORT)
    assert type(student) is Sum
    assert history.borders["student"].accuracy is None
    assert history.epochs[0].train.loss > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_channels_last(teachers, dtype):
    layouts = []

    def criterion(output, target):
        layouts.append(output.dtype)
        return cross_entropy(output.float(), target)

    student, history = merge(
        teachers, train_loader(), criterion=criterion, autocast=dtype, channels_last=True, val_loader=VAL, **SHORT
    )
    assert set(layouts) == {dtype}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert history.borders["student"].loss < 2
    setting = Setting(torch.device("cpu"), cross_entropy, channels_last=True)
    assert setting.place(nn.Conv2d(3, 4, 3)).weight.is_contiguous(memory_format=torch.channels_last)
    inputs, _ = next(setting.batches([(torch.ones(2, 3, 4, 4), 0)]))
    assert inputs[0].is_contiguous(memory_format=torch.channels_last)


def test_the_callback_sees_each_epoch_and_an_interrupt_leaves_nothing_behind(teachers, capsys):
    before, state = [state_of(teacher) for teacher in teachers], torch.get_rng_state()
    seen = []

    def callback(record):
        seen.append(record)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(teachers, train_loader(), callback=callback, **SHORT | {"finetune_epochs": 5, "progress": True})
    assert [(record.stage, record.epoch) for record in seen] == [("merge", 1), ("merge", 2), ("finetune", 1)]
    assert all(same(old, teacher.state_dict()) for old, teacher in zip(before, teachers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    shown = capsys.readouterr().err
    for part in ("merge:", "fine-tune:", "epoch=2/2", "λ=", "P[g>0]=", "loss=", "accuracy=", "images/s=", "memory="):
        assert part in shown


def test_gates_that_do_not_arrive_are_warned_of(teachers):
    with pytest.warns(
        UserWarning, match=r"did not move in 2 of 2 channel groups, .*raise lam_step \(now 5\), gate_lr"
    ) as found:
        _, history = merge(teachers, train_loader(), **SHORT | {"gate_lr": 1e-7})
    assert len(history.warnings) == 1
    assert found[0].filename == __file__  # where merge() was called
    with pytest.warns(UserWarning, match=r"above 1/T = 0\.50 in [12] of 2 channel groups, \w+ \(0\.[6-9]"):
        merge(teachers, train_loader(), **SHORT | {"lam_start": 4.0, "lam_step": 0.5})


def test_gate_warnings_tell_the_groups_apart():
    before = {"still": 0.9, "far": 0.9, "near": 0.9, **{f"g{i}": 0.9 for i in range(6)}}
    after = before | {"still": 0.895, "far": 0.7, "near": 0.41} | {f"g{i}": 0.2 for i in range(6)}
    still, above, below = gate_warnings(before, after, 1 / 3, 0.05, epochs=2)
    assert still.startswith("P[g>0] did not move in 1 of 9 channel groups, still (0.90);")
    assert above.startswith("P[g>0] is above 1/T = 0.33 in 1 of 9 channel groups, far (0.70);")
    assert below.startswith("P[g>0] is below 1/T = 0.33 in 6 of 9 channel groups, g0 (0.20), g1 (0.20)")
    assert "g3 (0.20) and 2 more; " in below
    assert all(warning.endswith(": raise merge_epochs") for warning in (still, above, below))  # no λ fits them all
    up, down = (gate_warnings(before, before | dict.fromkeys(before, p), 1 / 3, 0.05, epochs=2) for p in (0.7, 0.2))
    assert up[0].endswith(": raise lam_step (now 0.05), gate_lr or merge_epochs")
    assert down[0].endswith(": lower lam_step (now 0.05) or raise merge_epochs")
    assert gate_warnings(before, dict.fromkeys(before, 0.3), 1 / 3, 0.05, epochs=2) == []
    (alone,) = gate_warnings({"g": 0.9}, {"g": 0.9}, 1 / 2, 0.05, epochs=1)
    assert alone.endswith("raise merge_epochs, since λ only grows between epochs, or take gate_schedule='budget'")


@pytest.mark.parametrize(
    ("epochs", "steps", "channels"), [(3, 40, 50), (10, 400, 240), (30, 10**6, 1024), (7, None, 9)]
)
def test_the_fitting_lam_step_is_the_smallest_that_pulls_enough(epochs, steps, channels):
    def enough(lam_step):
        lam = QuadraticLambda(0.01, lam_step)
        values = [0.01] + [lam.step() for _ in range(epochs - 1)]
        pull = sum(values) * (steps or 10**9) / epochs * 0.2 / 0.1 / channels
        return values[-1] >= 400 and pull >= 100

    step = fitting_lam_step(epochs, steps, channels, 0.01, gate_lr=0.2)
    assert enough(step)
    assert not enough(step * 0.99)


def test_gates_learn_faster_the_fewer_steps_there_are():
    assert fitting_gate_lr(None) == fitting_gate_lr(150 * 390) == fitting_gate_lr(10**4) == 0.2
    assert fitting_gate_lr(4000) == pytest.approx(0.5)
    assert fitting_gate_lr(2000) == fitting_gate_lr(8) == 1.0


@pytest.mark.parametrize(("chosen", "expected"), [({}, 1.0), ({"gate_lr": 0.3}, 0.3)])
def test_the_learning_rate_of_the_gates_is_the_fitting_one_or_the_chosen(teachers, chosen, expected, monkeypatch):
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, *arguments):
            seen.append(self.param_groups[0]["lr"])
            return super().step(*arguments)

    monkeypatch.setattr(options_module, "SGD", Spy)
    options = {name: value for name, value in SHORT.items() if name != "gate_lr"} | {"lr": 0.02, "finetune_epochs": 0}
    merge(teachers, train_loader(), **options | chosen)
    assert set(seen) == {0.02, expected}


def test_undecided_gates_are_told_from_decided_ones(teachers):
    big = BigStudent(*teachers, example_inputs=VAL[0][0][:2])
    names = [group.name for group in big.groups]
    with torch.no_grad():
        for name in names:
            loc = big.gates[name].loc
            half = loc.new_tensor(big.gates[name].beta * math.log(-big.gates[name].gamma / big.gates[name].zeta))
            loc.copy_(half.expand_as(loc))  # P = 1/2
    (warning,) = undecided_warnings(big)
    assert warning.startswith(f"P[g>0] is neither 0 nor 1, with a mean 4 P (1 - P) above 0.8, in {len(names)} of")
    assert f"{names[0]} (1.00)" in warning
    with torch.no_grad():
        for name in names:
            big.gates[name].loc[::2] += 9
            big.gates[name].loc[1::2] -= 9
    assert undecided_warnings(big) == []


def test_a_stage_too_short_for_the_gates_leaves_the_criterion_a_say():
    lam = QuadraticLambda(0.01, fitting_lam_step(2, 26, 1024, 0.01, 0.2))
    assert lam.step() == pytest.approx(1000, rel=0.01)
    assert fitting_lam_step(1, 26, 1024, 0.01, 0.2) == fitting_lam_step(9, 26, 1024, 0.0, 0.2) == 0.05


def test_gates_of_narrow_layers_arrive_with_batch_norm():
    arrays = load_digits()
    x, y = torch.from_numpy(arrays.train_images).reshape(-1, 1, 8, 8) / 240, torch.from_numpy(arrays.train_labels)
    loader = DataLoader(TensorDataset(x, y), 60, shuffle=True)

    def trained(seed):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)),
        )
        train(network, loader, epochs=10, lr=0.05)
        return network

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, history = merge([trained(0), trained(1)], loader, merge_epochs=5, finetune_epochs=0, lr=0.05, seed=0)
    opened = history.stage("merge")[-1].open_probability
    assert opened == {name: pytest.approx(0.5, abs=0.05) for name in opened}


def test_a_budget_brings_every_group_to_its_share(teachers):
    options = SHORT | {"lam_step": None, "merge_epochs": 25, "gate_schedule": "budget"}
    _, history = merge(teachers, train_loader(), **options)
    last = history.stage("merge")[-1]
    assert last.lam is None
    assert last.open_probability == {name: pytest.approx(0.5, abs=0.06) for name in last.open_probability}
    assert not history.warnings


def test_a_budget_needs_a_length(teachers):
    class Endless:
        def __iter__(self):
            return iter(train_loader())

    with pytest.raises(ValueError, match="needs a train_loader with a length, to plan its steps; this one has none"):
        merge(teachers, Endless(), gate_schedule="budget", **SHORT)


def test_a_gate_schedule_is_one_of_two(teachers):
    with pytest.raises(ValueError, match=r"gate_schedule, .* quadratic or budget; got 'linear'"):
        merge(teachers, train_loader(), gate_schedule="linear", **SHORT)


def test_a_distributed_sampler_shuffles_anew_each_epoch(teachers):
    orders = [[]]

    class Noting(DistributedSampler):
        def __iter__(self):
            orders.append(list(super().__iter__()))
            return iter(orders[-1])

    loader = DataLoader(TRAIN, 64, sampler=Noting(TRAIN, num_replicas=1, rank=0))
    merge(teachers, loader, recalibrate=False, **SHORT)
    first, *epochs = orders[1:]  # the first batch is looked at before the merge
    assert len(epochs) == 3
    assert epochs[0] == first
    assert len({tuple(order) for order in epochs}) == 3


def test_any_sampler_that_counts_epochs_is_told(teachers):
    epochs = []

    class Counting:
        def set_epoch(self, epoch):
            epochs.append((type(self).__name__, epoch))

    class OfBatches(Counting, BatchSampler):
        pass

    class Within(Counting, SequentialSampler):
        pass

    loader = DataLoader(TRAIN, batch_sampler=OfBatches(Within(TRAIN), 64, drop_last=False))
    merge(teachers, loader, **SHORT)
    assert epochs == [(name, epoch) for epoch in range(3) for name in ("OfBatches", "Within")]


class Streamed(IterableDataset):
    """Has no length, and so its DataLoader has none."""

    def __iter__(self):
        for first in range(0, 256, 32):
            yield X[first : first + 32], Y[first : first + 32]


class Counted(Streamed):
    def __len__(self):
        return 8


def test_a_dataset_without_a_length(teachers):
    loader, options = DataLoader(Streamed(), batch_size=None), SHORT | {"gate_lr": 0.2, "distill": 0.5}
    student, history = merge(teachers, loader, val_loader=loader, **options)
    twin, same = merge(teachers, DataLoader(Counted(), batch_size=None), val_loader=loader, **options)
    assert [record.train for record in history.epochs] == [record.train for record in same.epochs]
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ValueError, match="needs a train_loader with a length"):
        merge(teachers, loader, gate_schedule="budget", **SHORT)


class Pair(NamedTuple):
    labels: torch.Tensor
    weights: list[torch.Tensor]


def test_targets_keep_their_structure_and_go_to_the_device(teachers):
    def criterion(output, target):
        if isinstance(target, dict):
            target = target["pair"]
        return (cross_entropy(output, target.labels, reduction="none") * target.weights[0]).mean()

    for target in (pair := Pair(Y[:8], [torch.ones(8)]), {"pair": pair, "names": ["a"]}):
        student, _ = merge(teachers, [(X[:8], target)], criterion=criterion, **SHORT)
    plain, _ = merge(teachers, [(X[:8], Y[:8])], **SHORT)
    for one, other in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    ((_, moved),) = Setting(torch.device("meta"), criterion).batches([(X[:8], {"pair": pair, "names": ["a"]})])
    assert moved["names"] == ["a"]
    assert moved["pair"].labels.is_meta
    assert moved["pair"].weights[0].is_meta


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whoever_calls_it_without_gradients(teachers, mode):
    with mode():
        student, _ = merge(teachers, train_loader(), **SHORT)
        assert not torch.is_grad_enabled()
    twin, _ = merge(teachers, train_loader(), **SHORT)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), twin.parameters(), strict=True))


def test_volumes_in_the_channels_last_layout():
    class Volume(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 2, 3))

    loader = [(torch.randn(2, 1, 6, 6, 6), torch.randint(2, (2, 2, 2, 2)))]
    student, _ = merge([Volume(), Volume()], loader, channels_last=True, **SHORT)
    assert student[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_inputs_are_cut_to_two_samples_where_all_count_the_samples() -> None:
    x, others = torch.randn(6, 3), torch.randn(4, 4)
    assert [len(each) for each in examples_of((x, x), SmallNet())] == [2, 2]
    assert [len(each) for each in examples_of((x, others), SmallNet())] == [6, 4]
