"""On a GPU: big students of real networks, fused and plain, block-diagonal and linked, against float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastmerge
from fastmerge.networks import ResNetCifar
from teachers import make_batch, make_teachers, set_gates

pytestmark = pytest.mark.gpu
SHAPE = (3, 64, 64)


def resnet18() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=7)  # type: ignore[no-any-return]


def densenet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=7)  # type: ignore[no-any-return]


def mobilenet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    # Dropout draws for itself on each device.
    return torchvision.models.mobilenet_v2(num_classes=7, dropout=0.0)  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "resnet20": lambda: ResNetCifar(num_classes=7),
    "densenet": densenet,
    "mobilenet": mobilenet,
}
# Of the output, at least twice what a CPU has under autocast: MobileNetV2 4e-6, 4e-2 and 6e-3, the others a tenth of that.
TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
_BIG: dict[str, fastmerge.BigStudent] = {}


def big_of(name: str) -> fastmerge.BigStudent:
    """A float64 big student on the CPU, its gates half open and deterministic."""
    if name not in _BIG:
        x = (make_batch(8, SHAPE),)
        big = fastmerge.BigStudent(*make_teachers(NETWORKS[name], x, 2), example_inputs=x)
        set_gates(big, 0.3)
        _BIG[name] = big
    return copy.deepcopy(_BIG[name])


def gradients(big: fastmerge.BigStudent, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients in training mode but for the gates, which are deterministic, so that devices agree on them."""
    lowp = dtype is not torch.float32 and x.is_cuda
    with torch.autocast(x.device.type, dtype, enabled=lowp):
        gates = big.eval()._draw_gates((x,))
        big.train()
        output = big._programs["train", False, big.linked].forward(big.network, gates, x)
    (
        output.double() * torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=x.device).view_as(output)
    ).sum().backward()
    found = {"output": output.detach()}
    found |= {name: p.grad for name, p in big.named_parameters() if p.grad is not None}
    found |= {name: b for name, b in big.named_buffers() if "running" in name}
    return {name: value.double().cpu() for name, value in found.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("linked", [False, True], ids=["block-diagonal", "linked"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_step_against_float64(name: str, fused: bool, linked: bool, dtype: torch.dtype) -> None:
    """Errors of all gradients together, relative to their size; low precision has few digits for deep ones."""
    big, x = big_of(name), make_batch(8, SHAPE, seed=3)
    if linked:
        big.link()
    expected = gradients(copy.deepcopy(big), x, torch.float32)
    big = big.float().cuda().to(memory_format=torch.channels_last)
    big.fused = fused
    previous = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        actual = gradients(big, x.float().cuda().to(memory_format=torch.channels_last), dtype)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = previous
    assert actual.keys() == expected.keys()
    output_error = (actual["output"] - expected["output"]).norm() / expected["output"].norm()
    assert output_error < TOLERANCE[dtype]
    difference = sum((actual[name] - value).square().sum() for name, value in expected.items())
    size = sum(value.square().sum() for value in expected.values())
    assert (difference / size).sqrt() < 5 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["resnet18", "densenet"])
def test_fusing_saves_activation_memory(name: str) -> None:
    """What the forward pass keeps for the backward pass."""
    kept = {}
    for fused in (False, True):
        big = big_of(name).float().cuda().to(memory_format=torch.channels_last).train()
        big.fused = fused
        x = make_batch(32, (3, 128, 128)).float().cuda().to(memory_format=torch.channels_last)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            output = big(x)
        torch.cuda.synchronize()
        kept[fused] = torch.cuda.memory_allocated() - before
        del output, big
    assert kept[True] < 0.8 * kept[False]


def test_automatic_is_fused_here() -> None:
    big = big_of("resnet20").float().cuda().train()
    assert big.fused == "auto"
    x = make_batch(8, SHAPE).float().cuda()
    names = set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        big(x).sum().backward()
        torch.cuda.synchronize()
    names = {event.name for event in profile.events()}
    assert not any("batch_norm_collect_statistics" in name or "bn_fw" in name for name in names)
