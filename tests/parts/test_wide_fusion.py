"""Patterns of BatchNorm, add, activation, max-pooling and gate run as one operation, with the same result."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastmerge.kernels.batch_norm import batch_norm_act_streams
from torch import Tensor, nn

import fastmerge
from architectures import BY_NAME, ZOO, Architecture, merged
from fastmerge.lowering import graph
from fastmerge.wide import norms
from fastmerge.wide.streams import split_streams
from teachers import make_teachers
from wide_programs import SIZE, assert_close, program, run

joined_or_not = pytest.mark.parametrize("joined", [False, True], ids=["streams", "joined"])


def without_patterns(patch: pytest.MonkeyPatch, big: fastmerge.BigStudent) -> fastmerge.BigStudent:
    """The same big student, lowered without looking for patterns."""
    with patch.context() as inner:
        inner.setattr(graph, "fuse", lambda *_: [])
        other = fastmerge.BigStudent.__new__(fastmerge.BigStudent)
        other.__setstate__(big.__getstate__())
    return other


def assert_as_plain(patch: pytest.MonkeyPatch, big: fastmerge.BigStudent, x: tuple[Tensor, ...]) -> None:
    """Fused or not, in streams or joined, in both modes, it computes what streams without patterns do."""
    plain = without_patterns(patch, big)
    assert not plain.norms()
    for training in (True, False):
        expected = run(plain.train(training), x, joined=False)
        for joined, fused in itertools.product((False, True), repeat=2):
            big.fused = fused
            assert_close(run(big.train(training), x, joined), expected)


@pytest.mark.parametrize("architecture", [a for a in ZOO if not a.stochastic], ids=lambda a: a.name)
def test_every_program_computes_the_same(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients and running statistics; linked, joined programs as those of streams."""
    big, x = merged(architecture.name), architecture.inputs(SIZE, seed=3)
    assert_as_plain(monkeypatch, big, x)
    big.link()
    for training in (True, False):
        assert_close(run(big.train(training), x, joined=True), run(big, x, joined=False))


def uses(name: str) -> dict[str, tuple[str, ...]]:
    return {norm.name: norm.fused for norm in merged(name).norms()}


def test_patterns_of_a_residual_network() -> None:
    found = uses("resnet_projected_shortcut")
    assert found["bn1"] == ("ReLU", "gate")
    assert found["layer1.0.bn1"] == ("ReLU", "gate")
    assert found["layer1.0.bn2"] == ("add", "ReLU", "gate")
    assert found["layer2.0.bn2"] == ("add", "ReLU", "gate")  # which the shortcut is added to in place
    assert found["layer2.0.shortcut.1"] == ("added",)
    assert found["layer2.1.bn2"] == ("add", "ReLU")


def test_patterns_with_max_pooling() -> None:
    assert uses("vgg") == {
        "features.1": ("ReLU", "max-pool", "gate"),
        "features.5": ("ReLU", "gate"),
        "features.8": ("ReLU", "max-pool"),
    }


class Parts(nn.Module):
    """Two convolutions around a BatchNorm; subclasses say what is between."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(6, **options), nn.ReLU(inplace=True)

    def between(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.between(self.conv1(x))).mean((2, 3))


class ReadTwice(Parts):
    """The normalised value is added to what the ReLU makes of it."""

    def between(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + F.relu(x)


class ReadWithoutGate(Parts):
    """The activation is read by a layer, and by a normalisation, which reads it without its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv1(x)))
        return (self.conv2(x) + self.conv3(F.relu(self.second(x)))).mean((2, 3))


class AddedInPlaceToTheOther(Parts):
    """The sum lands in the shortcut, which is read again."""

    def between(self, x: Tensor) -> Tensor:
        shortcut = torch.tanh(x) * 1
        shortcut.add_(self.norm(x))
        return F.relu(shortcut) + shortcut


class AddedWithAlpha(Parts):
    def between(self, x: Tensor) -> Tensor:
        return F.relu(torch.add(self.norm(x), x, alpha=2))


class AddedToALine(Parts):
    """What is added is broadcast."""

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x) + x.mean((2, 3), keepdim=True))


class ChangedBetween(Parts):
    """What the normalisation reads changes in place before its output is used; autograd forbids that."""

    def between(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.norm(x.detach())
        x = torch.relu(x) if self.training else x.relu_()
        return F.relu(y + x)


class Reflected(Parts):
    """The sum of a normalisation's output with itself."""

    def between(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.relu(x + x)


class PooledAlone(Parts):
    """A max-pooling of what was normalised, without an activation between."""

    def between(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.norm(x), 2)


class Scaled(Parts):
    def between(self, x: Tensor) -> Tensor:
        return self.norm(x) * 2


class NormalisedAgain(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.BatchNorm2d(6)

    def between(self, x: Tensor) -> Tensor:
        return self.second(self.norm(x))


class PooledOtherwise(Parts):
    """A max-pooling whose windows have gaps."""

    def between(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.act(self.norm(x)), 2, dilation=2)


class PooledWithPadding(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, 2, 1)

    def between(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.norm(x)))


class OneFeature(nn.Module):
    """BatchNorm after linear layers; the second normalises dimension 1 of three, which holds no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm1, self.norm2 = nn.BatchNorm1d(8), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        x = self.norm1(x.transpose(1, 2)).transpose(1, 2)
        return self.fc3(F.relu(self.norm2(self.fc2(x)))).mean(1)


NETWORKS: dict[str, tuple[type[nn.Module], dict[str, object], tuple[str, ...]]] = {
    "plain": (Parts, {}, ("ReLU", "gate")),
    "momentum None": (Parts, {"momentum": None}, ("ReLU", "gate")),
    "without affine": (Parts, {"affine": False}, ("ReLU", "gate")),
    "without statistics": (Parts, {"track_running_stats": False}, ("ReLU", "gate")),
    "read twice": (ReadTwice, {}, ()),
    "read without its gate": (ReadWithoutGate, {}, ("ReLU",)),
    "added in place to the other": (AddedInPlaceToTheOther, {}, ()),
    "added with alpha": (AddedWithAlpha, {}, ()),
    "added to a line": (AddedToALine, {}, ()),
    "reflected": (Reflected, {}, ()),
    "pooled otherwise": (PooledOtherwise, {}, ("ReLU",)),
    "pooled with padding": (PooledWithPadding, {}, ("ReLU", "max-pool", "gate")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_taken_as_a_pattern(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options, expected = NETWORKS[name]
    x = BY_NAME["unet"].inputs(SIZE)
    big = fastmerge.BigStudent(*make_teachers(lambda: make(**options), x, 2), example_inputs=x).train()
    first = big.norms()[0]
    assert first.fused == expected
    assert bool(first.reason) == (not expected)
    assert_as_plain(monkeypatch, big, x)


class BatchNormAct(nn.BatchNorm2d):
    """A BatchNorm that holds its activation, as timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return self.act(F.batch_norm(x, mean, var, self.weight, self.bias, self.training, eps=self.eps))


def same(x: Tensor) -> Tensor:
    """After a BatchNorm with an activation of its own."""
    return x


# With what it is fused as; nothing: named as what keeps the normalisation alone.
ACTIVATIONS: list[tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = [
    (nn.ReLU6(inplace=True), ("ReLU6",)),
    (F.relu6, ("ReLU6",)),
    (nn.Hardtanh(0, 6), ("ReLU6",)),
    (nn.SiLU(inplace=True), ("SiLU",)),
    (F.silu, ("SiLU",)),
    (lambda x: x * x.sigmoid(), ("SiLU",)),
    (lambda x: x.mul_(torch.sigmoid(x)), ("SiLU",)),
    (same, ("SiLU",)),
    (lambda x: F.max_pool2d(F.silu(x), 2), ("SiLU", "max-pool")),
    (nn.Hardswish(), ("Hardswish",)),
    (nn.Hardtanh(), ()),
    (nn.GELU(), ()),
    (nn.PReLU(), ()),
    (lambda x: x.clamp(0, 6), ()),  # passes the gradient at 0 and 6
    (lambda x: torch.sigmoid(x) * x.sigmoid(), ()),
    (lambda x: x * torch.tanh(x), ()),
]


class Activated(nn.Module):
    """A BatchNorm before each of the activations, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.after = [copy.deepcopy(activation) for activation, _ in ACTIVATIONS]
        self.learning = nn.ModuleList(a for a in self.after if isinstance(a, nn.Module))
        self.convs, self.heads = (nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in ACTIVATIONS) for _ in range(2))
        self.norms = nn.ModuleList(BatchNormAct(3) if a is same else nn.BatchNorm2d(3) for a in self.after)

    def forward(self, x: Tensor) -> Tensor:
        branches = zip(self.convs, self.norms, self.after, self.heads, strict=True)
        return sum(head(after(norm(conv(x)))).mean((2, 3)) for conv, norm, after, head in branches)


def test_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    x = BY_NAME["unet"].inputs(SIZE)
    big = fastmerge.BigStudent(*make_teachers(Activated, x, 2), example_inputs=x).train()
    norms = {int(norm.name.rpartition(".")[2]): norm for norm in big.norms()}
    for k, (_, fused) in enumerate(ACTIVATIONS):
        found = norms[k]
        assert found.fused == ((*fused, "gate") if fused else ()), found
        assert bool(found.reason) == (not fused)
    (prelu,) = (k for k, (activation, _) in enumerate(ACTIVATIONS) if isinstance(activation, nn.PReLU))
    assert norms[prelu].reason == "the activation after it is prelu, which no fused operation includes"
    assert_as_plain(monkeypatch, big, x)


REASONS: dict[type[nn.Module], str] = {
    ReadTwice: "read by relu and add",
    AddedWithAlpha: "the add after it is not the sum of two tensors of one shape",
    AddedToALine: "read by add and mean|the add after it is not the sum",
    Reflected: "the add after it is not the sum of two tensors of one shape",
    PooledAlone: "only where there is an activation between them",
    Scaled: "followed by mul, which no fused operation includes",
    NormalisedAgain: "followed by second, which reads it without a gate",
}


@pytest.mark.parametrize("make", REASONS)
def test_why_nothing_is_fused(make: type[nn.Module]) -> None:
    x = BY_NAME["unet"].inputs(SIZE)
    big = fastmerge.BigStudent(*make_teachers(make, x, 2), example_inputs=x).train()
    assert re.search(REASONS[make], big.norms()[0].reason), big.norms()[0].reason


@joined_or_not
@torch.no_grad()
def test_a_normalisation_does_not_move_past_a_change(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = BY_NAME["unet"].inputs(SIZE)
    big = fastmerge.BigStudent(*make_teachers(ChangedBetween, x, 2), example_inputs=x).eval()
    plain = without_patterns(monkeypatch, big)
    outputs = [b._programs["eval", False, joined].forward(b.network, None, *x) for b in (big, plain)]
    torch.testing.assert_close(*outputs)


def test_batch_norm_of_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.randn(SIZE, 5, 3, dtype=torch.float64),)
    big = fastmerge.BigStudent(*make_teachers(OneFeature, x, 2), example_inputs=x).train()
    assert_as_plain(monkeypatch, big, x)


def test_the_switch() -> None:
    big = merged("vgg")
    assert big.fused == "auto"
    for value in (True, False, "auto"):
        big.fused = value
        assert big.fused == value
    with pytest.raises(ValueError, match="'sometimes'"):
        big.fused = "sometimes"


@joined_or_not
def test_the_switch_decides_which_code_runs(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, a normalisation of all teachers is one call."""
    pooled: list[bool] = []

    def noted(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
        pooled.append(kwargs["pool"] is not None)
        return batch_norm_act_streams(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(norms, "batch_norm_act_streams", noted)
    big, x = merged("vgg").train(), BY_NAME["vgg"].inputs(SIZE)
    for value, expected in ((True, [True, False, True]), (False, []), ("auto", [])):
        pooled.clear()
        big.fused = value
        run(big, x, joined)
        assert pooled == expected


class _Reads(nn.Module):
    """A network of the normalisation's readers that a test names."""

    def __init__(self, *readers: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3, self.conv4 = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
        self.readers = readers

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        y = self.conv2(x)
        if "add" in self.readers:
            y = F.relu(self.norm2(y) + x)
        y = self.conv3(y).mean((2, 3))
        if "layer" in self.readers:
            y = y + self.conv4(x).mean((2, 3))
        if "operation" in self.readers:
            y = y + self.conv4(torch.tanh(x)).mean((2, 3))
        return y


@pytest.mark.parametrize(
    ("readers", "expected"),
    [((), False), (("add",), True), (("layer",), True), (("add", "layer"), True), (("add", "operation"), False)],
    ids=str,
)
def test_two_readers_get_results_of_their_own(
    readers: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reader reads the first, all others the second; operations that may change a value in place share it."""
    x = BY_NAME["unet"].inputs(SIZE)
    big = fastmerge.BigStudent(*make_teachers(lambda: _Reads(*readers), x, 2), example_inputs=x).train()
    for joined in (False, True):
        code = program(big, joined)
        assert ("readers = 2" in code) == expected
        if expected:
            (call,) = (line for line in code.splitlines() if "readers = 2" in line)
            name = call.split(" = ")[0].strip()
            handed = [int(found) for found in re.findall(rf"\b{name}\[(\d+)\]", code)]
            assert sorted(handed) == list(range(2 if joined else 4))
    assert_as_plain(monkeypatch, big, x)


def test_repr_counts_what_is_fused() -> None:
    assert repr(merged("vgg")).splitlines()[1].strip().endswith("3 of 3 normalisations fused")
    assert "normalisations" not in repr(merged("lenet")).splitlines()[1]


def test_gradients_written_into_one_tensor_go_back_as_that_tensor() -> None:
    """What takes a joined tensor apart copies nothing, forward or backward, where the gradients lie as the streams do."""
    joined = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    whole = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    apart = [torch.randn(2, 3, 4, 4) for _ in range(2)]
    for gradients, expected in (
        (whole.split(3, 1), whole),
        (apart, torch.cat(apart, 1)),
        (whole.split(3, 1)[::-1], None),
    ):
        streams = split_streams(joined, 2, 1)
        assert [s.data_ptr() for s in streams] == [s.data_ptr() for s in joined.split(3, 1)]
        streams[0].detach().mul_(1)  # a change in place of one leaves the others' versions alone
        assert streams[1]._version == 0
        (found,) = torch.autograd.grad(streams, joined, gradients)
        assert torch.equal(found, torch.cat(list(gradients), 1) if expected is None else expected)
        assert (found.data_ptr() == whole.data_ptr()) == (expected is whole)
    (found,) = torch.autograd.grad(split_streams(joined, 2, 1)[0].sum(), joined)
    assert torch.equal(found, torch.cat([torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)], 1))
