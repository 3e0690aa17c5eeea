"""compress(in_place=True): the student takes over the big student's memory, and is the student that a copy would be."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import fastmerge
from architectures import BY_NAME, merged
from compaction_paths import raw
from fastmerge.narrowing import cuts
from teachers import select_gates

# Concatenations, grouped and transposed convolutions, inputs read by later layers, norms and scales outside layers.
NAMES = [
    *("lenet", "resnet_projected_shortcut", "densenet", "mobilenet", "transposed", "input_concatenated", "unet"),
    *("gated_linear_unit", "group_norm", "token_mlp", "channel_scale", "layer_used_on_input", "shufflenet_v2"),
]


def merge(name: str, link: bool) -> tuple[fastmerge.BigStudent, tuple[Tensor, ...]]:
    big, x = merged(name, dtype=torch.float32, link=link), BY_NAME[name].inputs(6, dtype=torch.float32)
    if link:
        with torch.no_grad():  # what is off the diagonal counts too
            for parameter in big.weight_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    select_gates(big, x)
    return big, x


@pytest.mark.parametrize("link", [False, True], ids=["unlinked", "linked"])
@pytest.mark.parametrize("name", NAMES)
def test_the_student_is_that_of_a_copying_compress(name: str, link: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "SCRATCH_ELEMENTS", 50)
    big, _ = merge(name, link)
    expected = big.compress().state_dict()
    student = big.compress(in_place=True)
    state = student.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(raw(state[key]), raw(value)), key
        assert state[key].stride() == value.stride(), key
    for key, tensor in [*student.named_parameters(), *student.named_buffers()]:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), key
        assert tensor.is_leaf, key


@pytest.mark.parametrize("in_place", [False, True])
def test_channels_last_stays(in_place: bool) -> None:
    big, x = merge("resnet_projected_shortcut", link=True)
    expected = big.compress()(*x)
    student = big.to(memory_format=torch.channels_last).compress(in_place=in_place)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in student.parameters() if p.dim() == 4)
    torch.testing.assert_close(student(*x), expected)


MEMORY = """
import ctypes, gc, itertools, torch, fastmerge
from torch import nn

def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024

def settle():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

def make(width):
    linear = lambda a, b: nn.Linear(width * a, width * b)
    return nn.Sequential(linear(1, 5), nn.ReLU(), linear(5, 6), nn.ReLU(), linear(6, 5), nn.ReLU(), linear(5, 1))

def merge(width):
    big = fastmerge.BigStudent(make(width), make(width), verify=False)
    if link:
        big.link()
    optimizer = torch.optim.SGD(big.weight_parameters(), lr=0.1, momentum=0.9) if momentum else None
    if momentum:
        for p in big.weight_parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
    settle()
    return big, optimizer

torch.set_num_threads(1)
link = momentum = False
merge(2)
gc.freeze()  # what imports have left need not be looked through each time
for link, in_place, momentum in itertools.product((False, True), repeat=3):
    small, optimizer = merge(2)
    small.compress(optimizer, in_place=in_place)
    del small, optimizer
    settle()
    idle = resident("VmRSS")
    big, optimizer = merge(400)
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    student = big.compress(optimizer, in_place=in_place)
    peak = resident("VmHWM")
    settle()
    print(before - idle, peak - idle, resident("VmRSS") - idle)
    del big, optimizer, student
    settle()
"""


@pytest.fixture(scope="module")
def memory() -> dict[tuple[bool, ...], tuple[float, float, float]]:
    """MiB of the big student and what its optimizer keeps, at the peak of compress and after, by (link, in_place, momentum)."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    # Of what is freed glibc keeps up to 32 MiB for later, unless told to map large blocks one by one.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=env)
    lines = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    return dict(zip(itertools.product((False, True), repeat=3), lines, strict=True))


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("link", [False, True])
def test_the_peak_of_memory_in_place_is_the_big_student(memory: Any, link: bool, momentum: bool) -> None:
    big, peak, after = memory[link, True, momentum]
    assert peak <= 1.05 * big
    assert after <= (0.3 if link else 0.55) * big


@pytest.mark.parametrize("link", [False, True])
def test_a_copy_never_holds_two_big_students(memory: Any, link: bool) -> None:
    big, peak, after = memory[link, False, False]
    student = after - big
    assert student <= (0.3 if link else 0.55) * big
    assert peak <= 1.35 * big + student  # what is cut from the largest layer's rows stands beside both for a moment


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("link", [False, True])
def test_tensors_stay_in_their_storages(link: bool, in_place: bool) -> None:
    """The optimizer's always, since nothing else needs them; the weights' in place alone."""
    big, x = merge("vgg", link)
    optimizer = AdamW(big.weight_parameters(), lr=0.1, amsgrad=True)
    big(*x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    weights = {storage_of(p) for p in big.parameters()}
    moments = {storage_of(v) for entry in optimizer.state.values() for v in entry.values() if v.dim()}
    student = big.compress(optimizer, in_place=in_place)
    assert ({storage_of(p) for p in student.parameters()} <= weights) is in_place
    assert {storage_of(v) for entry in optimizer.state.values() for v in entry.values() if v.dim()} == moments


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


USES: dict[str, Callable[[Any], object]] = {
    "forward": lambda big: big(torch.randn(2, 5)),
    "compress": lambda big: big.compress(),
    "compress in place": lambda big: big.compress(in_place=True),
    "link": lambda big: big.link(),
    "gate loss": lambda big: big.gate_loss(),
    "gates": lambda big: big.gates,
    "parameters": lambda big: list(big.parameters()),
    "weights": lambda big: list(big.weight_parameters()),
    "state": lambda big: big.state_dict(),
    "mode": lambda big: big.eval(),
    "device": lambda big: big.to("cpu"),
    "setting": lambda big: setattr(big, "training", True),
    "open gates": lambda big: big.open_gates(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "an outer module": lambda big: nn.Sequential(big).parameters().__next__(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_spent_big_student_says_so(use: Callable[[Any], object]) -> None:
    big, _ = merge("mlp", link=False)
    big.compress(in_place=True)
    with pytest.raises(RuntimeError, match="was compressed in place"):
        use(big)


def test_a_spent_big_student_can_be_printed() -> None:
    big, _ = merge("mlp", link=False)
    big.compress(in_place=True)
    assert "compressed in place" in repr(big)


def aliases_of(big: fastmerge.BigStudent) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in big.network.state_dict().items()}


@pytest.mark.parametrize("link", [False, True])
def test_tensors_that_others_use_are_copied(link: bool) -> None:
    big, _ = merge("resnet_projected_shortcut", link)
    expected = big.compress().state_dict()
    aliases = aliases_of(big)
    values = {name: tensor.clone() for name, tensor in aliases.items()}
    student = big.compress(in_place=True)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, expected[name])
        tensor.zero_()
    assert all(torch.equal(tensor, values[name]) for name, tensor in aliases.items())


def test_layers_that_share_a_parameter_are_copied() -> None:
    big = fastmerge.BigStudent(Square(), Square())
    big.link()
    first, second = (big.network.get_submodule(path) for path in ("hidden.0", "hidden.2"))
    second.weight = first.weight
    expected = big.compress().state_dict()
    state = big.compress(in_place=True).state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.hidden = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.first(x).relu()))


def foreign(big: fastmerge.BigStudent) -> torch.optim.Optimizer:
    return SGD([nn.Parameter(torch.zeros(3))], lr=0.1)


def gates_only(big: fastmerge.BigStudent) -> torch.optim.Optimizer:
    return SGD(big.gate_parameters(), lr=0.1)


def factored(big: fastmerge.BigStudent) -> torch.optim.Optimizer:
    optimizer = AdamW(big.parameters(), lr=0.1)
    weight = max(big.weight_parameters(), key=Tensor.numel)
    optimizer.state[weight]["row_var"] = torch.zeros(len(weight), 1)
    return optimizer


class Wrapped(torch.optim.Optimizer):
    """Two steps of another optimizer's, in which the moments lie."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base_optimizer = base


def wrapped(big: fastmerge.BigStudent) -> torch.optim.Optimizer:
    return Wrapped(stepped(big, AdamW))


def stepped(big: fastmerge.BigStudent, kind: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Of a big student whose weights have gradients, after a step."""
    optimizer = kind(list(big.weight_parameters()), lr=1e-3)
    for parameter in big.weight_parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(lambda: 1.0)
    return optimizer


def lbfgs(big: fastmerge.BigStudent) -> torch.optim.Optimizer:
    return stepped(big, torch.optim.LBFGS)


def adafactor(big: fastmerge.BigStudent) -> torch.optim.Optimizer:
    return stepped(big, torch.optim.Adafactor)


@pytest.mark.parametrize("method", ["compress", "compress in place", "link", "compact"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "needs an optimizer of this big student's weights; this SGD holds none"),
        (gates_only, "compress needs an optimizer of this big student's weights; this SGD holds none"),
        (factored, "can't carry AdamW's 'row_var' of"),
        (wrapped, "can't carry what Wrapped keeps in another optimizer, its 'base_optimizer'"),
        (lbfgs, "can't carry LBFGS's 'd' of"),
        (adafactor, "can't carry Adafactor's 'row_var' of"),
    ],
)
def test_an_optimizer_that_can_not_go_along_changes_nothing(
    make: Callable[[fastmerge.BigStudent], torch.optim.Optimizer], message: str, method: str
) -> None:
    if make is gates_only and "compress" not in method:
        return  # whose state needs no change
    big, x = merge("lenet", link=False)
    optimizer = make(big)
    before, output = copy.deepcopy((big.state_dict(), optimizer.state_dict())), big(*x)
    call = partial(big.compress, in_place="in place" in method) if "compress" in method else getattr(big, method)
    with pytest.raises(ValueError, match=message):
        call(optimizer)
    after = (big.state_dict(), optimizer.state_dict())
    assert all(torch.equal(value, before[0][key]) for key, value in after[0].items())
    assert repr(after[1]) == repr(before[1])
    assert torch.equal(big(*x), output)


def test_gates_that_are_not_numbers_are_refused() -> None:
    big, x = merge("lenet", link=False)
    name, gate = list(big.gates.items())[1]
    with torch.no_grad():
        gate.loc[3] = torch.nan
    with pytest.raises(ValueError, match=f"1 of {len(gate.loc)} gates of '{name}' is NaN.*checkpoint"):
        big.compress(in_place=True)
    with pytest.raises(ValueError, match=f"keep needs .* 1 of {len(gate.loc)} gates of '{name}' is NaN"):
        big.keep()
    with big.open_gates():
        assert big(*x).isfinite().all()


@pytest.mark.parametrize("other", ["adam", [torch.nn.Parameter(torch.zeros(1))], torch.nn.Linear(1, 1)])
def test_what_is_no_optimizer_is_refused(other: Any) -> None:
    big, _ = merge("lenet", link=False)
    for call in (big.link, big.compact, big.compress):
        with pytest.raises(TypeError, match=f"{call.__name__} needs an optimizer .* got a {type(other).__name__}"):
            call(other)
    assert not big.linked
