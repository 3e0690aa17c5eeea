"""Faults planted in the PTX of the kernels, or beside it: the emulator must find each (``make test-ptx``)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ptx_emulator
from batch_norm_checks import check_against_float64, fused, laid_out, make
from block_conv_checks import Case, compare, operands

pytestmark = [pytest.mark.ptx, pytest.mark.usefixtures("poisoned_memory")]

CASE = Case(1, 2, 4, 5, 64, 64, 3, 1)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ptx_emulator.skip_unless_possible()
    return ptx_emulator.folder(tmp_path_factory)


def convolve() -> None:
    from fastmerge.kernels.block_conv import launch_triton, tiles

    given = operands(CASE, torch.bfloat16)
    (tile,) = (t for t in tiles.tiles(64, 64, 2) if (t.positions, t.written) == (64, 64))
    compare("y", launch_triton.forward(given.xs, given.weight, given.bias, 1, CASE.geometry, tile), given)


def weight_gradient() -> None:
    from fastmerge.kernels.block_conv import launch_triton, tiles

    given = operands(CASE, torch.bfloat16)
    tile = tiles.weight_tiles(64, 64, 3)[0]
    assert tile.row_of_taps
    compare("dw", [launch_triton.weight_gradient(given.dys, given.xs, 1, CASE.geometry, tile)], given)


def normalise() -> None:
    with fused():
        check_against_float64(
            laid_out(make((3, 24, 5, 7), torch.float32, samples=3), "channels-last"),
            {"training": True, "activation": "relu"},
        )


def without(pattern: str, times: int = 0) -> Callable[[str], str]:
    """Drops what matches, the first so many times or each time."""
    return lambda ptx: re.sub(pattern, "", ptx, count=times)


def between(first: str, last: str, pattern: str) -> Callable[[str], str]:
    """Drops what matches between one place of the text and the next after it."""

    def change(ptx: str) -> str:
        return re.sub(f"(?s)({first})(.*?)({last})", lambda m: m[1] + re.sub(pattern, "", m[2]) + m[3], ptx, count=1)

    return change


def other_layout(ptx: str) -> str:
    """wgmma's descriptors with a swizzle of 64 bytes in place of 128."""
    return re.sub(r"(or\.b64\s+%rd\d+, %rd\d+, )(46\d{17});", lambda m: f"{m[1]}{int(m[2]) ^ (3 << 62)};", ptx)


BARRIER = r"bar\.sync\s+0;"
WAIT_FOR_BOX = r"\{\s*\.reg \.pred complete;[^}]*\}"
WRONG, HAZARD = r"tolerances|not close", "HazardError: .*"
FAULTS = {
    "another swizzle": (convolve, other_layout, WRONG),
    "no barrier at all": (convolve, without(BARRIER), HAZARD),
    "no barrier before a box is fetched over one that was read": (
        convolve,
        between(r"wgmma\.wait_group\S+ [1-9];", r"cp\.async\.bulk\.tensor", BARRIER),
        HAZARD + "wait and barrier after wgmma's reading",
    ),
    "no wait for a box": (convolve, without(WAIT_FOR_BOX), HAZARD + "wgmma reads before the wait for a box"),
    "no wait for a product before its operands are overwritten": (
        convolve,
        without(r"wgmma\.wait_group\S+ [1-9];"),
        HAZARD + "wait and barrier after wgmma's reading",
    ),
    "no proxy fence before a store": (convolve, without(r"fence\.proxy\.async\S*;"), HAZARD + "without a proxy fence"),
    "no barrier between the fence and a store": (
        convolve,
        between(r"fence\.proxy\.async", r"cp\.async\.bulk\.tensor", BARRIER),
        HAZARD + "stored by TMA without a barrier",
    ),
    "no wait for a store": (convolve, without(r"cp\.async\.bulk\.wait_group\S*\s+0;"), HAZARD + "when its program ends"),
    "a shift that is off by one": (
        convolve,
        lambda ptx: re.sub(r"(add\.s32\s+%r\d+, %r\d+, -)1;", r"\g<1>2;", ptx, count=1),
        WRONG,
    ),
    "no barrier in a weight gradient": (weight_gradient, without(BARRIER), HAZARD),
    "no wait for a box of a weight gradient": (weight_gradient, without(WAIT_FOR_BOX, 1), HAZARD + "before the wait for a box"),
    "a product that is left out": (weight_gradient, without(r"wgmma\.mma_async[^;]*;", 1), WRONG),
    "no barrier in a sum": (normalise, without(BARRIER), HAZARD + "no barrier came after"),
    "stores beyond the end": (
        normalise,
        without(r"@!?%p\d+ (?=st\.global)"),
        "MemoryAccessError: .*outside of all tensors|" + WRONG,
    ),
    "a shuffle that is left out": (normalise, without(r"shfl\.sync\.bfly[^;]*;", 1), WRONG),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_ptx_is_found(name: str, folder: Path) -> None:
    from ptx_emulator.launch import emulated

    run, fault, found = FAULTS[name]
    changed = []

    def change(ptx: str) -> str:
        faulty = fault(ptx)
        changed.append(faulty != ptx)
        return faulty

    with emulated(folder, change=change), pytest.raises((AssertionError, RuntimeError), match=found):
        run()
    assert any(changed), "the PTX has nothing to plant this fault in"


def test_boxes_without_their_swizzle_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptx_emulator.launch import emulated
    from ptx_emulator.memory import TensorMap

    def in_order(self: TensorMap, address: int) -> torch.Tensor:
        return TensorMap(self.address, self.element, 0, self.sizes, self.strides, self.box).places_as_told(address)

    monkeypatch.setattr(TensorMap, "places_as_told", TensorMap.places, raising=False)
    monkeypatch.setattr(TensorMap, "places", in_order)
    with emulated(folder), pytest.raises(AssertionError, match=WRONG):
        convolve()


@pytest.mark.parametrize("run", [convolve, weight_gradient, normalise])
def test_nothing_is_found_without_a_fault(run: Callable[[], None], folder: Path) -> None:
    from ptx_emulator.launch import emulated

    with emulated(folder) as launched:
        run()
    assert launched
