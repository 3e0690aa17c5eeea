"""Every tile of the block convolution's kernels on a GPU or its emulator, against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from fastmerge.kernels.block_conv.arithmetic import arithmetic
from fastmerge.kernels.block_conv.choice import compile_beside_each_other
from fastmerge.kernels.block_conv.formulas import LiveBlocks
from fastmerge.kernels.block_conv.tiles import tiles, weight_tiles
from torch import Tensor

from block_conv_checks import Case, Operands, compare


def every_tile(
    case: Case,
    given: Operands,
    xs: list[Tensor],
    dys: list[Tensor],
    live: LiveBlocks | None = None,
    most: int = 100,
) -> Iterator[tuple[str, str, Callable[[], list[Tensor]]]]:
    """Pass, tile and function of every candidate, or the first few, all compiled when the first is handed out."""
    from fastmerge.kernels.block_conv import launch_triton

    options = (case.streams, case.geometry)
    block = None if live is None else live.block(given.weight.shape)
    kind = arithmetic(given.weight.dtype)
    found: list[tuple[str, str, Callable[[], list[Tensor]]]] = []
    for tile in tiles(case.c, case.k, case.n, block, kind)[:most]:
        forward = functools.partial(launch_triton.forward, xs, given.weight, given.bias, *options, tile=tile, live=live)
        found.append(("y", tile.name, forward))
    for tile in tiles(case.k, case.c, case.n, None if block is None else (block[1], block[0]), kind)[:most]:
        size = (case.height, case.width)
        gradient = functools.partial(
            launch_triton.input_gradient, dys, given.weight, size, *options, tile=tile, live=live
        )
        found.append(("dx", tile.name, gradient))
    for weight_tile in weight_tiles(case.c, case.k, case.kernel, block, kind)[:most]:

        def weight_gradient(weight_tile: object = weight_tile) -> list[Tensor]:
            return [launch_triton.weight_gradient(dys, xs, *options, tile=weight_tile, live=live)]

        found.append(("dw", weight_tile.name, weight_gradient))
    if given.weight.is_cuda:
        compile_beside_each_other([run for _, _, run in found])
    yield from found


def check_tiles(case: Case, given: Operands, xs: list[Tensor], dys: list[Tensor], **options: object) -> None:
    """Compares what every tile computes, on a GPU or its emulator, with float64; see :func:`every_tile`."""
    wrong = []
    for name, tile, run in every_tile(case, given, xs, dys, **options):
        try:
            compare(name, run(), given, tensor_cores=True)
        except Exception as error:  # all that are wrong are to be named, not the first alone
            wrong.append(f"{name}, {tile}: {type(error).__name__}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
