"""Triton's launches without a GPU: its own launchers and tensor descriptors over a libcuda of ours.

``kernel[grid](...)`` goes as on a GPU: Triton specialises, compiles to PTX, packs arguments and encodes descriptors with its
own code. In place of a cubin stands the PTX itself, and what the driver would launch is executed here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastmerge.kernels.launch import forget
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ptx_emulator import arithmetic, control, products, transfers  # noqa: F401, which register the instructions
from ptx_emulator.decode import decode
from ptx_emulator.machine import Launch, Step, run
from ptx_emulator.memory import GlobalMemory, TensorMap
from ptx_emulator.parse import Kernel, parse

_FAILED, _INVALID = 719, 1  # CUDA_ERROR_LAUNCH_FAILED, CUDA_ERROR_INVALID_VALUE
_MOST_SHARED, _MOST_THREADS, _MOST_YZ = 232448, 1024, 65535
_ELEMENTS = dict(enumerate((1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)))  # bytes of each CUtensorMapDataType
_MAP_BYTES = 128

_words, _longs = ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint64)
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, _words, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)
_ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint64),
    *(_longs, _longs, _words, _words),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
)


@contextlib.contextmanager
def emulated(folder: Path, change: Callable[[str], str] = str) -> Iterator[list[str]]:
    """Runs Triton's kernels on the emulator; tensors on the CPU stand for the device's.

    Args:
        folder: for what is compiled.
        change: applied to the PTX before it is executed, to plant a fault.

    Yields:
        The names of the kernels that were launched, in order.
    """
    launched: list[str] = []
    library, tensors = _library(folder), _Tensors()

    def execute(ptx: bytes, grid: Any, threads: int, shared: int, values: Any) -> int:
        def launch() -> None:
            kernel, steps = load(change(ptx.decode()))
            launched.append(kernel.name)
            run(_launch(kernel, tuple(grid[:3]), threads, shared, values, tensors.places()), steps)

        return _FAILED if _failed(library, launch) else 0

    def encode(to: int, kind: int, rank: int, address: int, *rest: Any) -> int:
        return _INVALID if _failed(library, lambda: _encode(to, kind, rank, address, *rest)) else 0

    callbacks = _LAUNCH(execute), _ENCODE(encode)
    before = driver._active
    with (
        mock.patch.object(nvidia, "library_dirs", return_value=[nvidia.libdevice_dir, str(folder)]),
        mock.patch.object(CUDABackend, "make_cubin", _ptx_itself),
        knobs.cache.scope(),
    ):
        knobs.cache.dir = str(folder / "triton")
        library.emulator_install(*callbacks)
        driver.set_active(_Driver())
        try:
            yield launched
        finally:
            driver._active = before
            gc.unfreeze()
            # What was compiled for this device is none of the next one's.
            forget()
            for function in [found for found in gc.get_objects() if issubclass(type(found), JITFunction)]:
                function.device_caches.clear()


class _Driver(nvidia.CudaDriver):
    """Triton's driver without what it asks PyTorch about the device."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def _ptx_itself(backend: CUDABackend, ptx: str, *options: Any) -> bytes:
    return ptx.encode()


@functools.cache
def _library(folder: Path) -> ctypes.CDLL:
    """The library that Triton's own find under the name of libcuda, as long as it is the first of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    source, library = Path(__file__).with_name("driver.c"), folder / "libcuda.so.1"
    built = folder / f"libcuda-{os.getpid()}.so"
    compiler = os.environ.get("CC", "cc")
    options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", *(f"-I{path}" for path in nvidia.include_dirs)]
    subprocess.run([compiler, *options, "-o", str(built), str(source)], check=True)
    built.replace(library)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@functools.lru_cache(maxsize=64)
def load(ptx: str) -> tuple[Kernel, list[Step]]:
    """A kernel, and what its instructions do."""
    kernel = parse(ptx)
    return kernel, decode(kernel)


def _failed(library: ctypes.CDLL, call: Callable[[], None]) -> bool:
    """Calls, and keeps what an error says for Triton, which raises it as its own."""
    try:
        call()
    except Exception as error:
        library.emulator_fail(f"{type(error).__name__}: {error}".encode()[:880])
        return True
    return False


def _launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    threads: int,
    shared: int,
    values: Any,
    tensors: set[tuple[int, int]],
) -> Launch:
    if threads > _MOST_THREADS or shared > _MOST_SHARED or 0 in grid or max(grid[1:]) > _MOST_YZ:
        raise ValueError(f"the device has no room for {grid} programs of {threads} threads and {shared} bytes")
    parameters, maps = {}, {}
    for i, (name, size) in enumerate(kernel.parameters):
        data = ctypes.string_at(values[i], size)
        parameters[name] = values[i] if size == _MAP_BYTES else int.from_bytes(data, "little")
        if size == _MAP_BYTES:
            maps[values[i]] = TensorMap.unpack(data)
    memory = GlobalMemory(tensors)
    return Launch(kernel, grid, threads, shared, parameters, maps, memory)


class _Tensors:
    """All tensors of this process, for one launch after the other: what was seen before is not looked through again."""

    _MANY = 50_000

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref] = {}
        self.places()
        gc.freeze()

    def places(self) -> set[tuple[int, int]]:
        """Address and bytes of what each tensor lies in."""
        young = gc.get_objects()
        for found in young:
            if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
                self._known[id(found)] = weakref.ref(found)
        if len(young) > self._MANY:
            gc.collect()
            gc.freeze()
        living = {key: tensor for key, known in self._known.items() if (tensor := known()) is not None}
        self._known = {key: self._known[key] for key in living}
        storages = [tensor.untyped_storage() for tensor in living.values() if tensor.layout == torch.strided]
        return {(storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes()}


def _encode(
    to: int, kind: int, rank: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any, interleave: int,
    swizzle: int, fill: int,
) -> None:  # fmt: skip
    if interleave or fill or kind not in _ELEMENTS or any(step != 1 for step in steps[:rank]):
        raise ValueError("the emulator's tensor maps are tiled, dense and filled up with zeros")
    element = _ELEMENTS[kind]
    lengths = element, *strides[: rank - 1]
    tensor_map = TensorMap(address, element, swizzle, tuple(sizes[:rank]), lengths, tuple(box[:rank]))
    refusal = tensor_map.refusal()
    if refusal:
        raise ValueError(refusal)
    data = tensor_map.pack()
    ctypes.memmove(to, data, len(data))
