"""Contenders timed in turn, A B C A B C, in one process, so that whatever drifts drifts for all of them.

pytest-benchmark times one function per benchmark. Here the others run in the set-up before each of its rounds, each timed
in the same way, and every sample goes into the JSON: ``extra_info["contenders"][name]["samples"]``, seconds, in order, so
that the i-th samples of two contenders make a pair.

A contender is also timed alone, right after its warm-up, and its samples are written down at once: whatever a later one does
to the process, they are there. They stand where turns were not reached, with ``paired`` false. A process that goes on with
another's journal leaves out what ended that one, takes over what it had measured, and compares the rest with the first.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import events
from benchmarks.effort import Effort
from benchmarks.profiling import profiled

LEAST_ROUNDS = 5
ALONE = 5  # samples of a contender before the others have their turn
RESERVE = 5.0  # seconds that are left at the end of a limited time
_PROFILING = 2.0  # seconds to profile one
_EVERY = 10.0  # seconds between two versions of the journal while turns are taken


@dataclass
class Contender:
    """What takes part.

    Attributes:
        step: what is timed; the device is waited for after it.
        facts: what is known of it besides, as JSON values: ``flops`` and ``bytes`` of a step, ``items``, memory.
        floor: called after the last round; the least seconds that the hardware allows. A time below is impossible and
            fails the benchmark.
        check: called after the last round; raises if what was timed went wrong.
        before: called before every step, outside the time: makes what the step uses up.
        more: called with the seconds of the samples so far; more facts, about these.
    """

    step: Callable[[], object]
    facts: dict[str, Any] = field(default_factory=dict)
    floor: Callable[[], float] | None = None
    check: Callable[[], object] = lambda: None
    before: Callable[[], object] = lambda: None
    more: Callable[[list[float]], dict[str, Any]] = lambda samples: {}


class Sample(NamedTuple):
    """Seconds of one step: all of it, until its last launch, and of the process's CPUs until then."""

    whole: float
    queued: float
    cpu: float


class UnavailableError(Exception):
    """Raised by a maker where its contender can't take part on this machine; the reason goes into the JSON."""


def race(
    benchmark: BenchmarkFixture,
    makers: Mapping[str, Callable[[], Contender]],
    effort: Effort,
    device: str,
    *,
    rounds: int | None = None,
    warmup: int | None = None,
    alone: int = ALONE,
    principal: str | None = None,
    profile: bool = True,
) -> None:
    """Times contenders in turn.

    Args:
        benchmark: pytest-benchmark's fixture; its own statistics are the principal's.
        makers: make the contenders, by name: the reference that others are compared with first, then those that may end the
            process last.
        effort: what was asked for; fewer rounds are run where they would take longer, never below 5.
        device: "cuda", which is waited for after each step, or "cpu".
        rounds: samples of each; by default as the effort has it.
        warmup: steps of each before the first sample; likewise.
        alone: samples of each before the next is made.
        principal: the one that pytest-benchmark times; None is the last.
        profile: whether one step of each is profiled, on a GPU.

    Raises:
        pytest.fail.Exception: after everything is measured and recorded, if a contender raised, or one was faster than
            its floor.
    """
    own = Race(benchmark, effort, device, profile)
    rounds = effort.rounds(device) if rounds is None else rounds
    warmup = effort.warmup(device) if warmup is None else warmup
    if not benchmark.enabled:
        rounds = warmup = alone = 1
    own.prepare(effort.chosen(makers), rounds, warmup, alone)
    own.take_turns(rounds, principal)
    own.profile_each()
    own.finish()


class Race:
    """A race as far as it has come; see :func:`race`."""

    def __init__(self, benchmark: BenchmarkFixture, effort: Effort, device: str, profile: bool) -> None:
        self.benchmark, self.effort, self.device = benchmark, effort, device
        self.profile = profile and device == "cuda"
        earlier = effort.journal.earlier(benchmark)
        if earlier.get("complete"):
            benchmark.extra_info.update(earlier)
            pytest.skip("an earlier process measured it")
        self.earlier: dict[str, dict[str, Any]] = earlier.get("contenders", {})
        self.results: dict[str, dict[str, Any]] = benchmark.extra_info.setdefault("contenders", {})
        self.runners: dict[str, Contender] = {}
        self.samples: dict[str, list[Sample]] = {}
        self.seconds: dict[str, float] = {}  # of a turn, with what comes before the step
        self.least = LEAST_ROUNDS
        self._kept = 0.0

    @property
    def reserve(self) -> float:
        """Seconds that are kept for what comes after the turns."""
        return RESERVE + _PROFILING * len(self.runners) * self.profile

    def prepare(self, makers: Mapping[str, Callable[[], Contender]], rounds: int, warmup: int, alone: int) -> None:
        """Makes, warms up and times one contender after the other."""
        for name, make in makers.items():
            before = self.earlier.get(name, {})
            if name in self.earlier and "begun" not in before and self.runners:
                self.results[name] = before  # the first one takes part again
                continue
            begun = before.get("begun", 0)
            if begun > (1 if self.effort.careful else 0):
                self.results[name] = {"error": before.get("error", "it ended the process")}
                continue
            needed = self.reserve + min(self.effort.seconds, rounds * sum(self.seconds.values()))
            if self.effort.left < needed:
                self.results[name] = {"unavailable": "no time was left to make it"}
                continue
            self.results[name] = {"begun": begun + 1}
            self.keep()
            title = f"{self.benchmark.extra_info['case']} | {name}"
            events.emit("begin", title)
            events.watch()
            outcome, says = self._prepare(name, make, warmup, alone)
            self.keep()
            events.emit("end", title, outcome=outcome, says=says)
            if "begun" in self.results[name] and outcome == "failed":
                self._leave(title)
        self.benchmark.extra_info["complete"] = True
        if not self.runners:
            self.finish()
            pytest.skip("no contender can run here")

    def _prepare(self, name: str, make: Callable[[], Contender], warmup: int, alone: int) -> tuple[str, str]:
        result = self.results[name]
        try:
            contender = make()
            for _ in range(warmup):
                contender.before()
                contender.step()
            start = time.perf_counter()
            self.samples[name] = [self._timed(contender) for _ in range(alone)]
            self.seconds[name] = (time.perf_counter() - start) / alone
        except UnavailableError as reason:
            self.results[name] = {"unavailable": str(reason)}
            return "skipped", str(reason)
        except Exception as error:
            return "failed", self._failed(name, error)
        self.runners[name] = contender
        result |= {**contender.facts, "process": os.getpid()}
        self._settle(name, self.samples[name], paired=False)
        self.samples[name] = []
        if self.effort.careful:
            result["convolutions"] = "cuDNN's alone"
        del result["begun"]
        queued = f", queued in {1e3 * result['queue_seconds']:.3f} ms" if "queue_seconds" in result else ""
        return "passed", f"{1e3 * statistics.median(result['samples']):.3f} ms{queued}"

    def take_turns(self, rounds: int, principal: str | None) -> None:
        """Times all of them in turn."""
        self.least = min(LEAST_ROUNDS, rounds)
        turn = sum(self.seconds.values())
        seconds = min(self.effort.seconds, self.effort.left - self.reserve)
        if turn * rounds > seconds:
            rounds = max(self.least, int(seconds / turn))
        last = principal if principal in self.runners else [*self.runners][-1]
        others = [name for name in self.runners if name != last]

        def run(name: str) -> None:
            self.samples[name].append(self._timed(self.runners[name], prepared=True))

        def before_each() -> None:
            events.watch()
            for name in others:
                self.runners[name].before()
                run(name)
            self.runners[last].before()
            if time.monotonic() - self._kept > _EVERY:
                self.keep()

        gc.collect()
        try:
            self.benchmark.pedantic(run, args=(last,), setup=before_each, rounds=rounds)
        finally:  # an interrupted race keeps its samples
            self.keep()
            events.rest()

    def profile_each(self) -> None:
        """Profiles a step of each on a GPU: last, since launches may be slower once a profiler was there."""
        for name, contender in self.runners.items() if self.profile else ():
            if self.effort.left < _PROFILING:
                break
            events.watch()
            contender.before()
            try:
                self.results[name]["profile"] = profiled(contender.step)
            except Exception as error:
                self.results[name]["profile_error"] = f"{type(error).__name__}: {error}"[:500]
            self.keep()
        events.rest()

    def finish(self) -> None:
        """Checks what has come out; raises where something is wrong."""
        broken = []
        for name, contender in self.runners.items():
            result = self.results[name]
            try:
                contender.check()
            except Exception as error:
                result["error"] = f"{type(error).__name__}: {error}"
            if contender.floor is None:
                continue
            result["floor"] = floor = contender.floor()
            if (fastest := min(result["samples"])) < floor:
                broken.append(f"{name} took {fastest:.3g} s, below what the hardware allows, {floor:.3g} s")
                result["error"] = "faster than the hardware allows"
        self.keep()
        failed = [f"{name}: {result['error']}" for name, result in self.results.items() if "error" in result]
        if broken or failed:
            pytest.fail("\n".join(["the benchmark is broken:", *broken] if broken else failed), pytrace=False)

    def keep(self) -> None:
        """Writes down what there is."""
        self._kept = time.monotonic()
        if min(map(len, self.samples.values()), default=0) >= self.least:
            for name, samples in self.samples.items():
                self._settle(name, samples, paired=True)
        found = [result["samples"] for result in self.results.values() if result.get("samples")]
        self.effort.journal.keep(self.benchmark, found[-1] if found else [])

    def _settle(self, name: str, samples: list[Sample], paired: bool) -> None:
        found = [sample.whole for sample in samples]
        times: dict[str, Any] = {"samples": found, "paired": paired}
        times["cpu_seconds"] = statistics.median(sample.cpu for sample in samples)
        if self.device == "cuda":
            times["queue_seconds"] = statistics.median(sample.queued for sample in samples)
        self.results[name] |= times | self.runners[name].more(found)

    def _timed(self, contender: Contender, prepared: bool = False) -> Sample:
        if not prepared:
            contender.before()
        cpu, start = time.process_time(), time.perf_counter()
        contender.step()
        queued, cpu = time.perf_counter() - start, time.process_time() - cpu
        if self.device == "cuda":
            torch.cuda.synchronize()
        return Sample(time.perf_counter() - start, queued, cpu)

    def _failed(self, name: str, error: Exception) -> str:
        message = next(iter(f"{type(error).__name__}: {error}".splitlines()))[:500]
        lost = events.has_lost_context()
        kept = {key: value for key, value in self.results[name].items() if lost or key != "begun"}
        self.results[name] = kept | {"error": message}
        self.samples.pop(name, None)
        self.seconds.pop(name, None)
        traceback.clear_frames(error.__traceback__)  # which hold tensors
        if torch.cuda.is_available() and not lost:
            gc.collect()
            torch.cuda.empty_cache()
        return message

    def _leave(self, title: str) -> None:
        """Ends a process without a CUDA context, in which nobody else could run."""
        events.emit("lost", title, says="the CUDA context is lost")
        if self.effort.journal.path is None:
            pytest.exit(f"the CUDA context is lost after {title}", returncode=events.DEAD)
        os._exit(events.DEAD)
