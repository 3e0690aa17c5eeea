"""What the tests of the gate sampling share: the float64 reference and the comparison with it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from fastmerge.kernels.gate import sampling  # noqa: F401, which registers the operations
from fastmerge.kernels.gate.formulas import BETA, GAMMA, ZETA, hard_concrete
from torch import Tensor

from philox import uniforms

CONSTANTS = (BETA, GAMMA, ZETA)
SEED = 0x123456789ABCDEF
# Smallest, odd, typical, and just past the blocks of either pass: (16, 128) forward, (256, 32) backward.
SHAPES = [(1, 1), (7, 13), (64, 160), (257, 129)]
# Absolute for gates; for gradients relative to the sum of the terms' sizes. The interpreter truncates to bfloat16.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

by_dtype = pytest.mark.parametrize("dtype", TOLERANCES)
by_shape = pytest.mark.parametrize("shape", SHAPES)

sample = torch.ops.fastmerge.sample_gates
sample_backward = torch.ops.fastmerge.sample_gates_backward


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills new tensors with NaN, so that an element a kernel skips is seen; forbids nondeterministic operations."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def check_against_float64(
    shape: tuple[int, int], dtype: torch.dtype, device: str, loc_dtype: torch.dtype | None = None
) -> None:
    """Compares gates of a dtype, and the gradient of loc, with those of the same uniform numbers in float64."""
    n, channels = shape
    loc_dtype = loc_dtype or dtype
    loc = torch.linspace(-3, 3, channels, dtype=torch.float64).to(device, loc_dtype).requires_grad_()
    z = sample(loc, torch.tensor([SEED], device=device), n, *CONSTANTS, dtype)
    dz = torch.randn(n, channels, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    (dloc,) = torch.autograd.grad(z, loc, dz)
    expected_z, expected_dloc, size = _expected(loc, n, dz)

    assert (z.dtype, dloc.dtype) == (dtype, loc_dtype)
    tolerance = max(TOLERANCES[dtype], TOLERANCES[loc_dtype])
    torch.testing.assert_close(z.cpu().double(), expected_z, rtol=0, atol=tolerance)
    assert ((dloc.cpu().double() - expected_dloc).abs() <= tolerance * (1 + size)).all()


def check_extreme_loc(dtype: torch.dtype, device: str) -> None:
    """Gates far out are exactly shut or open and pass no gradient; a NaN is not hidden."""
    loc = torch.tensor([-math.inf, -1e4, 1e4, math.inf, math.nan], dtype=dtype, device=device, requires_grad=True)
    z = sample(loc, torch.tensor([SEED], device=device), 6, *CONSTANTS, dtype)
    assert z[:, :4].tolist() == [[0, 0, 1, 1]] * 6
    assert z[:, 4].isnan().all()
    (dloc,) = torch.autograd.grad(z.sum(), loc)
    assert dloc[:4].tolist() == [0, 0, 0, 0]
    assert dloc[4].isnan()


def check_ends_of_the_uniform_numbers(device: str) -> None:
    """The least and the largest number that can be drawn are kept off 0 and 1, as in the reference."""
    # Seeds found by search. Without the margin the first gate would be 0 and the second nearly 1.
    for seed, sample_index, channel, u, loc, z in (
        (42591, 1, 23, 0.0, 20.0, 1.0),
        (25665, 2, 31, 1 - 2**-24, -15.0, 0.075),
    ):
        assert uniforms(seed, 4, 32)[sample_index, channel] == u
        drawn = sample(
            torch.full((32,), loc, device=device), torch.tensor([seed], device=device), 4, *CONSTANTS, torch.float32
        )
        assert drawn[sample_index, channel].item() == pytest.approx(z, abs=5e-3)


def _expected(loc: Tensor, n: int, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, gradient of loc, and the sum of the gradient's terms without their signs."""
    loc = loc.detach().cpu().double().requires_grad_()
    z = hard_concrete(uniforms(SEED, n, loc.shape[0]), loc)
    dz = dz.cpu().double()
    (dloc,) = torch.autograd.grad(z, loc, dz, retain_graph=True)
    (size,) = torch.autograd.grad(z, loc, dz.abs())
    return z.detach(), dloc, size
