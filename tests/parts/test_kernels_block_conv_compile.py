"""The block convolution's kernels compile for Hopper to TMA and wgmma without spills, and for Ampere at all.

float32 in TF32 comes to wgmma in every pass. Without TF32 there are no tensor cores for it, and no wgmma, but no spills either.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastmerge.kernels.block_conv.formulas import Geometry
from fastmerge.kernels.block_conv.tiles import Tile, WeightTile, box_of, tiles, weight_tiles

from offline_compile import TARGETS, Compiled, compile_offline

triton = pytest.importorskip("triton")

SHARED_BYTES = 227 * 1024
POINTWISE = {stride: Geometry((1, 1), (stride, stride)) for stride in (1, 2)}
THREE = {stride: Geometry((3, 3), (stride, stride), (1, 1)) for stride in (1, 2)}
# Channels read and written, of a stream: ResNet-20's, ResNet-18's and ResNet-50's.
CHANNELS = [(16, 16), (16, 32), (32, 32), (64, 64), (64, 128), (128, 64), (128, 128), (512, 512)]


def all_tiles(arithmetic: str = "bfloat16") -> list[Tile]:
    """Those for many samples, and the others that few have: boxes of neighbours that write few channels."""
    return sorted(
        {
            tile
            for read, written in CHANNELS
            for batch in (1, 256)
            for tile in tiles(read, written, batch, None, arithmetic)
        },
        key=str,
    )


def all_weight_tiles(arithmetic: str = "bfloat16") -> list[WeightTile]:
    return sorted(
        {
            tile
            for read, written in CHANNELS
            for tile in weight_tiles(read, written, 3, None, arithmetic)
            # How many programs there are is no matter of the code.
            if tile.programs == weight_tiles(16, 16, 3)[0].programs
        },
        key=str,
    )


ALL_TILES, ALL_WEIGHT_TILES = all_tiles(), all_weight_tiles()
TF32_TILES, TF32_WEIGHT_TILES = all_tiles("tf32"), all_weight_tiles("tf32")
IEEE_TILES, IEEE_WEIGHT_TILES = all_tiles("float32"), all_weight_tiles("float32")
# One of each size of accumulator, for every day.
SOME_TILES = [tile for tile in ALL_TILES if tile.read == 64 and tile.positions == 128 and tile.written >= 64]
SOME_WEIGHT_TILES = [tile for tile in ALL_WEIGHT_TILES if tile.columns == 64]


def descriptor(dtype: str, *box: int) -> str:
    return f"tensordesc<{dtype}[{','.join(map(str, box))}]>"


def box_dims(box: tuple[int, int, int], samples: bool, channels: int) -> tuple[int, ...]:
    n, h, w = box
    return (1, h, w, n, channels) if samples else (1, n, h, w, channels)


def compile_correlate(
    geometry: Geometry,
    tile: Tile,
    gradient: bool,
    bias: bool = False,
    blocks: tuple[int, int] = (0, 0),
    dtype: str = "bf16",
    capability: int = 90,
    arithmetic: str = "bfloat16",
) -> Compiled:
    from fastmerge.kernels.block_conv import correlate_triton as module

    box = (tile.positions, 1, 1) if tile.samples else box_of(tile.positions, 32, 14, 14)
    assert tile.samples or sum(edge > 1 for edge in box) > 1
    lattices = geometry.stride[0] ** 2
    read, written = (box_dims(box, tile.samples, channels) for channels in (tile.read, tile.written))
    reads, writes = (1, lattices) if gradient else (lattices, 1)
    constants = module.correlate_constants(geometry, tile, box, gradient, bias, blocks, arithmetic)
    read_in_rows = gradient and not constants["TURNED"]
    weight = (1, 1, tile.read, tile.written) if read_in_rows else (1, 1, tile.written, tile.read)
    arguments = (
        {f"x{i}": descriptor(dtype, *read) for i in range(reads)}
        | {f"y{i}": descriptor(dtype, *written) for i in range(writes)}
        | {"w": descriptor(dtype, *weight)}
        | ({"bias_ptr": f"*{dtype}"} if bias else {})
        | ({"starts_ptr": "*i32", "live_ptr": "*i32"} if blocks[0] else {})
        | dict.fromkeys(module._UNSPECIALIZED, "i32")
    )
    return compile_with(module.correlate_kernel, arguments, constants, capability, tile, module._UNSPECIALIZED)


def compile_wgrad(
    geometry: Geometry,
    tile: WeightTile,
    block: tuple[int, int] = (0, 0),
    box: tuple[int, int, int] = (64, 1, 1),
    dtype: str = "bf16",
    sums: str = "*fp32",
    capability: int = 90,
    arithmetic: str = "bfloat16",
) -> Compiled:
    from fastmerge.kernels.block_conv import wgrad_triton as module

    samples = box[0] > 1
    arguments = (
        {f"x{i}": descriptor(dtype, *box_dims(box, samples, tile.columns)) for i in range(geometry.stride[0] ** 2)}
        | {"dy": descriptor(dtype, *box_dims(box, samples, tile.rows)), "dw_ptr": sums}
        | ({"rows_ptr": "*i32", "columns_ptr": "*i32"} if block[0] else {})
        | dict.fromkeys(module._UNSPECIALIZED, "i32")
    )
    constants = module.wgrad_constants(geometry, tile, box, block, arithmetic)
    return compile_with(module.wgrad_kernel, arguments, constants, capability, tile, module._UNSPECIALIZED)


def compile_with(
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    tile: Tile | WeightTile,
    unspecialized: list[str],
) -> Compiled:
    absent = {name: None for name in kernel.arg_names if name not in arguments and name not in constants}
    return compile_offline(
        kernel,
        arguments,
        constants | absent,
        capability,
        unaligned=unspecialized,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def check_hopper(compiled: Compiled, loads_in_flight: int, from_shared_memory: bool = True) -> None:
    assert (compiled.stack_bytes, compiled.spill_bytes) == (0, 0)
    assert compiled.shared_bytes <= SHARED_BYTES
    assert "wgmma.mma_async" in compiled.ptx
    assert not re.search(r"\bmma\.sync", compiled.ptx)
    # Both operands as they lie in shared memory: no copy through registers.
    left_in_registers = re.findall(r"wgmma\.mma_async[^;{]*\{[^}]*\},\s*\{", compiled.ptx)
    assert bool(left_in_registers) != from_shared_memory
    # Fetched by TMA alone, the first steps' boxes before the loop: as many as there are stages.
    loads = len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", compiled.ptx))
    assert loads >= loads_in_flight
    assert "cp.async.cg" not in compiled.ptx


def check_correlate(geometry: Geometry, tile: Tile, gradient: bool, **options: Any) -> None:
    compiled = compile_correlate(geometry, tile, gradient, **options)
    # Few channels can't be the left operand, nor boxes of neighbours.
    check_hopper(compiled, 2 * (tile.stages - 1), tile.samples or tile.written >= 64)
    assert "cp.async.bulk.tensor.5d.global" in compiled.ptx
    assert "st.global" not in compiled.ptx


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("tile", SOME_TILES, ids=lambda tile: tile.name)
def test_some_tiles(tile: Tile, gradient: bool) -> None:
    check_correlate(THREE[2], tile, gradient, bias=not gradient)


@pytest.mark.parametrize("tile", SOME_WEIGHT_TILES, ids=lambda tile: tile.name)
def test_some_weight_tiles(tile: WeightTile) -> None:
    check_hopper(compile_wgrad(THREE[1], tile), (4 if tile.row_of_taps else 2) * (tile.stages - 1))


@pytest.mark.parametrize("geometry", [*POINTWISE.values(), THREE[1]], ids=["1x1", "1x1 stride 2", "3x3"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_geometries(geometry: Geometry, gradient: bool) -> None:
    check_correlate(geometry, tiles(64, 64, 256)[1], gradient)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("geometry", [POINTWISE[1], THREE[1]], ids=["1x1", "3x3"])
def test_live_blocks(geometry: Geometry, gradient: bool) -> None:
    # As many stages in flight as for a dense weight: looking up the next block holds up no box.
    check_correlate(geometry, tiles(128, 128, 256, (128, 128))[2], gradient, blocks=(128, 128))


def test_weight_gradient_of_live_blocks() -> None:
    tile = weight_tiles(128, 128, 3, (128, 128))[0]
    check_hopper(compile_wgrad(THREE[2], tile, (128, 128)), 2 * (tile.stages - 1))


@pytest.mark.parametrize("box", [(32, 1, 1), (16, 1, 1), (1, 1, 64), (1, 1, 16)])
def test_weight_gradient_of_other_boxes(box: tuple[int, int, int]) -> None:
    tile = weight_tiles(64, 64, 3)[0]
    check_hopper(compile_wgrad(THREE[1], tile, box=box), (4 if tile.row_of_taps else 2) * (tile.stages - 1))


def test_float16() -> None:
    check_correlate(THREE[1], tiles(64, 64, 256)[0], False, bias=True, dtype="fp16")
    tile = weight_tiles(64, 64, 3)[0]
    check_hopper(compile_wgrad(THREE[1], tile, dtype="fp16", sums="*fp16"), 2 * (tile.stages - 1))


def turned_in_shared_memory(compiled: Compiled) -> bool:
    """Whether anything but TMA writes operands to shared memory; what comes after the last product is the result."""
    return "st.shared" in compiled.ptx.rpartition("wgmma.mma_async")[0] or "stmatrix" in compiled.ptx


def check_tf32(geometry: Geometry, tile: Tile, gradient: bool, blocks: tuple[int, int] = (0, 0)) -> None:
    compiled = compile_correlate(geometry, tile, gradient, not gradient, blocks, dtype="fp32", arithmetic="tf32")
    check_hopper(compiled, 2 * (tile.stages - 1), tile.samples or tile.written >= 64)
    assert ".f32.tf32.tf32" in compiled.ptx
    # Both operands as TMA wrote them, the input gradient's too: its weight was turned.
    assert not turned_in_shared_memory(compiled)


def check_weight_tf32(
    geometry: Geometry, tile: WeightTile, box: tuple[int, int, int] = (32, 1, 1), block: tuple[int, int] = (0, 0)
) -> None:
    compiled = compile_wgrad(geometry, tile, block, box, dtype="fp32", arithmetic="tf32")
    check_hopper(compiled, (4 if tile.row_of_taps else 2) * (tile.stages - 1))
    assert ".f32.tf32.tf32" in compiled.ptx
    # The positions summed over lie apart in both boxes, where wgmma can't read 32 bits: Triton turns them round, through
    # registers into shared memory.
    assert turned_in_shared_memory(compiled)


def check_ieee(compiled: Compiled) -> None:
    assert (compiled.stack_bytes, compiled.spill_bytes) == (0, 0)
    assert compiled.shared_bytes <= SHARED_BYTES
    assert "fma.rn.f32" in compiled.ptx
    assert not re.search("tf32|mma", compiled.ptx)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_tf32(gradient: bool) -> None:
    check_tf32(THREE[1], tiles(128, 128, 32, None, "tf32")[0], gradient)


def test_weight_gradient_in_tf32() -> None:
    tile = weight_tiles(64, 64, 3, None, "tf32")[0]
    check_weight_tf32(THREE[1], tile)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_float32_without_tensor_cores(gradient: bool) -> None:
    tile = tiles(64, 64, 32, None, "float32")[0]
    check_ieee(compile_correlate(THREE[1], tile, gradient, dtype="fp32", arithmetic="float32"))


def test_weight_gradient_without_tensor_cores() -> None:
    tile = weight_tiles(64, 64, 3, None, "float32")[0]
    check_ieee(compile_wgrad(THREE[1], tile, box=(16, 1, 1), dtype="fp32", arithmetic="float32"))


def test_sums_are_written_by_vectors_whatever_the_channels() -> None:
    """24 channels as well as 32: nothing is known of them but that they are a multiple of 8."""
    tile = weight_tiles(64, 64, 3)[0]
    stores = re.findall(r"st\.global(?:\.v\d)?\.b32", compile_wgrad(THREE[1], tile).ptx)
    assert stores
    assert set(stores) <= {"st.global.v2.b32", "st.global.v4.b32"}


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("block", [(0, 0), (64, 64)])
def test_reduction(capability: int, block: tuple[int, int]) -> None:
    from fastmerge.kernels.block_conv import wgrad_triton as module

    arguments = {"sums_ptr": "*fp32", "dw_ptr": "*bf16"} | dict.fromkeys(module._REDUCE_UNSPECIALIZED, "i32")
    constants = module.reduce_constants(THREE[1], block, 8)
    lists = ["rows_ptr", "columns_ptr"]
    if block[0]:
        arguments |= dict.fromkeys(lists, "*i32")
    else:
        constants |= dict.fromkeys(lists)
    compiled = compile_offline(
        module.reduce_kernel, arguments, constants, capability, unaligned=module._REDUCE_UNSPECIALIZED
    )
    assert (compiled.stack_bytes, compiled.spill_bytes) == (0, 0)
    # Several partial sums on their way at a time; in whole vectors, where they lie as the weight does.
    vector = "" if block[0] else r"\.v4"
    assert len(re.findall(rf"ld\.global{vector}\.b32", compiled.ptx)) >= 4


def test_ampere() -> None:
    # No tile is chosen there; the boxes turn into loads by pointer.
    for gradient in (False, True):
        compiled = compile_correlate(THREE[1], Tile(64, 64, 32, 4, 3), gradient, capability=80)
        assert (compiled.stack_bytes, compiled.spill_bytes) == (0, 0)
        assert "mma.sync" in compiled.ptx
    compiled = compile_wgrad(THREE[1], WeightTile(64, 64, False, 1, 4, 3), capability=80)
    assert (compiled.stack_bytes, compiled.spill_bytes) == (0, 0)
    assert "mma.sync" in compiled.ptx


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [THREE[1], THREE[2]], ids=["stride 1", "stride 2"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("tile", ALL_TILES, ids=lambda tile: tile.name)
def test_all_tiles(tile: Tile, gradient: bool, geometry: Geometry) -> None:
    check_correlate(geometry, tile, gradient, bias=not gradient)


@pytest.mark.slow
@pytest.mark.parametrize(
    "geometry", [THREE[1], THREE[2], POINTWISE[1], POINTWISE[2]], ids=lambda g: f"{g.kernel} {g.stride}"
)
@pytest.mark.parametrize("tile", ALL_WEIGHT_TILES, ids=lambda tile: tile.name)
def test_all_weight_tiles(tile: WeightTile, geometry: Geometry) -> None:
    if tile.row_of_taps and geometry.kernel == (1, 1):
        pytest.skip("a kernel of one column has no row of three taps")
    check_hopper(compile_wgrad(geometry, tile), (4 if tile.row_of_taps else 2) * (tile.stages - 1))


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [THREE[1], THREE[2]], ids=["stride 1", "stride 2"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("tile", TF32_TILES, ids=lambda tile: tile.name)
def test_all_tiles_in_tf32(tile: Tile, gradient: bool, geometry: Geometry) -> None:
    check_tf32(geometry, tile, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [THREE[1], THREE[2]], ids=["stride 1", "stride 2"])
@pytest.mark.parametrize("box", [(16, 1, 1), (32, 1, 1), (1, 1, 32)], ids=str)
@pytest.mark.parametrize("tile", TF32_WEIGHT_TILES, ids=lambda tile: tile.name)
def test_all_weight_tiles_in_tf32(tile: WeightTile, box: tuple[int, int, int], geometry: Geometry) -> None:
    check_weight_tf32(geometry, tile, box)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [POINTWISE[1], THREE[2]], ids=["1x1", "3x3 stride 2"])
def test_live_blocks_of_float32(geometry: Geometry) -> None:
    blocks = (128, 128)
    for gradient in (False, True):
        check_tf32(geometry, tiles(128, 128, 256, blocks, "tf32")[2], gradient, blocks)
        tile = tiles(128, 128, 256, blocks, "float32")[0]
        check_ieee(compile_correlate(geometry, tile, gradient, blocks=blocks, dtype="fp32", arithmetic="float32"))
    columns = geometry.kernel[1]
    check_weight_tf32(geometry, weight_tiles(128, 128, columns, blocks, "tf32")[0], block=blocks)
    weight_tile = weight_tiles(128, 128, columns, blocks, "float32")[0]
    check_ieee(compile_wgrad(geometry, weight_tile, blocks, (16, 1, 1), dtype="fp32", arithmetic="float32"))


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("tile", IEEE_TILES, ids=lambda tile: tile.name)
def test_all_tiles_without_tensor_cores(tile: Tile, gradient: bool) -> None:
    bias = not gradient
    for geometry in (THREE[1], THREE[2]):
        check_ieee(compile_correlate(geometry, tile, gradient, bias=bias, dtype="fp32", arithmetic="float32"))


@pytest.mark.slow
@pytest.mark.parametrize("tile", IEEE_WEIGHT_TILES, ids=lambda tile: tile.name)
def test_all_weight_tiles_without_tensor_cores(tile: WeightTile) -> None:
    check_ieee(compile_wgrad(THREE[2], tile, box=(16, 1, 1), dtype="fp32", arithmetic="float32"))
