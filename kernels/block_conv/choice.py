"""Which implementation runs a convolution: timed once for each card, layer and pass, and remembered.

Candidates are functions by name. ``"split"``, cuDNN convolutions one after another, is always one, and what the others are
checked against. A pass that was never measured runs it too, or cuDNN's groups where there are many. Others run only where they
were measured to be clearly faster than plain PyTorch, on this card, with these versions, and gave the same result. Measuring is
off unless

* ``torch.backends.cudnn.benchmark`` is on, PyTorch's own switch for timing convolutions at their first use, and no
  deterministic algorithms are asked for, or
* :func:`set_measuring` says so.

It never happens while a CUDA graph is captured, nor in runs of several processes, which would choose apart: those run what one
process measured before. A batch size is measured in the second training step in a row that has it, so that an epoch's last
batch starts nothing; until then what won at the layer's last measured size runs. Winners live in memory and in
``convolutions.json`` in fastmerge's cache directory (``cache``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import statistics
import threading
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from fastmerge.kernels.block_conv.arithmetic import arithmetic
from fastmerge.kernels.block_conv.cache import cache_file, read_entries, write_entries
from fastmerge.kernels.cuda_graph import capture
from torch import Tensor

LOG = logging.getLogger("fastmerge")
SPLIT = "split"

Run = Callable[[], list[Tensor]]

# Largest difference from cuDNN's result that rounding explains, relative to the largest value.
_AGREEMENT = {"float16": 1e-2, "bfloat16": 5e-2, "tf32": 1e-2, "float32": 1e-3}
# What a candidate must gain over plain PyTorch, which costs the CPU less.
_LEAST_GAIN, _LEAST_MILLISECONDS = 0.05, 0.01
# Where no backward pass tells steps apart: calls in a row from which on a size is worth measuring. More than a network has
# layers of one shape.
_CALLS_IN_A_ROW = 64
_FLUSHED = 2**28  # bytes: several times the L2 cache
_MOST_REMEMBERED = 4096


@dataclass
class Measurement:
    """What timing a layer's pass gave.

    Attributes:
        winner: name of the candidate to run.
        milliseconds: time of each candidate that ran and agreed.
    """

    winner: str
    milliseconds: dict[str, float] = field(default_factory=dict)


@dataclass
class _Met:
    """How often a layer has been met at one batch size, with no other in between: since which step, and in how many calls."""

    batch: int
    step: int
    calls: int = 0


@dataclass
class Memory:
    """What :class:`Choices` knows.

    Attributes:
        read: whether the cache file was read.
        known: measurements by key.
        by_layer: the last winner of each layer and pass, whatever the batch size.
        met: how often each layer has been met at its present batch size.
        untimed: keys that could not be measured, as where there was not enough memory.
        remembered: what was found out for a call, by whatever tells calls apart; forgotten when anything above changes.
    """

    read: bool = False
    known: dict[str, Measurement] = field(default_factory=dict)
    by_layer: dict[str, str] = field(default_factory=dict)
    met: dict[str, _Met] = field(default_factory=dict)
    untimed: set[str] = field(default_factory=set)
    remembered: dict[Hashable, Any] = field(default_factory=dict)


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
        self._memory = Memory()
        self._fixed: str | None = None
        self._measuring: bool | None = None
        self._told = False
        self._step, self._backward = 0, False

    def idle(self) -> bool:
        """Whether there is nothing to choose: nothing was measured, is to be, or is fixed."""
        return self._fixed is None and not self._read().known and not self.measures()

    def known(self, key: str) -> str | None:
        """The name to run without measuring: the fixed one, a winner at this batch size or another, or None."""
        if self._fixed is not None:
            return self._fixed
        memory = self._read()
        found = memory.known.get(key)
        return memory.by_layer.get(without_batch(key)) if found is None else found.winner

    def settled(self, key: str) -> bool:
        """Whether :meth:`known` is the last word, as long as neither measuring nor what is fixed changes."""
        memory = self._read()
        return self._fixed is not None or key in memory.known or key in memory.untimed or not self.measures()

    def pick(
        self,
        key: str,
        candidates: Collection[str],
        trial: Callable[[], Mapping[str, Run]] | None,
        default: str = SPLIT,
        plain: str = SPLIT,
    ) -> str:
        """The name of the candidate to run.

        Args:
            key: card, layer and pass.
            candidates: names; ``"split"`` among them.
            trial: makes the functions to measure, which run on other data; ``"split"`` among them. None: not now.
            default: the candidate where nothing was measured, or where what was measured or fixed is not a candidate.
            plain: the one that plain PyTorch runs, which others must clearly beat.
        """
        if trial is not None and not self.settled(key):
            self._measure(key, trial, plain)
        return _matching(self.known(key), candidates, default)

    def begins(self, backward: bool) -> None:
        """To be told of each pass that runs: a forward pass after a backward one begins a step.

        One within a backward pass does not, as checkpointing computes activations again.
        """
        if not backward and torch._C._current_graph_task_id() != -1:
            return
        if self._backward and not backward:
            self._step += 1
        self._backward = backward

    def meets(self, layer: str, batch: int) -> None:
        """To be told of each forward pass of a layer, by whatever tells layers apart, whether it is measured or not."""
        met = self._memory.met.get(layer)
        if met is None or met.batch != batch:
            met = self._memory.met[layer] = _Met(batch, self._step)
        met.calls += 1

    def due(self, layer: str, batch: int) -> bool:
        """Whether a batch size stays: it was met in an earlier step, with no other in between."""
        met = self._memory.met.get(layer)
        return met is not None and met.batch == batch and (met.step < self._step or met.calls > _CALLS_IN_A_ROW)

    def measures(self) -> bool:
        """Whether a layer nobody has measured yet would be, now."""
        wanted = self._measuring
        if wanted is None:
            wanted = torch.backends.cudnn.benchmark and not (
                torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
            )
        if wanted and _is_one_of_several():
            self._tell(
                "convolutions are not timed in runs of several processes: they run what one process measured before"
            )
            return False
        return wanted and not _capturing()

    def set_measuring(self, measuring: bool | None) -> None:
        """Switches measuring on or off, or leaves it to ``torch.backends.cudnn.benchmark`` (None)."""
        self._measuring = measuring
        self._memory.remembered.clear()

    @contextlib.contextmanager
    def fixed(self, name: str) -> Iterator[None]:
        """Within it, this candidate runs wherever it is one, and the default elsewhere; see :func:`fixed_choice`."""
        before, self._fixed = self._fixed, name
        self._memory.remembered.clear()
        try:
            yield
        finally:
            self._fixed = before
            self._memory.remembered.clear()

    def remembered(self, call: Hashable) -> Any:
        """What :meth:`remember` was given for a call, or None; None too for sizes that a tracer leaves open."""
        try:
            return self._memory.remembered.get(call)
        except TypeError:  # they have no hash
            return None

    def remember(self, call: Hashable, found: Any) -> None:
        """Keeps what was found out for a call until a choice changes; of sizes that a tracer leaves open it keeps nothing."""
        if len(self._memory.remembered) >= _MOST_REMEMBERED:
            self._memory.remembered.clear()
        with contextlib.suppress(TypeError):
            self._memory.remembered[call] = found

    def table(self) -> list[dict[str, Any]]:
        """Everything measured or read: key, winner, and milliseconds by candidate."""
        return [{"key": key, **vars(measurement)} for key, measurement in sorted(self._read().known.items())]

    def forget(self) -> None:
        """Empties the memory; the cache file stays, and is not read again."""
        self._memory = Memory(read=True)

    def learn(self, key: str, measurement: Measurement) -> None:
        """Takes over what was measured."""
        self._memory.known[key] = measurement
        self._memory.by_layer[without_batch(key)] = measurement.winner
        self._memory.remembered.clear()

    def _read(self) -> Memory:
        if not self._memory.read:
            self._memory.read = True
            for key, entry in read_entries().items() if self._stored else ():
                self.learn(key, Measurement(**entry))
        return self._memory

    def _measure(self, key: str, trial: Callable[[], Mapping[str, Run]], plain: str) -> None:
        kept = f" in {cache_file()}" if self._stored else ""
        self._tell(f"convolutions are timed at their first use, which takes minutes in all; the fastest are kept{kept}")
        try:
            milliseconds = self._race(key, trial())
        except torch.OutOfMemoryError:
            LOG.warning("%s: there is not enough memory to time it; it runs as it did before", key)
            self._memory.untimed.add(key)
            return
        if not milliseconds:  # not even plain PyTorch could be timed, as the warnings say
            self._memory.untimed.add(key)
            return
        self.learn(key, Measurement(_winner(milliseconds, plain), milliseconds))
        if self._stored:
            write_entries({key: vars(self._memory.known[key])})

    def _race(self, key: str, trial: Mapping[str, Run]) -> dict[str, float]:
        """Milliseconds of the candidates that run and give what split does."""
        expected = trial[SPLIT]()
        self._prepare([run for name, run in trial.items() if name != SPLIT])
        milliseconds = {}
        for name, run in trial.items():
            try:
                wrong = _disagreement(run(), expected)
                if wrong is None:
                    milliseconds[name] = self._timer(run)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler or driver makes of one candidate, the others remain
                _check_device(key, name, error)
                wrong = f"{type(error).__name__}: {error}"
            if wrong is not None:
                warnings.warn(f"{key}: {name} is not used: {wrong}", RuntimeWarning, stacklevel=2)
        return milliseconds

    def _tell(self, message: str) -> None:
        """Says once why nothing seems to happen."""
        if not self._told:
            self._told = True
            LOG.info("%s", message)


def without_batch(key: str) -> str:
    """A key without its batch size."""
    return re.sub(r"\| \d+x", "| *x", key)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _is_one_of_several() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _winner(milliseconds: Mapping[str, float], plain: str) -> str:
    """The fastest candidate, unless plain PyTorch is about as fast."""
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    usual = milliseconds.get(plain)
    if usual is None or usual - milliseconds[fastest] > max(_LEAST_GAIN * usual, _LEAST_MILLISECONDS):
        return fastest
    return plain


def _matching(name: str | None, candidates: Collection[str], default: str) -> str:
    """A candidate of this name, else the first whose name begins with it, else the default."""
    if name is None or name in candidates:
        return name or default
    return next((candidate for candidate in candidates if candidate.startswith(name)), default)


def _check_device(key: str, name: str, error: Exception) -> None:
    """Raises if an error was one that CUDA doesn't recover from, while it is known which candidate's it is."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        raise RuntimeError(
            f"{key}: {name} left the GPU in an error that this process can't recover from: {error}. "
            "Run again without timing convolutions: torch.backends.cudnn.benchmark = False"
        ) from error


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
    """The time of a function on the current CUDA device, each time with a cold L2 cache, without what the CPU takes.

    Replays of a CUDA graph are timed that flushes the cache and runs the function, several times over. What flushing alone
    takes is subtracted. The function has run before.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    scratch = torch.empty(_FLUSHED, dtype=torch.int8, device=device)
    estimate = _replay_milliseconds(run)
    repeats = max(1, min(20, int(2 / max(estimate, 1e-3))))

    def flushes(then: Callable[[], Any]) -> None:
        for _ in range(repeats):
            scratch.zero_()
            then()

    both, flushing = (
        _replay_milliseconds(capture(lambda then=then: flushes(then), device)[0]) for then in (run, lambda: None)
    )
    return max(both - flushing, 0.0) / repeats


def _replay_milliseconds(replay: Callable[[], Any]) -> float:
    """The median time from one event to the next, with the function between them."""
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times[1:]))


_thread = threading.local()


def only_compiles() -> bool:
    """Whether kernels are to be compiled and not launched: in the threads of :func:`compile_beside_each_other`."""
    return getattr(_thread, "only_compiles", False)


def compile_beside_each_other(runs: Sequence[Run]) -> None:
    """Compiles the kernels that functions launch, in threads, and launches none of them."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def begin() -> None:
        _thread.only_compiles = True
        if device is not None:
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), initializer=begin) as pool:
        for future in [pool.submit(run) for run in runs]:
            # What fails here fails again when its turn comes, and is reported then.
            future.exception()


choices = Choices(device_milliseconds, compile_beside_each_other)


def set_measuring(measuring: bool | None) -> None:
    """Whether layers not met before are timed: True, False, or as ``torch.backends.cudnn.benchmark``.

    Timing compiles about ten kernels for each pass of a layer, seconds each the first time. It happens in the second training
    step of a batch size.
    """
    choices.set_measuring(measuring)


def fixed_choice(name: str) -> contextlib.AbstractContextManager[None]:
    """A context in which one implementation runs, whatever was measured, so that results repeat from run to run.

    Args:
        name: ``"split"``, ``"groups"``, the full name of a Triton tile, or ``"triton"`` for the one that is likely to be the
            fastest. Where there is no such candidate, what runs is that of a pass never measured.
    """
    return choices.fixed(name)


def choice_table() -> list[dict[str, Any]]:
    """What was measured, as data: one dict for each card, layer and pass, with ``key``, ``winner`` and ``milliseconds``."""
    return choices.table()
