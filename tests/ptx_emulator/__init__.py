"""Executes, on a CPU, the PTX that Triton emits for a Hopper GPU."""

from ptx_emulator.launch import emulated

__all__ = ["emulated"]
