"""What the tests of the gate sampling share: the float64 reference and the comparison with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fastmerge.kernels import gate  # noqa: F401, which registers the operations
from fastmerge.kernels.gate_formulas import BETA, GAMMA, ZETA, hard_concrete
from philox import uniforms
from torch import Tensor

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


def check_against_float64(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Compares gates and the gradient of loc with those of the same uniform numbers in float64."""
    n, channels = shape
    loc = torch.linspace(-3, 3, channels, dtype=torch.float64).to(device, dtype).requires_grad_()
    z = sample(loc, torch.tensor([SEED], device=device), n, *CONSTANTS, dtype)
    dz = torch.randn(n, channels, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    (dloc,) = torch.autograd.grad(z, loc, dz)
    expected_z, expected_dloc, size = _expected(loc, n, dz)

    assert z.dtype == dloc.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(z.cpu().double(), expected_z, rtol=0, atol=tolerance)
    assert ((dloc.cpu().double() - expected_dloc).abs() <= tolerance * (1 + size)).all()


def _expected(loc: Tensor, n: int, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, gradient of loc, and the sum of the gradient's terms without their signs."""
    loc = loc.detach().cpu().double().requires_grad_()
    z = hard_concrete(uniforms(SEED, n, loc.shape[0]), loc)
    dz = dz.cpu().double()
    (dloc,) = torch.autograd.grad(z, loc, dz, retain_graph=True)
    (size,) = torch.autograd.grad(z, loc, dz.abs())
    return z.detach(), dloc, size
