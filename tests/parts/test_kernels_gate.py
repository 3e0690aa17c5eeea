"""The fused gate sampling against float64, in Triton's interpreter in Triton's interpreter."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from fastmerge.kernels import direct
from fastmerge.kernels.gate import sampling
from fastmerge.kernels.gate.formulas import BETA, GAMMA, ZETA, hard_concrete, open_probability
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gate_checks import (
    CONSTANTS,
    SEED,
    by_dtype,
    by_shape,
    check_against_float64,
    check_ends_of_the_uniform_numbers,
    check_extreme_loc,
    sample,
    sample_backward,
)
from interpreter import INTERPRETING, interpreted
from philox import philox, uniforms

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def seeds(*values: int) -> Tensor:
    return torch.tensor(values)


@interpreted
@by_dtype
@by_shape
def test_against_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_against_float64(shape, dtype, "cpu")


@interpreted
@by_dtype
def test_gates_of_another_dtype(dtype: torch.dtype) -> None:
    check_against_float64((33, 40), dtype, "cpu", loc_dtype=torch.float32)


def test_known_answers_of_philox() -> None:
    # From the kat_vectors of Random123, the authors' own library.
    assert [int(word) for word in philox((0, 0, 0, 0), (0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    answer = [int(word) for word in philox((ones,) * 4, (ones,) * 2)]
    assert answer == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@interpreted
def test_gates_are_never_rounded_up_to_open() -> None:
    n, channels = 400, 50
    loc = torch.full((channels,), 1.0, dtype=torch.float16)
    z = sample(loc, seeds(SEED), n, *CONSTANTS, torch.float16)
    expected_z = hard_concrete(uniforms(SEED, n, channels), loc.double())
    assert (expected_z.half() == 1).sum() > (expected_z == 1).sum()
    assert torch.equal(z == 1, expected_z == 1)


@interpreted
@pytest.mark.parametrize("layout", ["transposed", "expanded", "every second"])
def test_strided_gradient(layout: str) -> None:
    n, channels = 70, 40
    z = sample(torch.linspace(-3, 3, channels), seeds(SEED), n, *CONSTANTS, torch.float32)
    dz = {
        "transposed": torch.randn(channels, n).t(),
        "expanded": torch.randn(n, 1).expand(n, channels),
        "every second": torch.randn(2 * n, 2 * channels)[::2, ::2],
    }[layout]
    dloc = sample_backward(dz, z, *CONSTANTS, torch.float32)
    assert torch.equal(dloc, sample_backward(dz.contiguous(), z, *CONSTANTS, torch.float32))


@interpreted
def test_clamped_gates_pass_no_gradient() -> None:
    n, channels = 64, 32
    z = sample(torch.zeros(channels), seeds(SEED), n, *CONSTANTS, torch.float32)
    clamped = (z == 0) | (z == 1)
    assert clamped.any(0).all()
    dz = torch.zeros(n, channels).masked_fill(clamped, float("inf"))
    assert (sample_backward(dz, z, *CONSTANTS, torch.float32) == 0).all()


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_loc(dtype: torch.dtype) -> None:
    check_extreme_loc(dtype, "cpu")


@interpreted
def test_ends_of_the_uniform_numbers() -> None:
    check_ends_of_the_uniform_numbers("cpu")


@interpreted
def test_frequencies_and_seeds() -> None:
    n, copies = 64, 128
    loc = torch.tensor([-2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    repeated = loc.repeat_interleave(copies)
    z, again, other = (sample(repeated, seeds(s), n, *CONSTANTS, torch.float64) for s in (1, 1, 1 + 2**32))
    assert torch.equal(z, again)
    assert (z != other).double().mean() > 0.3
    full = torch.sigmoid(loc - BETA * math.log((1 - GAMMA) / (ZETA - 1)))
    for event, probability in ((z > 0, open_probability(loc)), (z == 1, full)):
        frequency = event.double().mean(0).unflatten(0, (-1, copies)).mean(1)
        assert ((frequency - probability).abs() <= 5 * (probability * (1 - probability) / (n * copies)).sqrt()).all()


@interpreted
@pytest.mark.parametrize(("n", "channels"), [(0, 4), (4, 0), (0, 0)])
def test_empty(n: int, channels: int) -> None:
    loc = torch.zeros(channels, requires_grad=True)
    z = sample(loc, seeds(1), n, *CONSTANTS, torch.float16)
    assert z.shape == (n, channels)
    z.sum().backward()
    assert loc.grad is not None
    assert loc.grad.tolist() == [0.0] * channels


@interpreted
@pytest.mark.parametrize(("loc_dim", "seed_dim"), [(0, 0), (1, 0), (0, None), (None, 0)])
def test_vmap_is_a_loop(loc_dim: int | None, seed_dim: int | None) -> None:
    size, n, channels = 3, 10, 37
    loc = torch.randn(channels if loc_dim is None else (size, channels), requires_grad=True)
    stacked = loc if loc_dim is None else loc.movedim(0, loc_dim)
    seed = seeds(5) if seed_dim is None else torch.tensor([[5], [6], [7]])

    def draw(loc: Tensor, seed: Tensor) -> Tensor:
        return sample(loc, seed, n, *CONSTANTS, torch.float32)

    z = torch.func.vmap(draw, in_dims=(loc_dim, seed_dim))(stacked, seed)
    each = torch.stack(
        [
            draw(
                loc if loc_dim is None else stacked.select(loc_dim, i),
                seed if seed_dim is None else seed[i],
            )
            for i in range(size)
        ]
    )
    assert torch.equal(z, each)
    dz = torch.randn_like(z)
    (dloc,), (each_dloc,) = torch.autograd.grad(z, loc, dz), torch.autograd.grad(each, loc, dz)
    torch.testing.assert_close(dloc, each_dloc)


@interpreted
def test_vmap_over_the_backward_pass() -> None:
    z, dz = torch.rand(20, 5), torch.randn(3, 20, 5)
    dloc = torch.func.vmap(sample_backward, in_dims=(0, None, None, None, None, None))(dz, z, *CONSTANTS, torch.float32)
    each = torch.stack([sample_backward(dz_i, z, *CONSTANTS, torch.float32) for dz_i in dz])
    assert torch.equal(dloc, each)


@interpreted
def test_opcheck() -> None:
    loc = torch.randn(9, requires_grad=True)
    torch.library.opcheck(sample, (loc, seeds(3), 5, *CONSTANTS, torch.float32))
    torch.library.opcheck(sample, (loc.detach(), seeds(3), 5, *CONSTANTS, torch.float16))
    dz, z = torch.randn(5, 9), torch.rand(5, 9)
    torch.library.opcheck(sample_backward, (dz, z, *CONSTANTS, torch.float32))


@interpreted
def test_public_function_through_the_kernel() -> None:
    torch.manual_seed(0)
    loc = torch.zeros(20, dtype=torch.float16, requires_grad=True)
    with mock.patch.object(sampling, "_runs_fused", return_value=True):
        z = sampling.sample_gates(loc, 8, beta=0.5, gamma=-0.2, zeta=1.3, dtype=torch.float32)
        other = sampling.sample_gates(loc, 8, beta=0.5, gamma=-0.2, zeta=1.3, dtype=torch.float32)
    torch.manual_seed(0)
    seed = torch.randint(2**63 - 1, (1,))
    u = uniforms(int(seed), 8, 20)
    torch.testing.assert_close(z, hard_concrete(u, loc.float(), 0.5, -0.2, 1.3), rtol=0, atol=2e-6)
    assert not torch.equal(z, other)
    (dloc,) = torch.autograd.grad(z.sum(), loc)
    assert dloc.dtype == torch.float16
    assert (dloc > 0).all()


@interpreted
def test_an_eager_call_gives_what_the_operator_gives() -> None:
    loc, dz = torch.randn(37, requires_grad=True), torch.randn(10, 37)
    found = []
    for is_direct in (True, False):
        torch.manual_seed(3)
        with (
            mock.patch.object(sampling, "_runs_fused", return_value=True),
            mock.patch.object(direct, "runs_direct", return_value=is_direct),
        ):
            z = sampling.sample_gates(loc, 10)
        assert ("_Sample" in type(z.grad_fn).__name__) == is_direct
        found.append((z, *torch.autograd.grad(z, loc, dz)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(INTERPRETING, reason="says nothing about the interpreter")
def test_cuda_takes_the_kernel() -> None:
    with torch._subclasses.FakeTensorMode():
        graph = make_fx(lambda loc: sampling.sample_gates(loc, 8))(torch.empty(20, device="cuda"))
        assert sample.default in [node.target for node in graph.graph.nodes]
        graph = make_fx(lambda loc: sampling.sample_gates(loc, 8))(torch.empty(20))
        assert sample.default not in [node.target for node in graph.graph.nodes]


def test_func_grad_is_noticed_at_any_depth() -> None:
    seen = []

    def loss(loc: Tensor) -> Tensor:
        seen.append(sampling._under_func_grad(loc))
        return loc.sum()

    loc = torch.zeros(3, 4)
    torch.func.vmap(loss)(loc)
    torch.func.vmap(torch.func.grad(loss))(loc)
    torch.func.grad(lambda loc: torch.func.vmap(loss)(loc).sum())(loc)
    assert seen == [False, True, True]
    assert not sampling._under_func_grad(loc)
