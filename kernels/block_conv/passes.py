"""The passes of a block convolution and the candidates for each: cuDNN one stream after another, cuDNN's groups, Triton.

Dims: T streams, N batch, C input channels, K output channels (of one stream), H W positions, R S kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from fastmerge.kernels.block_conv import cudnn
from fastmerge.kernels.block_conv.arithmetic import arithmetic
from fastmerge.kernels.block_conv.choice import SPLIT, Run, choices, without_batch
from fastmerge.kernels.block_conv.layouts import empty_laid_out, fitting, laid_out
from fastmerge.kernels.block_conv.problem import Problem
from fastmerge.kernels.block_conv.tiles import Tile, WeightTile, by_traffic, tiles, weight_tiles, weights_by_traffic
from torch import Tensor

GROUPS = "groups"
# So many groups as there are teachers to merge. More are one layer's own, which would be as many small convolutions.
_FEW_GROUPS = 4

# A way to compute a pass: of the problem and the pass's operands.
Way = Callable[..., list[Tensor]]


class Candidate(NamedTuple):
    """A way, and whether it may be the fastest."""

    way: Way
    races: bool = True


class Sizes(NamedTuple):
    """What the candidates of a pass depend on, beside the problem.

    Attributes:
        joined: whether there is one tensor for all streams.
        size: of an input, (N, C, H, W) or (N, T·C, H, W).
        weight: (T·K, C, R, S).
        dtype: that it computes in.
        device: that it runs on.
    """

    joined: bool
    size: Sequence[int]
    weight: Sequence[int]
    dtype: torch.dtype
    device: torch.device


def forward(problem: Problem, xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The outputs: T tensors (N, K, H', W'), or one joined one."""
    sizes = Sizes(len(xs) < problem.groups, xs[0].shape, weight.shape, weight.dtype, weight.device)
    return _run(_FORWARD, problem, sizes, xs, weight, bias)


def input_gradient(problem: Problem, dys: Sequence[Tensor], weight: Tensor, size: Sequence[int]) -> list[Tensor]:
    """The gradients of the inputs: T tensors of this size (N, C, H, W), or one joined one of (N, T·C, H, W)."""
    sizes = Sizes(len(dys) < problem.groups, tuple(size), weight.shape, weight.dtype, weight.device)
    return _run(_INPUT_GRADIENT, problem, sizes, dys, weight, tuple(size))


def weight_gradient(
    problem: Problem, dys: Sequence[Tensor], xs: Sequence[Tensor], weight_size: Sequence[int]
) -> Tensor:
    """The gradient of the weight: (T·K, C, R, S)."""
    sizes = Sizes(len(xs) < problem.groups, xs[0].shape, tuple(weight_size), xs[0].dtype, xs[0].device)
    return _run(_WEIGHT_GRADIENT, problem, sizes, dys, xs, tuple(weight_size))[0]


def forward_candidates(problem: Problem, xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> dict[str, Run]:
    """The functions that compute :func:`forward`, by name."""
    sizes = Sizes(len(xs) < problem.groups, xs[0].shape, weight.shape, weight.dtype, weight.device)
    return _bound(_of_forward(problem, sizes), problem, xs, weight, bias)


def input_gradient_candidates(
    problem: Problem, size: Sequence[int], dys: Sequence[Tensor], weight: Tensor
) -> dict[str, Run]:
    """The functions that compute :func:`input_gradient`, by name."""
    sizes = Sizes(len(dys) < problem.groups, size, weight.shape, weight.dtype, weight.device)
    return _bound(_of_input_gradient(problem, sizes), problem, dys, weight, size)


def weight_gradient_candidates(
    problem: Problem, weight_size: Sequence[int], dys: Sequence[Tensor], xs: Sequence[Tensor]
) -> dict[str, Run]:
    """The functions that compute :func:`weight_gradient`, by name."""
    sizes = Sizes(len(xs) < problem.groups, xs[0].shape, weight_size, xs[0].dtype, xs[0].device)
    return _bound(_of_weight_gradient(problem, sizes), problem, dys, xs, weight_size)


def worth_an_operation(
    problem: Problem,
    xs: Sequence[Tensor],
    weight: Tensor,
    dtype: torch.dtype,
    differentiated: bool,
    name: Hashable = None,
) -> bool:
    """Whether a pass runs, or may be measured to run, anything but what plain PyTorch does: cuDNN, groups for a joined tensor.

    Args:
        problem: the convolution.
        xs: T tensors, or one joined one.
        weight: (T·K, C, R, S).
        dtype: that it computes in.
        differentiated: whether there will be a backward pass.
        name: what :func:`runs_plain` knows the call by, where it is asked.
    """
    if choices.idle():
        choices.remember(name, "")
        return False
    if not all(isinstance(size, int) for size in xs[0].shape):
        return True  # traced with open sizes: the operation will choose when it runs
    sizes = Sizes(len(xs) < problem.groups, xs[0].shape, weight.shape, dtype, weight.device)
    call = (differentiated, *_call(problem, sizes))
    layer, worth = choices.remembered(call) or (None, True)
    if layer is None:
        passes = (_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT) if differentiated else (_FORWARD,)
        keys = {step.key(problem, sizes): step for step in passes}
        worth = any(choices.known(key) not in (None, _plain(sizes)) for key in keys)
        layer = _layer(problem, sizes)
        if all(choices.settled(key) or not _races(step.candidates(problem, sizes)) for key, step in keys.items()):
            choices.remember(call, (layer, worth))
        else:
            worth = True
    if not worth:
        choices.meets(layer, sizes.size[0])
        choices.remember(name, layer)
    return bool(worth)


def runs_plain(name: Hashable, batch: int) -> bool:
    """Whether a call was not worth an operation before, and nothing has changed since."""
    layer = choices.remembered(name)
    if layer:
        choices.meets(layer, batch)
    return layer is not None


def _of_forward(problem: Problem, sizes: Sizes) -> dict[str, Candidate]:
    outputs, channels = sizes.weight[0] // problem.groups, sizes.weight[1]
    n, _, height, width = sizes.size
    found = tiles(channels, outputs, n, problem.block(sizes.weight), arithmetic(sizes.dtype))
    return _candidates(
        problem,
        sizes,
        lambda *operands: cudnn.split_forward(*operands),
        lambda problem, xs, *rest: [cudnn.grouped_forward(problem, xs[0], *rest)],
        _triton_forward,
        by_traffic(found, n, *problem.geometry.output_size(height, width), outputs),
    )


def _of_input_gradient(problem: Problem, sizes: Sizes) -> dict[str, Candidate]:
    outputs, channels = sizes.weight[0] // problem.groups, sizes.weight[1]
    n, _, height, width = sizes.size
    block = problem.block(sizes.weight)
    found = tiles(outputs, channels, n, None if block is None else (block[1], block[0]), arithmetic(sizes.dtype))
    return _candidates(
        problem,
        sizes,
        lambda *operands: cudnn.split_input_gradient(*operands),
        lambda problem, dys, *rest: [cudnn.grouped_input_gradient(problem, dys[0], *rest)],
        _triton_input_gradient,
        by_traffic(found, n, height, width, channels),
    )


def _of_weight_gradient(problem: Problem, sizes: Sizes) -> dict[str, Candidate]:
    outputs, channels, columns = sizes.weight[0] // problem.groups, sizes.weight[1], sizes.weight[3]
    found = weight_tiles(channels, outputs, columns, problem.block(sizes.weight), arithmetic(sizes.dtype))
    return _candidates(
        problem,
        sizes,
        lambda *operands: [cudnn.split_weight_gradient(*operands)],
        lambda problem, dys, xs, size: [cudnn.grouped_weight_gradient(problem, dys[0], xs[0], size)],
        _triton_weight_gradient,
        weights_by_traffic(found, channels, outputs),
    )


def _candidates(
    problem: Problem, sizes: Sizes, split: Way, groups: Way, triton: Way, found: Sequence[Tile | WeightTile]
) -> dict[str, Candidate]:
    """By name; results are in the problem's layout: bringing them there is part of what is timed."""
    ways = {SPLIT: split} | ({GROUPS: groups} if sizes.joined else {})
    ways |= {tile.name: functools.partial(triton, tile=tile) for tile in found}
    slow = {tile.name for tile in found if tile.narrow and problem.live is None}
    return {name: Candidate(functools.partial(_laid_out, way), name not in slow) for name, way in ways.items()}


def _laid_out(way: Way, problem: Problem, *operands: Any) -> list[Tensor]:
    return [laid_out(result, problem.channels_last) for result in way(problem, *operands)]


@dataclass(frozen=True)
class _Pass:
    name: str
    candidates: Callable[[Problem, Sizes], dict[str, Candidate]]

    def key(self, problem: Problem, sizes: Sizes) -> str:
        return problem.key(self.name, sizes.joined, sizes.size, sizes.weight, sizes.dtype, sizes.device)


_FORWARD = _Pass("forward", _of_forward)
_INPUT_GRADIENT = _Pass("input gradient", _of_input_gradient)
_WEIGHT_GRADIENT = _Pass("weight gradient", _of_weight_gradient)


def _run(step: _Pass, problem: Problem, sizes: Sizes, *operands: Any) -> list[Tensor]:
    """Runs what was chosen for a pass. Where that is settled, finding it is one look into a dictionary."""
    call = (step.name, *_call(problem, sizes))
    layer, way = choices.remembered(call) or (_layer(problem, sizes), None)
    choices.begins(backward=step is not _FORWARD)
    if step is _FORWARD:
        choices.meets(layer, sizes.size[0])
    if way is None:
        way = _choose(step, problem, sizes, operands, call, layer)
    return cast(list[Tensor], way(problem, *operands))


def _choose(step: _Pass, problem: Problem, sizes: Sizes, operands: Sequence[Any], call: Hashable, layer: str) -> Way:
    """The way to run a pass, measured if that is due; remembered for the call if it is settled."""
    key, found = step.key(problem, sizes), step.candidates(problem, sizes)

    def trial() -> Mapping[str, Run]:
        # Not the tensors at hand: zeros, as gradients often are at first, would hide a wrong kernel and run faster.
        generators: dict[torch.device, torch.Generator] = {}
        given = [_random_like(operand, generators, problem.channels_last) for operand in operands]
        return _bound({name: candidate for name, candidate in found.items() if candidate.races}, problem, *given)

    races = _races(found)
    default = GROUPS if GROUPS in found and problem.groups > _FEW_GROUPS else SPLIT
    due = races and choices.due(layer, sizes.size[0])
    way = found[choices.pick(key, found, trial if due else None, default, _plain(sizes))].way
    if choices.settled(key) or not races:
        choices.remember(call, (layer, way))
    return way


def _layer(problem: Problem, sizes: Sizes) -> str:
    return without_batch(_FORWARD.key(problem, sizes))


def _races(found: Mapping[str, Candidate]) -> bool:
    return sum(candidate.races for candidate in found.values()) > 1


def _call(problem: Problem, sizes: Sizes) -> tuple[Hashable, ...]:
    """All that the choice for a call depends on."""
    live = problem.live
    blocks = None if live is None else (len(live.rows), live.mask.shape)
    return (
        *(problem.groups, problem.geometry, blocks, problem.channels_last),
        *(sizes.joined, sizes.size, sizes.weight, arithmetic(sizes.dtype), sizes.device),
        choices.measures(),
    )


def _plain(sizes: Sizes) -> str:
    return GROUPS if sizes.joined else SPLIT


def _bound(found: Mapping[str, Candidate], problem: Problem, *operands: Any) -> dict[str, Run]:
    return {name: functools.partial(candidate.way, problem, *operands) for name, candidate in found.items()}


def _random_like(operand: Any, generators: dict[torch.device, torch.Generator], channels_last: bool) -> Any:
    if operand is None or isinstance(operand, int):
        return operand
    if isinstance(operand, Tensor):
        generator = generators.setdefault(operand.device, torch.Generator(operand.device).manual_seed(0))
        if 0 in operand.stride() and operand.dim() == 4:
            # What sum() hands back, one number seen everywhere, is not the gradient that the other steps bring.
            copy = empty_laid_out(operand, operand.shape, channels_last)
        else:
            copy = torch.empty_strided(operand.shape, operand.stride(), dtype=operand.dtype, device=operand.device)
        return copy.normal_(generator=generator)
    return [_random_like(tensor, generators, channels_last) for tensor in operand]


def _triton_forward(
    problem: Problem, xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, tile: Tile
) -> list[Tensor]:
    # Imported here, as below: a machine without CUDA never imports Triton.
    from fastmerge.kernels.block_conv import launch_triton

    return launch_triton.forward(fitting(xs), weight, bias, problem.groups, problem.geometry, tile, problem.live)


def _triton_input_gradient(
    problem: Problem, dys: Sequence[Tensor], weight: Tensor, size: Sequence[int], tile: Tile
) -> list[Tensor]:
    from fastmerge.kernels.block_conv import launch_triton

    height, width = size[2:]
    return launch_triton.input_gradient(
        fitting(dys), weight, (height, width), problem.groups, problem.geometry, tile, problem.live
    )


def _triton_weight_gradient(
    problem: Problem, dys: Sequence[Tensor], xs: Sequence[Tensor], size: Sequence[int], tile: WeightTile
) -> list[Tensor]:
    from fastmerge.kernels.block_conv import launch_triton

    return [
        launch_triton.weight_gradient(fitting(dys), fitting(xs), problem.groups, problem.geometry, tile, problem.live)
    ]
