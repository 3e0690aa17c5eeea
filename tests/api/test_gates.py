"""HardConcrete against its closed forms, computed here from the formulas of the paper and not from the library."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

import fastmerge

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
SAMPLES = 40_000
LOCS = [-3.0, -0.5, 0.0, 1.0, 2.5]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def gate_at(loc: list[float], dtype: torch.dtype = torch.float64, **constants: float) -> fastmerge.HardConcrete:
    gate = fastmerge.HardConcrete(len(loc), **constants).to(dtype)
    with torch.no_grad():
        gate.loc.copy_(torch.tensor(loc, dtype=torch.float64))
    return gate


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def closed_form(u: Tensor, loc: float, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    s = torch.sigmoid((u.log() - (1 - u).log() + loc) / beta)
    return (s * (zeta - gamma) + gamma).clamp(0, 1)


def test_starts_open_near_one() -> None:
    loc = fastmerge.HardConcrete(4000).loc.detach()
    assert loc.shape == (4000,)
    assert abs(loc.mean() - 1) < 5 * 0.01 / 4000**0.5
    assert 0.009 < loc.std() < 0.011


def test_two_gates_start_apart() -> None:
    assert not torch.equal(fastmerge.HardConcrete(5).loc, fastmerge.HardConcrete(5).loc)


def test_probability_of_a_closed_gate() -> None:
    """``P[g = 0] = sigmoid(beta log(-gamma/zeta) - loc)``, in frequencies and in ``open_probability``."""
    gate = gate_at(LOCS)
    expected = torch.tensor([sigmoid(BETA * math.log(-GAMMA / ZETA) - loc) for loc in LOCS], dtype=torch.float64)
    torch.testing.assert_close(1 - gate.open_probability(), expected)
    frequency = (gate.sample(SAMPLES) == 0).double().mean(0)
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / SAMPLES).sqrt()).all()


def test_probability_of_a_fully_open_gate() -> None:
    """``P[g = 1] = sigmoid(loc - beta log((1 - gamma)/(zeta - 1)))``."""
    expected = torch.tensor([sigmoid(loc - BETA * math.log((1 - GAMMA) / (ZETA - 1))) for loc in LOCS])
    frequency = (gate_at(LOCS).sample(SAMPLES) == 1).double().mean(0)
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / SAMPLES).sqrt()).all()


def test_mean_of_samples_is_the_integral() -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    expected = torch.stack([closed_form(u, loc).mean() for loc in LOCS])
    spread = torch.stack([closed_form(u, loc).std() for loc in LOCS])
    mean = gate_at(LOCS).sample(SAMPLES).mean(0)
    assert ((mean - expected).abs() < 5 * spread / SAMPLES**0.5).all()


def test_samples_have_the_closed_forms_distribution() -> None:
    """The largest distance between the sampled and the exact cumulative distribution inside (0, 1)."""
    values = gate_at([0.4]).sample(SAMPLES).flatten().sort().values
    inside = values[(values > 0) & (values < 1)]
    s = (inside - GAMMA) / (ZETA - GAMMA)
    exact = torch.sigmoid(BETA * (s.log() - (1 - s).log()) - 0.4)
    empirical = ((values <= 0).sum() + torch.arange(1, len(inside) + 1)) / SAMPLES
    assert (exact - empirical).abs().max() < 2 / SAMPLES**0.5


def test_deterministic_gate() -> None:
    """``clamp(sigmoid(loc)(zeta - gamma) + gamma, 0, 1)``: no temperature, no draw."""
    gate = gate_at(LOCS)
    expected = [min(1.0, max(0.0, sigmoid(loc) * (ZETA - GAMMA) + GAMMA)) for loc in LOCS]
    torch.testing.assert_close(gate.mean(), torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(gate.mean(), gate.mean())


def test_other_constants() -> None:
    constants = {"beta": 0.4, "gamma": -0.3, "zeta": 1.2}
    gate = gate_at([0.2], **constants)
    torch.testing.assert_close(gate.open_probability().item(), sigmoid(0.2 - 0.4 * math.log(0.3 / 1.2)))
    torch.testing.assert_close(gate.mean().item(), sigmoid(0.2) * 1.5 - 0.3)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert abs(gate.sample(SAMPLES).mean() - closed_form(u, 0.2, **constants).mean()) < 5 * 0.5 / SAMPLES**0.5


def sample_with_seed(gate: fastmerge.HardConcrete, n: int = 64) -> Tensor:
    torch.manual_seed(7)
    return gate.sample(n)


def test_gradient_of_a_sample_is_the_difference_quotient_at_fixed_u() -> None:
    weight = torch.randn(64, len(LOCS), dtype=torch.float64)
    gate, h = gate_at(LOCS), 1e-6
    (sample_with_seed(gate) * weight).sum().backward()
    above, below = (sample_with_seed(gate_at([loc + d for loc in LOCS])) for d in (h, -h))
    quotient = (above - below) / (2 * h)
    # at a kink, where u lands within h of the clamp, the quotient is neither side's slope
    kinks = ((above > 0) != (below > 0)) | ((above < 1) != (below < 1))
    assert not kinks.any()
    torch.testing.assert_close(gate.loc.grad, (quotient * weight).sum(0), rtol=1e-6, atol=1e-7)


def test_gradient_inside_is_the_analytic_one_and_clamped_gates_have_none() -> None:
    gate = gate_at([0.3])
    values = sample_with_seed(gate, 200)
    grads = [torch.autograd.grad(v, gate.loc, retain_graph=True)[0].item() for v in values.flatten()]
    z = values.detach().flatten()
    expected = (z - GAMMA) * (ZETA - z) / (BETA * (ZETA - GAMMA)) * ((z > 0) & (z < 1))
    torch.testing.assert_close(torch.tensor(grads, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)
    assert (z == 0).any()
    assert (z == 1).any()


def test_gradients_of_the_deterministic_forms() -> None:
    gate = gate_at(LOCS).eval()
    (gradient,) = torch.autograd.grad(gate.mean().sum(), gate.loc)
    slope = [
        (ZETA - GAMMA) * sigmoid(loc) * sigmoid(-loc) if 0 < m < 1 else 0.0
        for loc, m in zip(LOCS, gate.mean().tolist(), strict=True)
    ]
    torch.testing.assert_close(gradient, torch.tensor(slope, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(gate.open_probability().sum(), gate.loc)
    p = gate.open_probability().detach()
    torch.testing.assert_close(gradient, p * (1 - p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loc", [-1e4, -100.0, -30.0, 30.0, 100.0, 1e4])
def test_extreme_loc_is_exact_and_finite(dtype: torch.dtype, loc: float) -> None:
    gate = gate_at([loc], dtype)
    expected = float(loc > 0)
    values = gate.sample(2000)
    assert (values == expected).all()
    assert (gate.mean() == expected).all()
    (values.sum() + gate.mean().sum() + gate.open_probability().sum()).backward()
    assert torch.isfinite(gate.open_probability()).all()
    assert torch.isfinite(gate.loc.grad).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    gate = gate_at(LOCS, dtype)
    values = gate.sample(4000)
    assert values.dtype == gate.mean().dtype == gate.open_probability().dtype == dtype
    assert values.shape == (4000, 5)
    assert values.min() >= 0
    assert values.max() <= 1
    exact = gate_at(gate.loc.detach().double().tolist())
    error = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(gate.mean().double(), exact.mean(), rtol=error, atol=error)
    torch.testing.assert_close(gate.open_probability().double(), exact.open_probability(), rtol=error, atol=error)
    # half precision must not round small uniform numbers to 0, which would close gates that are seldom closed
    closed = (values == 0).double().mean(0)
    expected = 1 - exact.open_probability().detach()
    assert ((closed - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + error).all()
    values.sum().backward()
    assert gate.loc.grad.dtype == dtype
    assert torch.isfinite(gate.loc.grad).all()


def test_seeds_repeat_and_differ() -> None:
    gate = gate_at(LOCS)
    first, again = sample_with_seed(gate), sample_with_seed(gate)
    assert torch.equal(first, again)
    assert not torch.equal(first, gate.sample(64))


def test_samples_and_channels_are_independent() -> None:
    values = gate_at([0.0] * 8).sample(5000)
    assert (torch.corrcoef(values.T) - torch.eye(8)).abs().max() < 5 / 5000**0.5
    shifted = torch.corrcoef(torch.stack([values[:-1].flatten(), values[1:].flatten()]))[0, 1]
    assert shifted.abs() < 5 / 39_992**0.5


def test_no_samples() -> None:
    gate = gate_at(LOCS)
    assert gate.sample(0).shape == (0, 5)
    gate.sample(0).sum().backward()
    assert torch.equal(gate.loc.grad, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 7), (3, 5, 4, 4)])
def test_as_a_module_it_gates_channels(shape: tuple[int, ...]) -> None:
    gate = gate_at(LOCS)
    x = torch.randn(shape, dtype=torch.float64)
    per_channel = (slice(None), slice(None), *[None] * (len(shape) - 2))
    torch.testing.assert_close(gate.eval()(x), x * gate.mean()[None][per_channel])
    torch.manual_seed(7)
    out = gate.train()(x)
    torch.manual_seed(7)
    torch.testing.assert_close(out, x * gate.sample(3)[per_channel])


def test_state_and_copies() -> None:
    gate = gate_at(LOCS)
    other = fastmerge.HardConcrete(5).double()
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.mean(), gate.mean())
    assert torch.equal(sample_with_seed(copy.deepcopy(gate)), sample_with_seed(gate))
    assert [name for name, _ in gate.named_parameters()] == ["loc"]


@pytest.mark.parametrize(
    ("channels", "constants", "message"),
    [
        (0, {}, "channel"),
        (-2, {}, "channel"),
        (3, {"beta": 0.0}, "beta"),
        (3, {"beta": -1.0}, "beta"),
        (3, {"gamma": 0.0}, "gamma"),
        (3, {"zeta": 1.0}, "zeta"),
    ],
)
def test_bad_arguments(channels: int, constants: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastmerge.HardConcrete(channels, **constants)
