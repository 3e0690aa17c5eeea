"""What the tests of the block convolution share: cases, float64 references, and the comparison with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fastmerge.kernels.block_conv.arithmetic import arithmetic
from fastmerge.kernels.block_conv.formulas import (
    Geometry,
    block_diagonal_reference,
    block_sparse_reference,
)
from torch import Tensor

# Relative to the result: half a unit in the last place, or a whole one, since the interpreter truncates to bfloat16.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
# Relative to the sum of the terms' sizes: float32 accumulation in any order.
ACCUMULATION = {torch.float32: 2e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}
# Likewise: both factors cut to TF32's 10 bits.
TF32 = 2.0**-9


@dataclass(frozen=True)
class Case:
    """T convolutions: from C to K channels, of N samples of height × width.

    The kernel is square unless it has a number of columns of its own, the padding half of it unless it is given.
    """

    streams: int
    n: int
    height: int
    width: int
    c: int
    k: int
    kernel: int
    stride: int
    padding: int = -1
    dilation: int = 1
    columns: int = 0

    @property
    def geometry(self) -> Geometry:
        kernel = (self.kernel, self.columns or self.kernel)
        rows, columns = (edge // 2 if self.padding < 0 else self.padding for edge in kernel)
        return Geometry(kernel, (self.stride, self.stride), (rows, columns), (self.dilation, self.dilation))


# Odd sizes, three streams, channels that fill no tile.
ODD = [
    Case(3, 5, 7, 9, 24, 40, 3, 1),
    Case(3, 5, 7, 9, 24, 40, 3, 2),
    Case(2, 1, 2, 2, 8, 8, 3, 2),
    Case(2, 3, 9, 7, 200, 72, 1, 1),
    Case(2, 3, 9, 7, 72, 200, 1, 2),
    Case(2, 2, 11, 13, 48, 48, 3, 1, padding=2, dilation=2),
    Case(1, 1, 1, 1, 8, 8, 1, 1),
]


@dataclass
class Operands:
    """Random tensors of a case, T of each in lists, and what float64 makes of them."""

    xs: list[Tensor]
    weight: Tensor
    bias: Tensor
    dys: list[Tensor]
    expected: dict[str, list[Tensor]]
    sizes: dict[str, list[Tensor]]


def operands(case: Case, dtype: torch.dtype, device: str = "cpu", mask: Tensor | None = None) -> Operands:
    """Random operands, with results and, for the tolerance, the sums of their terms' sizes."""
    geometry = case.geometry
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    def channels_last(*size: int) -> Tensor:
        return random(*size).contiguous(memory_format=torch.channels_last)

    out = geometry.output_size(case.height, case.width)
    xs = [channels_last(case.n, case.c, case.height, case.width) for _ in range(case.streams)]
    weight = random(case.streams * case.k, case.c, *geometry.kernel)
    bias = random(case.streams * case.k)
    dys = [channels_last(case.n, case.k, *out) for _ in range(case.streams)]
    expected = _float64(xs, weight, bias, dys, geometry, mask, signs=True)
    return Operands(xs, weight, bias, dys, expected, _float64(xs, weight, bias, dys, geometry, mask, signs=False))


def _float64(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    dys: Sequence[Tensor],
    geometry: Geometry,
    mask: Tensor | None,
    signs: bool,
) -> dict[str, list[Tensor]]:
    given = [*xs, weight, bias, *dys]
    values = [t.detach().double() if signs else t.detach().double().abs() for t in given]
    count = len(xs)
    leaves = [value.requires_grad_() for value in values[: count + 2]]
    # cuDNN may have no deterministic algorithm for float64.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    if mask is None:
        ys = block_diagonal_reference(leaves[:count], leaves[-2], leaves[-1], geometry)
    else:
        ys = (block_sparse_reference(leaves[0], leaves[-2], mask, leaves[-1], geometry),)
    gradients = torch.autograd.grad(ys, leaves, values[count + 2 :])
    torch.use_deterministic_algorithms(deterministic)
    return {
        "y": [y.detach() for y in ys],
        "dx": list(gradients[:count]),
        "dw": [gradients[count]],
        "db": [gradients[count + 1]],
    }


def joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The streams' channels side by side in one tensor."""
    return [torch.cat(list(tensors), 1).contiguous(memory_format=torch.channels_last)]


def slices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values as slices of the channels of wider tensors, with NaN in the channels around them."""
    views = []
    for tensor in tensors:
        channels = tensor.shape[1]
        wide = torch.full_like(torch.cat([tensor, tensor, tensor[:, :8]], 1), float("nan"))
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, 8 : 8 + channels] = tensor
        views.append(wide[:, 8 : 8 + channels])
    return views


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in contiguous tensors."""
    return [tensor.contiguous() for tensor in tensors]


def contiguous_slices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values as slices of the channels of wider contiguous tensors, with NaN in the channels around them."""
    found = []
    for tensor in tensors:
        wide = torch.full_like(torch.cat([tensor, tensor], 1), float("nan"), memory_format=torch.contiguous_format)
        wide[:, 3 : 3 + tensor.shape[1]] = tensor
        found.append(wide[:, 3 : 3 + tensor.shape[1]])
    return found


def compare(
    name: str, got: Sequence[Tensor], given: Operands, slack: float = 1, tensor_cores: bool | None = None
) -> None:
    """Compares each result with float64; a joined one is taken apart.

    Args:
        name: "y", "dx", "dw" or "db".
        got: the results.
        given: what they were computed from.
        slack: how many times the tolerance is allowed.
        tensor_cores: whether they may have multiplied float32 in TF32; by default, if the results are a GPU's.
    """
    expected, sizes = given.expected[name], given.sizes[name]
    if len(got) < len(expected):
        got = got[0].chunk(len(expected), 1)
    assert len(got) == len(expected)
    for result, right, size in zip(got, expected, sizes, strict=True):
        assert result.shape == right.shape
        error = (result.double() - right).abs()
        cut = (result.is_cuda if tensor_cores is None else tensor_cores) and arithmetic(result.dtype) == "tf32"
        per_term = TF32 if cut else ACCUMULATION[result.dtype]
        allowed = slack * (ROUNDING[result.dtype] * right.abs() + per_term * size) + torch.finfo(result.dtype).tiny
        # Written so that a NaN fails.
        assert (error <= allowed).all(), (
            f"{name} is off by up to {(error / allowed).nan_to_num(1e9).max():.1f} tolerances"
        )


def random_mask(rows: int, columns: int, kind: str) -> Tensor:
    """A mask of live blocks."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(2)) < 0.5
    if kind == "full":
        mask[:] = True
    elif kind == "none":
        mask[:] = False
    elif kind == "empty row":
        mask[:] = True
        mask[-1] = False
    elif kind == "empty column":
        mask[:] = True
        mask[:, 0] = False
    elif kind == "diagonal":
        mask = torch.eye(rows, columns).bool()
    return mask
