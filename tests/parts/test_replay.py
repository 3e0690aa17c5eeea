"""Replaying a traced function gives what the function gives."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap

from fastmerge import cpu_convolutions
from fastmerge.replay import replayed


def gradients(weight, bias, x, y):
    """Of a stacked layer with everything that the simplification looks for: views, transposes, ones, factors of one."""

    def loss(w, b, x, y):
        out = F.linear(torch.relu(F.linear(x, w, b)), w.t().contiguous().t(), b)
        return 1 * F.mse_loss(out, y)

    found = vmap(grad(loss, argnums=(0, 1)))(weight, bias, x, y)
    return [*found, x.sum()]


def operands():
    return torch.randn(3, 4, 4), torch.randn(3, 4), torch.randn(3, 6, 4), torch.randn(3, 6, 4)


def test_values_are_equal_bit_by_bit():
    replay = replayed(gradients, *operands())
    for _ in range(2):
        tensors = operands()
        for got, expected in zip(replay(*tensors), gradients(*tensors), strict=True):
            assert torch.equal(got, expected)


def test_one_mode_keeps_all_shapes_of_a_trace(monkeypatch):
    """PyTorch would make one for each operation, and note down the stack of calls each time."""
    made, begin = [], FakeTensorMode.__init__
    monkeypatch.setattr(FakeTensorMode, "__init__", lambda self, **options: made.append(self) or begin(self, **options))
    replayed(gradients, *operands())
    assert len(made) == 1


def test_random_numbers_are_drawn_in_every_call():
    def noisy(x):
        return [x + torch.rand_like(x)]

    x = torch.zeros(5)
    state = torch.get_rng_state()
    replay = replayed(noisy, x)
    assert torch.equal(torch.get_rng_state(), state)  # tracing draws nothing
    torch.manual_seed(3)
    (first,), (second,) = replay(x), replay(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(noisy(x)[0], first)


def test_changes_in_place_happen_in_every_call_and_not_to_the_examples():
    def count(counter, x):
        counter.add_(x)
        return [counter * 2]

    example = torch.zeros(2)
    replay = replayed(count, example, torch.ones(2))
    assert not example.any()
    counter = torch.zeros(2)
    replay(counter, torch.ones(2))
    (doubled,) = replay(counter, torch.ones(2))
    assert counter.tolist() == [2, 2]
    assert doubled.tolist() == [4, 4]


def test_ones_that_were_changed_are_not_taken_for_ones():
    def function(x):
        ones = torch.ones_like(x)
        view = ones.view(2, 2)
        ones.mul_(3)
        return [x.view(2, 2) * view]

    x = torch.randn(4)
    assert torch.equal(replayed(function, x)(x)[0], 3 * x.view(2, 2))


def test_constants_and_several_results_survive():
    table = torch.tensor([2, 0, 1])

    def function(x):
        values, indices = x[table].max(0)
        return [values, indices, x.to(torch.float64)]

    x = torch.randn(3, 5)
    for got, expected in zip(replayed(function, x)(x), function(x), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_split_convolutions_equal_grouped_ones(groups, transposed, monkeypatch):
    """With weights of two batches of networks, forward and all gradients."""
    convolve = F.conv_transpose2d if transposed else F.conv2d

    def function(w, b, x):
        def loss(w, b, x):
            return convolve(x, w, b, padding=1, groups=groups).square().sum()

        return [*vmap(grad(loss, argnums=(0, 1, 2)))(w, b, x)]

    out = 6 // groups if transposed else 6
    w = torch.randn(3, 4, out, 3, 3) if transposed else torch.randn(3, out, 4 // groups, 3, 3)
    tensors = (w, torch.randn(3, 6), torch.randn(3, 2, 4, 7, 7))
    whole = replayed(function, *tensors, replicates=3)
    monkeypatch.setattr(cpu_convolutions, "_LEAST_PRODUCTS", 0)
    calls = []
    monkeypatch.setattr(cpu_convolutions, "convolution_backward", counted(cpu_convolutions.convolution_backward, calls))
    split = replayed(function, *tensors, replicates=3)
    for got, expected in zip(split(*tensors), whole(*tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert calls


def counted(function, calls):
    def call(*arguments):
        calls.append(function.__name__)
        return function(*arguments)

    return call
