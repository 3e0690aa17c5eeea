"""A block convolution as a problem to be solved by whichever implementation is fastest: what it is, and what it is known by.

Dims: T streams, N batch, C input channels, K output channels (of one stream), H W positions, R S kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fastmerge.kernels.block_conv.arithmetic import arithmetic
from fastmerge.kernels.block_conv.formulas import Geometry, LiveBlocks


@dataclass(frozen=True)
class Problem:
    """A convolution, whatever its tensors hold.

    Attributes:
        groups: T.
        geometry: of the convolution.
        live: the live blocks of a block-sparse weight, T being 1; None for a block diagonal.
        channels_last: the layout of the result and of both gradients, as of the input; contiguous otherwise.
    """

    groups: int
    geometry: Geometry
    live: LiveBlocks | None = None
    channels_last: bool = True

    def block(self, weight_size: Sequence[int]) -> tuple[int, int] | None:
        """Output and input channels of a block of a block-sparse weight."""
        return None if self.live is None else self.live.block(weight_size)

    def key(
        self,
        step: str,
        joined: bool,
        size: Sequence[int],
        weight_size: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> str:
        """Card, pass, arithmetic, shapes and layout, as text: what a measured choice holds for.

        Args:
            step: name of the pass.
            joined: whether there is one tensor for all streams.
            size: of an input, (N, C, H, W) or (N, T·C, H, W).
            weight_size: (T·K, C, R, S).
            dtype: that it computes in.
            device: that it runs on.
        """
        n, _, height, width = size
        outputs, channels, *kernel = weight_size
        (stride, _), padding, dilation = self.geometry.options
        live = "" if self.live is None else f", {len(self.live.rows)} of {_pair(self.live.mask.shape)} blocks"
        streams = "joined" if joined else "streams"
        layout = "channels-last" if self.channels_last else "contiguous"
        return (
            f"{_card(device)} | {step} {arithmetic(dtype)} | {self.groups} {streams}{live} | "
            f"{n}x{channels}x{height}x{width} {layout} to {outputs // self.groups}, kernel {_pair(kernel)}, stride {stride}, "
            f"padding {_pair(padding)}, dilation {_pair(dilation)}"
        )


@functools.cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _pair(pair: Sequence[int]) -> str:
    return f"{pair[0]}x{pair[1]}"
