"""Convolutions that PyTorch runs slowly on a CPU: another way gives the same, where it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastmerge import self_check
from fastmerge.cpu_convolutions import by_matrix, depthwise


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {"padding": 1}),
        ((3, 3), {"stride": 2, "padding": 1}),
        ((1, 1), {"stride": (1, 2)}),
        ((5, 2), {"stride": (3, 1), "padding": (0, 2), "dilation": (1, 3)}),
        ((11, 9), {}),
    ],
)
@pytest.mark.parametrize("groups", [1, 100])
def test_they_give_the_same(
    kernel: tuple[int, int], options: dict[str, int | tuple[int, int]], groups: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 100, 11, 9), (100, 100 // groups, *kernel), (100,))
    )
    given = offset if bias else None
    pairs = {key: (value, value) if isinstance(value, int) else value for key, value in options.items()}
    sizes = pairs.get("stride", (1, 1)), pairs.get("padding", (0, 0)), pairs.get("dilation", (1, 1))
    expected = F.conv2d(x, weight, given, groups=groups, **options)
    actual = (by_matrix if groups == 1 else depthwise)(x, weight, given, *sizes)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-12)
    assert actual.is_contiguous()


class _Convolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "transposed", "groups", "size", "is_own"),
    [
        (torch.float64, False, 16, 8, True),
        (torch.float32, False, 16, 8, False),
        (torch.float64, False, 8, 8, False),
        (torch.float64, True, 16, 8, False),
        (torch.float32, False, 1, 1, True),
        (torch.float32, False, 1, 8, False),
        (torch.float64, False, 1, 1, False),
    ],
)
def test_the_check_runs_those_alone(dtype: torch.dtype, transposed: bool, groups: int, size: int, is_own: bool) -> None:
    x, weight = torch.randn(2, 16, size, size, dtype=dtype), torch.randn(16, 16 // groups, 3, 3, dtype=dtype)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    with _Convolutions() as ran, self_check._HeldStill():
        actual = convolve(x, weight, padding=1, groups=groups)
    assert ran.count == (not is_own)
    torch.testing.assert_close(actual, convolve(x, weight, padding=1, groups=groups))
