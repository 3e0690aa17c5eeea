"""The hard concrete distribution in plain PyTorch, and the sampling where no kernel runs."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastmerge.kernels.gate import sample_gates
from fastmerge.kernels.gate.formulas import (
    BETA,
    GAMMA,
    ZETA,
    hard_concrete,
    hard_concrete_mean,
    open_probability,
    sample_gates_reference,
)
from torch.fx.experimental.proxy_tensor import make_fx

LOC = [-4.0, -1.0, 0.0, 1.0, 4.0]


def test_formula_by_hand() -> None:
    # u = 1/2 leaves loc / beta: sigmoid(1.5 log 4) = 8/9, stretched to 8/9 * 1.2 - 0.1.
    loc = torch.tensor([math.log(4.0), -math.log(4.0)], dtype=torch.float64)
    z = hard_concrete(torch.full((1, 2), 0.5), loc)
    assert z[0].tolist() == pytest.approx([8 / 9 * 1.2 - 0.1, 1 / 9 * 1.2 - 0.1], abs=1e-12)


def test_sampled_frequencies() -> None:
    torch.manual_seed(0)
    n = 40_000
    loc = torch.tensor(LOC, dtype=torch.float64)
    z = sample_gates(loc, n)
    open_ = open_probability(loc)
    full = torch.sigmoid(loc - BETA * math.log((1 - GAMMA) / (ZETA - 1)))
    for frequency, probability in ((z > 0, open_), (z == 1, full)):
        error = (frequency.double().mean(0) - probability).abs()
        assert (error <= 5 * (probability * (1 - probability) / n).sqrt()).all()


def test_gradient() -> None:
    u = torch.linspace(0.01, 0.99, 21, dtype=torch.float64)[:, None].expand(21, len(LOC))
    loc = torch.tensor(LOC, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda loc: hard_concrete(u, loc), (loc,))
    z = hard_concrete(u, loc)
    clamped = (z == 0) | (z == 1)
    assert clamped.any()
    assert not clamped.all()
    (gradient,) = torch.autograd.grad(z[clamped].sum(), loc)
    assert (gradient == 0).all()


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_uniform_numbers_at_the_ends(u: float) -> None:
    loc = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    z = hard_concrete(torch.full((1, 3), u), loc)
    z.sum().backward()
    assert z[0].tolist() == [0.0, u, 1.0]
    assert loc.grad is not None
    assert loc.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_changes_the_rounding_alone(dtype: torch.dtype) -> None:
    loc = torch.tensor(LOC).to(dtype)
    exact = loc.double()
    margin = torch.finfo(dtype).eps
    for function in (hard_concrete_mean, open_probability):
        assert function(loc).dtype == dtype
        torch.testing.assert_close(function(loc).double(), function(exact), rtol=0, atol=margin)
    assert sample_gates(loc, 3).dtype == dtype
    assert sample_gates(loc, 3, dtype=torch.float32).dtype == torch.float32


def test_mean_closes_and_opens() -> None:
    mean = hard_concrete_mean(torch.tensor([-10.0, 0.0, 10.0]))
    assert mean.tolist() == pytest.approx([0.0, 0.5, 1.0], abs=1e-7)
    assert mean[[0, 2]].tolist() == [0.0, 1.0]


def test_seed_repeats_and_differs() -> None:
    loc = torch.zeros(50)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(sample_gates(loc, 20))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(sample_gates(loc, 20), sample_gates(loc, 20))


def test_vmap_draws_for_each() -> None:
    loc = torch.zeros(2, 50, requires_grad=True)
    z = torch.func.vmap(lambda loc: sample_gates(loc, 20), randomness="different")(loc)
    assert z.shape == (2, 20, 50)
    assert not torch.equal(z[0], z[1])
    (gradient,) = torch.autograd.grad(z[0].sum(), loc)
    assert (gradient[0] > 0).all()
    assert (gradient[1] == 0).all()


def test_traced_graph_draws_anew() -> None:
    loc = torch.zeros(50)
    graph = make_fx(lambda loc: sample_gates(loc, 20))(loc)
    assert not torch.equal(graph(loc), graph(loc))


def test_torch_compile_takes_it_whole() -> None:
    loc = torch.zeros(50, requires_grad=True)
    compiled = torch.compile(lambda loc: sample_gates(loc, 20), fullgraph=True, backend="aot_eager")
    compiled(loc).sum().backward()
    assert loc.grad is not None
    assert (loc.grad > 0).all()


def test_works_without_triton() -> None:
    # None in sys.modules makes every import of triton an ImportError.
    code = """
import sys
sys.modules["triton"] = None
import torch
from fastmerge.kernels.gate import sample_gates
assert sample_gates(torch.zeros(3), 2).shape == (2, 3)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(("n", "channels"), [(0, 4), (4, 0)])
def test_empty(n: int, channels: int) -> None:
    assert sample_gates_reference(torch.zeros(channels), n).shape == (n, channels)


@pytest.mark.parametrize(
    ("loc", "n", "message"),
    [
        (torch.zeros(2, 3), 4, r"shape \(2, 3\)"),
        (torch.zeros(3, dtype=torch.int64), 4, "int64"),
        (torch.zeros(3), -1, "got -1"),
    ],
)
def test_bad_arguments(loc: torch.Tensor, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_gates(loc, n)
