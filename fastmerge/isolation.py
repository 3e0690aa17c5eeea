"""What PyTorch and Python keep once for all threads, used by one thread at a time, unseen by the others, and put back.

Random numbers, the filters of warnings, switches of PyTorch's backends and what ``torch.export`` patches belong to the process.
Two threads that each change and restore them would restore what the other had changed.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import random
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

# What says on standard error how an export goes.
_ANNOUNCING = ("torch.fx.experimental.symbolic_shapes", "torch._export.non_strict_utils", "torch.export._trace")

ONE_THREAD = threading.RLock()  # whoever changes what holds for the whole process has it for that time


@contextmanager
def undisturbed(tensors: Iterable[Any] = (), grad: bool = False) -> Iterator[None]:
    """To run a network for what it shows: as it is by itself, without warnings, and without using up anybody's random numbers.

    Whatever the user is in the middle of (inference mode, autocast) does not hold within it. Attention takes no fast path, and
    convolutions are not timed. Numbers that another thread draws meanwhile may be drawn again after it.

    Args:
        tensors: what it is run on and with.
        grad: whether gradients can be taken.
    """
    devices = {x.device for x in tensors if isinstance(x, Tensor)}
    with ONE_THREAD, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(torch.random.fork_rng(devices=[d for d in devices if d.type == "cuda"]))
        for kind in {"cpu", "cuda", *(device.type for device in devices)} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(quietly())
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.cudnn.benchmark = False
        yield


@contextmanager
def quietly(message: str = "", category: type[Warning] = Warning, module: str = "") -> Iterator[None]:
    """Within it warnings of this kind are not shown; the arguments are those of ``warnings.filterwarnings``."""
    with ONE_THREAD, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category, module)
        yield


@contextmanager
def without_search() -> Iterator[None]:
    """Within it objects are not searched for garbage: for what makes many of them, hardly any of which is garbage."""
    with ONE_THREAD, ExitStack() as stack:
        if gc.isenabled():
            stack.callback(gc.enable)
            gc.disable()
        yield


@contextmanager
def exporting(asked: Callable[[FrameType], None]) -> Iterator[None]:
    """Within it ``torch.export`` switches for this thread alone what it would switch for the whole process.

    It replaces ``nn.Module.__call__`` and ``__getattr__``, which give other threads stand-ins for their modules, and tells
    whoever asks that the process is compiling. What it would note of each tensor's memory takes long, and it does not. What an
    export that fails would print beside its error is not shown: whoever asks for it reports it.

    Args:
        asked: gets the frame of whoever asks whether the process is compiling or exporting.
    """
    from torch.export import _trace
    from torch.fx import _symbolic_trace
    from torch.fx.experimental import proxy_tensor

    patcher, thread = _symbolic_trace._Patcher, threading.get_ident()
    patch_method, switches = patcher.patch_method, _trace._compiling_state_context
    layout_of = proxy_tensor._extract_tensor_metadata

    def patch_here(self: Any, cls: type, name: str, new: Callable[..., Any], deduplicate: bool = True) -> None:
        old = getattr(cls, name)

        @functools.wraps(new)
        def here(*args: Any, **kwargs: Any) -> Any:
            return (new if threading.get_ident() == thread else old)(*args, **kwargs)

        patch_method(self, cls, name, here, deduplicate)

    def layout_elsewhere(*args: Any) -> Any:
        return None if threading.get_ident() == thread else layout_of(*args)

    @contextmanager
    def switched_here() -> Iterator[None]:
        with switches():
            torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = _Here(asked)  # type: ignore[assignment]
            yield

    with without_search(), ExitStack() as stack:
        _keep_device_guard()
        stack.callback(setattr, patcher, "patch_method", patch_method)
        # a mask is used whether or not it is causal, but nn.TransformerEncoder asks its values
        stack.callback(setattr, transformer, "_detect_is_causal_mask", transformer._detect_is_causal_mask)
        transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
        stack.callback(setattr, _trace, "_compiling_state_context", switches)
        stack.callback(setattr, proxy_tensor, "_extract_tensor_metadata", layout_of)
        patcher.patch_method = patch_here  # type: ignore[method-assign, assignment]
        for logger in map(logging.getLogger, _ANNOUNCING):
            stack.callback(setattr, logger, "disabled", logger.disabled)
            logger.disabled = True
        _trace.print = lambda *args, **kwargs: None  # type: ignore[attr-defined]
        stack.callback(vars(_trace).pop, "print", None)
        proxy_tensor._extract_tensor_metadata = layout_elsewhere  # type: ignore[assignment]
        _trace._compiling_state_context = switched_here
        yield


@functools.cache
def _keep_device_guard() -> None:
    """Lets a thread that never ends be the first that exports.

    What stands in for a GPU that is missing belongs to that thread, and PyTorch crashes in the next export once it has ended.
    """
    if threading.current_thread() is threading.main_thread() or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        return
    is_set = threading.Event()

    def stay() -> None:
        torch._C._ensureCUDADeviceGuardSet()
        is_set.set()
        threading.Event().wait()

    threading.Thread(target=stay, daemon=True).start()
    is_set.wait()


class _Here:
    """A switch that is on in the thread that made it, and notes who asks there."""

    def __init__(self, asked: Callable[[FrameType], None]) -> None:
        self.thread, self.asked = threading.get_ident(), asked

    def __bool__(self) -> bool:
        return self._answer(sys._getframe(1))

    # code computes with what should be a bool: is_tracing |= is_fake_tensor(x)
    def __or__(self, other: Any) -> Any:
        return self._answer(sys._getframe(1)) | other

    def __and__(self, other: Any) -> Any:
        return self._answer(sys._getframe(1)) & other

    def __xor__(self, other: Any) -> Any:
        return self._answer(sys._getframe(1)) ^ other

    __ror__, __rand__, __rxor__ = __or__, __and__, __xor__

    def _answer(self, frame: FrameType) -> bool:
        is_here = threading.get_ident() == self.thread
        if is_here:
            self.asked(frame)
        return is_here


Network = TypeVar("Network", bound=nn.Module)


def copied(network: Network) -> Network:
    """What ``copy.deepcopy`` gives, in half the time: empty dicts and sets, such as every module has for hooks, are ready."""
    attributes = (value for module in network.modules() for value in vars(module).values())
    with without_search():
        return copy.deepcopy(network, {id(v): type(v)() for v in attributes if type(v) in (OrderedDict, set) and not v})
