"""Wide layers: every way to run one agrees, linking copies one layer at a time, and the layout is nobody's business."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmerge
from architectures import BY_NAME, merged
from fastmerge.channels.layer_calls import Geometry
from fastmerge.narrowing.closing import fitting_multiple
from fastmerge.wide.layers import WideLayer, Wiring
from fastmerge.wide.norms import WideBatchNorm
from teachers import make_teachers, relative_error

GEOMETRIES = {
    "linear": (Geometry("linear", 0), (5, 4), (7, 4)),
    "conv1d": (Geometry("conv", 1, {"stride": 2, "padding": 1}), (5, 4, 3), (7, 4, 9)),
    "conv2d": (Geometry("conv", 2, {"padding": 1, "dilation": 1, "stride": (2, 1)}), (5, 4, 3, 3), (7, 4, 6, 6)),
    "transposed": (Geometry("conv_transpose", 2, {"stride": 2}), (4, 5, 3, 3), (7, 4, 6, 6)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_ways_to_run_a_layer(name: str, bias: bool) -> None:
    """Streams or joined, to streams or joined, block-diagonal or linked."""
    torch.manual_seed(0)
    geometry, weight_shape, input_shape = GEOMETRIES[name]
    weights = [torch.randn(weight_shape, dtype=torch.float64) for _ in range(3)]
    biases = [torch.randn(5, dtype=torch.float64) for _ in range(3)] if bias else None
    streams = tuple(torch.randn(input_shape, dtype=torch.float64) for _ in range(3))
    layer = WideLayer(geometry, Wiring(True, True), weights, biases)
    dim = geometry.channel_dim
    expected = torch.cat(layer(streams), dim)
    for link in (False, True):
        if link:
            layer.link()
        for values in (streams, (torch.cat(streams, dim),)):
            for join in (False, True):
                outputs = layer(values, join=join)
                assert len(outputs) == (1 if join else 3)
                torch.testing.assert_close(torch.cat(outputs, dim), expected)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make and that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.known:
            return
        self.known.add(address)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.alive -= size


def deep() -> nn.Sequential:
    layers = [m for _ in range(12) for m in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Linear(3, 64), nn.ReLU(), *layers, nn.Linear(64, 2))


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1, 0.9), lambda p: AdamW(p, 0.1)], ids=["sgd", "adamw"])
def test_linking_never_holds_two_copies_of_the_weights(make: Any) -> None:
    """At most one layer is there twice at any time."""
    x = torch.randn(4, 3)
    big = fastmerge.BigStudent(deep(), deep(), example_inputs=x).train()
    optimizer = make(big.parameters())
    big(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    live = LiveBytes()
    values = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    for tensor in [*big.parameters(), *values]:
        live.note(tensor.untyped_storage())
    del values, tensor
    before, dense_layer = live.alive, 128 * 128 * 4
    with live:
        big.link(optimizer=optimizer)
    copies = 1 + len([v for v in optimizer.state[next(big.weight_parameters())].values() if v.dim()])
    assert live.alive == before + copies * 12 * dense_layer // 2
    assert live.most <= live.alive + dense_layer


@pytest.mark.parametrize("name", ["resnet_projected_shortcut", "unet", "shufflenet_v2"])
def test_layout_is_chosen_inside(name: str) -> None:
    """float32 on a CPU runs channels-last; the output is contiguous as ever, and what an optimizer sees stays as it was."""
    big, x = merged(name, dtype=torch.float32), BY_NAME[name].inputs(6, dtype=torch.float32)
    seen: list[bool] = []
    layers = [m for m in big.network.modules() if isinstance(m, WideLayer) and m.geometry.spatial_dims == 2]
    layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].is_contiguous(memory_format=torch.channels_last))
    )
    output = big(*x)
    assert seen == [True]
    assert output.is_contiguous()
    assert all(parameter.is_contiguous() for parameter in big.parameters())
    exact = big.double()(*(v.double() for v in x))
    assert seen == [True, False]
    assert relative_error(output.double(), exact) < 1e-4
    big.float().link()
    big(*x)
    assert seen[2:] == [False]


class ChangesReshaped(nn.Module):
    """A ReLU in place on a reshaped view of features that are read again: in another layout the view would be a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.conv1(x), -2.0, 2.0)
        x.flatten(1).relu_()
        return self.conv2(x * 2).mean((2, 3))


@torch.no_grad()
def test_layout_stays_where_it_decides_the_result() -> None:
    x = BY_NAME["unet"].inputs(6, dtype=torch.float32)
    teachers = make_teachers(ChangesReshaped, x, 2, torch.float32)
    big = fastmerge.BigStudent(*teachers, example_inputs=x).eval()
    with big.open_gates():
        torch.testing.assert_close(big(*x), (teachers[0](*x) + teachers[1](*x)) / 2)


def test_a_normalisation_without_weights_prints_its_teachers() -> None:
    bare = WideBatchNorm([nn.BatchNorm2d(3, affine=False, track_running_stats=False) for _ in range(2)])
    assert str(bare).startswith("WideBatchNorm(2 teachers, eps=")


def test_closed_channels_stay_for_a_round_number_on_a_gpu_alone() -> None:
    assert [fitting_multiple(torch.device(kind)) for kind in ("cpu", "cuda")] == [1, 8]
