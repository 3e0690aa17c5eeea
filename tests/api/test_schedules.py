"""QuadraticLambda against the paper's rule, written out."""

from __future__ import annotations

import math

import pytest
import torch

import fastmerge


@pytest.mark.parametrize(("start", "step"), [(0.01, 0.05), (0.05, 0.05), (0.3, 0.2), (1.0, 0.0)])
def test_follows_the_rule(start: float, step: float) -> None:
    lam, expected = fastmerge.QuadraticLambda(start, step), start
    for _ in range(50):
        assert lam.value == float(lam) == pytest.approx(expected, rel=1e-12)
        expected += step * math.sqrt(expected)
        lam.step()


def test_default_step_is_the_papers() -> None:
    lam = fastmerge.QuadraticLambda(0.01)
    lam.step()
    assert lam.value == pytest.approx(0.015)


def test_grows_quadratically() -> None:
    """The square root of λ grows by nearly step/2 an epoch."""
    lam = fastmerge.QuadraticLambda(0.01)
    for _ in range(1000):
        lam.step()
    assert math.sqrt(lam.value) == pytest.approx(0.025 * 1000, rel=0.02)


def test_weighs_a_loss_from_either_side() -> None:
    lam = fastmerge.QuadraticLambda(0.25)
    loss = torch.tensor(2.0, requires_grad=True)
    for weighed in (lam * loss, loss * lam):
        assert isinstance(weighed, torch.Tensor)
        assert weighed.item() == 0.5
        (gradient,) = torch.autograd.grad(weighed, loss)
        assert gradient.item() == 0.25
    assert 2 * lam == lam * 2 == 0.5


def test_in_a_sum_with_another_loss() -> None:
    lam = fastmerge.QuadraticLambda(0.5)
    assert (torch.tensor(1.0) + lam * torch.tensor(4.0)).item() == 3.0


def test_stays_in_the_losss_dtype() -> None:
    lam = fastmerge.QuadraticLambda(0.25)
    assert (lam * torch.tensor(1.0, dtype=torch.float16)).dtype == torch.float16


def test_state_continues_where_it_was() -> None:
    lam = fastmerge.QuadraticLambda(0.01, step=0.2)
    for _ in range(5):
        lam.step()
    other = fastmerge.QuadraticLambda(1.0)
    other.load_state_dict(lam.state_dict())
    for _ in range(5):
        lam.step()
        other.step()
    assert other.value == lam.value


@pytest.mark.parametrize(("start", "step"), [(-0.1, 0.05), (0.1, -0.05), (float("nan"), 0.1), (0.1, float("inf"))])
def test_bad_arguments(start: float, step: float) -> None:
    with pytest.raises(ValueError, match=r"start|step"):
        fastmerge.QuadraticLambda(start, step)
