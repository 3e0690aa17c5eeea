"""torch.compile of a big student, forward and backward, and torch.export of what it compresses to."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastmerge
from architectures import BY_NAME, merged
from teachers import disturb_weights, relative_error, select_gates

NAMES = [
    "lenet",
    "resnet_projected_shortcut",
    "shufflenet_v2",
    "unet",
    "dict_heads",
    "log_softmax",
    "functional_parameters",
]
every_network = pytest.mark.parametrize("name", NAMES)
linked_or_not = pytest.mark.parametrize("linked", [False, True], ids=["unlinked", "linked"])

# PyTorch's own modules warn when the compiler is imported
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def merge(name: str, linked: bool) -> fastmerge.BigStudent:
    big = merged(name, link=linked)
    if linked:
        disturb_weights(big, scale=0.1)
    return big


def loss_of(output: object, big: fastmerge.BigStudent) -> Tensor:
    return sum(y.square().mean() for y in tree_leaves(output)) + big.gate_loss()


@every_network
@linked_or_not
def test_eval_mode_compiles_whole(name: str, linked: bool) -> None:
    big, x = merge(name, linked), BY_NAME[name].inputs(4, seed=8)
    compiled = torch.compile(big, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(*x), big(*x)) < 1e-9
        with big.open_gates():
            assert relative_error(compiled(*x), big(*x)) < 1e-9


@every_network
@linked_or_not
def test_training_step_compiles_whole(name: str, linked: bool) -> None:
    """One graph; the same draws, gradients and running statistics as without the compiler."""
    eager, x = merge(name, linked).train(), BY_NAME[name].inputs(4, seed=8)
    big = copy.deepcopy(eager)
    compiled = torch.compile(big, backend="aot_eager", fullgraph=True)
    for model, parts in ((eager, eager), (compiled, big)):
        torch.manual_seed(2)
        loss_of(model(*x), parts).backward()
    for (key, expected), actual in zip(eager.named_parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(
            actual.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
        )
    for key, expected in eager.state_dict().items():
        torch.testing.assert_close(big.state_dict()[key], expected, rtol=1e-9, atol=1e-12)


def test_two_compiled_steps_draw_anew() -> None:
    big, x = merge("lenet", linked=False).train(), BY_NAME["lenet"].inputs(4)
    compiled = torch.compile(big, backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(*x), compiled(*x))


def test_a_copy_of_a_compiled_one_is_itself() -> None:
    """Not what was compiled for the first one; pickled, it loads without it."""
    big, x = merge("lenet", linked=True), BY_NAME["lenet"].inputs(4, seed=8)
    big.eval().compile(backend="eager")
    before = big(*x)
    for clone in (copy.deepcopy(big), pickle.loads(pickle.dumps(big))):
        disturb_weights(clone, scale=0.5)
        assert relative_error(clone(*x), before) > 1e-2
    torch.testing.assert_close(big(*x), before)


def test_batch_sizes_change() -> None:
    big = merge("lenet", linked=False).eval()
    compiled = torch.compile(big, backend="aot_eager", fullgraph=True)
    for batch in (4, 7, 3):
        x = BY_NAME["lenet"].inputs(batch)
        assert relative_error(compiled(*x), big(*x)) < 1e-9


def test_compiled_goes_on_after_link_and_compress() -> None:
    big, x = merge("lenet", linked=False), BY_NAME["lenet"].inputs(4)
    compiled = torch.compile(big, backend="aot_eager")
    before = compiled(*x)
    big.link()
    assert relative_error(compiled(*x), before) < 1e-9
    select_gates(big, x)
    student = torch.compile(big.compress(), backend="aot_eager", fullgraph=True)
    assert relative_error(student(*x), compiled(*x)) < 1e-9


def test_inductor() -> None:
    """PyTorch's default backend, once, on a network of two layers."""
    make = lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))  # noqa: E731
    torch.manual_seed(0)
    x = torch.randn(16, 3)
    big = fastmerge.BigStudent(make(), make(), example_inputs=x).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, of which there are many
        compiled = torch.compile(big, fullgraph=True)
        losses = []
        optimizer = torch.optim.SGD(big.parameters(), lr=0.1)
        for _ in range(30):
            optimizer.zero_grad()
            loss = (compiled(x) - x[:, :2]).square().mean()
            (loss + big.gate_loss()).backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        big.eval()
        torch.testing.assert_close(compiled(x), big(x))


@every_network
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch.export.load's own
@torch.no_grad()
def test_compressed_student_exports(name: str) -> None:
    """A plain module: torch.export takes it, saves it and loads it."""
    big, x = merge(name, linked=True), BY_NAME[name].inputs(4, seed=8)
    select_gates(big, x)
    student = big.compress()
    program = torch.export.export(student, x)
    assert relative_error(program.module()(*x), student(*x)) < 1e-9
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert relative_error(torch.export.load(file).module()(*x), student(*x)) < 1e-9


@every_network
@torch.no_grad()
def test_compressed_student_is_free_of_fastmerge(name: str) -> None:
    big, x = merge(name, linked=True), BY_NAME[name].inputs(4)
    select_gates(big, x)
    student = big.compress()
    assert not any(type(module).__module__.startswith("fastmerge") for module in student.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    assert b"fastmerge" not in file.getvalue()
