"""The operators of the fused BatchNorm as torch sees them: opcheck, torch.compile, torch.func, and who runs fused."""

from __future__ import annotations

import pytest
import torch
from fastmerge.kernels.batch_norm import act, batch_norm_act, batch_norm_act_pool, pool
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from batch_norm_checks import fused, in_layout, make
from interpreter import INTERPRETING, interpreted

pytest.importorskip("triton")

SHAPE = (3, 5, 6, 4)
WINDOW = (3, 3, 2, 2, 1, 1)
operators = torch.ops.fastmerge


def statistics() -> tuple[Tensor, Tensor]:
    return torch.zeros(5), torch.ones(5)


@interpreted
def test_opcheck_of_the_statistics() -> None:
    x = in_layout(torch.randn(SHAPE), "slice")
    torch.library.opcheck(operators.batch_norm_statistics, (x, *statistics(), 0.1))
    torch.library.opcheck(operators.batch_norm_statistics, (x, None, None, 0.1))


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "slice"])
def test_opcheck(layout: str) -> None:
    case = make(SHAPE, torch.float32, samples=3)
    x, weight, bias, residual, gate = (t.requires_grad_() for t in case.values())
    x = in_layout(x.detach(), layout).requires_grad_()
    vectors = (weight, bias, *statistics())
    torch.library.opcheck(operators.batch_norm_act, (x, *vectors, residual, gate, True, 1e-5, "relu"))
    torch.library.opcheck(operators.batch_norm_act, (x, *vectors, residual, None, True, 1e-5, "identity"))
    torch.library.opcheck(operators.batch_norm_act, (x, None, None, *statistics(), None, None, False, 1e-5, "silu"))
    torch.library.opcheck(operators.batch_norm_act_pool, (x, *vectors, gate, True, 1e-5, "relu", WINDOW, True))
    torch.library.opcheck(
        operators.batch_norm_act_pool,
        (x.detach(), None, None, *statistics(), None, False, 1e-5, "hardswish", WINDOW, False),
    )


@interpreted
def test_opcheck_of_the_backward_operators() -> None:
    case = make(SHAPE, torch.float16, samples=3)
    x, weight, bias, residual, gate = case.values()
    vectors = (weight, bias, *statistics())
    for needs in ([True] * 5, [False, True, False, False, True], [True, False, False, False, False]):
        arguments = (x, x, *vectors, residual, gate, True, 1e-5, "silu", needs)
        torch.library.opcheck(operators.batch_norm_act_backward, arguments)
    y, peak, place = operators.batch_norm_act_pool(x, *vectors, gate, True, 1e-5, "relu", WINDOW, True)
    for needs in ([True] * 4, [False, True, False, True]):
        arguments = (y, x, *vectors, gate, peak, place, True, 1e-5, "relu", WINDOW, needs)
        torch.library.opcheck(operators.batch_norm_act_pool_backward, arguments)


@interpreted
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pooled", [False, True])
def test_torch_compile_takes_it_whole(pooled: bool) -> None:
    case = make(SHAPE, torch.float32, samples=3, residual=False)

    def step(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        # Slices of the buffers of a wider layer, updated in place through them.
        arguments = (x, weight, bias, mean[2:7], var[2:7])
        if pooled:
            return batch_norm_act_pool(*arguments, training=True, kernel_size=3, stride=2, padding=1, gate=gate) * 2
        return batch_norm_act(*arguments, training=True, residual=x, gate=gate) * 2

    results = []
    with fused():
        for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
            tensors = [case[name].clone().requires_grad_() for name in ("x", "weight", "bias", "gate")]
            mean, var = torch.zeros(9), torch.ones(9)
            y = function(*tensors, mean, var)
            results.append([y.detach(), mean, var, *torch.autograd.grad(y.square().sum(), tensors)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)
    assert (results[1][1] != 0).sum() == 5


@pytest.mark.skipif(INTERPRETING, reason="says nothing about the interpreter")
def test_cuda_takes_the_kernels() -> None:
    def nodes(device: str, dtype: torch.dtype = torch.float32, **options: str) -> set[str]:
        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            arguments = (x, None, None, None, None)
            pooling = {"kernel_size": 3, "stride": 2, "padding": 1}
            return batch_norm_act(*arguments, training=True), batch_norm_act_pool(*arguments, training=True, **pooling)

        with torch._subclasses.FakeTensorMode():
            graph = make_fx(both)(torch.empty(SHAPE, device=device, dtype=dtype))
        return {str(node.target) for node in graph.graph.nodes if "fastmerge" in str(node.target)}

    names = ("batch_norm_statistics", "batch_norm_act", "batch_norm_act_pool")
    assert nodes("cuda") == {f"fastmerge.{name}.default" for name in names}
    assert nodes("cuda", torch.float64) == nodes("cpu") == set()


@pytest.mark.skipif(INTERPRETING, reason="says nothing about the interpreter")
def test_why_not_fused() -> None:
    x = torch.empty(SHAPE)
    assert pool.why_not_fused(x, kernel_size=(2, 2)) == "x is on cpu, not on a CUDA device"
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(SHAPE, device="cuda", dtype=torch.bfloat16)
        assert act.why_not_fused(x, residual=x, gate=torch.empty(3, 5, device="cuda")) is None
        for reason, arguments, options in (
            ("the activation is gelu", (x,), {"activation": "gelu"}),
            ("x is torch.float64", (x.double(),), {}),
            ("x is empty", (x[:0],), {}),
            ("the residual is torch.float32", (x,), {"residual": x.float()}),
            ("another argument on cpu", (x, torch.empty(5)), {}),
            ("an argument is torch.float64", (x,), {"gate": torch.empty(1, 5, device="cuda", dtype=torch.float64)}),
        ):
            assert reason in str(act.why_not_fused(*arguments, **options))
        assert pool.why_not_fused(x, kernel_size=(8, 16)) is None
        assert "144 positions" in str(pool.why_not_fused(x, kernel_size=(12, 12)))


@pytest.mark.parametrize("pooled", [False, True])
def test_torch_func_runs_the_reference(pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = []
    monkeypatch.setattr(act, "_holds_kernels", lambda x: True)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        reasons.append(act.why_not_fused(x, weight))
        arguments = (x, weight, None, None, None)
        if pooled:
            return batch_norm_act_pool(*arguments, training=True, kernel_size=2, stride=2).sum()
        return batch_norm_act(*arguments, training=True, gate=torch.rand(3, 5)).sum()

    weights, x = torch.rand(2, 5), torch.randn(2, *SHAPE)
    gradient = torch.func.vmap(torch.func.grad(loss), randomness="different")(weights, x)
    torch.func.vmap(loss, randomness="different")(weights, x)
    assert gradient.shape == weights.shape
    assert (gradient != 0).any()
    assert all("torch.func" in str(reason) for reason in reasons)
    assert len(reasons) == 2
