"""The passes of a block convolution and the candidates for each: cuDNN one stream after another, cuDNN's groups, Triton.

Dims: T streams, N batch, C input channels, K output channels (of one stream), H W positions, R S kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastmerge.kernels.block_conv_choice import SPLIT, Run, choices
from fastmerge.kernels.block_conv_formulas import (
    Geometry,
    LiveBlocks,
    boxes_fit,
    empty_channels_last,
    masked_weight,
)
from fastmerge.kernels.block_conv_tiles import Tile, WeightTile, tiles, weight_tiles
from torch import Tensor

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class Problem:
    """A convolution, whatever its tensors hold.

    Attributes:
        groups: T.
        geometry: of the convolution.
        live: the live blocks of a block-sparse weight, T being 1; None for a block diagonal.
    """

    groups: int
    geometry: Geometry
    live: LiveBlocks | None = None

    def block(self, weight_size: Sequence[int]) -> tuple[int, int] | None:
        """Output and input channels of a block of a block-sparse weight."""
        return None if self.live is None else self.live.block(weight_size)

    def key(
        self, step: str, given: Sequence[Tensor], size: Sequence[int], weight_size: Sequence[int], dtype: torch.dtype
    ) -> str:
        """Card, pass and shapes, as text: what a measured choice holds for.

        Args:
            step: name of the pass.
            given: inputs or output gradients, T or joined.
            size: of an input, (N, C, H, W) or (N, T·C, H, W).
            weight_size: (T·K, C, R, S).
            dtype: that it computes in.
        """
        n, _, height, width = size
        outputs, channels, *kernel = weight_size
        (stride, _), padding, dilation = self.geometry.options
        live = "" if self.live is None else f", {len(self.live.rows)} of {self.live.mask.numel()} blocks"
        layout = "joined" if len(given) < self.groups else "streams"
        return (
            f"{_card(given[0].device)} | {step} {str(dtype).removeprefix('torch.')} | {self.groups} {layout}{live} | "
            f"{n}x{channels}x{height}x{width} to {outputs // self.groups}, kernel {_pair(kernel)}, stride {stride}, "
            f"padding {_pair(padding)}, dilation {_pair(dilation)}"
        )


def forward(problem: Problem, xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The outputs: T tensors (N, K, H', W'), or one joined one."""
    key = problem.key("forward", xs, xs[0].shape, weight.shape, xs[0].dtype)
    return _run(key, functools.partial(forward_candidates, problem), xs, weight, bias)


def input_gradient(problem: Problem, dys: Sequence[Tensor], weight: Tensor, size: Sequence[int]) -> list[Tensor]:
    """The gradients of the inputs: T tensors of this size (N, C, H, W), or one joined one of (N, T·C, H, W)."""
    key = problem.key("input gradient", dys, size, weight.shape, dys[0].dtype)
    return _run(key, functools.partial(input_gradient_candidates, problem, size), dys, weight)


def weight_gradient(
    problem: Problem, dys: Sequence[Tensor], xs: Sequence[Tensor], weight_size: Sequence[int]
) -> Tensor:
    """The gradient of the weight: (T·K, C, R, S)."""
    key = problem.key("weight gradient", xs, xs[0].shape, weight_size, xs[0].dtype)
    return _run(key, functools.partial(weight_gradient_candidates, problem, weight_size), dys, xs)[0]


def forward_candidates(problem: Problem, xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> dict[str, Run]:
    """The functions that compute :func:`forward`, by name."""
    found: dict[str, Run] = {SPLIT: lambda: _split_forward(problem, xs, weight, bias)}
    if len(xs) < problem.groups:
        found["groups"] = lambda: [
            _convolution(xs[0], weight, bias, *problem.geometry.options, False, [0, 0], problem.groups)
        ]
    for tile in tiles(weight.shape[1], weight.shape[0] // problem.groups, xs[0].shape[0], problem.block(weight.shape)):
        found[tile.name] = functools.partial(_triton_forward, problem, xs, weight, bias, tile)
    return found


def input_gradient_candidates(
    problem: Problem, size: Sequence[int], dys: Sequence[Tensor], weight: Tensor
) -> dict[str, Run]:
    """The functions that compute :func:`input_gradient`, by name."""
    found: dict[str, Run] = {SPLIT: lambda: _split_input_gradient(problem, dys, weight, size)}
    if len(dys) < problem.groups:
        found["groups"] = lambda: [
            _cudnn_backward(problem, dys[0], empty_channels_last(dys[0], size), weight, problem.groups, 0)
        ]
    block = problem.block(weight.shape)
    swapped = None if block is None else (block[1], block[0])
    for tile in tiles(weight.shape[0] // problem.groups, weight.shape[1], size[0], swapped):
        found[tile.name] = functools.partial(_triton_input_gradient, problem, dys, weight, size, tile)
    return found


def weight_gradient_candidates(
    problem: Problem, weight_size: Sequence[int], dys: Sequence[Tensor], xs: Sequence[Tensor]
) -> dict[str, Run]:
    """The functions that compute :func:`weight_gradient`, by name."""
    found: dict[str, Run] = {SPLIT: lambda: [_split_weight_gradient(problem, dys, xs, weight_size)]}
    if len(dys) < problem.groups:
        found["groups"] = lambda: [
            _cudnn_backward(problem, dys[0], xs[0], empty_channels_last(xs[0], weight_size), problem.groups, 1)
        ]
    outputs, channels, _, kernel_w = weight_size
    for tile in weight_tiles(channels, outputs // problem.groups, kernel_w, problem.block(weight_size)):
        found[tile.name] = functools.partial(_triton_weight_gradient, problem, dys, xs, tile)
    return found


def worth_an_operation(
    problem: Problem, xs: Sequence[Tensor], weight: Tensor, dtype: torch.dtype, differentiated: bool
) -> bool:
    """Whether a pass runs, or may be measured to run, anything but cuDNN one stream after another.

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
    return any(name not in (None, SPLIT) for name in known) or (None in known and choices.measures())


def _run(
    key: str, candidates: Callable[..., Mapping[str, Run]], *operands: Sequence[Tensor] | Tensor | None
) -> list[Tensor]:
    """Picks a candidate and runs it on tensors of which TMA can fetch boxes, laid out as the fake results say."""

    def trial() -> Mapping[str, Run]:
        # Not the tensors at hand: zeros, as gradients often are at first, would hide a wrong kernel and run faster.
        generators: dict[torch.device, torch.Generator] = {}
        return candidates(*(_random_like(operand, generators) for operand in operands))

    found = candidates(*operands)
    results = found[choices.pick(key, found, trial)]()
    return [result.contiguous(memory_format=torch.channels_last) for result in results]


def _random_like(operand: Sequence[Tensor] | Tensor | None, generators: dict[torch.device, torch.Generator]) -> Any:
    if operand is None:
        return None
    if isinstance(operand, Tensor):
        generator = generators.setdefault(operand.device, torch.Generator(operand.device).manual_seed(0))
        copy = torch.empty_strided(operand.shape, operand.stride(), dtype=operand.dtype, device=operand.device)
        return copy.normal_(generator=generator)
    return [_random_like(tensor, generators) for tensor in operand]


def _split_forward(problem: Problem, xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    biases = [None] * problem.groups if bias is None else bias.chunk(problem.groups)
    parts = [
        _convolution(x, w, b, *problem.geometry.options, False, [0, 0], 1)
        for x, w, b in zip(_each(xs, problem), _dense(problem, weight).chunk(problem.groups), biases, strict=True)
    ]
    return _like_given(parts, xs)


def _split_input_gradient(problem: Problem, dys: Sequence[Tensor], weight: Tensor, size: Sequence[int]) -> list[Tensor]:
    # Of the input it needs no more than the shape.
    x = empty_channels_last(dys[0], (size[0], weight.shape[1], *size[2:]))
    parts = [
        _cudnn_backward(problem, dy, x, w, 1, 0)
        for dy, w in zip(_each(dys, problem), _dense(problem, weight).chunk(problem.groups), strict=True)
    ]
    return _like_given(parts, dys)


def _split_weight_gradient(
    problem: Problem, dys: Sequence[Tensor], xs: Sequence[Tensor], weight_size: Sequence[int]
) -> Tensor:
    # Of the weight too, no more than the shape.
    weight = empty_channels_last(xs[0], (weight_size[0] // problem.groups, *weight_size[1:]))
    parts = [
        _cudnn_backward(problem, dy, x, weight, 1, 1)
        for dy, x in zip(_each(dys, problem), _each(xs, problem), strict=True)
    ]
    return _dense(problem, torch.cat(parts) if len(parts) > 1 else parts[0])


def _cudnn_backward(problem: Problem, dy: Tensor, x: Tensor, weight: Tensor, groups: int, which: int) -> Tensor:
    wanted = [which == 0, which == 1, False]
    return _convolution_backward(dy, x, weight, None, *problem.geometry.options, False, [0, 0], groups, wanted)[which]


def _triton_forward(
    problem: Problem, xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, tile: Tile
) -> list[Tensor]:
    # Imported here, as below: a machine without CUDA never imports Triton.
    from fastmerge.kernels import block_conv_triton

    return block_conv_triton.forward(_fitting(xs), weight, bias, problem.groups, problem.geometry, tile, problem.live)


def _triton_input_gradient(
    problem: Problem, dys: Sequence[Tensor], weight: Tensor, size: Sequence[int], tile: Tile
) -> list[Tensor]:
    from fastmerge.kernels import block_conv_triton

    height, width = size[2:]
    return block_conv_triton.input_gradient(
        _fitting(dys), weight, (height, width), problem.groups, problem.geometry, tile, problem.live
    )


def _triton_weight_gradient(
    problem: Problem, dys: Sequence[Tensor], xs: Sequence[Tensor], tile: WeightTile
) -> list[Tensor]:
    from fastmerge.kernels import block_conv_wgrad_triton

    return [
        block_conv_wgrad_triton.weight_gradient(
            _fitting(dys), _fitting(xs), problem.groups, problem.geometry, tile, problem.live
        )
    ]


def _fitting(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, copied where TMA can't fetch boxes of them: a gradient in another order, a tensor not 16 bytes aligned."""
    return [
        t
        if boxes_fit(t) and t.data_ptr() % 16 == 0
        else torch.empty_like(t, memory_format=torch.channels_last).copy_(t)
        for t in tensors
    ]


def _each(tensors: Sequence[Tensor], problem: Problem) -> Sequence[Tensor]:
    return tensors if len(tensors) == problem.groups else tensors[0].chunk(problem.groups, 1)


def _like_given(parts: list[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    return parts if len(parts) == len(given) else [torch.cat(parts, 1)]


def _dense(problem: Problem, weight: Tensor) -> Tensor:
    return weight if problem.live is None else masked_weight(weight, problem.live.mask)


@functools.cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _pair(pair: Sequence[int]) -> str:
    return f"{pair[0]}x{pair[1]}"
