"""BatchNorm over processes is that of one process with all their samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ddp_merge
import synced_shares
from ddp_merge import assert_close
from gloo import together

pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize(
    ("size", "dtype", "momentum", "affine"),
    [
        (2, torch.float64, 0.1, True),
        (3, torch.float64, None, False),
        (3, torch.float32, 0.3, True),
        (2, torch.float16, 0.1, True),
        (2, torch.bfloat16, 0.1, True),
    ],
)
def test_unequal_shares_are_one_batch(size: int, dtype: torch.dtype, momentum: float | None, affine: bool) -> None:
    found = together(size, synced_shares.run, dtype, momentum, affine)
    assert all(isinstance(each, list) for each in found.values()), found
    whole = synced_shares.run(0, 1, torch.float64, momentum, affine)
    for number, expected in enumerate(whole):
        each = [found[rank][number] for rank in range(size)]
        for name, value in expected.items():
            want, *parts = (torch.tensor(one, dtype=torch.float64) for one in (value, *(one[name] for one in each)))
            if name in ("y", "dx", "eval"):
                parts = [torch.cat(parts)]
            elif name in ("dweight", "dbias"):
                parts = [torch.stack(parts).sum(0)]  # DistributedDataParallel adds them up
            scale = max(1.0, want.abs().max().item())
            for part in parts:
                torch.testing.assert_close(
                    part / scale, want / scale, rtol=0, atol=TOLERANCES[dtype], msg=f"{name} of {number}"
                )


def test_a_process_may_have_no_samples() -> None:
    (of_first, of_last) = together(2, synced_shares.empty).values()
    assert sorted([of_first[0], of_last[0]]) == [0, 4]
    assert of_first[1:] == of_last[1:] == [[4.5, 5.5, 6.5], [15.0, 15.0, 15.0]]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return ddp_merge.synced(0, 1)


@pytest.mark.parametrize("size", [2, 3])
def test_a_merge_with_batch_norm_is_that_of_one_process(alone: dict[str, Any], size: int) -> None:
    found = together(size, ddp_merge.synced)
    for rank in range(size):
        assert isinstance(found[rank], dict), found
        assert_close(found[rank], alone)
    dropped = [sum(each["dropped"].values()) for each in found[0]["history"]["compactions"]]
    assert any(dropped)


@pytest.mark.slow
def test_under_torch_compile(alone: dict[str, Any]) -> None:
    found = together(2, ddp_merge.compiled)
    for rank in range(2):
        assert isinstance(found[rank], dict), found
        assert_close(found[rank], alone)
    assert [said.partition(":")[0] for said in found[0]["said"]] == [
        "compiled the big student, block-diagonal",
        "compiled the big student, block-diagonal",  # after channels were dropped
        "compiled the big student, linked",
        "compiled Wide",
    ]
    assert found[1]["said"] == []


def test_without_it_the_statistics_are_those_of_a_share(alone: dict[str, Any]) -> None:
    found = together(2, ddp_merge.synced, False)
    with pytest.raises(AssertionError):
        assert_close(found[0], alone)
