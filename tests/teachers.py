"""Teachers that can tell a right big student from a wrong one, and the measure that does.

Freshly initialised networks give nearly constant outputs, and all of them share the same running statistics, so a wrong
big student looks right. Here every parameter and buffer of every teacher has its own values, BatchNorm knows its data,
and errors count against the part of the output that depends on the input.

A right big student must not look wrong either. In a deep network of random weights whose running statistics don't fit what
its layers really read in eval mode, activations grow by a factor a layer and rounding errors with them: an EfficientNet-B7
made that way amplifies them 10⁹-fold. So the statistics are fitted in eval mode, layer by layer, and normalised values
have a mean of their own (trained networks have both), which leaves an amplification of about 10.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastmerge import BigStudent

OPEN = 40.0  # a loc whose gate is exactly 1, drawn or deterministic, in float16 too
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LEAST_SPREAD = {torch.float64: 1e-5, torch.float32: 1e-3}  # below, rounding alone would come near the tolerance

Make = Callable[[], nn.Module]


def make_batch(batch: int, shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random samples (batch, *shape), each with a brightness and a contrast of its own per channel.

    White noise alone would vanish in a network's average pooling, and the output would hardly depend on the sample.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    per_channel = (2, batch, shape[0], *[1] * (len(shape) - 1))
    brightness, contrast = torch.randn(per_channel, generator=generator, dtype=torch.float64)
    return (brightness + noise * (1 + contrast.abs())).to(dtype)


def make_teachers(
    make: Make, inputs: Sequence[Tensor], count: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[nn.Module]:
    """Returns ``count`` teachers in eval mode that differ in every parameter and buffer, calibrated on ``inputs``.

    Args:
        make: returns a new network.
        inputs: one batch, a tensor per input of the network; BatchNorm sees it and noisy copies of it.
        count: how many.
        dtype: floating point type of the teachers, in which they are calibrated too.
        seed: the first teacher's seed; the others count on from it.
    """
    return [make_teacher(make, inputs, dtype=dtype, seed=seed + t) for t in range(count)]


def make_teacher(make: Make, inputs: Sequence[Tensor], dtype: torch.dtype, seed: int) -> nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = make().to(dtype)
        randomise_parameters(model)
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        calibrate(model, inputs)
        perturb_buffers(model)
        settle(model, inputs)
    return model.eval()


def randomise_parameters(model: nn.Module) -> None:
    """Gives weights He's scale, scales a value around 1, and biases one around 0 (normalisations': around 1).

    A layer's scale that begins at 0, the last one of a residual branch without normalisations, stays small: with 1 such a
    network of ten blocks and more multiplies rounding errors by 10⁷.
    """
    for module in model.modules():
        normalises = isinstance(module, NORMS)
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = parameter.dim() > 1 and isinstance(module, LAYERS) and name != "gain"  # (C, 1, 1, 1), a scale
            if is_weight or (parameter.dim() > 1 and parameter.numel() > max(parameter.shape)):
                nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
            elif name == "bias" or "offset" in name or "bias" in name:
                nn.init.normal_(parameter, mean=float(normalises), std=0.3 if normalises else 0.1)
            elif normalises or parameter.any():
                nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                nn.init.uniform_(parameter, 0.1, 0.3)


@contextmanager
def cumulative_statistics(model: nn.Module) -> Iterator[None]:
    """Within, running statistics are plain averages over the batches."""
    norms = [(module, module.momentum) for module in model.modules() if isinstance(module, _NormBase)]
    for module, _ in norms:
        module.reset_running_stats()
        module.momentum = None
    try:
        yield
    finally:
        for module, momentum in norms:
            module.momentum = momentum


def calibrate(model: nn.Module, inputs: Sequence[Tensor], batches: int = 3) -> None:
    """Runs the network in training mode so that its running statistics fit the data."""
    model.train()
    with cumulative_statistics(model):
        for _ in range(batches):
            model(*(x + 0.3 * torch.randn_like(x) if x.is_floating_point() else x for x in inputs))


def perturb_buffers(model: nn.Module, named: str = "") -> None:
    """Moves every floating point buffer, or those with a part of the name, a little, so that no two teachers agree on one.

    Those that are not saved, such as frequencies, are what the code makes of its numbers.
    """
    unsaved = {
        f"{path}.{name}".lstrip(".") for path, m in model.named_modules() for name in m._non_persistent_buffers_set
    }
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point() or named not in name or name in unsaved:
            continue
        buffer.mul_(torch.empty_like(buffer).uniform_(0.8, 1.25))
        if "mean" in name:
            buffer.add_(0.1 * torch.randn_like(buffer))


class _Settling(TorchFunctionMode):
    """Fits the running statistics of every BatchNorm to what it reads, before it runs, but for a little."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            given = inspect.signature(F.batch_norm).bind(*args, **(kwargs or {})).arguments
            x, mean, var = given["input"], given["running_mean"], given["running_var"]
            if mean is not None and not given.get("training", False):
                variance, centre = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
                mean.copy_(centre + 0.1 * variance.sqrt() * torch.randn_like(centre))
                var.copy_(variance * torch.empty_like(variance).uniform_(0.8, 1.25))
        return func(*args, **(kwargs or {}))


def settle(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Fits running statistics to the eval mode's own activations, layer by layer, no two alike.

    Statistics gathered in training mode leave deep networks far from normalised in eval mode: errors of every layer's
    statistics are passed on to the next.
    """
    model.eval()
    with _Settling():
        model(*inputs)


def mean_output(models: Sequence[nn.Module], inputs: Sequence[Tensor]) -> object:
    """The mean over the models of each tensor of their outputs; what is no tensor is the first one's."""
    outputs = [pytree.tree_flatten(model(*inputs)) for model in models]
    leaves = [
        torch.stack(values).mean(0) if isinstance(values[0], Tensor) else values[0]
        for values in zip(*(flat for flat, _ in outputs), strict=True)
    ]
    return pytree.tree_unflatten(leaves, outputs[0][1])


def relative_error(actual: object, expected: object) -> float:
    """``‖actual − expected‖ / ‖expected − mean over the batch of expected‖``, the largest over the outputs' tensors.

    Raises:
        AssertionError: if the outputs differ in structure or shape, or hardly depend on the input.
    """
    actual_leaves, actual_tree = pytree.tree_flatten(actual)
    expected_leaves, expected_tree = pytree.tree_flatten(expected)
    assert actual_tree == expected_tree, f"the output is {actual_tree}, expected {expected_tree}"
    assert depends_on_input(expected), "the expected output hardly depends on the input"
    errors = []
    for a, e in zip(actual_leaves, expected_leaves, strict=True):
        assert a.shape == e.shape, f"the output is {tuple(a.shape)}, expected {tuple(e.shape)}"
        errors.append(((a - e).norm() / (e - e.mean(0)).norm()).item())
    return max(errors)


def depends_on_input(output: object) -> bool:
    """Whether every tensor of an output varies over the batch by far more than rounding errors."""
    leaves = pytree.tree_leaves(output)
    return all(bool((y - y.mean(0)).norm() > LEAST_SPREAD[y.dtype] * y.norm()) for y in leaves)


@torch.no_grad()
def select_gates(
    big: nn.Module, inputs: Sequence[Tensor], seed: int = 0, recalibrate: bool = False
) -> dict[str, Tensor]:
    """Sets n random gates of the T·n of every group to 1 and the others to 0; returns the open ones, ascending.

    Draws again where what is left of a small network is dead: its output, in eval mode, must depend on ``inputs``.

    Args:
        big: a big student; it is left in eval mode.
        inputs: one batch.
        seed: of the choice.
        recalibrate: fit running statistics to what is left, for deep networks, which go dead without.
    """
    generator = torch.Generator().manual_seed(seed)
    for trial in range(20):
        opened = {}
        whole = torch.randint(big.num_teachers, (1,), generator=generator)
        for name, gate in big.gates.items():
            candidates = gate.loc.numel()
            chosen = torch.randperm(candidates, generator=generator)[: candidates // big.num_teachers]
            if trial >= 10 and candidates == big.num_teachers:  # streams of different teachers are dead until linked
                chosen = whole
            gate.loc.fill_(-OPEN)
            gate.loc[chosen] = OPEN
            opened[name] = chosen.sort().values
        if recalibrate:
            with torch.random.fork_rng():
                calibrate(big, inputs, batches=1)
                perturb_buffers(big, "running_")  # its own constants belong together
                settle(big, inputs)
        if depends_on_input(big.eval()(*inputs)):
            return opened
    raise AssertionError("no selection of gates leaves an output that depends on the input")


@torch.no_grad()
def set_gates(big: nn.Module, loc: float) -> None:
    """Gives every gate the same loc."""
    for gate in big.gates.values():
        gate.loc.fill_(loc)


@torch.no_grad()
def disturb_weights(big: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Adds noise to every weight, in proportion to its tensor: off-diagonal weights are zero no longer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in big.weight_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        size = parameter.square().mean().sqrt()
        parameter.add_(scale * size * noise)


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers that later changes don't reach."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def exactness(big: BigStudent, x: Sequence[Tensor], expected: object) -> tuple[list[float], list[float]]:
    """How far a big student is from what it must compute, before and after ``link()`` and a change of all weights.

    Args:
        big: not linked yet; it is left linked, with random gates at 0 and 1.
        x: one batch, a tensor per input.
        expected: the mean of its teachers' outputs.

    Returns:
        Errors with open gates, and of the compressed network against the big student with the same channels kept.
    """
    opened, compressed = [], []
    for linked in (False, True):
        if linked:
            big.link()
        with big.open_gates():
            opened.append(relative_error(big.eval()(*x), expected))
        statistics = {name: buffer.clone() for name, buffer in big.named_buffers()}
        if linked:
            disturb_weights(big, scale=0.1)
        select_gates(big, x, seed=int(linked), recalibrate=True)
        kept = big.predictions(big.compress()(*x))
        compressed.append(relative_error(kept, big.predictions(big(*x))))
        if not linked:
            for name, buffer in big.named_buffers():
                buffer.copy_(statistics[name])
    return opened, compressed


@torch.no_grad()
def check_exact(make: Make, x: Sequence[Tensor], dtype: torch.dtype, count: int) -> BigStudent:
    """Open gates give the mean; the compressed network computes what was kept; teachers stay as they are.

    Args:
        make: returns a new network.
        x: one batch, a tensor per input.
        dtype: of teachers and floating point inputs.
        count: of teachers.

    Returns:
        The big student.

    Raises:
        AssertionError: if one of these is not so.
    """
    teachers = make_teachers(make, x, count, dtype)
    states = [copy_state(teacher) for teacher in teachers]
    big = BigStudent(*teachers, example_inputs=tuple(x))
    expected = mean_output(teachers, x)
    opened, compressed = exactness(big, x, expected)
    assert all(error <= TOLERANCE[dtype] for error in (*opened, *compressed)), (opened, compressed)
    student = big.compress()
    assert type(student) is type(teachers[0])
    for teacher, state in zip(teachers, states, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in teacher.state_dict().items())
    teachers[0].load_state_dict(student.state_dict(), strict=True)
    assert relative_error(teachers[0](*x), student(*x)) == 0
    gc.collect()
    return big
