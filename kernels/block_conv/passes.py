"""The passes of a block convolution and the candidates for each: cuDNN one stream after another, cuDNN's groups, Triton.

Dims: T streams, N batch, C input channels, K output channels (of one stream), H W positions, R S kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fastmerge.kernels.block_conv import cudnn
from fastmerge.kernels.block_conv.arithmetic import arithmetic
from fastmerge.kernels.block_conv.choice import SPLIT, Run, choices
from fastmerge.kernels.block_conv.layouts import empty_laid_out, fitting, laid_out
from fastmerge.kernels.block_conv.problem import Problem
from fastmerge.kernels.block_conv.tiles import Tile, WeightTile, tiles, weight_tiles
from torch import Tensor

GROUPS = "groups"
# So many groups as there are teachers to merge. More are one layer's own, which would be as many small convolutions.
_FEW_GROUPS = 4


def forward(problem: Problem, xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The outputs: T tensors (N, K, H', W'), or one joined one."""
    key = problem.key("forward", xs, xs[0].shape, weight.shape, xs[0].dtype)
    return _run(problem, key, functools.partial(forward_candidates, problem), xs, weight, bias)


def input_gradient(problem: Problem, dys: Sequence[Tensor], weight: Tensor, size: Sequence[int]) -> list[Tensor]:
    """The gradients of the inputs: T tensors of this size (N, C, H, W), or one joined one of (N, T·C, H, W)."""
    key = problem.key("input gradient", dys, size, weight.shape, dys[0].dtype)
    return _run(problem, key, functools.partial(input_gradient_candidates, problem, size), dys, weight)


def weight_gradient(
    problem: Problem, dys: Sequence[Tensor], xs: Sequence[Tensor], weight_size: Sequence[int]
) -> Tensor:
    """The gradient of the weight: (T·K, C, R, S)."""
    key = problem.key("weight gradient", xs, xs[0].shape, weight_size, xs[0].dtype)
    return _run(problem, key, functools.partial(weight_gradient_candidates, problem, weight_size), dys, xs)[0]


def forward_candidates(problem: Problem, xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> dict[str, Run]:
    """The functions that compute :func:`forward`, by name."""
    found: dict[str, Run] = {SPLIT: lambda: cudnn.split_forward(problem, xs, weight, bias)}
    if len(xs) < problem.groups:
        found[GROUPS] = lambda: [cudnn.grouped_forward(problem, xs[0], weight, bias)]
    block, kind = problem.block(weight.shape), arithmetic(weight.dtype)
    for tile in tiles(weight.shape[1], weight.shape[0] // problem.groups, xs[0].shape[0], block, kind):
        found[tile.name] = functools.partial(_triton_forward, problem, xs, weight, bias, tile)
    return _all_laid_out(problem, found)


def input_gradient_candidates(
    problem: Problem, size: Sequence[int], dys: Sequence[Tensor], weight: Tensor
) -> dict[str, Run]:
    """The functions that compute :func:`input_gradient`, by name."""
    found: dict[str, Run] = {SPLIT: lambda: cudnn.split_input_gradient(problem, dys, weight, size)}
    if len(dys) < problem.groups:
        found[GROUPS] = lambda: [cudnn.grouped_input_gradient(problem, dys[0], weight, size)]
    block = problem.block(weight.shape)
    swapped = None if block is None else (block[1], block[0])
    for tile in tiles(weight.shape[0] // problem.groups, weight.shape[1], size[0], swapped, arithmetic(weight.dtype)):
        found[tile.name] = functools.partial(_triton_input_gradient, problem, dys, weight, size, tile)
    return _all_laid_out(problem, found)


def weight_gradient_candidates(
    problem: Problem, weight_size: Sequence[int], dys: Sequence[Tensor], xs: Sequence[Tensor]
) -> dict[str, Run]:
    """The functions that compute :func:`weight_gradient`, by name."""
    found: dict[str, Run] = {SPLIT: lambda: [cudnn.split_weight_gradient(problem, dys, xs, weight_size)]}
    if len(dys) < problem.groups:
        found[GROUPS] = lambda: [cudnn.grouped_weight_gradient(problem, dys[0], xs[0], weight_size)]
    outputs, channels, _, kernel_w = weight_size
    block, kind = problem.block(weight_size), arithmetic(xs[0].dtype)
    for tile in weight_tiles(channels, outputs // problem.groups, kernel_w, block, kind):
        found[tile.name] = functools.partial(_triton_weight_gradient, problem, dys, xs, tile)
    return _all_laid_out(problem, found)


def worth_an_operation(
    problem: Problem, xs: Sequence[Tensor], weight: Tensor, dtype: torch.dtype, differentiated: bool
) -> bool:
    """Whether a pass runs, or may be measured to run, anything but what plain PyTorch does: cuDNN, groups for a joined tensor.

    Args:
        problem: the convolution.
        xs: T tensors, or one joined one.
        weight: (T·K, C, R, S).
        dtype: that it computes in.
        differentiated: whether there will be a backward pass.
    """
    if choices.idle():
        return False
    steps = ("forward", "input gradient", "weight gradient") if differentiated else ("forward",)
    known = [choices.known(problem.key(step, xs, xs[0].shape, weight.shape, dtype)) for step in steps]
    plain = GROUPS if len(xs) < problem.groups else SPLIT
    return any(name not in (None, plain) for name in known) or (None in known and choices.measures())


def _run(
    problem: Problem,
    key: str,
    candidates: Callable[..., Mapping[str, Run]],
    *operands: Sequence[Tensor] | Tensor | None,
) -> list[Tensor]:
    """Picks a candidate and runs it."""

    def trial() -> Mapping[str, Run]:
        # Not the tensors at hand: zeros, as gradients often are at first, would hide a wrong kernel and run faster.
        generators: dict[torch.device, torch.Generator] = {}
        return candidates(*(_random_like(operand, generators, problem.channels_last) for operand in operands))

    found = candidates(*operands)
    default = GROUPS if GROUPS in found and problem.groups > _FEW_GROUPS else SPLIT
    return found[choices.pick(key, found, trial, default)]()


def _all_laid_out(problem: Problem, candidates: Mapping[str, Run]) -> dict[str, Run]:
    """The candidates with results in the problem's layout: bringing them there is part of what they are timed for."""

    def finished(run: Run) -> list[Tensor]:
        return [laid_out(result, problem.channels_last) for result in run()]

    return {name: functools.partial(finished, run) for name, run in candidates.items()}


def _random_like(
    operand: Sequence[Tensor] | Tensor | None, generators: dict[torch.device, torch.Generator], channels_last: bool
) -> Any:
    if operand is None:
        return None
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
    problem: Problem, dys: Sequence[Tensor], xs: Sequence[Tensor], tile: WeightTile
) -> list[Tensor]:
    from fastmerge.kernels.block_conv import launch_triton

    return [
        launch_triton.weight_gradient(fitting(dys), fitting(xs), problem.groups, problem.geometry, tile, problem.live)
    ]
