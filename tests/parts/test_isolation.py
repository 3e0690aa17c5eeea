"""Threads: what a big student's building switches for the process, others don't see, and two at once put it back."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor

from fastmerge import BigStudent, merge
from fastmerge.channels import tracing
from fastmerge.isolation import undisturbed
from small_task import SmallNet, train_loader


class Calling(nn.Module):
    """Calls what its thread was started with, each time it runs; has one layer under two names, which export looks after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        getattr(threading.current_thread(), "call", lambda: None)()
        return self.last(torch.relu(self.again(x)))


def process_state() -> tuple[Any, ...]:
    switches = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.benchmark, gc.isenabled()
    return list(warnings.filters), *switches, proxy_tensor._extract_tensor_metadata


def in_threads(*functions: Callable[[], None]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


@contextmanager
def building(call: Callable[[], None], errors: list[Exception]) -> Iterator[threading.Thread]:
    """A thread that builds a big student, whose teachers call something in it whenever they run."""

    def build() -> None:
        try:
            BigStudent(Calling(), Calling())
        except Exception as error:
            errors.append(error)

    thread: Any = threading.Thread(target=build)
    thread.call = call
    thread.start()
    try:
        yield thread
    finally:
        thread.join(60)
    assert not thread.is_alive()


def test_other_threads_see_nothing_of_an_export() -> None:
    inside, go_on, errors = threading.Event(), threading.Event(), []

    def call() -> None:
        if torch.compiler.is_exporting():
            inside.set()
            assert go_on.wait(60)

    net = Calling()
    x = torch.randn(3, 4)
    want = net(x)
    with building(call, errors):
        assert inside.wait(60)
        try:
            assert not torch.compiler.is_compiling()
            assert not torch.compiler.is_exporting()
            assert net.again is net.first
            assert type(net.get_submodule("again")) is nn.Linear
            assert torch.equal(net(x), want)
            copy.deepcopy(net)(x).sum().backward()
            assert not any(module.training for module in net.eval().modules())
        finally:
            go_on.set()
    assert errors == []


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_searched_for_afterwards_if_it_was_before(enabled: bool) -> None:
    before, within = gc.isenabled(), []
    (gc.enable if enabled else gc.disable)()
    try:
        threading.current_thread().call = lambda: within.append(gc.isenabled())  # type: ignore[attr-defined]
        BigStudent(Calling(), Calling(), verify=False)
        assert gc.isenabled() == enabled
        assert not any(within)
    finally:
        del threading.current_thread().call  # type: ignore[attr-defined]
        (gc.enable if before else gc.disable)()


def test_two_at_once_put_back_what_they_found() -> None:
    """The second would find what the first had switched, and put that back last."""
    first_began, second_began, first_ended = threading.Event(), threading.Event(), threading.Event()
    found = process_state()

    def first() -> None:
        with undisturbed():
            first_began.set()
            second_began.wait(0.3)  # it may not
        first_ended.set()

    def second() -> None:
        first_began.wait(60)
        with undisturbed():
            second_began.set()
            first_ended.wait(60)

    in_threads(first, second)
    assert process_state() == found


@pytest.mark.filterwarnings("ignore:.*P.g>0.")
def test_two_merges_in_two_threads() -> None:
    found, results = process_state(), {}
    teachers = [[SmallNet(), SmallNet()] for _ in range(2)]

    def run(number: int) -> None:
        results[number] = merge(teachers[number], train_loader(), merge_epochs=2, finetune_epochs=1, progress=False)

    in_threads(lambda: run(0), lambda: run(1))
    assert results.keys() == {0, 1}
    for student, history in results.values():
        assert all(parameter.isfinite().all() for parameter in student.parameters())
        assert len(history.stage("merge")) == 2
    assert process_state() == found


def test_tracing_leaves_the_random_numbers_of_the_inputs_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are compared after a seed, which PyTorch gives to all devices; the state of a tensor's card is kept."""
    x, kept = torch.randn(2, 4), []

    def watched(tensors: Any = (), grad: bool = False) -> Any:
        kept.append(any(tensor is x for tensor in tensors))
        return undisturbed(tensors, grad)

    monkeypatch.setattr(tracing, "undisturbed", watched)
    tracing.trace(Calling(), ((x,), {}))
    assert kept
    assert all(kept)
