"""The fused gate sampling on a CUDA device (``pytest -m gpu``)."""

from __future__ import annotations

import pytest
import torch
from fastmerge.kernels.gate import sample_gates
from fastmerge.kernels.gate.formulas import hard_concrete

from gate_checks import (
    CONSTANTS,
    by_dtype,
    by_shape,
    check_against_float64,
    check_ends_of_the_uniform_numbers,
    check_extreme_loc,
    sample,
    sample_backward,
)
from philox import uniforms

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@by_dtype
@by_shape
def test_against_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_against_float64(shape, dtype, "cuda")


@by_dtype
def test_gates_of_another_dtype(dtype: torch.dtype) -> None:
    check_against_float64((33, 40), dtype, "cuda", loc_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_loc(dtype: torch.dtype) -> None:
    check_extreme_loc(dtype, "cuda")


def test_ends_of_the_uniform_numbers() -> None:
    check_ends_of_the_uniform_numbers("cuda")


def test_gates_are_never_rounded_up_to_open() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        loc = torch.full((200,), 1.0, dtype=dtype, device="cuda")
        z = sample(loc, torch.tensor([7], device="cuda"), 400, *CONSTANTS, dtype).cpu()
        expected = hard_concrete(uniforms(7, 400, 200), loc.cpu().double())
        # float32 and float64 may disagree on a gate at the very edge.
        assert (expected.to(dtype) == 1).sum() > (expected == 1).sum() + 20
        assert ((z == 1) != (expected == 1)).sum() <= 2


def test_manual_seed_repeats() -> None:
    loc = torch.zeros(300, device="cuda")
    torch.manual_seed(3)
    first, second = sample_gates(loc, 64), sample_gates(loc, 64)
    torch.manual_seed(3)
    assert torch.equal(first, sample_gates(loc, 64))
    assert not torch.equal(first, second)


def test_gradients_repeat_bit_by_bit() -> None:
    z, dz = torch.rand(5000, 300, device="cuda"), torch.randn(5000, 300, device="cuda")
    gradients = [sample_backward(dz, z, *CONSTANTS, torch.float32) for _ in range(5)]
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients[1:])


def test_replayed_graph_draws_anew() -> None:
    loc = torch.zeros(300, device="cuda", requires_grad=True)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        z = sample_gates(loc, 64)
        return z, torch.autograd.grad(z.sum(), loc)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, dloc = step()

    draws = []
    for seed in (None, None, 5, 5):
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        draws.append(z.clone())
        # Of the same strides as the gradient of a sum: others are added up in another order.
        ones = torch.ones((), device="cuda").expand_as(z)
        assert torch.equal(dloc, sample_backward(ones, z, *CONSTANTS, torch.float32))
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[2], draws[3])


def test_vmap_draws_for_each() -> None:
    loc = torch.zeros(3, 50, device="cuda", requires_grad=True)
    z = torch.func.vmap(lambda loc: sample_gates(loc, 20), randomness="different")(loc)
    assert z.shape == (3, 20, 50)
    assert not torch.equal(z[0], z[1])
    (gradient,) = torch.autograd.grad(z[0].sum(), loc)
    assert (gradient[0] > 0).all()
    assert (gradient[1:] == 0).all()


def test_func_grad_runs_the_reference() -> None:
    loc = torch.zeros(3, 50, device="cuda")
    gradient = torch.func.vmap(torch.func.grad(lambda loc: sample_gates(loc, 20).sum()), randomness="different")(loc)
    assert gradient.shape == loc.shape
    assert (gradient > 0).all()


def test_torch_compile_takes_it_whole() -> None:
    loc = torch.zeros(50, device="cuda", requires_grad=True)
    compiled = torch.compile(lambda loc: sample_gates(loc, 20) * 2, fullgraph=True)
    first, second = compiled(loc), compiled(loc)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert loc.grad is not None
    assert (loc.grad > 0).all()


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    z = sample_gates(torch.zeros(50, device="cuda:1"), 20)
    assert z.device == torch.device("cuda:1")
    assert z.isfinite().all()
