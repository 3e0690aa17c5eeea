"""compact_ against index_select, through the extension and through PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compaction_paths import by_path, check, random_tensor, select, selected, through
from fastmerge import compaction
from fastmerge.compaction import compact_

DTYPES = [
    torch.bool,
    torch.int8,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


@st.composite
def keeps(draw: st.DrawFn, size: int) -> Tensor:
    return torch.tensor(sorted(draw(st.sets(st.integers(0, size - 1)))) if size else [], dtype=torch.int64)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=5)))
    tensor = random_tensor(shape, draw(st.sampled_from(DTYPES)))
    order = draw(st.permutations(range(len(shape))))
    tensor = tensor.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
    if draw(st.booleans()):  # holes in memory, as a slice leaves them whose base is gone
        holed = tensor.new_zeros([2 * size for size in shape])[tuple(slice(None, None, 2) for _ in shape)]
        tensor = holed.copy_(tensor)
    tensor = tensor.detach()  # a view keeps its base alive
    keep_in = draw(st.none() | keeps(shape[1])) if len(shape) > 1 else None
    return tensor, draw(keeps(shape[0])), keep_in


@by_path
@given(call=calls())
def test_any_tensor_equals_index_select(path: str, call: tuple[Tensor, Tensor, Tensor | None]) -> None:
    tensor, keep_out, keep_in = call
    with through(path):
        check(tensor, keep_out, keep_in)


@by_path
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((8, 6), torch.contiguous_format),
        ((8, 6, 3), torch.contiguous_format),
        ((8, 6, 3, 3), torch.contiguous_format),
        ((8, 6, 3, 3), torch.channels_last),
        ((8, 6, 1, 1), torch.contiguous_format),
        ((8, 6, 1, 1), torch.channels_last),
        ((8, 1, 3, 3), torch.channels_last),
        ((8, 6, 3, 3, 3), torch.contiguous_format),
        ((8, 6, 3, 3, 3), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("outputs", [0, 1, 4, 8])
@pytest.mark.parametrize("inputs", [None, 1])
def test_the_memory_format_stays(
    path: str, shape: tuple[int, ...], memory_format: torch.memory_format, outputs: int, inputs: int | None
) -> None:
    tensor = torch.empty(shape, memory_format=memory_format).normal_()
    keep_out = torch.arange(8 - outputs, 8)
    keep_in = None if inputs is None else torch.tensor([shape[1] - 1])
    with through(path):
        check(tensor, keep_out, keep_in)
    assert tensor.stride() == torch.empty(tensor.shape, memory_format=memory_format).stride()


@by_path
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("scratch", [1, 1000, 1 << 24])
def test_large_tensors_and_little_scratch(
    path: str, order: tuple[int, ...], scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "_SCRATCH_BYTES", scratch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    generator = torch.Generator().manual_seed(1)
    shape = (600, 500, 9) if scratch > 1 else (60, 50, 9)
    tensor = torch.randn(shape).permute(order).contiguous().permute([order.index(d) for d in range(3)]).detach()
    with through(path):
        check(tensor, select(shape[0], generator), select(shape[1], generator, 0.7))


@by_path
def test_parameters_stay_leaves_and_lose_their_gradient(path: str) -> None:
    layer = nn.Conv2d(4, 6, 3)
    weight = layer.weight
    layer(torch.randn(2, 4, 5, 5)).sum().backward()
    expected = weight.detach()[[1, 5]][:, [0, 2]].clone()
    with through(path):
        compact_(weight, torch.tensor([1, 5]), torch.tensor([0, 2]))
        compact_(layer.bias, torch.tensor([1, 5]))
    assert layer.weight is weight
    assert weight.is_leaf
    assert weight.requires_grad
    assert weight.grad is None
    assert torch.equal(weight, expected)
    layer.in_channels, layer.out_channels = 2, 2
    layer(torch.randn(2, 2, 5, 5)).sum().backward()
    assert weight.grad.shape == (2, 2, 3, 3)


@by_path
def test_a_compacted_tensor_is_like_any_other(path: str) -> None:
    tensor = torch.randn(8, 5)
    with through(path):
        compact_(tensor, torch.tensor([2, 3, 7]))
        values = tensor.clone()
        for again in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
            assert torch.equal(again, values)
        compact_(tensor, torch.tensor([1]), torch.tensor([0, 4]))
    assert torch.equal(tensor, values[1:2, [0, 4]])
    tensor.resize_(4, 4).fill_(1)
    assert tensor.sum() == 16


@by_path
@given(call=calls())
def test_a_storage_shrunk_through_the_host_is_the_same(path: str, call: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """As the large tensors of a GPU do it."""
    tensor, keep_out, keep_in = call
    with through(path), pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "_resize", compaction._resize_through_host)
        check(tensor, keep_out, keep_in)


@by_path
def test_optimizer_state_goes_with_its_parameter(path: str) -> None:
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    keep = torch.tensor([0, 3])
    state = optimizer.state[layer.weight]
    expected = {name: selected(value, keep, None) for name, value in state.items() if value.dim()}
    with through(path):
        for tensor in (layer.weight, layer.bias, *optimizer.state[layer.bias].values(), *state.values()):
            if tensor.dim():
                compact_(tensor, keep)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    layer(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()


@by_path
def test_a_graph_that_saved_the_tensor_sees_the_change(path: str) -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    loss = (weight * weight).sum()
    with through(path):
        compact_(weight, torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
