"""Merges whose gates are learned in parts of the depth."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastmerge
from architectures import BY_NAME, teachers_of
from fastmerge.evaluation import Setting
from fastmerge.history import EpochRecord
from fastmerge.merging.estimate import estimate
from fastmerge.merging.layerwise import Parts
from fastmerge.merging.options import Options
from fastmerge.methods.cost import predict
from fastmerge.narrowing.parts import consecutive_parts, representatives
from teachers import OPEN, TOLERANCE, calibrate, disturb_weights, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")


def open_some(big: fastmerge.BigStudent, names: list[str]) -> None:
    """As many gates of some groups as the student has channels, by chance."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        loc = big.gates[name].loc
        loc.fill_(-OPEN)[torch.randperm(len(loc), generator=generator)[: big.widths[name]]] = OPEN


def test_only_what_belongs_together_is_adopted() -> None:
    narrow, wide = (linked(width) for width in (4, 5))
    with pytest.raises(ValueError, match="as many teachers, of the same architecture"):
        narrow.adopt(wide)


def linked(width: int) -> fastmerge.BigStudent:
    teachers = [nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2)) for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=torch.randn(2, 3))
    big.link()
    return big


@pytest.mark.parametrize(
    "name",
    [
        "resnet_projected_shortcut",
        "mobilenet",
        "densenet",
        "lenet",
        "channel_scale",
        "weight_standardised",
        "cosine_attention",
    ],
)
@torch.no_grad()
def test_every_part_is_exact(name: str) -> None:
    teachers, x = teachers_of(name, 2), BY_NAME[name].inputs(6)
    parts = Parts(list(teachers), BY_NAME[name].inputs(2), Options(layerwise=2, merge_epochs=4))
    chosen: dict[str, Any] = {}
    before = None
    for number in range(2):
        big = parts.build(number, chosen)
        assert {n for n, gate in big.gates.items() if bool((gate.loc.abs() < 2).all())} == set(parts.groups[number])
        if before is not None:
            big.adopt(before)
            assert set(big.state_dict()) == set(before.state_dict())
            for name in parts.groups[1]:  # with the channels that were there the function must be the same
                there = candidates(before, name)[before.gates[name].loc > 0]
                big.gates[name].loc.copy_(torch.where(torch.isin(candidates(big, name), there), OPEN, -OPEN))
            assert relative_error(big.eval()(*x), before.eval()(*x)) <= TOLERANCE[torch.float64]
        big.link()
        disturb_weights(big, scale=0.1)
        open_some(big, parts.groups[number])
        calibrate(big.train(), x, batches=1)
        chosen |= {n: kept for n, kept in big.keep().items() if n in parts.groups[number]}
        student = big.eval().compress()
        fixed = set(big.gates) - set(parts.groups[number])
        always = big._population.open_groups
        assert fixed.issuperset(always)
        assert always == {n for n in fixed if len(candidates(big, n)) == big.widths[n]}  # odd widths leave a closed one
        assert type(student) is type(teachers[0])
        assert relative_error(student(*x), big(*x)) <= TOLERANCE[torch.float64]
        before = big
    assert set(chosen) == {group.name for group in before.groups}


def candidates(big: fastmerge.BigStudent, name: str) -> torch.Tensor:
    left = big.gates[name].candidates
    return torch.arange(len(big.gates[name].loc)) if left is None else left


def test_gates_that_are_fixed_open_are_not_multiplied_by() -> None:
    teachers = [
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(2)
    ]
    big = fastmerge.BigStudent(*teachers)
    first, second = big.gates
    assert len(list(big.network.gates_before.children())) == 2
    big.fix({first: torch.tensor([0, 1, 4, 5])})
    big.compact()
    assert len(list(big.network.gates_before.children())) == 1
    with pytest.raises(ValueError, match=rf"gates= can't have group '{first}', whose gates are fixed"):
        big(torch.ones(1, 2), gates={first: torch.ones(4)})
    again = pickle.loads(pickle.dumps(big))
    assert torch.equal(again.eval()(torch.ones(1, 2)), big.eval()(torch.ones(1, 2)))
    loc = big.gates[first].loc.detach().clone()
    optimizer = torch.optim.SGD(big.parameters(), 1.0)
    (big.train()(torch.ones(8, 2)).square().mean() + big.gate_loss()).backward()
    optimizer.step()
    assert torch.equal(big.gates[first].loc, loc)
    assert not torch.equal(big.gates[second].loc, torch.ones(8))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda big: big.fix({"nowhere": [0]}), ValueError, "fix needs names of channel groups; got 'nowhere'"),
        (
            lambda big: big.fix({"0": [0, 1, 8]}),
            ValueError,
            "fix needs 3 or more candidates of group '0'.* from 0 to 5",
        ),
        (lambda big: big.fix({"0": torch.rand(3)}), ValueError, "fix needs 3 or more candidates of group '0'"),
        (lambda big: big.fix({"0": [0]}), ValueError, "fix needs 3 or more candidates of group '0'"),
        (lambda big: big.fix({"0": None}), ValueError, "fix needs 3 or more candidates of group '0'"),
        (lambda big: big.fix([0, 1, 2]), TypeError, "fix needs candidates by name of their channel group; got a list"),
        (
            lambda big: big.compress(keep=3),
            TypeError,
            "keep needs candidates by name of their channel group; got a int",
        ),
        (lambda big: big.compress(keep={"0": ["a"]}), ValueError, "keep needs 3 candidates of group '0'"),
        (lambda big: big.parts(0), ValueError, "parts needs a whole number of at least 1; got 0"),
        (lambda big: big.adopt(None), TypeError, "adopt needs another BigStudent; got a NoneType"),
        (
            lambda big: big(torch.ones(1, 2), gates={"0": [1.0] * 6}),
            TypeError,
            "gates of group '0' need to be a tensor",
        ),
    ],
)
def test_what_is_no_candidate_is_refused_and_changes_nothing(call: Any, error: type[Exception], says: str) -> None:
    big = fastmerge.BigStudent(*(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)) for _ in range(2)))
    before = big.gates["0"].loc.detach().clone()
    with pytest.raises(error, match=says):
        call(big)
    assert torch.equal(big.gates["0"].loc, before)
    assert not big.gates["0"].fixed


def make() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)
    )


@pytest.fixture(scope="module")
def teachers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [make() for _ in range(2)]


@pytest.fixture(scope="module")
def loader() -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(8, 1, 6, 6), torch.arange(8) % 2) for _ in range(3)]


OPTIONS: dict[str, Any] = {
    "layerwise": 2, "merge_epochs": 4, "finetune_epochs": 1, "seed": 0, "progress": False, "lr": 0.05, "link_at": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"gate_schedule": "budget", "compact_at": 0.5, "keep": {"0": 3}}])
def test_a_merge_in_parts_ends_as_if_it_had_not_been_stopped(
    more: dict[str, Any], teachers: list[nn.Module], loader: list[Any], tmp_path: Path
) -> None:
    options = OPTIONS | more
    expected, whole = fastmerge.merge(teachers, loader, val_loader=loader, **options)
    assert type(expected) is nn.Sequential
    merged = whole.stage("merge")
    assert [record.epoch for record in merged] == [1, 2, 3, 4]
    assert [record.linked for record in merged] == [False, True, True, True]
    assert [record.open_probability["3"] for record in merged[:2]] == [0.5, 0.5]  # fixed, as the other one's then
    share = expected[0].out_channels / 10
    assert [record.open_probability["0"] for record in merged[2:]] == pytest.approx([share, share])
    assert "big student, gates open" not in whole.borders

    for calls in (1, 2, 3, 4, 5):  # ended by each of the callback's errors, and once within an epoch
        directory = tmp_path / str(calls)
        kept = {"checkpoint_dir": directory, "checkpoint_seconds": 0.0}
        count = 0

        def stop(record: EpochRecord, calls: int = calls) -> None:
            nonlocal count
            count += 1
            if count == calls:
                raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            fastmerge.merge(teachers, loader, val_loader=loader, **options, **kept, callback=stop)
        student, history = fastmerge.merge(teachers, loader, val_loader=loader, **options, **kept, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), expected.parameters(), strict=True))
        assert (history.borders, history.warnings) == (whole.borders, whole.warnings)


def test_networks_whose_code_is_not_known_again_are_merged_in_parts(
    teachers: list[nn.Module], loader: list[Any]
) -> None:
    options = OPTIONS | {"merge_epochs": 2}
    expected, _ = fastmerge.merge(teachers, loader, **options)
    others = copy.deepcopy(teachers)
    for teacher in others:
        teacher.unhashed = range(3)  # each of their big students is traced by itself
    student, _ = fastmerge.merge(others, loader, **options)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), expected.parameters(), strict=True))


def test_a_callback_ends_a_part(teachers: list[nn.Module], loader: list[Any]) -> None:
    _, history = fastmerge.merge(teachers, loader, **OPTIONS, callback=lambda record: record.epoch == 1)
    assert [record.linked for record in history.stage("merge")] == [False, True, True]


def test_milestones_are_those_of_the_whole_stage(teachers: list[nn.Module], loader: list[Any]) -> None:
    _, history = fastmerge.merge(teachers, loader, **OPTIONS, merge_milestones=(1, 3))
    assert [record.lr for record in history.stage("merge")] == pytest.approx([0.05, 0.005, 0.005, 0.0005])


def test_the_last_epoch_is_scored_after_a_part_that_a_callback_ended(
    teachers: list[nn.Module], loader: list[Any]
) -> None:
    options = OPTIONS | {"val_every": 9, "callback": lambda record: record.epoch == 1}
    _, history = fastmerge.merge(teachers, loader, val_loader=loader, **options)
    assert [record.val is not None for record in history.stage("merge")] == [False, False, True]


def test_parts_have_about_equally_many_activations() -> None:
    assert consecutive_parts([4.0, 1, 1, 2, 2], 2) == [range(2), range(2, 5)]
    assert consecutive_parts([3.0, 1, 1, 3], 3) == [range(1), range(1, 3), range(3, 4)]


def test_the_largest_channels_of_each_teacher_stand_for_a_group() -> None:
    teachers = [nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(2)]
    with torch.no_grad():
        for teacher, large in zip(teachers, ([0, 3], [1, 2]), strict=True):
            teacher[0].weight[large] *= 100
    big = fastmerge.BigStudent(*teachers)
    assert representatives(big.groups, teachers, {"0": 4})["0"].tolist() == [0, 3, 5, 6]
    assert len(representatives(big.groups, teachers, {"0": 3})["0"]) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"layerwise": 3},
            r"layerwise=3 needs 3 channel groups that can be narrowed; this network has 2",
        ),
        ({"layerwise": 5}, r"layerwise=5 needs merge_epochs of at least 5; got 4"),
        ({"layerwise": 0}, r"merge needs layerwise, parts of the depth .*of at least 1; got 0"),
    ],
)
def test_what_cannot_be_done_in_parts_is_refused(
    options: dict[str, Any], says: str, teachers: list[nn.Module], loader: list[Any]
) -> None:
    def never(record: EpochRecord) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match=says):
        fastmerge.merge(teachers, loader, **OPTIONS | options, callback=never)


def test_parts_are_counted_and_timed(teachers: list[nn.Module], loader: list[Any]) -> None:
    setting = Setting(torch.device("cpu"), nn.functional.cross_entropy)
    plans = [Options(merge_epochs=4, finetune_epochs=1, link_at=0.0, layerwise=parts) for parts in (1, 2)]
    whole, parts = (predict(teachers, loader, setting, plan) for plan in plans)
    assert parts.memory[0] < whole.memory[0]
    assert parts.merge < whole.merge
    found = estimate(teachers, loader, None, setting, plans[1])
    assert [(part.name, part.epochs) for part in found.parts] == [
        ("merge part 1, linked", 2),
        ("merge part 2, linked", 2),
        ("fine-tune", 1),
    ]
