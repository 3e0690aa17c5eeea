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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmerge.big_student import BigStudent
from fastmerge.isolation import ONE_THREAD
from fastmerge.kernels.cuda_graph import capture
from fastmerge.wide.norms import WideBatchNorm

if TYPE_CHECKING:
    from fastmerge.merging.steps import MergeStep, Outcome, Result

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


class _Graph:
    """Work on tensors that becomes a CUDA graph, for arguments laid out as those of the first call.

    The first three times it runs as it is, on a stream of its own, in preparation of the capture. The last of these is watched:
    what waits for the device is not captured. Each replay copies the arguments into the graph's own tensors.

    Args:
        graphs: How to capture; None for never.
    """

    def __init__(self, graphs: Any) -> None:
        self._graphs, self._possible = graphs, graphs is not None
        self.forget()

    def forget(self) -> None:
        """To be called where tensors that the work finds by itself have been replaced."""
        self._prepared = 0
        self._layout: list[Any] | None = None
        self._replay: Callable[[], None] | None = None
        self._held: list[Tensor] = []
        self._result: Any = None

    @property
    def replays(self) -> bool:
        """Whether there is a graph at present."""
        return self._replay is not None

    def _work(self, *arguments: Tensor) -> Any:
        """What is captured; it finds all tensors but its arguments where they were, and its result is written anew."""
        raise NotImplementedError

    def _preparing(self) -> AbstractContextManager[Any]:
        """A context for all runs of the work and its capture."""
        return nullcontext()

    def _run(self, arguments: Sequence[Tensor]) -> Any:
        """Does the work by the graph, or on the way to one; None, and nothing is done, where there is none for these."""
        layout = [(each.shape, each.stride(), each.dtype) for each in arguments]
        self._layout = self._layout or layout
        if not self._possible or layout != self._layout:
            return None
        if self._prepared < WARM_UP:
            return self._prepare(arguments)
        return self._replayed(arguments) if self.replays or self._capture(arguments) else None

    def _prepare(self, arguments: Sequence[Tensor]) -> Any:
        self._prepared += 1
        with self._preparing():
            run = partial(self._graphs.aside, partial(self._work, *arguments))
            if self._prepared < WARM_UP:
                return run()
            result, waits = self._graphs.watched(run)
        if waits:
            self._give_up(ValueError(f"it waits for the device, at {waits[0]}"))
        return result

    def _capture(self, arguments: Sequence[Tensor]) -> bool:
        self._held = [torch.empty_like(argument).copy_(argument) for argument in arguments]
        try:
            with self._preparing():
                self._replay, self._result = self._graphs.capture(partial(self._work, *self._held))
        except RuntimeError as error:
            self.forget()
            # What went wrong within the work says more than that the capture could not be ended.
            cause = error.__context__
            self._give_up(cause if isinstance(cause, Exception) else error)
            return False
        return True

    def _replayed(self, arguments: Sequence[Tensor]) -> Any:
        for held, argument in zip(self._held, arguments, strict=True):
            held.copy_(argument, non_blocking=True)
        assert self._replay is not None
        self._replay()
        return self._result

    def _give_up(self, error: Exception) -> None:
        """Goes on without a graph, which a warning says."""
        self._possible = False
        reason = str(error).splitlines()[0]
        warnings.warn(f"the training step can't be captured as a CUDA graph and runs without: {reason}", stacklevel=4)


class Graphed(_Graph):
    """A function of tensors as a CUDA graph, where it can be captured.

    Args:
        function: Takes tensors, returns a sequence of tensors, and finds all others that it reads or changes where they were.
        graphs: How to capture.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], graphs: Any) -> None:
        self._function = function
        super().__init__(graphs)

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        results = self._run(arguments)
        return tuple(self._function(*arguments) if results is None else results)

    def _work(self, *arguments: Tensor) -> Sequence[Tensor]:
        return self._function(*arguments)

    def _replayed(self, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(result.clone() for result in super()._replayed(arguments))


class GraphedStep(_Graph):
    """A training step that becomes a CUDA graph where that is faster.

    Five eager steps are measured. Then the step is captured, five replays are measured, and what has the lower median stays.

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
        self._eager_times: list[float] = []
        self._graph_times: list[float] = []
        super().__init__(CudaGraphs(step.setting.device) if graphs is None and reason is None else graphs)
        if step.lam is not None and self._possible:
            step.lam.begin(step.network, step.network.open_state()[0])  # type: ignore[operator]

    def __call__(self, inputs: tuple[Tensor, ...], target: Any) -> Outcome:
        """Trains on a batch as a :class:`~fastmerge.merging.steps.MergeStep`. The output is overwritten by the next call."""
        leaves, self._spec = tree_flatten((inputs, target))
        outcome = self._run(leaves) if all(isinstance(leaf, Tensor) for leaf in leaves) else None
        return outcome or self.step(inputs, target)

    def renew(self) -> None:
        """To be called where parameters may have moved, such as between epochs: captures anew if they have."""
        if self.replays and self._fingerprint() != self._captured:
            self.forget()

    def _work(self, *leaves: Tensor) -> Result:
        inputs, target = tree_unflatten(leaves, self._spec)
        return self.step.run(inputs, target, self._terms)

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        self._terms = tuple(term.clone() for term in self.step.terms())
        self.step.zero_grad()
        with _capturable(self.step.optimizers) as self._rates:
            yield

    def _capture(self, arguments: Sequence[Tensor]) -> bool:
        captured = super()._capture(arguments)
        self._captured = self._fingerprint()
        return captured

    def _prepare(self, arguments: Sequence[Tensor]) -> Outcome:
        if self.wanted is None and len(self._eager_times) < MEASURED:
            return self._timed(self._eager_times, partial(self.step, *tree_unflatten(arguments, self._spec)))
        return self._finished(super()._prepare(arguments))

    def _replayed(self, arguments: Sequence[Tensor]) -> Outcome:
        if self.wanted is not None or len(self._graph_times) == MEASURED:
            return self._by_graph(arguments)
        outcome = self._timed(self._graph_times, partial(self._by_graph, arguments))
        if len(self._graph_times) == MEASURED:
            eager, graph = map(statistics.median, (self._eager_times, self._graph_times))
            if eager < _LEAST_GAIN * graph:
                self.forget()
                self._possible = False
        return outcome

    def _timed(self, times: list[float], run: Callable[[], Outcome]) -> Outcome:
        seconds, outcome = self._graphs.seconds(run)
        times.append(seconds)
        return outcome

    def _by_graph(self, arguments: Sequence[Tensor]) -> Outcome:
        for held, term in zip(self._terms, self.step.terms(), strict=True):
            held.copy_(term)
        groups = [group for optimizer in self.step.optimizers for group in optimizer.param_groups]
        for held, group in zip(self._rates, groups, strict=True):
            held.fill_(group["lr"])
        return self._finished(super()._replayed(arguments))

    def _finished(self, result: Result) -> Outcome:
        output, losses, open_now = result
        self.step.finish(None if open_now is None else open_now.clone())
        return output, {name: loss.clone() for name, loss in losses.items()}

    def _give_up(self, error: Exception) -> None:
        """Goes on without a graph, or raises where one is wanted."""
        _start_anew(self.step)
        if self.wanted:
            reason = str(error).splitlines()[0]
            raise ValueError(f"cuda_graph=True needs a step that can be captured; {reason}") from error
        super()._give_up(error)

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
    if step.scaler.is_enabled():
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
