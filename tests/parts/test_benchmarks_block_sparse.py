"""The benchmark of block-sparse convolutions: its masks, its candidates on a CPU, and its table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastmerge.kernels.block_conv.choice import SPLIT

from benchmark_reports import raced, report, text_of
from benchmarks.bench_block_sparse import CASES, LAYERS, PASSES, PATTERNS, Layer, flops, functions, pattern
from benchmarks.convolution_tables import convolutions, fastest

SMALL = Layer("small", 2, 32, 64, 3, 2, 5)
CONTENDERS: dict[str, dict[str, Any]] = {
    "masked": {"samples": [2.0, 2.0], "device_ms": 0.25},
    "dense": {"samples": [4.0, 4.0], "device_ms": 0.5},
    "triton": {"samples": [1.0, 1.0], "device_ms": 0.125, "tile": "triton 128x64x64 w4 s4"},
}


def test_patterns_have_as_many_live_blocks_as_they_say() -> None:
    masks = {name: pattern(name, SMALL) for name in PATTERNS}
    shares = {name: float(mask.float().mean()) for name, mask in masks.items() if mask is not None}
    assert shares == {"half": 0.5, "quarter": 0.25, "diagonal": 0.5}
    for mask in masks.values():
        assert mask is not None
        assert len({*mask.sum(0).tolist(), *mask.sum(1).tolist()}) == 1
    assert torch.equal(masks["diagonal"], torch.eye(2).bool())


def test_every_network_has_every_pattern() -> None:
    found = {(layer.network, name) for layer, name in CASES}
    assert found == {(network, name) for network in ("resnet18", "resnet50", "resnet20") for name in PATTERNS}
    # Blocks of fewer than 16 channels are none of the kernels'.
    assert pattern("quarter", Layer("resnet20", 128, 16, 16, 3, 1, 32)) is None
    assert {layer for layer, name in CASES if name == "diagonal"} == set(LAYERS)


@pytest.mark.parametrize("step", PASSES)
def test_candidates_of_each_pass(step: str) -> None:
    mask = pattern("quarter", SMALL)
    masked = functions(SMALL, step, torch.float32, mask, "cpu")
    dense = functions(SMALL, step, torch.float32, None, "cpu")
    assert any(name.startswith("triton") for name in masked)
    size = {"forward": (2, 128, 3, 3), "input gradient": (2, 64, 5, 5), "weight gradient": (128, 64, 3, 3)}[step]
    (of_mask,), (of_all,) = masked[SPLIT](), dense[SPLIT]()
    assert of_mask.shape == of_all.shape == size
    if step == "weight gradient":
        assert float((of_mask != 0).float().mean()) == 0.25
        assert bool((of_all != 0).all())


def test_work_is_that_of_live_blocks() -> None:
    mask = pattern("quarter", SMALL)
    assert mask is not None
    assert flops(SMALL, mask) == 2 * 2 * 9 * 64 * 128 * 9 // 4


def sparse(contenders: dict[str, dict[str, Any]], step: str = "forward") -> dict[str, Any]:
    made = raced(f"block-sparse convolution, {step}, a layer half bf16 cuda", contenders)
    winner = fastest(contenders)
    made["extra_info"]["sparse"] = {"pass": step, "layer": "a layer", "live": "half", "dtype": "bf16", "winner": winner}
    return made


def test_a_row_for_each_shape_pass_and_pattern() -> None:
    text = text_of({"a-card": report([sparse(CONTENDERS), sparse(CONTENDERS, "input gradient")], gpu=True)})
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "a layer bf16 " in line
    ]
    assert [row[0] for row in rows] == ["forward", "input gradient"]
    times = ["0.25", "0.5", "0.125", "triton", "128x64x64 w4 s4"]
    assert rows[0][1:] == ["a layer bf16", "half", *times, "0.50", "0.25"]
    # One table in place of one for each case, and none of what was not measured.
    assert "### block-sparse convolution, forward" not in text
    assert text.count("### Block-sparse convolutions") == 1


def test_the_least_time_on_the_device_wins() -> None:
    assert fastest(CONTENDERS) == "triton"
    assert fastest(CONTENDERS | {"triton": CONTENDERS["triton"] | {"device_ms": 0.3}}) == "masked"
    assert fastest(CONTENDERS | {"triton": {"error": "RuntimeError: no"}}) == "masked"
    assert fastest({"masked": {"error": "RuntimeError: no"}}) is None


def test_what_failed_is_named() -> None:
    failing = CONTENDERS | {"triton": {"error": "RuntimeError: no"}}
    found = convolutions(report([sparse(failing)], gpu=True))
    assert "*triton* failed: RuntimeError: no, in forward, a layer half bf16 cuda." in found
