"""compact_ against index_select, through the extension and through PyTorch."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import threading
import time
import warnings
from ast import FunctionDef, parse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastmerge import compaction
from fastmerge.compaction import compact_

needs_extension = pytest.mark.skipif(compaction._compaction is None, reason="the C++ extension is not built")
by_path = pytest.mark.parametrize("path", [pytest.param("cpp", marks=needs_extension), "torch"])

DTYPES = [
    torch.bool,
    torch.int8,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


@contextmanager
def through(path: str) -> Iterator[None]:
    """Runs CPU compaction in C++ or, as if it were not built, in PyTorch."""
    before = compaction._compaction, compaction._warned
    if path == "torch":
        compaction._compaction, compaction._warned = None, True
    try:
        yield
    finally:
        compaction._compaction, compaction._warned = before


def raw(tensor: Tensor) -> Tensor:
    """The bytes behind a tensor's elements: NaN equals NaN and -0 differs from 0."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.testing.make_tensor(shape, dtype=dtype, device="cpu")


def selected(tensor: Tensor, keep_out: Tensor, keep_in: Tensor | None) -> Tensor:
    rows = tensor.detach().index_select(0, keep_out)
    return rows if keep_in is None else rows.index_select(1, keep_in)


def select(size: int, generator: torch.Generator, share: float = 0.5) -> Tensor:
    return torch.randperm(size, generator=generator)[: int(size * share)].sort().values


def check(tensor: Tensor, keep_out: Tensor, keep_in: Tensor | None = None) -> None:
    expected = selected(tensor, keep_out, keep_in)
    storage = tensor.untyped_storage()
    assert compact_(tensor, keep_out, keep_in) is None
    assert tensor.shape == expected.shape
    assert torch.equal(raw(tensor), raw(expected))
    assert tensor.untyped_storage()._cdata == storage._cdata
    assert storage.nbytes() == tensor.numel() * tensor.element_size()


@st.composite
def keeps(draw: st.DrawFn, size: int) -> Tensor:
    return torch.tensor(sorted(draw(st.sets(st.integers(0, size - 1)))) if size else [], dtype=torch.int64)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=5)))
    tensor = random_tensor(shape, draw(st.sampled_from(DTYPES)))
    order = draw(st.permutations(range(len(shape))))
    tensor = tensor.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
    if draw(st.booleans()):  # holes in memory, as a slice leaves them whose base is gone
        holed = tensor.new_zeros([2 * size for size in shape])[tuple(slice(None, None, 2) for _ in shape)]
        tensor = holed.copy_(tensor)
    tensor = tensor.detach()  # a view keeps its base alive
    keep_in = draw(st.none() | keeps(shape[1])) if len(shape) > 1 else None
    return tensor, draw(keeps(shape[0])), keep_in


@by_path
@given(call=calls())
def test_any_tensor_equals_index_select(path: str, call: tuple[Tensor, Tensor, Tensor | None]) -> None:
    tensor, keep_out, keep_in = call
    with through(path):
        check(tensor, keep_out, keep_in)


@by_path
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((8, 6), torch.contiguous_format),
        ((8, 6, 3), torch.contiguous_format),
        ((8, 6, 3, 3), torch.contiguous_format),
        ((8, 6, 3, 3), torch.channels_last),
        ((8, 6, 1, 1), torch.contiguous_format),
        ((8, 6, 1, 1), torch.channels_last),
        ((8, 1, 3, 3), torch.channels_last),
        ((8, 6, 3, 3, 3), torch.contiguous_format),
        ((8, 6, 3, 3, 3), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("outputs", [0, 1, 4, 8])
@pytest.mark.parametrize("inputs", [None, 1])
def test_the_memory_format_stays(
    path: str, shape: tuple[int, ...], memory_format: torch.memory_format, outputs: int, inputs: int | None
) -> None:
    tensor = torch.empty(shape, memory_format=memory_format).normal_()
    keep_out = torch.arange(8 - outputs, 8)
    keep_in = None if inputs is None else torch.tensor([shape[1] - 1])
    with through(path):
        check(tensor, keep_out, keep_in)
    assert tensor.stride() == torch.empty(tensor.shape, memory_format=memory_format).stride()


@by_path
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("scratch", [1, 1000, 1 << 24])
def test_large_tensors_and_little_scratch(
    path: str, order: tuple[int, ...], scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "_SCRATCH_BYTES", scratch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    generator = torch.Generator().manual_seed(1)
    shape = (600, 500, 9) if scratch > 1 else (60, 50, 9)
    tensor = torch.randn(shape).permute(order).contiguous().permute([order.index(d) for d in range(3)]).detach()
    with through(path):
        check(tensor, select(shape[0], generator), select(shape[1], generator, 0.7))


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 5, 64])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_threads_move_the_same(threads: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        check(torch.randn(3000, 1000), select(3000, generator, share))
        check(torch.randn(3000, 1000), torch.arange(3000), select(1000, generator, share))


@by_path
def test_parameters_stay_leaves_and_lose_their_gradient(path: str) -> None:
    layer = nn.Conv2d(4, 6, 3)
    weight = layer.weight
    layer(torch.randn(2, 4, 5, 5)).sum().backward()
    expected = weight.detach()[[1, 5]][:, [0, 2]].clone()
    with through(path):
        compact_(weight, torch.tensor([1, 5]), torch.tensor([0, 2]))
        compact_(layer.bias, torch.tensor([1, 5]))
    assert layer.weight is weight
    assert weight.is_leaf
    assert weight.requires_grad
    assert weight.grad is None
    assert torch.equal(weight, expected)
    layer.in_channels, layer.out_channels = 2, 2
    layer(torch.randn(2, 2, 5, 5)).sum().backward()
    assert weight.grad.shape == (2, 2, 3, 3)


@by_path
def test_a_compacted_tensor_is_like_any_other(path: str) -> None:
    tensor = torch.randn(8, 5)
    with through(path):
        compact_(tensor, torch.tensor([2, 3, 7]))
        values = tensor.clone()
        for again in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
            assert torch.equal(again, values)
        compact_(tensor, torch.tensor([1]), torch.tensor([0, 4]))
    assert torch.equal(tensor, values[1:2, [0, 4]])
    tensor.resize_(4, 4).fill_(1)
    assert tensor.sum() == 16


@by_path
def test_optimizer_state_goes_with_its_parameter(path: str) -> None:
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    keep = torch.tensor([0, 3])
    state = optimizer.state[layer.weight]
    expected = {name: selected(value, keep, None) for name, value in state.items() if value.dim()}
    with through(path):
        for tensor in (layer.weight, layer.bias, *optimizer.state[layer.bias].values(), *state.values()):
            if tensor.dim():
                compact_(tensor, keep)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    layer(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()


@by_path
def test_a_graph_that_saved_the_tensor_sees_the_change(path: str) -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    loss = (weight * weight).sum()
    with through(path):
        compact_(weight, torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _shared() -> Tensor:
    return torch.randn(4, 4).share_memory_()


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.randn(4, 4)


FIRST_TWO = torch.tensor([0, 1])
BAD_TENSORS: dict[str, tuple[Any, type[Exception], str]] = {
    "not a tensor": (lambda: [[1.0]], TypeError, "needs a tensor"),
    "sparse": (lambda: torch.eye(4).to_sparse(), TypeError, "plain strided"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8), TypeError, "plain strided"),
    "number": (lambda: torch.tensor(1.0), ValueError, "one dimension or more"),
    "not a leaf": (lambda: torch.randn(4, 4, requires_grad=True) * 2, ValueError, "needs a leaf"),
    "inference": (_inference, ValueError, "inference_mode"),
    "conjugate": (lambda: torch.randn(4, 4, dtype=torch.complex64).conj(), ValueError, "resolve_conj"),
    "negative": (
        lambda: torch.randn(4, 4, dtype=torch.complex64).conj().imag,
        ValueError,
        "needs the values themselves",
    ),
    "expanded": (lambda: torch.randn(1, 4).expand(4, 4), ValueError, "do not overlap"),
    "overlapping": (lambda: torch.randn(16).as_strided((4, 4), (2, 1)), ValueError, "do not overlap"),
    "offset": (lambda: torch.randn(5, 4)[1:], ValueError, "starts 4 elements in"),
    "numpy's": (lambda: torch.from_numpy(torch.randn(4, 4).numpy().copy()), ValueError, "torch's own"),
    "shared": (_shared, ValueError, "torch's own"),
}


@by_path
@pytest.mark.parametrize("name", BAD_TENSORS)
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quantize:DeprecationWarning")
def test_a_tensor_that_can_not_shrink_is_refused(path: str, name: str) -> None:
    make, error, message = BAD_TENSORS[name]
    tensor = make()
    before = tensor.clone() if isinstance(tensor, Tensor) else None
    with through(path), pytest.raises(error, match=message):
        compact_(tensor, FIRST_TWO)
    if before is not None and not before.is_sparse:
        assert tensor.shape == before.shape
        assert torch.equal(tensor, before)


@by_path
def test_memory_that_others_use_is_refused(path: str) -> None:
    tensor = torch.randn(4, 4, requires_grad=True)
    for make in (Tensor.detach, lambda t: t.data, lambda t: t.view(-1), lambda t: t[2:]):
        alias = make(tensor)
        with through(path), pytest.raises(ValueError, match="alone uses its storage"):
            compact_(tensor, FIRST_TWO)
        del alias
    with through(path):
        compact_(tensor, FIRST_TWO)
    tensor.detach().numpy()  # torch can't know when numpy is done
    with through(path), pytest.raises(ValueError, match="torch's own"):
        compact_(tensor, torch.tensor([0]))


GOOD = torch.tensor([0, 2, 3])
BAD_KEEPS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "list": ([0, 1], None, TypeError, "int64 tensor of indices as keep_out; it got list"),
    "mask": (torch.tensor([True, False, True, True]), None, TypeError, "it got torch.bool"),
    "int32": (GOOD.int(), None, TypeError, "it got torch.int32"),
    "two dimensions": (GOOD[None], None, ValueError, "keep_out of one dimension"),
    "negative": (torch.tensor([-1, 2]), None, IndexError, r"\[0, 4\) as keep_out; position 0 has -1"),
    "too large": (torch.tensor([0, 4]), None, IndexError, "position 1 has 4"),
    "huge": (torch.tensor([0, 2**62]), None, IndexError, "position 1 has"),
    "descending": (torch.tensor([0, 3, 2]), None, ValueError, "ascending and unique; 3 is followed by 2"),
    "twice": (torch.tensor([1, 1]), None, ValueError, "ascending and unique; 1 is followed by 1"),
    "columns too large": (GOOD, torch.tensor([5]), IndexError, r"\[0, 5\) as keep_in"),
    "columns twice": (GOOD, torch.tensor([4, 4]), ValueError, "keep_in ascending and unique"),
    "columns of float": (GOOD, torch.tensor([1.0]), TypeError, "as keep_in; it got torch.float32"),
}


@by_path
@pytest.mark.parametrize("name", BAD_KEEPS)
def test_bad_indices_change_nothing(path: str, name: str) -> None:
    keep_out, keep_in, error, message = BAD_KEEPS[name]
    tensor = nn.Parameter(torch.randn(4, 5))
    tensor.grad = torch.randn(4, 5)
    before, gradient, version, address = tensor.detach().clone(), tensor.grad, tensor._version, tensor.data_ptr()
    with through(path), pytest.raises(error, match=message):
        compact_(tensor, keep_out, keep_in)
    assert torch.equal(tensor, before)
    assert tensor.grad is gradient
    assert (tensor._version, tensor.data_ptr()) == (version, address)


@by_path
def test_columns_need_a_second_dimension(path: str) -> None:
    with through(path), pytest.raises(ValueError, match="needs a dimension 1 for keep_in"):
        compact_(torch.randn(4), GOOD, GOOD)


def test_without_the_extension_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_compaction", None)
    monkeypatch.setattr(compaction, "_warned", False)
    with pytest.warns(RuntimeWarning, match="compaction runs in Python") as caught:
        compact_(torch.randn(4), GOOD)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compact_(torch.randn(4), GOOD)


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
    stub = parse(Path(compaction.__file__).with_name("_compaction.pyi").read_text())
    functions = {node.name: [a.arg for a in node.args.args] for node in stub.body if isinstance(node, FunctionDef)}
    module = compaction._compaction
    public = [name for name in dir(module) if not name.startswith("_")]
    assert sorted(functions) == public
    for name, arguments in functions.items():
        described = inspect.getdoc(getattr(module, name)).splitlines()[0]  # name(a: type, b: type = 1) -> type
        assert [part.split(":")[0].strip() for part in _arguments(described)] == arguments
        assert described.endswith("-> None")


def _arguments(signature: str) -> list[str]:
    """The arguments of a signature as pybind11 writes it, split at the commas outside brackets."""
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
