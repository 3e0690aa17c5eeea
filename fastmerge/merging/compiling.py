"""Networks in training under torch.compile: compiled where they are, anew when their shapes change, eager where that fails."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from fastmerge.big_student import BigStudent
from fastmerge.isolation import quietly

LOG = logging.getLogger("fastmerge")
BACKEND = "inductor"

Result = TypeVar("Result")


class Compiler:
    """Compiles a network's forward and backward passes in place, so that it stays the object that it is.

    Linking and compaction change shapes, and so do an epoch's last batches: each shape is compiled once. torch.compile
    counts how often a piece of code was compiled and gives up after a few times, whatever the network; its caches are
    emptied for every network.

    Args:
        wanted: whether to compile at all.
        tell: whether this process says what was compiled.
    """

    def __init__(self, wanted: bool, tell: bool = True) -> None:
        self.wanted, self.tell = wanted, tell
        self._network: nn.Module | None = None
        self._shapes: list[Any] = []
        self._before: tuple[int, Counter[str]] | None = None

    def renew(self, network: nn.Module) -> None:
        """To be called where shapes may have changed, such as between epochs."""
        if not self.wanted:
            return
        shapes = [parameter.shape for parameter in network.parameters()]
        if network is self._network and shapes == self._shapes:
            return
        self._network, self._shapes = network, shapes
        torch.compiler.reset()

        def call(
            *inputs: Any, **options: Any
        ) -> Any:  # Module.compile does nothing for torch's own, such as Sequential
            return network._call_impl(*inputs, **options)

        network._compiled_call_impl = torch.compile(call, backend=BACKEND, dynamic=False)
        self._before = _counts()

    def run(self, work: Callable[[], Result]) -> Result:
        """Runs something with the network; where it can't be compiled, it warns and runs it again without.

        The first time after :meth:`renew` it says what was compiled.
        """
        if not self.wanted or self._network is None:
            return work()
        try:
            # the compiler's own, of its dependencies and of what it would rather have
            with quietly(category=DeprecationWarning, module="torch"), quietly(".*TensorFloat32 tensor cores.*"):
                result = work()
        except _failures() as error:
            warnings.warn(
                f"{name_of(self._network)} can't be compiled and runs eagerly: {str(error).strip().splitlines()[0]}",
                stacklevel=2,
            )
            self.stop()
            self.wanted = False
            return work()
        if self._before is not None:
            if self.tell:
                LOG.info("%s", self._said(self._network, *self._before))
            self._before = None
        return result

    def stop(self) -> None:
        """The network runs eagerly again."""
        if self._network is not None:
            self._network._compiled_call_impl = None
        self._network = self._before = None

    @staticmethod
    def _said(network: nn.Module, graphs: int, breaks: Counter[str]) -> str:
        now, reasons = _counts()
        graphs, reasons = now - graphs, reasons - breaks
        text = f"compiled {name_of(network)}: {graphs} graph{'s' * (graphs != 1)}"
        if reasons:
            first = next(iter(reasons)).strip().splitlines()[0]
            text += f", broken in {sum(reasons.values())} places ({first})"
        return text


def name_of(network: nn.Module) -> str:
    """What a log calls a network."""
    if not isinstance(network, BigStudent):
        return type(network).__name__
    return f"the big student, {'linked' if network.linked else 'block-diagonal'}"


def _counts() -> tuple[int, Counter[str]]:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]), Counter(counters["graph_break"])


def _failures() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return (TorchDynamoException, InductorError)
