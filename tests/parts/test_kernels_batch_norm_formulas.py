"""The reference of the fused BatchNorm: torch's own modules, and what neither takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastmerge.kernels.batch_norm import batch_norm_act, batch_norm_act_pool
from torch import Tensor, nn

from batch_norm_checks import fused

STEM = {"kernel_size": 3, "stride": 2, "padding": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_of_modules(training: bool, dtype: torch.dtype) -> None:
    norm = nn.BatchNorm2d(5, momentum=0.3).to(dtype).train(training)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
    x, residual, gate = torch.randn(3, 5, 7, 6), torch.randn(3, 5, 7, 6), torch.rand(3, 5)
    x, residual = x.to(dtype), residual.to(dtype)
    running = norm.running_mean.clone(), norm.running_var.clone()
    arguments: Any = (x, norm.weight, norm.bias, *running)
    y = batch_norm_act(*arguments, training=training, momentum=0.3, residual=residual, gate=gate)
    expected = nn.functional.relu(norm(x) + residual) * gate[:, :, None, None].to(dtype)
    assert torch.equal(y, expected)
    assert torch.equal(running[0], norm.running_mean)
    assert torch.equal(running[1], norm.running_var)
    pooled = batch_norm_act_pool(*arguments, training=False, gate=gate[:1], **STEM)
    stem = nn.Sequential(norm.eval(), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    assert torch.equal(pooled, stem(x) * gate[:1, :, None, None].to(dtype))
    assert y.dtype == pooled.dtype == dtype


def test_gates_do_not_promote() -> None:
    x = torch.randn(3, 5, 4, 4, dtype=torch.bfloat16)
    y = batch_norm_act(x, torch.ones(5), torch.zeros(5), None, None, training=True, gate=torch.rand(3, 5))
    assert y.dtype == torch.bfloat16


def test_empty_batch() -> None:
    x, mean, var = torch.randn(0, 5, 4, 4, requires_grad=True), torch.zeros(5), torch.ones(5)
    gate = torch.rand(0, 5)
    weight = torch.ones(5, requires_grad=True)
    # Where the kernels would run, too.
    with fused():
        y = batch_norm_act(x, weight, None, mean, var, training=True, residual=x, gate=gate)
        pooled = batch_norm_act_pool(x, weight, None, mean, var, training=True, gate=gate, **STEM)
    assert (y.shape, pooled.shape) == (x.shape, (0, 5, 2, 2))
    (y.sum() + pooled.sum()).backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0] * 5
    assert mean.tolist() == [0.0] * 5


def both(message: str, x: Tensor, *, training: bool = True, **options: Any) -> None:
    """Expects the same refusal from the kernels' way and the reference's."""
    function = batch_norm_act_pool if "kernel_size" in options else batch_norm_act
    with pytest.raises(ValueError, match=message):
        function(x, None, None, None, None, training=training, **options)
    with fused(), pytest.raises(ValueError, match=message):
        function(x, None, None, None, None, training=training, **options)


def test_refusals() -> None:
    x = torch.randn(3, 5, 4, 6)
    both("activation to be one of identity, relu, relu6, silu, hardswish; got 'gelu'", x, activation="gelu")
    both(r"x of shape \(N, C, ...\); got torch.float32 of shape \(5,\)", torch.randn(5))
    both("floating x", torch.ones(3, 5, dtype=torch.int64))
    both(r"residual in the shape of x, \(3, 5, 4, 6\); got \(3, 5, 4, 1\)", x, residual=x[..., :1])
    both(r"gate of shape \(1, 5\) or \(3, 5\); got \(2, 5\)", x, gate=torch.rand(2, 5))
    both(r"gate of shape \(1, 5\) or \(3, 5\); got \(5,\)", x, gate=torch.rand(5))
    both("running_mean and running_var when training is False", x, training=False)
    both(r"got input size torch.Size\(\[1, 5, 1, 1\]\)", x[:1, :, :1, :1])
    both("activation to be one of", x, activation="gelu", **STEM)
    both("gate of shape", x, gate=torch.rand(2, 5), **STEM)
    both(r"x of shape \(N, C, H, W\); got \(3, 5\)", x[:, :, 0, 0], **STEM)
    both("padding of at most half the kernel", x, kernel_size=3, stride=2, padding=2)
    both("stride of at least 1", x, kernel_size=3, stride=0)
    both(r"a padded x of at least \(5, 5\)", x, kernel_size=5, stride=1)


def test_one_value_per_channel_in_the_words_of_torch() -> None:
    x = torch.randn(1, 5, 1, 1)
    with pytest.raises(ValueError) as theirs:  # noqa: PT011, its words are what is tested
        nn.BatchNorm2d(5)(x)
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        batch_norm_act(x, None, None, None, None, training=True)
    assert str(ours.value) == str(theirs.value)
