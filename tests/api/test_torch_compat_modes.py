"""A big student is an nn.Module like any other: modes, dtypes, memory formats, autocast, state, copies, pickles."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmerge
from architectures import BY_NAME, merged, teachers_of
from teachers import (
    copy_state,
    disturb_weights,
    make_batch,
    make_teachers,
    mean_output,
    relative_error,
    select_gates,
    set_gates,
)

NAMES = ["resnet_projected_shortcut", "shufflenet_v2", "unet", "log_softmax", "dict_heads", "functional_parameters"]
every_network = pytest.mark.parametrize("name", NAMES)
linked_or_not = pytest.mark.parametrize("linked", [False, True], ids=["unlinked", "linked"])


def merge(name: str, linked: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> fastmerge.BigStudent:
    """A big student in eval mode with gates at all heights; off-diagonal weights are not zero where linked."""
    big = merged(name, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in big.gates.values():
            gate.loc.copy_(torch.randn(gate.loc.shape, generator=generator))
    if linked:
        big.link()
        disturb_weights(big, seed, scale=0.1)
    return big


def inputs(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return BY_NAME[name].inputs(5, seed=20, dtype=dtype)


def drawn(big: nn.Module, x: tuple[Tensor, ...]) -> object:
    """The output in training mode with fixed draws."""
    torch.manual_seed(5)
    return big(*x)


def coarse_error(actual: object, expected: object) -> float:
    """``‖actual − expected‖ / ‖expected‖``: low precision has no digits left for the part that depends on the input."""
    pairs = zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True)
    return max(((a.double() - e.double()).norm() / e.double().norm()).item() for a, e in pairs)


@every_network
@linked_or_not
def test_train_and_eval(name: str, linked: bool) -> None:
    big, x = merge(name, linked), inputs(name)
    assert not big.training
    before = big(*x)
    buffers = copy_state(big)
    assert big.train() is big
    assert all(module.training for module in big.modules())
    drawn(big, x)
    big.load_state_dict(buffers)  # BatchNorm moved
    assert relative_error(big.eval()(*x), before) == 0


def test_mode_follows_the_teachers() -> None:
    architecture = BY_NAME["lenet"]
    for training in (False, True):
        teachers = [architecture.make().train(training) for _ in range(2)]
        assert (
            fastmerge.BigStudent(*teachers, example_inputs=architecture.inputs(2, dtype=torch.float32)).training
            is training
        )


def test_students_mode_is_the_big_students() -> None:
    big = merge("lenet", linked=False)
    assert big.train().compress().training
    assert not big.eval().compress().training


@every_network
@linked_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_to_dtype(name: str, linked: bool, dtype: torch.dtype) -> None:
    big, x = merge(name, linked), inputs(name)
    expected = big(*x)
    big.to(dtype)
    assert {p.dtype for p in big.parameters()} == {dtype}
    actual = big(*(value.to(dtype) for value in x))
    assert all(y.dtype == dtype for y in torch.utils._pytree.tree_leaves(actual))
    assert coarse_error(actual, expected) < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    student = big.compress()
    assert {p.dtype for p in student.parameters()} == {dtype}
    student(*(value.to(dtype) for value in x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teachers_dtype_is_the_big_students(dtype: torch.dtype) -> None:
    assert {p.dtype for p in merge("mobilenet", linked=False, dtype=dtype).parameters()} == {dtype}


@pytest.mark.parametrize("name", ["resnet_projected_shortcut", "shufflenet_v2", "unet"])
@linked_or_not
def test_channels_last(name: str, linked: bool) -> None:
    big, x = merge(name, linked), inputs(name)
    expected = drawn(big.train(), x)
    changed = copy.deepcopy(big).to(memory_format=torch.channels_last)
    assert relative_error(drawn(changed, tuple(v.to(memory_format=torch.channels_last) for v in x)), expected) < 1e-9
    weights = [p for p in changed.network.parameters() if p.dim() == 4]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    changed.link()
    select_gates(changed, x)
    assert relative_error(changed.compress()(*x), changed(*x)) < 1e-9


def test_a_layer_of_one_channel_keeps_its_layout() -> None:
    teachers = [nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 4, 3)) for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=torch.randn(2, 3, 12, 12))
    big.link()
    student = big.compress()
    for name, weight in teachers[0].named_parameters():
        assert student.get_parameter(name).stride() == weight.stride(), name


@every_network
@linked_or_not
def test_autocast(name: str, linked: bool) -> None:
    big, x = merge(name, linked, torch.float32), inputs(name, torch.float32)
    expected = big(*x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = big(*x)
    assert coarse_error(actual, expected) < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = torch.utils._pytree.tree_leaves(big.train()(*x))
        loss = sum(y.float().square().mean() for y in outputs) + big.gate_loss()
    loss.backward()
    assert all(
        torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in big.parameters() if p.grad is not None
    )
    assert all(gate.loc.grad.abs().sum() > 0 for gate in big.gates.values())


def test_autocast_runs_layers_in_low_precision() -> None:
    """Gating must not carry activations back to float32, which would double their traffic."""
    big, (x,) = merge("vgg", linked=False, dtype=torch.float32), inputs("vgg", torch.float32)
    seen: list[torch.dtype] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].dtype))
        for name, module in big.network.named_modules()
        if name.startswith("classifier") and any(True for _ in module.parameters(recurse=False))
    ]
    assert hooks
    with torch.autocast("cpu", dtype=torch.bfloat16):
        big.train()(x)
    assert set(seen) == {torch.bfloat16}


@every_network
@linked_or_not
def test_state_dict_round_trip(name: str, linked: bool) -> None:
    """Saved, and loaded into a big student of other teachers that is not linked."""
    big, other, x = merge(name, linked), merge(name, False, seed=100), inputs(name)
    file = io.BytesIO()
    torch.save(big.state_dict(), file)
    file.seek(0)
    result = other.load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert other.linked is linked
    assert relative_error(other(*x), big(*x)) == 0
    assert relative_error(drawn(other.train(), x), drawn(big.train(), x)) == 0
    assert relative_error(other.compress().eval()(*x), big.compress().eval()(*x)) == 0


@every_network
def test_an_unlinked_state_loads_into_a_linked_big_student(name: str) -> None:
    big, other, x = merge(name, False), merge(name, True, seed=100), inputs(name)
    other.load_state_dict(big.state_dict())
    assert other.linked
    assert relative_error(other(*x), big(*x)) < 1e-9


def test_a_state_of_another_network_is_refused() -> None:
    with pytest.raises(RuntimeError):
        merge("unet", False).load_state_dict(merge("shufflenet_v2", False).state_dict())


@every_network
@linked_or_not
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_are_independent(name: str, linked: bool, way: str) -> None:
    big, x = merge(name, linked), inputs(name)
    if way == "deepcopy":
        clone = copy.deepcopy(big)
    elif way == "pickle":
        clone = pickle.loads(pickle.dumps(big))
    else:
        file = io.BytesIO()
        torch.save(big, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    expected, output = drawn(big.train(), x), drawn(clone.train(), x)
    assert type(clone) is type(big)
    assert relative_error(output, expected) == 0
    before = relative_to_zero(big.eval()(*x))
    with torch.no_grad():
        for tensor in [*clone.parameters(), *clone.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(1)
    assert relative_error(big(*x), before) == 0
    assert clone.linked is linked
    clone.link()
    assert big.linked is linked
    set_gates(clone, 0.0)
    clone.compress()


def relative_to_zero(output: object) -> object:
    return torch.utils._pytree.tree_map(lambda y: y.detach().clone(), output)


def test_a_big_student_of_students() -> None:
    """What compress returns can be a teacher."""
    architecture = BY_NAME["unet"]
    x = inputs("unet")
    students = []
    for seed in (0, 100):
        big = merge("unet", False, seed=seed)
        select_gates(big, x, seed)
        students.append(big.compress())
    again = fastmerge.BigStudent(*students, example_inputs=architecture.inputs(2)).eval()
    with torch.no_grad(), again.open_gates():
        assert relative_error(again(*x), mean_output(students, x)) < 1e-9


def test_representation_tells_the_groups() -> None:
    text = repr(merge("lenet", linked=False))
    assert "2 teachers" in text
    assert "HardConcrete(12" in text


def test_empty_and_single_batches_in_eval_mode() -> None:
    big = merge("lenet", linked=False)
    for batch in (0, 1):
        assert big(torch.zeros(batch, 1, 16, 16, dtype=torch.float64)).shape == (batch, 4)


class CountsSamples(nn.Module):
    """Does something else with some batch sizes than with others."""

    def __init__(self, doubles: Callable[[int], bool]) -> None:
        super().__init__()
        self.doubles, self.first, self.last = doubles, nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(2 * x if self.doubles(x.shape[0]) else x)


@pytest.mark.parametrize(
    "doubles", [lambda n: n > 4, lambda n: n < 5, lambda n: n % 2 == 0, lambda n: n == 7, lambda n: n == 1]
)
@pytest.mark.parametrize("batch", [2, 3, 7])
@torch.no_grad()
def test_code_that_depends_on_the_batch_size(doubles: Callable[[int], bool], batch: int) -> None:
    teachers = [CountsSamples(doubles).double() for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=torch.randn(batch, 5, dtype=torch.float64)).eval()
    for other in (batch, 1, 2, 3, 5, 6, 7):
        x = torch.randn(other, 5, dtype=torch.float64)
        with big.open_gates():
            torch.testing.assert_close(big(x), mean_output(teachers, (x,)), rtol=1e-9, atol=1e-9)


class ScalesNormalised(nn.Module):
    """Takes no single sample in training, and scales by what it computes of the batch size."""

    def __init__(self, factor: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.factor, self.first, self.norm, self.last = factor, nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu() * self.factor(x))


@pytest.mark.parametrize(
    "factor",
    [lambda x: 2 if x.shape[0] == 1 else 1, lambda x: 1 / len(x), lambda x: x.shape[0] ** 0.5],
    ids=["branch", "len", "root"],
)
@torch.no_grad()
def test_one_sample_that_only_eval_mode_takes(factor: Callable[[Tensor], float]) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    teachers = make_teachers(lambda: ScalesNormalised(factor), (x,), 2)
    big = fastmerge.BigStudent(*teachers, example_inputs=x).eval()
    for count in (1, 2, 1, 4, 7):
        with big.open_gates():
            batch = torch.randn(count, 5, dtype=torch.float64)
            torch.testing.assert_close(big(batch), mean_output(teachers, (batch,)), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"module 'norm' \(train mode.*more than 1 value"):
        big.train()(x[:1])
    big.eval().link()
    disturb_weights(big, 0, scale=0.1)
    select_gates(big, (x,))
    student = big.compress()
    for count in (1, 4):
        torch.testing.assert_close(student(x[:count]), big(x[:count]), rtol=1e-9, atol=1e-9)


class AsksAboutItsInputs(nn.Module):
    """Does something else with many long sequences, with bytes, and with tables of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(2, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.to(table.dtype) / 255
        y = self.first(x).relu().mean(2)
        return self.last(2 * y if len(x) > 4 and x.shape[2] > 8 else y) + table.sum() / len(table)


@torch.no_grad()
def test_code_that_depends_on_other_lengths_and_on_types() -> None:
    teachers = [AsksAboutItsInputs().double() for _ in range(2)]
    table = torch.randn(7, 3, dtype=torch.float64)
    big = fastmerge.BigStudent(*teachers, example_inputs=(torch.randn(3, 2, 8, dtype=torch.float64), table)).eval()
    for count, length, rows in [(3, 9, 7), (6, 9, 7), (3, 9, 7), (6, 8, 7), (7, 9, 7), (3, 8, 5), (1, 9, 7), (5, 8, 5)]:
        for x in (torch.randn(count, 2, length, dtype=torch.float64), torch.randint(9, (count, 2, length)).byte()):
            with big.open_gates():
                actual = big(x, table[:rows])
            torch.testing.assert_close(actual, mean_output(teachers, (x, table[:rows])), rtol=1e-9, atol=1e-9)


def test_an_example_may_be_a_strided_view() -> None:
    """Whose strides torch.export asks about."""
    teachers = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)) for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=torch.randn(4, 1, 4, 4)[::2])
    assert big._blueprint.traced.is_open == {"train": True, "eval": True}


def test_other_batch_and_image_sizes_than_the_examples() -> None:
    big, teachers = merge("unet", linked=False), teachers_of("unet", 2)
    x = (torch.randn(3, 3, 16, 12, dtype=torch.float64),)
    with torch.no_grad(), big.open_gates():
        assert relative_error(big(*x), mean_output(teachers, x)) < 1e-9


def test_frozen_teachers_make_a_trainable_big_student() -> None:
    architecture = BY_NAME["unet"]
    teachers = [architecture.make().requires_grad_(False) for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=architecture.inputs(2, dtype=torch.float32))
    assert all(parameter.requires_grad for parameter in big.parameters())
    assert not any(parameter.requires_grad for teacher in teachers for parameter in teacher.parameters())


def test_keyword_inputs() -> None:
    big = merge("two_inputs", linked=False)
    image, vector = inputs("two_inputs")
    assert torch.equal(big(image, vector=vector), big(image, vector))
    assert torch.equal(big(image=image, vector=vector), big(image, vector))


class TakingAnyKeywords(nn.Module):
    """As a wrapper of a Hugging Face network takes a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, *args: Tensor, **batch: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(args[0] if args else batch["a"]) - self.first(batch["b"])))


@torch.no_grad()
def test_any_keywords_in_any_order() -> None:
    a, b = torch.randn(2, 4, 3)
    for example in ({"a": a, "b": b}, ((a,), {"b": b})):
        teachers = [TakingAnyKeywords().eval(), TakingAnyKeywords().eval()]
        big = fastmerge.BigStudent(*teachers, example_inputs=example)
        args, batch = example if isinstance(example, tuple) else ((), dict(reversed(example.items())))
        with big.open_gates():
            torch.testing.assert_close(big(*args, **batch), sum(t(*args, **batch) for t in teachers) / 2)
        student = big.compress(keep={"first": range(6)})
        gates = {"first": torch.tensor([1.0] * 6 + [0.0] * 6)}
        torch.testing.assert_close(student(*args, **batch), big(*args, gates=gates, **batch))
        assert "forward" not in vars(student)


class LibrarysTensor(Tensor):
    """As MONAI's MetaTensor does, it remembers how often it was changed."""

    changes = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, LibrarysTensor):
            out.changes = 1 + max([x.changes for x in args if isinstance(x, LibrarysTensor)], default=0)
            return out.as_subclass(LibrarysTensor) if out.changes < 3 else out + 1
        return out


def test_examples_of_a_librarys_class_are_plain_tensors() -> None:
    teachers = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)) for _ in range(2)]
    x = torch.randn(2, 1, 6, 6)
    big = fastmerge.BigStudent(*teachers, example_inputs=x.as_subclass(LibrarysTensor))
    with big.open_gates():
        torch.testing.assert_close(big(x), (teachers[0](x) + teachers[1](x)) / 2)
    with pytest.raises(ValueError, match="example_inputs need dense tensors; got one of layout sparse_coo"):
        fastmerge.BigStudent(*teachers, example_inputs=x.to_sparse())


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.last(torch.relu(self.first(x)))
        return y, y.argmax(1), y[:, 0] > 0


@torch.no_grad()
def test_class_numbers_are_those_of_most_teachers() -> None:
    x = torch.randn(32, 3)
    teachers = [Deciding().eval() for _ in range(3)]
    big = fastmerge.BigStudent(*teachers, example_inputs=x)
    with big.open_gates():
        mean, numbers, flags = big(x)
    said = torch.stack([teacher(x)[1] for teacher in teachers])
    assert (numbers.dtype, flags.dtype) == (torch.int64, torch.bool)
    assert torch.equal(numbers, said.mode(0).values)
    assert torch.equal(flags, sum(teacher(x)[2].long() for teacher in teachers) >= 2)
    torch.testing.assert_close(mean, sum(teacher(x)[0] for teacher in teachers) / 3)


class Wrapped(nn.Module):
    """A network on a torus."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pad, self.last = nn.Conv2d(2, 6, 1), nn.CircularPad2d(1), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.pad(torch.relu(self.first(x))))
        return x + torch.zeros(len(x), 1, 1, 1, device=x.device)


def traced() -> nn.Module:
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()]
    return torch.fx.symbolic_trace(nn.Sequential(*layers))


@pytest.mark.parametrize("make", [Wrapped, traced])
@torch.no_grad()
def test_networks_that_once_were_refused(make: Callable[[], nn.Module]) -> None:
    """Padding that goes around, tensors that the code makes, and code that torch.fx wrote, of another class each time."""
    x = (make_batch(4, (2, 7, 7)),)
    teachers = make_teachers(make, x, 2)
    big = fastmerge.BigStudent(*teachers, example_inputs=x)
    assert [group.size for group in big.groups] == [6]
    with big.open_gates():
        assert relative_error(big(*x), mean_output(teachers, x)) < 1e-9
    select_gates(big, x)
    assert relative_error(big.compress()(*x), big(*x)) < 1e-9
