"""Compaction on a CUDA device (``pytest -m gpu``): the kernel, the memory it takes and the memory it gives back."""

from __future__ import annotations

import pytest
import torch
from fastmerge.kernels.compact import compact
from torch import Tensor, nn

from compact_checks import by_dtype, by_shape, check_every_layout
from compaction_paths import raw, select, selected
from fastmerge import compaction
from fastmerge.compaction import compact_

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
MIB = 1 << 20


@by_shape
@by_dtype
def test_every_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_every_layout(lambda t, k: compact(t, k, 1000), shape, dtype, "cuda")


# Large enough that thousands of programs run at once: a pass that overlapped its own sources would be seen.
LARGE = {
    "linear": ((6000, 5000), torch.contiguous_format),
    "convolution": ((1500, 1200, 3, 3), torch.contiguous_format),
    "channels-last": ((1500, 1200, 3, 3), torch.channels_last),
    "rows alone": ((100_000, 64), torch.contiguous_format),
}


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_tensors(name: str, share: float, dtype: torch.dtype) -> None:
    shape, memory_format = LARGE[name]
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, dtype=dtype, device="cuda").contiguous(memory_format=memory_format)
    keep_out = select(shape[0], generator, share)
    keep_in = None if name == "rows alone" else select(shape[1], generator, share)
    expected = selected(tensor, keep_out.cuda(), None if keep_in is None else keep_in.cuda())
    compact_(tensor, keep_out, keep_in)
    assert torch.equal(raw(tensor), raw(expected))
    assert tensor.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("staged_above", [0, 1 << 40])
def test_parameters_stay_parameters(staged_above: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_STAGED_ABOVE", staged_above)
    layer = nn.Conv2d(4, 6, 3, device="cuda")
    weight, expected = layer.weight, selected(layer.weight, torch.tensor([1, 5]).cuda(), torch.tensor([0, 2]).cuda())
    layer(torch.randn(2, 4, 5, 5, device="cuda")).sum().backward()
    compact_(weight, torch.tensor([1, 5], device="cuda"), torch.tensor([0, 2]))
    compact_(layer.bias, torch.tensor([1, 5]))
    assert layer.weight is weight
    assert weight.grad is None
    assert torch.equal(weight, expected)
    assert weight.untyped_storage().nbytes() == weight.numel() * 4
    layer.in_channels = layer.out_channels = 2
    layer(torch.randn(2, 2, 5, 5, device="cuda")).sum().backward()
    assert weight.grad.shape == (2, 2, 3, 3)


@pytest.mark.parametrize("mebibytes", [64, 512])
def test_memory_goes_back_and_little_is_taken(mebibytes: int) -> None:
    rows = mebibytes * 256
    compact_(torch.randn(64, 4, device="cuda"), torch.arange(32), torch.arange(2))  # loads the kernel
    torch.cuda.empty_cache()
    tensor = torch.ones(rows, 1024, device="cuda")  # 4 KiB a row
    keep = torch.arange(0, rows, 2)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    compact_(tensor, keep)
    torch.cuda.synchronize()
    assert before - torch.cuda.memory_allocated() == mebibytes * MIB // 2
    # index_select would need another half beside the tensor; here it is 16 MiB of scratch or, while the storage shrinks,
    # at most 64 MiB.
    assert torch.cuda.max_memory_allocated() - before <= min(64, mebibytes // 2) * MIB + 2 * MIB
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved
    assert (tensor == 1).all()


def test_a_bad_call_changes_nothing() -> None:
    tensor = torch.randn(40, 5, device="cuda")
    before, version, address = tensor.clone(), tensor._version, tensor.data_ptr()
    alias = tensor.view(-1)
    with pytest.raises(ValueError, match="alone uses its storage"):
        compact_(tensor, torch.tensor([0]))
    del alias
    with pytest.raises(IndexError, match="position 0 has 40"):
        compact_(tensor, torch.tensor([40]))
    assert torch.equal(tensor, before)
    assert (tensor._version, tensor.data_ptr()) == (version, address)


def test_capture_is_refused() -> None:
    tensor = torch.randn(40, 5, device="cuda")
    before, graph, side = tensor.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin()
        with pytest.raises(ValueError, match="CUDA graph"):
            compact_(tensor, torch.tensor([0]))
        tensor + 1  # an empty capture warns
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(tensor, before)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    tensor: Tensor = torch.arange(10.0, device="cuda:1")
    compact_(tensor, torch.tensor([3, 7]))
    assert tensor.device == torch.device("cuda:1")
    assert tensor.tolist() == [3, 7]
