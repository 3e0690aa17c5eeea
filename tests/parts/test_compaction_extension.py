"""What only the C++ extension does: threads, the interpreter's lock, memory, checks of its own; and its absence."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from importlib.machinery import PathFinder
from itertools import pairwise
from typing import Any

import pytest
import torch

import fastmerge
from compaction_paths import check, needs_extension, select
from extension_stub import check_stub
from fastmerge import compaction
from fastmerge.compaction import compact_


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 5, 64])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_threads_move_the_same(threads: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        check(torch.randn(3000, 1000), select(3000, generator, share))
        check(torch.randn(3000, 1000), torch.arange(3000), select(1000, generator, share))


def test_without_the_extension_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_compaction", None)
    monkeypatch.setattr(compaction, "_warned", False)
    with pytest.warns(RuntimeWarning, match="compaction runs in Python") as caught:
        compact_(torch.randn(4), torch.tensor([0, 2]))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compact_(torch.randn(4), torch.tensor([0, 2]))


def test_an_extension_that_was_not_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package is imported for the first time and there is no such file."""
    monkeypatch.setattr(fastmerge, "__path__", [])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])  # no editable install's finder
    monkeypatch.delattr(fastmerge, "_compaction", raising=False)
    monkeypatch.delitem(sys.modules, "fastmerge._compaction", raising=False)
    monkeypatch.setattr(fastmerge.__spec__, "_initializing", True, raising=False)
    spec = importlib.util.spec_from_file_location("compaction_again", compaction.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again._why_missing == "No module named 'fastmerge._compaction'"


@needs_extension
def test_other_threads_run_meanwhile(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-4)  # far below the time of the call, or waiting for the lock counts as running

    def longest_wait() -> float:
        """The longest this thread stood still while another compacted, as a share of the compaction's time."""
        tensor, keep = torch.zeros(12000, 12000, dtype=torch.uint8), list(range(0, 12000, 2))
        arguments = tensor.data_ptr(), 1, tensor.shape, tensor.stride(), [keep, keep]
        seconds = []

        def compact() -> None:
            start = time.perf_counter()
            compaction._compaction.compact(*arguments)
            seconds.append(time.perf_counter() - start)

        thread = threading.Thread(target=compact)
        times = [time.perf_counter()]
        thread.start()
        while thread.is_alive():
            times.append(time.perf_counter())
        times.append(time.perf_counter())
        return max(after - before for before, after in pairwise(times)) / seconds[0]

    # A busy machine may hold this thread up; with the lock held it would stand still every time.
    assert any(longest_wait() < 0.6 for _ in range(5))


MEMORY = """
import torch
from fastmerge.compaction import compact_

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10

compact_(torch.randn(4096, 4), torch.arange(0, 4096, 2), torch.arange(2))
tensor = torch.ones(1 << 14, 1 << 12)  # 256 MiB
before = peak()
compact_(tensor, torch.arange(0, 1 << 14, 2))
print(peak() - before)
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_the_tensor_itself() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16  # MiB; index_select would need another 128


@needs_extension
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": 0}, ValueError),
        ({"itemsize": 0}, ValueError),
        ({"itemsize": -4}, ValueError),
        ({"shape": [4, -5]}, ValueError),
        ({"strides": [5]}, ValueError),
        ({"strides": [4, 1]}, ValueError),
        ({"strides": [-5, 1]}, ValueError),
        ({"strides": [0, 1]}, ValueError),
        ({"keeps": [[0]]}, ValueError),
        ({"keeps": [[4], None]}, IndexError),
        ({"keeps": [[-1], None]}, IndexError),
        ({"keeps": [[1, 0], None]}, ValueError),
        ({"keeps": [None, [2, 2]]}, ValueError),
        ({"keeps": [[0.5], None]}, TypeError),
        ({"keeps": [[2**63], None]}, TypeError),
    ],
)
def test_the_extension_checks_by_itself(changes: dict[str, Any], error: type[Exception]) -> None:
    tensor = torch.randn(4, 5)
    before = tensor.clone()
    call = {"data": tensor.data_ptr(), "itemsize": 4, "shape": [4, 5], "strides": [5, 1], "keeps": [[1, 3], None]}
    with pytest.raises(error):
        compaction._compaction.compact(**call | changes)
    assert torch.equal(tensor, before)


@needs_extension
def test_the_stub_names_what_the_module_has() -> None:
    check_stub(compaction._compaction)
