"""What compact_ refuses, and that it then has changed nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compaction_paths import by_path, through
from fastmerge.compaction import compact_


def _shared() -> Tensor:
    return torch.randn(4, 4).share_memory_()


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.randn(4, 4)


FIRST_TWO = torch.tensor([0, 1])
BAD_TENSORS: dict[str, tuple[Any, type[Exception], str]] = {
    "not a tensor": (lambda: [[1.0]], TypeError, "needs a tensor"),
    "sparse": (lambda: torch.eye(4).to_sparse(), TypeError, "plain strided"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8), TypeError, "plain strided"),
    "number": (lambda: torch.tensor(1.0), ValueError, "one dimension or more"),
    "not a leaf": (lambda: torch.randn(4, 4, requires_grad=True) * 2, ValueError, "needs a leaf"),
    "inference": (_inference, ValueError, "inference_mode"),
    "conjugate": (lambda: torch.randn(4, 4, dtype=torch.complex64).conj(), ValueError, "resolve_conj"),
    "negative": (
        lambda: torch.randn(4, 4, dtype=torch.complex64).conj().imag,
        ValueError,
        "needs the values themselves",
    ),
    "expanded": (lambda: torch.randn(1, 4).expand(4, 4), ValueError, "do not overlap"),
    "overlapping": (lambda: torch.randn(16).as_strided((4, 4), (2, 1)), ValueError, "do not overlap"),
    "offset": (lambda: torch.randn(5, 4)[1:], ValueError, "starts 4 elements in"),
    "numpy's": (lambda: torch.from_numpy(torch.randn(4, 4).numpy().copy()), ValueError, "torch's own"),
    "shared": (_shared, ValueError, "torch's own"),
}


@by_path
@pytest.mark.parametrize("name", BAD_TENSORS)
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quantize:DeprecationWarning")
def test_a_tensor_that_can_not_shrink_is_refused(path: str, name: str) -> None:
    make, error, message = BAD_TENSORS[name]
    tensor = make()
    before = tensor.clone() if isinstance(tensor, Tensor) else None
    with through(path), pytest.raises(error, match=message):
        compact_(tensor, FIRST_TWO)
    if before is not None and not before.is_sparse:
        assert tensor.shape == before.shape
        assert torch.equal(tensor, before)


@by_path
def test_memory_that_others_use_is_refused(path: str) -> None:
    tensor = torch.randn(4, 4, requires_grad=True)
    for make in (Tensor.detach, lambda t: t.data, lambda t: t.view(-1), lambda t: t[2:]):
        alias = make(tensor)
        with through(path), pytest.raises(ValueError, match="alone uses its storage"):
            compact_(tensor, FIRST_TWO)
        del alias
    with through(path):
        compact_(tensor, FIRST_TWO)
    tensor.detach().numpy()  # torch can't know when numpy is done
    with through(path), pytest.raises(ValueError, match="torch's own"):
        compact_(tensor, torch.tensor([0]))


GOOD = torch.tensor([0, 2, 3])
BAD_KEEPS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "list": ([0, 1], None, TypeError, "int64 tensor of indices as keep_out; it got list"),
    "mask": (torch.tensor([True, False, True, True]), None, TypeError, "it got torch.bool"),
    "int32": (GOOD.int(), None, TypeError, "it got torch.int32"),
    "meta": (GOOD.to("meta"), None, TypeError, "as keep_out; it got one on the meta device, without values"),
    "sparse": (GOOD.to_sparse(), None, TypeError, "as keep_out; it got one of layout torch.sparse_coo"),
    "sparse columns": (GOOD, GOOD.to_sparse(), TypeError, "as keep_in; it got one of layout torch.sparse_coo"),
    "two dimensions": (GOOD[None], None, ValueError, "keep_out of one dimension"),
    "negative": (torch.tensor([-1, 2]), None, IndexError, r"\[0, 4\) as keep_out; position 0 has -1"),
    "too large": (torch.tensor([0, 4]), None, IndexError, "position 1 has 4"),
    "huge": (torch.tensor([0, 2**62]), None, IndexError, "position 1 has"),
    "descending": (torch.tensor([0, 3, 2]), None, ValueError, "ascending and unique; 3 is followed by 2"),
    "twice": (torch.tensor([1, 1]), None, ValueError, "ascending and unique; 1 is followed by 1"),
    "columns too large": (GOOD, torch.tensor([5]), IndexError, r"\[0, 5\) as keep_in"),
    "columns twice": (GOOD, torch.tensor([4, 4]), ValueError, "keep_in ascending and unique"),
    "columns of float": (GOOD, torch.tensor([1.0]), TypeError, "as keep_in; it got torch.float32"),
}


@by_path
@pytest.mark.parametrize("name", BAD_KEEPS)
def test_bad_indices_change_nothing(path: str, name: str) -> None:
    keep_out, keep_in, error, message = BAD_KEEPS[name]
    tensor = nn.Parameter(torch.randn(4, 5))
    tensor.grad = torch.randn(4, 5)
    before, gradient, version, address = tensor.detach().clone(), tensor.grad, tensor._version, tensor.data_ptr()
    with through(path), pytest.raises(error, match=message):
        compact_(tensor, keep_out, keep_in)
    assert torch.equal(tensor, before)
    assert tensor.grad is gradient
    assert (tensor._version, tensor.data_ptr()) == (version, address)


@by_path
def test_columns_need_a_second_dimension(path: str) -> None:
    with through(path), pytest.raises(ValueError, match="needs a dimension 1 for keep_in"):
        compact_(torch.randn(4), GOOD, GOOD)
