"""Students of other widths than their teachers."""

import argparse
import copy
import pickle

import pytest
import torch
from torch import nn

import fastmerge
from architectures import BY_NAME, teachers_of
from fastmerge.cli.arguments import keep
from fastmerge.history import EpochRecord
from fastmerge.narrowing.closing import UnsettledGatesWarning
from fastmerge.narrowing.compression import TracedStudent
from fastmerge.networks import LeNet, ResNetCifar
from teachers import OPEN, TOLERANCE, calibrate, disturb_weights, make_batch, make_teachers, mean_output, relative_error


def open_some(big: fastmerge.BigStudent, seed: int = 0) -> None:
    """As many gates of every group as the student has channels, by chance."""
    generator = torch.Generator().manual_seed(seed)
    for name, gate in big.gates.items():
        gate.loc.fill_(-OPEN)
        gate.loc[torch.randperm(len(gate.loc), generator=generator)[: big.widths[name]]] = OPEN


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        *(
            (name, keep)
            for name in ("mlp", "resnet_projected_shortcut", "densenet", "convolution_1d")
            for keep in (0.5, 1.5)
        ),
        *((name, 1.5) for name in ("mobilenet", "depthwise_multiplier", "resnext", "group_norm")),
        *((name, 0.5) for name in ("mobilenet", "resnext")),
        *((name, keep) for name in ("layer_norm", "rms_norm", "channels_last_blocks") for keep in (0.5, 1.5)),
    ],
)
@torch.no_grad()
def test_compress_is_exact_at_any_width(name: str, keep: float) -> None:
    teachers, x = teachers_of(name), BY_NAME[name].inputs(6)
    big = fastmerge.BigStudent(*teachers, example_inputs=BY_NAME[name].inputs(2), keep=keep)
    for linked in (False, True):
        if linked:
            big.link()
            disturb_weights(big, scale=0.1)
        open_some(big)
        calibrate(big, x, batches=1)
        big.eval()
        expected = big(*x)
        student = big.compress()
        assert type(student) is type(teachers[0])
        assert relative_error(student(*x), expected) <= TOLERANCE[torch.float64]
    for group in big.groups:
        wanted = group.size if group.size == 1 else max(1, round(keep * group.size))
        assert big.widths[group.name] == wanted == len(big.keep()[group.name])


@pytest.mark.parametrize("keep", [0.5, 2.0])
@torch.no_grad()
def test_where_the_code_names_its_width_the_student_is_traced(keep: float) -> None:
    teachers, x = teachers_of("lenet", 2), BY_NAME["lenet"].inputs(6)
    big = fastmerge.BigStudent(*teachers, example_inputs=BY_NAME["lenet"].inputs(2), keep=keep)
    big.link()
    disturb_weights(big, scale=0.1)
    open_some(big)
    student = big.eval().compress()
    assert isinstance(student, TracedStudent)
    assert student.state_dict().keys() == teachers[0].state_dict().keys()
    assert relative_error(student(*x), big(*x)) <= TOLERANCE[torch.float64]
    again = pickle.loads(pickle.dumps(copy.deepcopy(student)))
    assert torch.equal(again(x[0][:3]), student(x[0][:3]))
    with torch.enable_grad():
        student.train()(*x).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@torch.no_grad()
def test_it_is_as_the_class_builds_it_at_that_width() -> None:
    x = make_batch(4, (3, 16, 16))
    teachers = make_teachers(lambda: ResNetCifar(1, 5, width=1), (x,), 2)
    big = fastmerge.BigStudent(*teachers, keep=2.0)
    for gate in big.gates.values():
        gate.loc.fill_(OPEN)
    student = big.compress()
    built = ResNetCifar(1, 5, width=2).double().eval()
    built.load_state_dict(student.state_dict(), strict=True)
    assert torch.equal(built(x), student(x))
    assert repr(student) == repr(built)
    with big.open_gates():  # all channels stay, so that it is the mean
        assert relative_error(student(x), big(x)) <= TOLERANCE[torch.float64]
    by_group = fastmerge.BigStudent(*teachers, keep={big.groups[0].name: 0.5, big.groups[1].name: 12})
    assert [by_group.widths[group.name] for group in by_group.groups][:3] == [8, 12, big.groups[2].size]


class Reordered(nn.Module):
    """Reads one layer's channels in an order of its own, which another group's width has nothing to do with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.last(x[:, torch.tensor([3, 1, 5, 0, 2, 4])])


@torch.no_grad()
def test_groups_in_another_order_keep_their_width() -> None:
    x = make_batch(4, (5,))
    teachers = make_teachers(Reordered, (x,), 2)
    big = fastmerge.BigStudent(*teachers, example_inputs=x, keep={"first": 0.5}).eval()
    open_some(big)
    assert relative_error(big.compress()(x), big(x)) <= TOLERANCE[torch.float64]


def test_training_compaction_state_and_optimizer_know_the_width() -> None:
    x = make_batch(8, (3, 12, 12))
    teachers = make_teachers(lambda: LeNet(3, 12, 4, kernel_size=3, channels=(4, 8), units=(8, 8)), (x,), 2)
    big = fastmerge.BigStudent(*teachers, example_inputs=x, keep=0.5).train()
    with torch.no_grad():
        for gate in big.gates.values():  # P[g > 0] is a quarter of all candidates', as is wanted
            gate.loc.fill_(-OPEN)
            gate.loc[: len(gate.loc) // 4] = OPEN
    assert float(big.gate_loss().detach()) == pytest.approx(0, abs=1e-6)
    budget = fastmerge.GateBudget(10)
    assert float(budget.loss(big).detach()) == pytest.approx(0, abs=1e-4)
    assert budget.goal.tolist() == [0.25] * len(big.groups)
    optimizer = torch.optim.SGD(big.parameters(), 0.01, momentum=0.9)
    big.link(optimizer)
    nn.functional.cross_entropy(big(x), torch.arange(8) % 4).backward()
    optimizer.step()
    big.eval()
    before = big(x).detach()
    done = big.compact(optimizer, multiple=1)
    assert done.left == big.widths
    other = fastmerge.BigStudent(*teachers, example_inputs=x, keep=0.5)
    other.load_state_dict(big.state_dict())
    assert relative_error(other(x).detach(), before) <= TOLERANCE[torch.float64]
    student = big.compress(optimizer)
    assert relative_error(student(x).detach(), before) <= TOLERANCE[torch.float64]
    assert all(state["momentum_buffer"].shape == p.shape for p, state in optimizer.state.items())
    assert student.conv2.in_channels == 2


def test_candidates_can_be_given() -> None:
    teachers = make_teachers(
        lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (make_batch(4, (3,)),), 2
    )
    big = fastmerge.BigStudent(*teachers, keep=0.5)
    (name,) = big.widths
    with pytest.raises(ValueError, match="needs 4 candidates of group"):
        big.compress(keep={name: range(8)})
    with pytest.warns(UnsettledGatesWarning, match="above the share that is kept|neither 0 nor 1"):
        big.compress()
    student = big.compress(keep={name: [1, 3, 9, 15]})
    assert torch.equal(student[0].weight[3], teachers[1][0].weight[7])


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (0.2, r"0.25..2, or a whole number of channels above 2; group '0' has 8, so 2..16; got 0.2"),
        (0, r"2..16; got 0$"),
        (2.5, r"2..16; got 2.5"),
        ({"0": 17}, r"2..16; got 17"),
        ({"0": "half"}, r"2..16; got 'half'"),
        ({"nowhere": 0.5}, r"keep needs names of channel groups; got 'nowhere', known are 0"),
    ],
)
def test_widths_out_of_range_are_refused(keep, says: str) -> None:
    teachers = [nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
    with pytest.raises(ValueError, match=says):
        fastmerge.BigStudent(*teachers, keep=keep)


@pytest.mark.parametrize(
    ("name", "keep", "says"),
    [
        ("instance_norm", 0.5, "passes 'instance_norm' in 'norm2', which may count on the number of channels"),
        (
            "layer_norm",
            2.0,
            "is read by 'layer_norm', which is exact only with fewer channels than all teachers have together",
        ),
        ("written_norms", 0.5, "is read by 'rms_norm', which depends on the number of channels"),
        ("shufflenet_v2", 0.5, "which may count on the number of channels"),
    ],
)
def test_networks_that_count_on_their_widths_are_refused(name: str, keep: float, says: str) -> None:
    with pytest.raises(ValueError, match=f"keep can't give group '.*' .* channels in place of .*{says}"):
        fastmerge.BigStudent(*teachers_of(name, 2), example_inputs=BY_NAME[name].inputs(2), keep=keep, verify=False)


class Flattened(nn.Module):
    """A depthwise convolution, a grouped one, a group and a layer normalisation, and a width in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.GroupNorm(4, 8)
        self.narrow, self.hidden, self.head = nn.Conv2d(8, 4, 3), nn.Linear(64, 12), nn.Linear(12, 4)
        self.last = nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.narrow(torch.relu(self.norm(self.grouped(torch.relu(self.depthwise(self.stem(x)))))))
        return self.head(torch.relu(self.last(self.hidden(torch.relu(x).view(-1, 64)))))


@torch.no_grad()
def test_a_traced_student_has_no_width_in_its_operations() -> None:
    x = make_batch(6, (3, 6, 6))
    teachers = make_teachers(Flattened, (x,), 2)
    big = fastmerge.BigStudent(*teachers, example_inputs=x, keep=0.5)
    big.link()
    disturb_weights(big, scale=0.1)
    open_some(big)
    student = big.eval().compress()
    assert isinstance(student, TracedStudent)
    assert (student.depthwise.groups, student.grouped.groups, student.norm.num_groups) == (4, 2, 2)
    assert student.last.normalized_shape == (6,)
    assert relative_error(student(x), big(x)) <= TOLERANCE[torch.float64]


def test_a_network_of_one_precision_is_checked_at_the_widths_that_were_asked_for() -> None:
    """Two channels are not twice a teacher's."""

    class InFloat32(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float())

    torch.manual_seed(0)
    teachers = [InFloat32(nn.Linear(6, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 3)).float() for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=torch.randn(4, 6, dtype=torch.float32), keep=0.5)
    assert big.widths == {"0": 2}


class NamesItsGroups(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](torch.relu(nn.functional.group_norm(self[0](x), 4)))


class WithoutParameters(nn.Sequential):
    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__(first, nn.GroupNorm(4, 8, affine=False), nn.ReLU(), last)


@torch.no_grad()
@pytest.mark.parametrize("kind", [NamesItsGroups, WithoutParameters])
def test_code_that_runs_at_another_width_but_does_something_else_is_traced(kind: type[nn.Module]) -> None:
    """Four groups of one channel each in place of two of two."""
    x = make_batch(6, (3, 6, 6))
    teachers = make_teachers(lambda: kind(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), (x,), 2)
    big = fastmerge.BigStudent(*teachers, example_inputs=x, keep=0.5)
    big.link()
    disturb_weights(big, scale=0.1)
    open_some(big)
    assert relative_error(big.eval().compress()(x), big(x)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize(("keep", "chosen"), [(0.5, [0, 9, 10, 12]), (1.5, [0, 1, 2, *range(7, 16)])])
@torch.no_grad()
def test_a_value_for_all_channels_is_exact_at_any_width(keep: float, chosen: list[int]) -> None:
    """The slope of a PReLU: the mean by how many channels are kept of each teacher."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.PReLU(init=float(torch.rand(()))), nn.Linear(8, 2))

    x = make_batch(6, (3,))
    teachers = make_teachers(make, (x,), 2)
    with pytest.raises(ValueError, match=r"keep can't give group '0' 16 channels .*: it shares '1\.weight'"):
        fastmerge.BigStudent(*teachers, keep=2.0)
    big = fastmerge.BigStudent(*teachers, keep=keep)
    with big.open_gates():
        assert relative_error(big.eval()(x), mean_output(teachers, (x,))) <= TOLERANCE[torch.float64]
    big.link()
    big.gates["0"].loc.fill_(-40.0)[chosen] = 40.0
    student = big.eval().compress()
    assert relative_error(student.eval()(x), big(x)) <= TOLERANCE[torch.float64]
    first = sum(candidate < 8 for candidate in chosen) / len(chosen)
    slopes = [teacher[1].weight.item() for teacher in teachers]
    assert student[1].weight.item() == pytest.approx(first * slopes[0] + (1 - first) * slopes[1])


@pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")
def test_a_merge_to_other_widths_goes_on_in_its_fine_tuning(tmp_path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 2),
        )

    torch.manual_seed(0)
    teachers = [make() for _ in range(2)]
    loader = [(torch.randn(8, 1, 6, 6), torch.arange(8) % 2) for _ in range(2)]
    options = {"keep": {"0": 0.5, "3": 9}, "merge_epochs": 2, "finetune_epochs": 2, "seed": 0, "progress": False}
    expected, history = fastmerge.merge(teachers, loader, **options)
    assert expected[0].out_channels == 2
    assert expected[3].weight.shape == (9, 2, 3, 3)
    assert [sum(history.kept[name]) for name in ("0", "3")] == [2, 9]

    def stop(record: EpochRecord) -> None:
        if record.stage == "finetune":
            raise RuntimeError("stopped")

    kept = {"checkpoint_dir": tmp_path, "checkpoint_seconds": 0.0}
    with pytest.raises(RuntimeError, match="stopped"):
        fastmerge.merge(teachers, loader, **options, **kept, callback=stop)
    student, _ = fastmerge.merge(teachers, loader, **options, **kept, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), expected.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"keep needs a fraction of a teacher's channels, 0\.25\.\.2"):
        fastmerge.merge(teachers, loader, keep=3.0)


def test_the_command_line_takes_widths() -> None:
    assert keep("0.5") == 0.5
    assert isinstance(keep("12"), int)
    assert keep("conv1=0.5, layer1_0=12") == {"conv1": 0.5, "layer1_0": 12}
    for text in ("half", "conv1=half", "0.5,0.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="needs a fraction, or NAME=X"):
            keep(text)
