"""The training step as a CUDA graph: one launch where a small network's hundreds of kernels wait for the CPU.

Captured are forward, losses, backward, the gradient scaler and the optimizers' steps. Batches, learning rates and the weight
of the gates are copied into the graph's own tensors before each replay, so schedules need no new capture; gates and dropout
draw anew in every replay. A batch of another shape, such as an epoch's last, takes an eager step.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmerge.big_student import BigStudent
from fastmerge.isolation import ONE_THREAD
from fastmerge.kernels.cuda_graph import capture
from fastmerge.merging.step import MergeStep, Result
from fastmerge.wide.norms import WideBatchNorm

WARM_UP = 3
MEASURED = 5
_LEAST_GAIN = 1.05  # a graph has to be this much faster to be kept


class CudaGraphs:
    """How work is captured and timed on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)

    def aside(self, run: Callable[[], Any]) -> Any:
        """Runs something on a stream of its own, as is asked for before a capture."""
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            result = run()
        current.wait_stream(self._side)
        return result

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Captures something; returns what replays it, and its result, which every replay writes anew."""
        return capture(run, self.device)

    def watched(self, run: Callable[[], Any]) -> tuple[Any, list[str]]:
        """Runs something; returns its result, and the lines that waited for the device, which a graph can't hold."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with ONE_THREAD, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        waits = []
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                waits.append(f"{warning.filename}:{warning.lineno}")
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result, waits

    def seconds(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """How long something takes, the device's work included."""
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        result = run()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - started, result


class GraphedStep:
    """A training step that becomes a CUDA graph where that is faster.

    The first steps are eager: five measured, three more in preparation of the capture. The last of these is watched: a step
    that waits for the device is not captured. Then the step is captured, five replays are measured, and what has the lower
    median stays.

    Args:
        step: the eager step.
        wanted: True: capture without measuring, and raise if it can't be; None: keep the graph if it is at least 5 % faster.
        graphs: how to capture; tests give their own.

    Raises:
        ValueError: if a graph is wanted and the step can't be captured, with the reason; here, or in the step that is watched.
    """

    def __init__(self, step: MergeStep, wanted: bool | None = None, graphs: Any = None) -> None:
        self.step, self.wanted = step, wanted
        reason = why_not_captured(step) if graphs is None else None
        if wanted and reason is not None:
            raise ValueError(f"cuda_graph=True needs a step that can be captured; {reason}")
        self._possible = reason is None
        self._graphs: Any = graphs or (CudaGraphs(step.setting.device) if self._possible else None)
        self._eager_times: list[float] = []
        self._graph_times: list[float] = []
        self._replay: Callable[[], None] | None = None
        self._captured: Any = None
        self._shapes: list[Any] | None = None
        self._result: Any = None
        self._prepared = 0

    @property
    def replays(self) -> bool:
        """Whether there is a graph at present."""
        return self._replay is not None

    def __call__(self, inputs: tuple[Tensor, ...], target: Any) -> tuple[Any, dict[str, Tensor]]:
        """Trains on a batch, as :class:`~fastmerge.merging.step.MergeStep` does. The output is overwritten by the next call."""
        leaves, spec = tree_flatten((inputs, target))
        if not self._possible or not all(isinstance(leaf, Tensor) for leaf in leaves):
            return self.step(inputs, target)
        shapes = [(leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves]
        if self._shapes is None:
            self._shapes = shapes
        if shapes != self._shapes:
            return self.step(inputs, target)
        if self.wanted is None and len(self._eager_times) < MEASURED:
            return self._measured(self._eager_times, lambda: self.step(inputs, target))
        if self._prepared < WARM_UP:
            return self._prepare(inputs, target)
        if self._replay is None and not self._capture(leaves, spec):
            return self.step(inputs, target)
        if self.wanted is None and len(self._graph_times) < MEASURED:
            result = self._measured(self._graph_times, lambda: self._run(leaves))
            if len(self._graph_times) == MEASURED:
                self._decide()
            return result
        return self._run(leaves)

    def renew(self) -> None:
        """To be called where parameters may have moved, such as between epochs: captures anew if they have."""
        if self._replay is not None and self._fingerprint() != self._captured:
            self._forget()

    def _forget(self) -> None:
        self._replay = self._result = self._captured = self._shapes = None
        self._prepared = 0

    def _measured(self, times: list[float], run: Callable[[], Any]) -> Any:
        seconds, result = self._graphs.seconds(run)
        times.append(seconds)
        return result

    def _decide(self) -> None:
        if statistics.median(self._eager_times) < _LEAST_GAIN * statistics.median(self._graph_times):
            self._forget()
            self._possible = False

    def _prepare(self, inputs: tuple[Tensor, ...], target: Any) -> tuple[Any, dict[str, Tensor]]:
        """A step as it will be captured; the last of them finds out whether it can be."""
        self._prepared += 1
        with _capturable(self.step.optimizers):
            if self._prepared < WARM_UP:
                return self._graphs.aside(lambda: self.step(inputs, target))
            for optimizer in self.step.optimizers:
                optimizer.zero_grad()
            terms = self.step.terms()
            run = partial(self._graphs.aside, lambda: self.step.run(inputs, target, terms))
            (output, losses, open_now), waits = self._graphs.watched(run)
        self.step.finish(open_now)
        if waits:
            self._give_up(ValueError(f"it waits for the device, at {waits[0]}"))
        return output, losses

    def _give_up(self, error: Exception) -> None:
        """Goes on without a graph, which a warning says, or raises where one is wanted."""
        reason = str(error).splitlines()[0]
        if self.wanted:
            raise ValueError(f"cuda_graph=True needs a step that can be captured; {reason}") from error
        self._possible = False
        warnings.warn(f"the training step can't be captured as a CUDA graph and runs without: {reason}", stacklevel=4)

    def _capture(self, leaves: list[Tensor], spec: Any) -> bool:
        """Captures the step; False if it can't be after all, which a warning says."""
        self._inputs = [torch.empty_like(leaf).copy_(leaf) for leaf in leaves]
        self._terms = tuple(term.clone() for term in self.step.terms())
        for optimizer in self.step.optimizers:
            optimizer.zero_grad(set_to_none=True)
        inputs, target = tree_unflatten(self._inputs, spec)
        try:
            with _capturable(self.step.optimizers) as self._rates:
                self._replay, self._result = self._graphs.capture(lambda: self.step.run(inputs, target, self._terms))
        except RuntimeError as error:
            self._forget()
            _start_anew(self.step)
            # What went wrong within the step says more than that the capture could not be ended.
            cause = error.__context__
            self._give_up(cause if isinstance(cause, Exception) else error)
            return False
        self._captured = self._fingerprint()
        return True

    def _run(self, leaves: list[Tensor]) -> tuple[Any, dict[str, Tensor]]:
        for held, leaf in zip(self._inputs, leaves, strict=True):
            held.copy_(leaf, non_blocking=True)
        for held, term in zip(self._terms, self.step.terms(), strict=True):
            held.copy_(term)
        groups = [group for optimizer in self.step.optimizers for group in optimizer.param_groups]
        for held, group in zip(self._rates, groups, strict=True):
            held.fill_(group["lr"])
        assert self._replay is not None
        self._replay()
        result: Result = self._result
        output, losses, open_now = result
        self.step.finish(None if open_now is None else open_now.clone())
        return output, {name: loss.clone() for name, loss in losses.items()}

    def _fingerprint(self) -> list[Any]:
        """What a graph has fixed: where tensors lie, and numbers that are no tensors."""
        network = self.step.network
        tensors = [*network.parameters(), *network.buffers()]
        states = [v for o in self.step.optimizers for entry in o.state.values() for v in entry.values()]
        places = [(t.data_ptr(), t.shape) for t in [*tensors, *states] if isinstance(t, Tensor)]
        options = [
            {k: v for k, v in g.items() if k not in ("params", "lr")}
            for o in self.step.optimizers
            for g in o.param_groups
        ]
        return [places, options, isinstance(network, BigStudent) and (network.linked, network.fused)]


class Graphed:
    """A function of tensors that becomes a CUDA graph, for the shapes of its first call; it runs as it is for others.

    The first calls run as they are, on a stream of their own. The last of them is watched: what waits for the device is not
    captured. Each replay copies the arguments into the graph's own tensors.

    Args:
        function: Takes tensors, returns a sequence of tensors, and finds all others that it reads or changes where they were.
        graphs: How to capture.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], graphs: Any) -> None:
        self._function, self._graphs = function, graphs
        self._shapes: list[torch.Size] | None = None
        self._possible = True
        self.forget()

    def forget(self) -> None:
        """To be called where tensors that the function finds by itself have been replaced."""
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._held: list[Tensor] = []
        self._results: Sequence[Tensor] = ()

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        shapes = [argument.shape for argument in arguments]
        self._shapes = self._shapes or shapes
        if not self._possible or shapes != self._shapes:
            return tuple(self._function(*arguments))
        if self._calls < WARM_UP:
            self._calls += 1
            run = partial(self._graphs.aside, partial(self._function, *arguments))
            if self._calls < WARM_UP:
                return tuple(run())
            results, waits = self._graphs.watched(run)
            if waits:
                self._give_up(f"they wait for the device, at {waits[0]}")
            return tuple(results)
        if self._replay is None:
            self._held = [argument.clone() for argument in arguments]
            try:
                self._replay, self._results = self._graphs.capture(partial(self._function, *self._held))
            except RuntimeError as error:
                self._give_up(str(error.__context__ or error))
                return tuple(self._function(*arguments))
        for held, argument in zip(self._held, arguments, strict=True):
            held.copy_(argument)
        self._replay()
        return tuple(result.clone() for result in self._results)

    def _give_up(self, reason: str) -> None:
        self._possible = False
        warnings.warn(f"stacked steps can't be captured as a CUDA graph and run without: {reason}", stacklevel=3)


def why_not_captured(step: MergeStep) -> str | None:
    """Why a step can't be a CUDA graph, or None if nothing speaks against it."""
    if step.setting.device.type != "cuda":
        return f"it runs on {step.setting.device.type}, not on a CUDA device"
    for optimizer in step.optimizers:
        if type(optimizer) is not SGD and not all(group.get("capturable") for group in optimizer.param_groups):
            return f"{type(optimizer).__name__} needs capturable=True"
        if type(optimizer) is SGD and any(group["momentum"] and group["dampening"] for group in optimizer.param_groups):
            return "SGD with dampening treats its first step apart from the others"
    for name, module in step.network.named_modules():
        waits = isinstance(module, (WideBatchNorm, nn.modules.batchnorm._BatchNorm)) and module.momentum is None
        if waits:
            return f"'{name}' averages over all batches (momentum=None), for which it reads a counter on the host"
    return None


def _start_anew(step: MergeStep) -> None:
    """Forgets how far the optimizers came in a capture that failed, of which nothing has happened on the device."""
    step.scaler._per_optimizer_states.clear()
    for optimizer in step.optimizers:
        optimizer.zero_grad(set_to_none=True)
        for name in ("grad_scale", "found_inf"):
            optimizer.__dict__.pop(name, None)


def prepare_momentum(optimizer: SGD) -> None:
    """Gives every parameter the momentum that it starts from, laid out as it is itself.

    Fused SGD makes uninitialised buffers in its first step and counts on this step to write them; a step that the scaler
    skips does not. It also takes buffers for laid out as parameters are, which a checkpoint's may not be.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if not parameter.requires_grad:
                continue
            buffer = optimizer.state[parameter].get("momentum_buffer")
            if buffer is None or buffer.stride() != parameter.stride():
                laid_out = torch.zeros_like(parameter)
                optimizer.state[parameter]["momentum_buffer"] = laid_out if buffer is None else laid_out.copy_(buffer)


@contextmanager
def _capturable(optimizers: list[Optimizer]) -> Iterator[list[Tensor]]:
    """Within, learning rates are tensors on the device, one per group, and SGD runs as one kernel, the scaler's part inside."""
    rates: list[Tensor] = []
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            device = group["params"][0].device
            rates.append(torch.full((), group["lr"], dtype=torch.float32, device=device))
            before.append((group, {key: group[key] for key in ("lr", "fused", "foreach") if key in group}))
            group["lr"] = rates[-1]
            if type(optimizer) is SGD:
                group["fused"], group["foreach"] = True, False
                optimizer._step_supports_amp_scaling = True
        if type(optimizer) is SGD:
            prepare_momentum(optimizer)
    try:
        yield rates
    finally:
        for group, values in before:
            group.update(values)
        for optimizer in optimizers:
            if type(optimizer) is SGD and not all(group["fused"] for group in optimizer.param_groups):
                del optimizer._step_supports_amp_scaling
