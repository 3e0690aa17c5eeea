"""Which implementation runs a convolution: timed once for each card, layer and pass, and remembered.

Candidates are functions by name. ``"split"``, cuDNN convolutions one after another, is always one, and what the others are
checked against. A pass that was never measured runs it too, or cuDNN's groups where there are many. Others run only where they
were measured to be faster, on this card, with these versions, and gave the same result. Measuring is off unless

* ``torch.backends.cudnn.benchmark`` is on, PyTorch's own switch for timing convolutions at their first use, and no
  deterministic algorithms are asked for, or
* :func:`set_measuring` says so.

It never happens while a CUDA graph is captured. Winners live in memory and in ``convolutions.json`` in fastmerge's cache
directory (``cache``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from fastmerge.kernels.block_conv.arithmetic import arithmetic
from fastmerge.kernels.block_conv.cache import cache_file, read_entries, write_entries
from torch import Tensor

LOG = logging.getLogger("fastmerge")
SPLIT = "split"

Run = Callable[[], list[Tensor]]

# Largest difference from cuDNN's result that rounding explains, relative to the largest value.
_AGREEMENT = {"float16": 1e-2, "bfloat16": 5e-2, "tf32": 1e-2, "float32": 1e-3}


@dataclass
class Measurement:
    """What timing a layer's pass gave.

    Attributes:
        winner: name of the fastest candidate.
        milliseconds: time of each candidate that ran and agreed.
    """

    winner: str
    milliseconds: dict[str, float] = field(default_factory=dict)


class Choices:
    """The winners, and how they are found.

    Args:
        timer: milliseconds that a function takes.
        prepare: called with the candidates that are about to be timed.
        stored: whether winners are read from and written to the cache file.
    """

    def __init__(
        self,
        timer: Callable[[Callable[[], Any]], float],
        prepare: Callable[[Sequence[Run]], None] = lambda runs: None,
        stored: bool = True,
    ) -> None:
        self._timer, self._prepare, self._stored = timer, prepare, stored
        self._known: dict[str, Measurement] = {}
        self._read = False
        self._fixed: str | None = None
        self._measuring: bool | None = None
        self._told = False

    def idle(self) -> bool:
        """Whether there is nothing to choose: nothing was measured, is to be, or is fixed."""
        self._read_once()
        return self._fixed is None and not (self._known or self.measures())

    def known(self, key: str) -> str | None:
        """The name to run without measuring: the fixed one, the winner of an earlier measurement, or None."""
        if self._fixed is not None:
            return self._fixed
        self._read_once()
        found = self._known.get(key)
        return None if found is None else found.winner

    def pick(
        self, key: str, candidates: Mapping[str, Any], trial: Callable[[], Mapping[str, Run]], default: str = SPLIT
    ) -> str:
        """The name of the candidate to run.

        Args:
            key: card, layer and pass.
            candidates: by name; ``"split"`` among them.
            trial: makes functions of the same names that run on other data, for measuring.
            default: the candidate where nothing was measured, or where what was measured or fixed is not a candidate.
        """
        name = self.known(key)
        if name is None and self.measures():
            name = self._measure(key, trial())
        return _matching(name, candidates, default)

    def measures(self) -> bool:
        """Whether a layer nobody has measured yet would be, now."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        if self._measuring is not None:
            return self._measuring
        deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        return torch.backends.cudnn.benchmark and not deterministic

    def set_measuring(self, measuring: bool | None) -> None:
        """Switches measuring on or off, or leaves it to ``torch.backends.cudnn.benchmark`` (None)."""
        self._measuring = measuring

    @contextlib.contextmanager
    def fixed(self, name: str) -> Iterator[None]:
        """Within it, this candidate runs wherever it is one, and the default elsewhere; see :func:`fixed_choice`."""
        before, self._fixed = self._fixed, name
        try:
            yield
        finally:
            self._fixed = before

    def table(self) -> list[dict[str, Any]]:
        """Everything measured or read: key, winner, and milliseconds by candidate."""
        self._read_once()
        return [{"key": key, **vars(measurement)} for key, measurement in sorted(self._known.items())]

    def forget(self) -> None:
        """Empties the memory; the cache file stays, and is not read again."""
        self._known.clear()
        self._read = True

    def _read_once(self) -> None:
        if not self._read:
            self._read = True
            if self._stored:
                for key, entry in read_entries().items():
                    self._known.setdefault(key, Measurement(**entry))

    def _measure(self, key: str, trial: Mapping[str, Run]) -> str:
        self._tell()
        expected = trial[SPLIT]()
        self._prepare([run for name, run in trial.items() if name != SPLIT])
        milliseconds = {}
        for name, run in trial.items():
            try:
                wrong = _disagreement(run(), expected)
                if wrong is None:
                    milliseconds[name] = self._timer(run)
            except Exception as error:  # whatever a compiler or driver makes of one candidate, the others remain
                wrong = f"{type(error).__name__}: {error}"
            if wrong is not None:
                warnings.warn(f"{key}: {name} is not used: {wrong}", RuntimeWarning, stacklevel=2)
        # Of equals the first: cuDNN.
        winner = min(milliseconds, key=milliseconds.__getitem__)
        self._known[key] = Measurement(winner, milliseconds)
        if self._stored:
            write_entries({key: vars(self._known[key])})
        return winner

    def _tell(self) -> None:
        """Says, the first time, why nothing seems to happen."""
        if not self._told:
            self._told = True
            kept = f" in {cache_file()}" if self._stored else ""
            LOG.info(
                "convolutions are timed at their first use, which takes minutes in all; the fastest are kept%s", kept
            )


def _matching(name: str | None, candidates: Mapping[str, Any], default: str) -> str:
    """A candidate of this name, else the first whose name begins with it, else the default."""
    if name is None or name in candidates:
        return name or default
    return next((candidate for candidate in candidates if candidate.startswith(name)), default)


def _disagreement(got: list[Tensor], expected: list[Tensor]) -> str | None:
    for result, right in zip(got, expected, strict=True):
        if result.shape != right.shape or result.dtype != right.dtype:
            return f"a result of shape {tuple(result.shape)} where {tuple(right.shape)} is right"
        difference = (result.float() - right.float()).abs().max()
        scale = right.float().abs().max()
        # Written so that a NaN disagrees.
        if not difference <= _AGREEMENT[arithmetic(right.dtype)] * scale:
            return f"its result is off by {float(difference):.2g} where the largest value is {float(scale):.2g}"
    return None


def device_milliseconds(run: Callable[[], Any]) -> float:
    """The median time of a function on the current CUDA device, each time with a cold L2 cache."""
    from triton.testing import do_bench

    return float(statistics.median(do_bench(run, warmup=10, rep=50, return_mode="all")))


def run_beside_each_other(runs: Sequence[Run]) -> None:
    """Runs functions in threads of their own, whatever becomes of them: kernels they launch are compiled side by side."""
    torch.cuda.synchronize()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for future in [pool.submit(run) for run in runs]:
            # What fails here fails again when its turn comes, and is reported then.
            future.exception()
    torch.cuda.synchronize()


choices = Choices(device_milliseconds, run_beside_each_other)


def set_measuring(measuring: bool | None) -> None:
    """Whether layers not met before are timed at their first use: True, False, or as ``torch.backends.cudnn.benchmark``.

    Timing compiles about ten kernels for each pass of a layer, seconds each the first time.
    """
    choices.set_measuring(measuring)


def fixed_choice(name: str) -> contextlib.AbstractContextManager[None]:
    """A context in which one implementation runs, whatever was measured, so that results repeat from run to run.

    Args:
        name: ``"split"``, ``"groups"``, the full name of a Triton tile, or ``"triton"`` for the first that fits. Where there
            is no such candidate, what runs is that of a pass never measured.
    """
    return choices.fixed(name)


def choice_table() -> list[dict[str, Any]]:
    """What was measured, as data: one dict for each card, layer and pass, with ``key``, ``winner`` and ``milliseconds``."""
    return choices.table()
