"""The compaction kernel against index_select in Triton's interpreter, and the plan that makes its passes safe."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from fastmerge.kernels.compact import compact_reference
from fastmerge.kernels.compact.plan import make_plan
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compact_checks import by_dtype, by_shape, check_every_layout, check_moves, keeps_of, make
from interpreter import interpreted

pytest.importorskip("triton")
by_scratch = pytest.mark.parametrize("scratch", [1, 600, 1 << 24])


def through_the_kernel(scratch_bytes: int):
    from fastmerge.kernels.compact import gather_triton

    return lambda tensor, keeps: gather_triton.compact(tensor, keeps, scratch_bytes)


@interpreted
@by_shape
@by_dtype
def test_every_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_every_layout(through_the_kernel(4000), shape, dtype, "cpu")


@interpreted
@by_scratch
def test_little_scratch(scratch: int) -> None:
    shape = (9, 7, 3) if scratch == 1 else (90, 70, 3)
    for case in range(6):
        tensor = make(shape, torch.float32, "contiguous")
        check_moves(through_the_kernel(scratch), tensor, keeps_of(tensor, 1)[case])


@interpreted
def test_huge_memory_is_indexed_in_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmerge.kernels.compact import gather_triton

    monkeypatch.setattr(gather_triton, "_INT32_WORDS", 10)
    for case in range(6):
        tensor = make((40, 30, 3), torch.float32, "contiguous")
        check_moves(through_the_kernel(1000), tensor, keeps_of(tensor, 2)[case])


@by_shape
@by_dtype
def test_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_every_layout(lambda t, k: compact_reference(t, k, 300), shape, dtype, "cpu")


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, list[Tensor | None], int]:
    shape = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=5)))
    tensor = make(
        shape,
        draw(st.sampled_from([torch.int8, torch.int16, torch.int64])),
        draw(st.sampled_from(["contiguous", "reversed", "holes"])),
    )
    keeps = [draw(st.none() | st.sets(st.integers(0, n - 1))) if n else None for n in shape]
    return (
        tensor,
        [None if k is None else torch.tensor(sorted(k), dtype=torch.int64) for k in keeps],
        draw(st.integers(1, 40)),
    )


@given(call=calls())
def test_passes_are_safe_in_any_order_of_execution(call: tuple[Tensor, list[Tensor | None], int]) -> None:
    tensor, keeps, scratch = call
    plan = make_plan(tensor, keeps)
    sources = [plan.source(place) for place in range(plan.total)]
    assert all(a < b for a, b in pairwise(sources))
    assert all(0 <= source < plan.extent for source in sources)
    assert plan.extent * plan.word.itemsize <= tensor.untyped_storage().nbytes()
    filled = 0
    for first, last, direct in plan.passes(scratch):
        assert first == filled < last
        filled = last
        # Everything written lies before everything read, or was read into scratch memory of bounded size.
        assert last <= sources[first] if direct else last - first <= scratch
    assert filled == plan.total


def test_of_a_half_dropped_tensor_little_goes_through_scratch() -> None:
    tensor, keep = torch.empty(1 << 14, 64), torch.arange(0, 1 << 14, 2)
    passes = list(make_plan(tensor, [keep, None]).passes(1 << 12))
    assert sum(last - first for first, last, direct in passes if not direct) <= 1 << 13
    assert len(passes) <= 10


@pytest.mark.parametrize(
    ("shape", "dtype", "keeps", "word"),
    [
        ((8, 6, 2, 2), torch.float32, [torch.tensor([1]), None, None, None], torch.int64),
        ((8, 6, 3, 3), torch.float32, [torch.tensor([1]), torch.tensor([2]), None, None], torch.int32),
        ((8, 8), torch.float16, [torch.tensor([1]), None], torch.int64),
        ((8, 3), torch.float16, [torch.tensor([1]), None], torch.int16),
        ((8, 8), torch.float16, [torch.tensor([1]), torch.tensor([1])], torch.int16),
        ((8,), torch.complex128, [torch.tensor([1])], torch.int64),
    ],
)
def test_words_are_as_wide_as_can_be(
    shape: tuple[int, ...], dtype: torch.dtype, keeps: list[Tensor | None], word: torch.dtype
) -> None:
    assert make_plan(torch.zeros(shape, dtype=dtype), keeps).word == word


def test_tables_stay_small() -> None:
    plan = make_plan(torch.empty(2, 3, 50, 60, 7), [torch.tensor([0, 1]), torch.tensor([0, 2]), None, None, None])
    assert len(plan.outer) + len(plan.inner) <= 4
