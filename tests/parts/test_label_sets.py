"""Teachers of different label sets: each part of a big student's output is its teacher's own, whatever becomes of it."""

import copy
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

import fastmerge
from architectures import BY_NAME
from fastmerge.evaluation import Setting
from fastmerge.merging.distillation import TaughtSetting, divergence, foreign_divergence
from fastmerge.merging.label_sets import LabelSets, PartCriterion, Reached, TeachersLoader
from fastmerge.merging.options import Options
from fastmerge.networks import LeNet
from fastmerge.processes import Processes
from fastmerge.wide.blueprint import join_heads
from fastmerge.wide.heads import SeparateHeads
from teachers import TOLERANCE, disturb_weights, make_batch, make_teacher, relative_error, select_gates

pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")
SIZES = (5, 3, 4)


def normed(classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)),
    )


def convolutional_head(classes: int) -> nn.Module:
    head = nn.Conv2d(8, classes, 1, bias=False)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), head, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def sigmoid_at_the_end(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, classes), nn.Sigmoid())


MAKERS = {
    "normed": normed,
    "lenet": lambda classes: LeNet(3, 12, classes, kernel_size=3, channels=(3, 4), units=(8, 7)),
    "convolutional_head": convolutional_head,
    "sigmoid_at_the_end": sigmoid_at_the_end,
}


def teachers_of(name: str, x: Tensor, sizes: Sequence[int]) -> list[nn.Module]:
    return [make_teacher(lambda k=k: MAKERS[name](k), (x,), torch.float64, seed) for seed, k in enumerate(sizes)]


def side(name: str) -> int:
    return 12 if name == "lenet" else 8


@pytest.mark.parametrize("sizes", [SIZES, (3, 3)], ids=str)
@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_parts_are_the_teachers_own_and_compress_is_exact(name: str, sizes: tuple[int, ...]) -> None:
    x = make_batch(6, (3, side(name), side(name)))
    teachers = teachers_of(name, x, sizes)
    big = fastmerge.BigStudent(*teachers, example_inputs=x[:2], heads="concatenate")
    expected = torch.cat([teacher(x) for teacher in teachers], 1)
    for linked in (False, True):
        if linked:
            big.link()
        with big.open_gates():
            assert relative_error(big(x), expected) <= TOLERANCE[torch.float64]
    disturb_weights(big, scale=0.1)
    select_gates(big, (x,), recalibrate=True)
    student = big.compress()
    assert type(student) is type(teachers[0])
    assert relative_error(student(x), big(x)) <= TOLERANCE[torch.float64]
    built = MAKERS[name](sum(sizes)).double().eval()
    built.load_state_dict(student.state_dict(), strict=True)
    assert torch.equal(built(x), student(x))


@torch.no_grad()
def test_heads_read_their_own_teachers_channels_alone_until_trained() -> None:
    x = make_batch(4, (3, 8, 8))
    big = fastmerge.BigStudent(*teachers_of("normed", x, (5, 3)), heads="concatenate")
    for gate in big.gates.values():  # all of teacher 0's
        gate.loc.fill_(-40.0)
        gate.loc[: len(gate.loc) // 2] = 40.0
    student = big.compress()
    assert student[-1].weight[:5].abs().min() > 0
    assert student[-1].weight[5:].abs().max() == 0


@torch.no_grad()
def test_separate_heads_give_a_tuple() -> None:
    x = make_batch(6, (3, 8, 8))
    teachers = teachers_of("normed", x, SIZES)
    big = fastmerge.BigStudent(*teachers, heads="separate")
    with big.open_gates():
        parts = big(x)
    assert isinstance(parts, tuple)
    assert relative_error(parts, tuple(teacher(x) for teacher in teachers)) <= TOLERANCE[torch.float64]
    assert len(big.predictions(parts)) == len(SIZES)
    select_gates(big, (x,), recalibrate=True)
    student = big.compress()
    assert isinstance(student, SeparateHeads)
    assert type(student.network) is type(teachers[0])
    assert not student.training
    assert relative_error(student(x), big(x)) <= TOLERANCE[torch.float64]
    again = copy.deepcopy(student)
    assert relative_error(again(x), student(x)) == 0


@torch.no_grad()
def test_several_outputs_each_have_their_parts() -> None:
    architecture = BY_NAME["dict_heads"]
    x = architecture.inputs(6)
    teachers = [make_teacher(architecture.make, x, torch.float64, seed) for seed in range(2)]
    fastmerge.BigStudent(
        *teachers, example_inputs=architecture.inputs(4), verify=False
    )  # the teachers' graphs are known, of another batch size
    big = fastmerge.BigStudent(*teachers, example_inputs=x, heads="concatenate")
    outputs = [pytree.tree_leaves(teacher(*x)) for teacher in teachers]
    with big.open_gates():
        for whole, *own in zip(pytree.tree_leaves(big(*x)), *outputs, strict=True):
            assert relative_error(whole, torch.cat(own, 1)) <= TOLERANCE[torch.float64]


def test_they_are_optimised_linked_compacted_saved_and_compressed_as_all_are() -> None:
    x = make_batch(8, (3, 8, 8))
    big = fastmerge.BigStudent(*teachers_of("normed", x, (5, 3)), heads="concatenate").train()
    optimizer = torch.optim.SGD(big.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(big(x), torch.arange(8)).backward()
        optimizer.step()

    step()
    big.link(optimizer)
    with torch.no_grad():
        for gate in big.gates.values():
            gate.loc[::2] = -40.0
            gate.loc[1::2] = 40.0
    big.eval()
    before = big(x).detach()
    assert big.compact(optimizer, multiple=1).total == 14
    assert relative_error(big(x).detach(), before) <= TOLERANCE[torch.float64]
    other = fastmerge.BigStudent(*teachers_of("normed", x, (5, 3)), heads="concatenate")
    other.load_state_dict(big.state_dict())
    assert relative_error(other(x).detach(), before) <= TOLERANCE[torch.float64]
    big.train()
    step()
    expected = big.eval()(x).detach()
    student = big.compress(optimizer)
    assert relative_error(student(x).detach(), expected) <= TOLERANCE[torch.float64]
    assert {id(p) for p in student.parameters()} >= {id(p) for p in optimizer.state}
    assert all(state["momentum_buffer"].shape == p.shape for p, state in optimizer.state.items())


def test_teachers_stay_as_they_are_and_share_what_is_not_a_head() -> None:
    x = make_batch(4, (3, 8, 8))
    teachers = teachers_of("normed", x, (5, 3))
    states = [{k: v.clone() for k, v in teacher.state_dict().items()} for teacher in teachers]
    networks, _ = join_heads(teachers)
    assert networks[1][0].weight is teachers[1][0].weight
    assert networks[1][-1].out_features == 8
    fastmerge.BigStudent(*teachers, heads="concatenate")
    for teacher, state in zip(teachers, states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())
    assert teachers[1][-1].out_features == 3


class Scaled(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 6), nn.Linear(6, classes)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x).relu()) * self.temperature


def mlp(classes: int, hidden: int = 6, last: Sequence[nn.Module] = ()) -> nn.Module:
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, classes), *last)


@pytest.mark.parametrize(
    ("teachers", "heads", "says"),
    [
        (
            (mlp(3), mlp(2)),
            "average",
            r'2.weight is .*if only the last layers differ in their number of classes, pass heads="concatenate"',
        ),
        ((mlp(3), mlp(2, hidden=7)), "concatenate", r"0.weight is \(6, 4\) in teacher 0 and \(7, 4\) in teacher 1"),
        (
            (mlp(3, last=[nn.LogSoftmax(1)]), mlp(2, last=[nn.LogSoftmax(1)])),
            "concatenate",
            "outputs are logits; 'log_softmax'",
        ),
        ((Scaled(3), Scaled(2)), "concatenate", "'temperature' acts on the output after the last layer"),
        ((mlp(3), nn.Linear(4, 2)), "concatenate", "teachers of one class"),
        ((mlp(3),), "concatenate", "at least two teachers"),
        ((mlp(3), mlp(3)), "both", "needs heads of 'average', 'concatenate', 'separate'; got 'both'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_built(teachers, heads: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fastmerge.BigStudent(*teachers, heads=heads)
    if heads != "both":
        report = fastmerge.check(*teachers, heads=heads)
        assert not report.ok
        assert any(re.search(says, str(problem)) for problem in report.problems)


def test_check_reports_teachers_that_fit() -> None:
    assert fastmerge.check(mlp(3), mlp(2), heads="concatenate").ok


def test_each_sample_trains_its_own_part() -> None:
    sets, generator = LabelSets((3, 2)), torch.Generator().manual_seed(0)
    output = torch.randn(6, 5, generator=generator, requires_grad=True)
    target = torch.tensor([0, 4, 2, 3, 1, 4])
    first, second = target < 3, target >= 3
    expected = (
        cross_entropy(output[first][:, :3], target[first], reduction="sum")
        + cross_entropy(output[second][:, 3:], target[second] - 3, reduction="sum")
    ) / 6
    fast = PartCriterion(cross_entropy, sets)(output, target)
    assert torch.allclose(fast, expected)
    assert torch.allclose(PartCriterion(nn.CrossEntropyLoss(), sets)(output, target), expected)
    fast.backward()
    assert output.grad is not None
    assert output.grad[first][:, 3:].abs().max() == 0
    assert output.grad[first][:, :3].abs().min() > 0
    assert torch.equal(
        PartCriterion(cross_entropy, sets, all_classes=True)(output, target), cross_entropy(output, target)
    )
    wanted = torch.randn(6, 5, generator=generator)
    said = (
        divergence(output[first][:, 3:], wanted[first][:, 3:], 2.0) * first.sum()
        + divergence(output[second][:, :3], wanted[second][:, :3], 2.0) * second.sum()
    ) / 6
    assert torch.allclose(foreign_divergence(output, wanted, target, sets, 2.0), said)
    with pytest.raises(ValueError, match=r"need logits \(N, 5\)"):
        PartCriterion(cross_entropy, sets)(output[:, :4], target)


def test_teachers_of_other_classes_are_asked_once_a_step() -> None:
    calls, sets, x = [], LabelSets((3, 2)), torch.randn(4, 4)
    setting = Setting(torch.device("cpu"), PartCriterion(cross_entropy, sets))
    taught = TaughtSetting.of(setting, [mlp(5), mlp(5)], weight=0.5, temperature=2.0)
    for teacher in taught.teachers:
        teacher.register_forward_hook(lambda *_: calls.append(1))
    student, target = mlp(5).train(), torch.tensor([0, 4, 2, 3])
    output, loss = taught.apply(student, (x,), target)
    foreign = foreign_divergence(output, taught.answers((x,)), target, sets, 2.0)
    assert torch.allclose(loss, (setting.criterion(output, target) + foreign) / 2)
    assert len(calls) == 2 * 2  # in the step, and to compare


def test_loaders_side_by_side_and_in_turn() -> None:
    sets = LabelSets((3, 2))
    long = [(torch.full((2, 1), float(k)), torch.tensor([0, 2])) for k in range(3)]
    short = [(torch.full((1, 1), 10.0 + k), torch.tensor([1])) for k in range(2)]
    together = TeachersLoader([long, short], sets, together=True)
    assert len(together) == 3
    batches = list(together)
    assert [y.tolist() for _, y in batches] == [[0, 2, 4]] * 3
    assert [x.flatten().tolist() for x, _ in batches] == [[0, 0, 10], [1, 1, 11], [2, 2, 10]]
    in_turn = TeachersLoader([long, short], sets, together=False)
    assert [y.tolist() for _, y in in_turn] == [[0, 2]] * 3 + [[4]] * 2
    assert len(in_turn) == 5


def data_of(weights: Tensor, classes: Sequence[int], counted_through: bool = False) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(240, 4, generator=torch.Generator().manual_seed(1))
    y = (x @ weights).argmax(1)
    own = torch.isin(y, torch.tensor(classes))
    y = y if counted_through else y - classes[0]
    return list(zip(x[own].split(20), y[own].split(20), strict=True))


def trained(network: nn.Module, data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for x, y in data * 20:
        optimizer.zero_grad()
        cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def task():
    """Two teachers, each with its data, and the data of both with classes counted through."""
    torch.manual_seed(0)
    weights = torch.randn(4, 5)
    data = [data_of(weights, [0, 1, 2]), data_of(weights, [3, 4])]
    teachers = [trained(mlp(3, 12), data[0]), trained(mlp(2, 12), data[1])]
    return teachers, data, data_of(weights, [0, 1, 2, 3, 4], counted_through=True)


OPTIONS = {"merge_epochs": 4, "finetune_epochs": 4, "seed": 0, "lr": 0.05, "heads": "concatenate"}


@pytest.mark.parametrize("changes", [{}, {"distill": 0.3}, {"all_classes": True}, {"heads": "separate"}], ids=str)
def test_merge_of_a_loader_per_teacher(task, changes: dict) -> None:
    teachers, data, _ = task
    student, history = fastmerge.merge(teachers, data, val_loader=data, **OPTIONS | changes)
    opened, final = history.borders["big student, gates open"], history.borders["student"]
    for number, (teacher, loader) in enumerate(zip(teachers, data, strict=True)):
        right = torch.cat([teacher(x).argmax(1) == y for x, y in loader]).float().mean()
        assert opened.metrics[f"part {number}"] == pytest.approx(float(right))
    assert final.metrics["own part"] > 0.85
    if changes.get("all_classes"):
        assert final.accuracy > 0.75
    output = student(data[0][0][0])
    if changes.get("heads") == "separate":
        assert [tuple(part.shape[1:]) for part in output] == [(3,), (2,)]
    else:
        assert type(student) is type(teachers[0])
        assert output.shape[1:] == (5,)


def test_merge_of_one_loader_whose_targets_say_which(task) -> None:
    teachers, _, both = task
    _, history = fastmerge.merge(teachers, both, val_loader=both, **OPTIONS)
    assert history.borders["student"].metrics["own part"] > 0.85
    assert not any("no target" in warning for warning in history.warnings)


def test_a_merge_says_whose_classes_never_come(task) -> None:
    teachers, (((x, y), *_), _), _ = task
    ignored = torch.where(torch.arange(len(y)) % 2 > 0, y, -100)
    says = r"no target in the first epoch was of teacher 1's classes, 3\.\.4, so nothing trains"
    with pytest.warns(UserWarning, match=says):
        _, history = fastmerge.merge(teachers, [(x, ignored)], **OPTIONS)
    assert [bool(re.match(says, warning)) for warning in history.warnings].count(True) == 1


def test_a_merge_that_goes_on_keeps_what_it_warned_of(task, tmp_path) -> None:
    teachers, (batches, _), _ = task

    def stop(record) -> None:
        if record.epoch == 2:
            raise KeyboardInterrupt

    common = {"checkpoint_dir": tmp_path, "checkpoint_seconds": 0.0}
    with pytest.warns(UserWarning, match="no target in the first epoch"), pytest.raises(KeyboardInterrupt):
        fastmerge.merge(teachers, batches, **OPTIONS, **common, callback=stop)
    _, history = fastmerge.merge(teachers, batches, **OPTIONS, **common, resume=True)
    assert ["no target" in warning for warning in history.warnings].count(True) == 1


def test_with_all_classes_the_criterion_may_weigh_all_of_them(task) -> None:
    teachers, data, _ = task
    weights = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0])
    options = OPTIONS | {
        "criterion": torch.nn.CrossEntropyLoss(weight=weights),
        "merge_epochs": 1,
        "finetune_epochs": 1,
    }
    student, _ = fastmerge.merge(teachers, data, **options, all_classes=True)
    assert student(data[0][0][0]).shape[1:] == (5,)
    with pytest.raises(ValueError, match="the criterion failed on train_loader\\[0\\]'s first batch"):
        fastmerge.merge(teachers, data, **options)


def test_a_merge_with_a_seed_and_its_prediction_leave_random_numbers_alone(task) -> None:
    teachers, data, _ = task
    loaders = [torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True) for batches in data]
    before, options = torch.get_rng_state(), OPTIONS | {"merge_epochs": 1, "finetune_epochs": 0}
    fastmerge.merge(teachers, loaders, **options)
    assert torch.equal(torch.get_rng_state(), before)
    fastmerge.methods.predict(teachers, loaders, Setting(torch.device("cpu"), cross_entropy), Options(**options))
    assert torch.equal(torch.get_rng_state(), before)


def test_of_no_batch_at_all_every_teacher_is_named() -> None:
    said = Reached(LabelSets((3, 2))).warnings(Processes.alone(torch.device("cpu")))
    assert [re.search(r"\d\.\.\d", warning)[0] for warning in said] == ["0..2", "3..4"]


def test_a_merge_goes_on_where_it_stopped(task, tmp_path) -> None:
    teachers, data, _ = task

    class StopError(Exception):
        pass

    def stop(record) -> None:
        if (record.stage, record.epoch) == ("finetune", 2):
            raise StopError

    whole, _ = fastmerge.merge(teachers, data, **OPTIONS)
    common = {"checkpoint_dir": tmp_path, "checkpoint_seconds": 0.0}
    with pytest.raises(StopError):
        fastmerge.merge(teachers, data, **OPTIONS, **common, callback=stop)
    student, _ = fastmerge.merge(teachers, data, **OPTIONS, **common, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), student.parameters(), strict=True))
    with pytest.raises(ValueError, match="heads"):
        fastmerge.merge(teachers, data, **OPTIONS | {"heads": "separate"}, **common, resume=True)


def test_merge_says_what_does_not_fit(task) -> None:
    teachers, data, both = task
    with pytest.raises(ValueError, match="one train_loader per teacher, or one for all; got 3 for 2 teachers"):
        fastmerge.merge(teachers, [*data, data[0]], **OPTIONS)
    with pytest.raises(ValueError, match=r"train_loader\[1\] has targets 0..2; the teachers have 2 classes"):
        fastmerge.merge(teachers, [data[0], data[0]], **OPTIONS)
    with pytest.raises(ValueError, match=r"train_loader has targets 5..9; the teachers have 5 classes"):
        fastmerge.merge(teachers, [(torch.zeros(2, 4), torch.tensor([5, 9]))], **OPTIONS)
    ignored = [(data[1][0][0], torch.full_like(data[1][0][1], -100))]
    with pytest.raises(ValueError, match=r"teacher 1's loss on train_loader\[1\]'s first batch is nan"):
        fastmerge.merge(teachers, [data[0], ignored], **OPTIONS)
    with pytest.raises(TypeError, match=r"train_loader\[1\] has none"):
        fastmerge.merge(teachers, [data[0], torch.utils.data.DataLoader(Endless(), 4)], **OPTIONS)
    with pytest.raises(ValueError, match="all_classes goes with heads"):
        fastmerge.merge(teachers, both, all_classes=True)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(4), 0)] * 8)
