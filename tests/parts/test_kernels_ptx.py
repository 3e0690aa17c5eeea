"""Every kernel and pass against float64, as the PTX for sm_90a that Triton makes of it (``make test-ptx``).

What this can see and what it can't: ``ptx_emulator``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from fastmerge.kernels.block_conv import live_blocks, tiles
from fastmerge.kernels.block_conv.arithmetic import IEEE, TF32
from fastmerge.kernels.gate.formulas import hard_concrete
from torch import Tensor

import compact_checks
import gate_checks
from batch_norm_checks import (
    DTYPES,
    OTHER_ACTIVATIONS,
    by_dtype_and_layout,
    check_against_float64,
    check_streams,
    fused,
    in_layout,
    laid_out,
    make,
    small_cuts,
    stretched,
)
from block_conv_checks import ODD, Case, compare, joined, operands, random_mask, slices
from block_conv_tiles import check_tiles
from philox import uniforms

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("emulator", "poisoned_memory")]

ARITHMETIC = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    TF32: torch.float32,
    IEEE: torch.float32,
}
# Together every tile of the tables: both sides of 16 to 256 channels, and samples enough to fill a tile with one position.
TILES = [
    Case(2, 2, 3, 5, 16, 32, 3, 1),
    Case(2, 2, 4, 4, 64, 64, 3, 1),
    Case(2, 3, 5, 4, 128, 64, 3, 2),
    Case(2, 1, 5, 3, 128, 256, 3, 1),
    Case(2, 3, 5, 7, 256, 128, 1, 2),
    Case(2, 130, 2, 2, 16, 128, 3, 2),
    Case(2, 260, 1, 2, 32, 64, 1, 1),
]


@pytest.fixture(params=ARITHMETIC)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Each of the dtypes, float32 with and without TF32."""
    with mock.patch("fastmerge.kernels.block_conv.arithmetic.takes_tf32", return_value=request.param == TF32):
        yield ARITHMETIC[request.param]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_the_cases_run_every_tile(arithmetic: str) -> None:
    run, run_weights = set(), set()
    for case in TILES:
        for sides in ((case.c, case.k), (case.k, case.c)):
            run |= {(t.positions, t.written, t.warps, t.stages) for t in tiles.tiles(*sides, case.n, None, arithmetic)}
        found = tiles.weight_tiles(case.c, case.k, case.kernel, None, arithmetic)
        run_weights |= {(t.rows, t.columns, t.row_of_taps, t.warps, t.stages) for t in found}
    ieee = arithmetic == IEEE
    assert run == set(tiles._IEEE_TILES if ieee else tiles._TILES)
    assert run_weights == set(tiles._IEEE_WEIGHT_TILES if ieee else tiles._WEIGHT_TILES)


@pytest.mark.parametrize("case", TILES, ids=str)
def test_every_tile(case: Case, dtype: torch.dtype) -> None:
    given = operands(case, dtype)
    check_tiles(case, given, given.xs, given.dys)


@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_shapes(case: Case, dtype: torch.dtype) -> None:
    given = operands(case, dtype)
    check_tiles(case, given, given.xs, given.dys, most=2)


@pytest.mark.parametrize("layout", [slices, joined])
@pytest.mark.parametrize("case", [ODD[0], ODD[1], TILES[5]], ids=str)
def test_other_layouts(case: Case, layout: Callable[[list[Tensor]], list[Tensor]]) -> None:
    given = operands(case, torch.bfloat16)
    check_tiles(case, given, layout(given.xs), layout(given.dys), most=1)


def test_streams_in_falling_addresses() -> None:
    case = Case(2, 2, 4, 5, 32, 48, 3, 2)
    given = operands(case, torch.float16)

    def falling(tensors: list[Tensor]) -> list[Tensor]:
        copies = sorted((tensor.clone() for tensor in tensors), key=Tensor.data_ptr, reverse=True)
        return [copy.copy_(tensor) for copy, tensor in zip(copies, tensors, strict=True)]

    check_tiles(case, given, falling(given.xs), falling(given.dys), most=1)


@pytest.mark.parametrize(
    ("block", "kernel", "stride", "kind", "dtype"),
    [
        (128, 3, 1, "random", "float16"),
        (64, 3, 2, "empty row", "bfloat16"),
        (32, 1, 1, "empty column", "float16"),
        (16, 1, 2, "full", "bfloat16"),
        (16, 3, 1, "none", "float16"),
        (64, 3, 2, "random", TF32),
        (16, 1, 1, "random", IEEE),
    ],
    indirect=["dtype"],
)
def test_live_blocks(block: int, kernel: int, stride: int, kind: str, dtype: torch.dtype) -> None:
    mask = random_mask(3, 4, kind)
    case = Case(1, 2, 5, 4, 4 * block, 3 * block, kernel, stride)
    given = operands(case, dtype, mask=mask)
    check_tiles(case, given, given.xs, given.dys, live=live_blocks(mask), most=2)


def test_sums_split_many_times(emulator: list[str]) -> None:
    from fastmerge.kernels.block_conv import launch_triton

    case = Case(1, 20, 8, 8, 16, 16, 1, 1)
    given = operands(case, torch.bfloat16)
    emulator.clear()
    for tile in tiles.weight_tiles(16, 16, 1):
        dw = launch_triton.weight_gradient(given.dys, given.xs, 1, case.geometry, tile)
        compare("dw", [dw], given)
    assert "reduce_kernel" in emulator


# BatchNorm. Shapes: smallest, odd, typical, just past a block of 8 and of 64 channels, without a plane (the first of which has
# threads part at a loop), and several programs.
SHAPES = [(2, 1, 1, 1), (3, 5, 7, 3), (2, 64, 8, 8), (3, 72, 5, 4), (1, 130, 9, 17), (6, 5), (300, 40)]
TRAINING: dict[str, Any] = {"training": True, "activation": "relu"}
STEM: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}


@by_dtype_and_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    if len(shape) == 2 and layout == "channels-last":
        layout = "transposed"
    with fused():
        check_against_float64(laid_out(make(shape, dtype, samples=shape[0]), layout), TRAINING, dy_layout=layout)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_options_of_batch_norm(activation: str, residual: bool, samples: int | None, training: bool) -> None:
    case = laid_out(make((3, 18, 5, 4), torch.bfloat16, samples=samples, residual=residual), "channels-last")
    with fused():
        check_against_float64(case, {"training": training, "activation": activation, "momentum": 0.3, "eps": 1e-3})


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "channels-last"), (torch.bfloat16, "contiguous")])
@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS)
def test_other_activations(activation: str, dtype: torch.dtype, layout: str) -> None:
    case = stretched(laid_out(make((3, 18, 5, 4), dtype, samples=3), layout))
    options = {"training": True, "activation": activation}
    with fused():
        check_against_float64(case, options, dy_layout="slice")
        check_against_float64(case | {"residual": None}, options | STEM, dy_layout="slice")


@pytest.mark.parametrize("learning", [("weight",), ("bias", "residual"), ("gate",), ("x", "residual")], ids=str)
def test_only_the_gradients_wanted(learning: tuple[str, ...]) -> None:
    with fused():
        check_against_float64(make((3, 5, 7, 3), torch.float32, samples=3), TRAINING, learning=learning)


@pytest.mark.parametrize(
    ("x_layout", "residual_layout", "dy_layout"),
    [("slice", "contiguous", "transposed"), ("cropped", "slice", "contiguous"), ("channels-last", "cropped", "slice")],
)
def test_each_tensor_in_a_layout_of_its_own(x_layout: str, residual_layout: str, dy_layout: str) -> None:
    case = make((3, 16, 7, 4), torch.float16, samples=3)
    case["x"], case["residual"] = in_layout(case["x"], x_layout), in_layout(case["residual"], residual_layout)
    with fused():
        check_against_float64(case, TRAINING, dy_layout=dy_layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tiles_and_programs(dtype: torch.dtype, layout: str) -> None:
    case = laid_out(make((5, 17, 9, 8), dtype, samples=5), layout)
    with small_cuts(), fused():
        check_against_float64(case, TRAINING, dy_layout=layout)
        check_against_float64(case | {"residual": None}, TRAINING | STEM, dy_layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"residual": True, "samples": 3},
        {"samples": 3, "pool": (3, 2, 1), "place": "slices"},
        {"samples": 1, "place": "slices", "dy_place": "behind"},
        {"layout": "contiguous", "residual": True, "readers": 1},
    ],
    ids=str,
)
def test_streams(options: dict[str, Any], dtype: torch.dtype) -> None:
    with fused():
        for channels in (16, 24):
            check_streams(2, (3, channels, 5, 4), dtype, **options)


@by_dtype_and_layout
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 5, 7, 3), (1, 66, 17, 9), (2, 64, 8, 8)], ids=str)
def test_stem(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    case = laid_out(make(shape, dtype, samples=shape[0], residual=False), layout)
    with fused():
        check_against_float64(case, TRAINING | STEM, dy_layout=layout)


@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 2, "stride": 3},
        {"kernel_size": (2, 5), "stride": (3, 2), "padding": (0, 2)},
    ],
    ids=str,
)
def test_windows(window: dict[str, Any]) -> None:
    for samples, training, activation in ((None, True, "identity"), (1, False, "relu")):
        case = laid_out(make((3, 5, 7, 6), torch.float32, samples=samples, residual=False), "channels-last")
        with fused():
            check_against_float64(case, {"training": training, "activation": activation} | window)


@gate_checks.by_dtype
@gate_checks.by_shape
def test_gates(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_checks.check_against_float64(shape, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gates_far_out(dtype: torch.dtype) -> None:
    gate_checks.check_extreme_loc(dtype, "cpu")
    gate_checks.check_ends_of_the_uniform_numbers("cpu")


def test_gates_of_several_seeds_and_a_strided_gradient() -> None:
    loc, seeds = torch.linspace(-3, 3, 24), [gate_checks.SEED, 7]
    z = gate_checks.sample(loc, torch.tensor(seeds), 9, *gate_checks.CONSTANTS, torch.float32)
    halves = [
        hard_concrete(uniforms(seed, 9, 12), half) for seed, half in zip(seeds, loc.double().chunk(2), strict=True)
    ]
    torch.testing.assert_close(z.double(), torch.cat(halves, 1), rtol=0, atol=2e-6)
    for dz in (torch.randn(24, 9).t(), torch.randn(9, 1).expand(9, 24)):
        dloc = [gate_checks.sample_backward(d, z, *gate_checks.CONSTANTS, torch.float32) for d in (dz, dz.contiguous())]
        torch.testing.assert_close(*dloc)


@compact_checks.by_shape
@compact_checks.by_dtype
def test_compaction(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from fastmerge.kernels.compact import gather_triton

    compact_checks.check_every_layout(lambda t, keeps: gather_triton.compact(t, keeps, 4000), shape, dtype, "cpu")


def test_compaction_of_huge_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmerge.kernels.compact import gather_triton

    monkeypatch.setattr(gather_triton, "_INT32_WORDS", 10)
    for case in range(6):
        tensor = compact_checks.make((40, 30, 3), torch.float32, "contiguous")
        keeps = compact_checks.keeps_of(tensor, 2)[case]
        compact_checks.check_moves(lambda t, k: gather_triton.compact(t, k, 1000), tensor, keeps)
