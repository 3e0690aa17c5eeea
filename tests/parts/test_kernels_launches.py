"""How often the kernels run: all gates in one launch, BatchNorm in two passes each way, one convolution for a shared input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from fastmerge.kernels.batch_norm import batch_norm_act_streams
from fastmerge.kernels.gate import sampling
from torch.utils._python_dispatch import TorchDispatchMode

from batch_norm_checks import fused, in_layout, small_cuts
from fastmerge import BigStudent
from fastmerge.networks import ResNetCifar, small_lenet
from interpreter import interpreted

pytest.importorskip("triton")


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the kernels that the interpreter runs, in order."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    call = GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.fn.__name__)
        call(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", noted):
        yield names


@interpreted
def test_all_gates_of_a_network_are_drawn_in_one_launch() -> None:
    big = BigStudent(small_lenet(), small_lenet()).train()
    assert len(big.groups) > 1
    with mock.patch.object(sampling, "_runs_fused", return_value=True), launches() as names:
        out = big(torch.randn(3, 1, 8, 8))
        assert names == ["sample_kernel"]
        out.square().sum().backward()
    assert names == ["sample_kernel", "sample_backward_kernel"]
    assert all(gate.loc.grad is not None for gate in big.gates.values())


@interpreted
@pytest.mark.parametrize("count", [1, 2])
def test_batch_norm_passes_twice_over_its_tensors_each_way(count: int) -> None:
    """The kernels that merge read what the shares of a pass came to, a few numbers per channel. All streams go in one launch.

    Counters, running statistics, the sum of the gates' gradient and that of two readers' gradients take none of their own.
    """
    generator = torch.Generator().manual_seed(0)
    xs, residuals = (
        [in_layout(torch.randn(3, 5, 7, 9), "channels-last").requires_grad_() for _ in range(count)] for _ in range(2)
    )
    vectors = [torch.rand(count * 5, generator=generator) for _ in range(4)]
    gate = torch.rand(3, count * 5, generator=generator).requires_grad_()
    operations = _Operations()
    with fused(), small_cuts(tile=16), launches() as names:
        ys = batch_norm_act_streams(
            *(xs, vectors[0].requires_grad_(), vectors[1].requires_grad_(), *vectors[2:]),
            training=True,
            residuals=residuals,
            gate=gate,
            readers=2,
            num_batches_tracked=torch.zeros(count, dtype=torch.int64),
        )
        assert names == ["partial_statistics_kernel", "merge_statistics_kernel", "normalize_kernel"]
        names.clear()
        dys = [torch.ones_like(y) for y in ys]
        with operations:
            torch.autograd.grad(ys, [*xs, *vectors[:2], gate, *residuals], dys)
    assert names == ["sum_gradients_kernel", "merge_sums_kernel", "input_gradient_kernel"]
    assert operations.names >= {"empty_strided"}
    assert not operations.names & {"add", "add_", "sum", "cat"}


class _Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _Convolutions(TorchDispatchMode):
    """Counts convolutions by the channels that they read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.read.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


def test_one_convolution_reads_the_shared_input_and_each_teacher_has_its_others() -> None:
    teachers, x = [ResNetCifar(1), ResNetCifar(1), ResNetCifar(1)], torch.randn(2, 3, 16, 16)
    with _Convolutions() as of_teacher:
        teachers[0](x)
    big = BigStudent(*teachers, example_inputs=x).train()
    with _Convolutions() as found:
        big(x)
    first, *others = of_teacher.read
    assert first == 3
    assert sorted(found.read) == sorted([first, *others * 3])
