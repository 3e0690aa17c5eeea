"""Executes, on a CPU, the PTX that Triton emits for a Hopper GPU, so that kernels are tested as they are compiled.

A test takes the fixture ``emulator`` and launches kernels with tensors of the CPU. What runs is what would run on a GPU:
Triton's own specialisation, compiler, argument packing and tensor descriptors, then each instruction for sm_90a.
Every access of global memory is checked for alignment and against the tensors that there are,
every tensor map against CUDA's rules, and shared memory for hazards: accesses whose order no barrier, wait or fence guarantees.
What nobody has written reads as NaN.

What it can't see:

* speed, registers, spills, occupancy: ``tests/offline_compile.py`` asks the assembler about these;
* what the real driver refuses beyond the documented rules, and what ptxas makes of the PTX;
* races through global memory, between programs and between threads;
* hazards within a warp, whose threads run in step here;
* how the tensor cores round their sums: here these are float32 sums of exact products;
* instructions that no kernel of this project uses: they are errors that name themselves.

Source: NVIDIA, "Parallel Thread Execution ISA". A wrong reading of it would show as wrong numbers here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from interpreter import INTERPRETING


def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of this run keep what they compile, those of all workers together."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "ptx-emulator"


_TRITON = "3.6"


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Runs the module's kernels on the emulator; the names of those that were launched."""
    skip_unless_possible()
    from ptx_emulator.launch import emulated

    with emulated(folder(tmp_path_factory)) as launched:
        yield launched


def skip_unless_possible() -> None:
    """The emulator's libcuda takes the place of a real one, and interpreted kernels have no PTX.

    Other releases of Triton emit instructions that the emulator does not know.
    """
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith(_TRITON):
        pytest.skip(f"the emulator knows what Triton {_TRITON} emits; this is {triton.__version__}")
    if INTERPRETING or torch.cuda.is_available():
        pytest.skip("the emulator runs where there is no GPU, and where kernels are not interpreted")
