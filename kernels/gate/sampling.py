"""Sampling of all hard concrete gates of a network in one launch. Formula and reference: ``formulas``.

There are two ways to the same kernels, see ``direct``. The gates come from a seed tensor on the device: Philox with the seed as
key and (channel, sample) as counter. The same seed gives the same gates; a replayed CUDA graph draws a new seed. The backward
pass needs the gates alone,

    dz/dloc = (z - gamma) (zeta - z) / (beta (zeta - gamma)),   0 where z is 0 or 1.

Dims: N batch, C channels (all channel groups of a network, concatenated), S seeds, B the batch of ``torch.func.vmap``.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from fastmerge.kernels import direct
from fastmerge.kernels.gate.formulas import (
    BETA,
    GAMMA,
    ZETA,
    hard_concrete,
    hard_concrete_mean,
    open_probability,
    sample_gates_reference,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["hard_concrete", "hard_concrete_mean", "open_probability", "sample_gates", "sample_gates_reference"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_MAX_SEED = 2**63 - 1


@torch.library.custom_op("fastmerge::sample_gates", mutates_args=())
def _sample(loc: Tensor, seed: Tensor, n: int, beta: float, gamma: float, zeta: float, dtype: torch.dtype) -> Tensor:
    # Imported here: a machine without CUDA never imports Triton.
    from fastmerge.kernels.gate import sampling_triton

    return sampling_triton.sample(loc, seed, n, beta, gamma, zeta, dtype)


@_sample.register_fake
def _(loc: Tensor, seed: Tensor, n: int, beta: float, gamma: float, zeta: float, dtype: torch.dtype) -> Tensor:
    return loc.new_empty((n, loc.shape[0]), dtype=dtype)


@torch.library.custom_op("fastmerge::sample_gates_backward", mutates_args=())
def _sample_backward(dz: Tensor, z: Tensor, beta: float, gamma: float, zeta: float, dtype: torch.dtype) -> Tensor:
    from fastmerge.kernels.gate import sampling_triton

    return sampling_triton.sample_backward(dz, z, beta, gamma, zeta, dtype)


@_sample_backward.register_fake
def _(dz: Tensor, z: Tensor, beta: float, gamma: float, zeta: float, dtype: torch.dtype) -> Tensor:
    return z.new_empty(z.shape[1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    loc, _, _, ctx.beta, ctx.gamma, ctx.zeta, _ = inputs
    ctx.dtype = loc.dtype
    ctx.save_for_backward(output)


def _backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    (z,) = ctx.saved_tensors
    return _sample_backward(dz, z, ctx.beta, ctx.gamma, ctx.zeta, ctx.dtype), None, None, None, None, None, None


_sample.register_autograd(_backward, setup_context=_setup_context)


@_sample.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], loc: Tensor, seed: Tensor, n: int, *constants: Any) -> tuple[Tensor, int]:
    # One launch for the whole batch: its channels side by side, each element's under its own seeds.
    loc_BC, seed_BS = (_batch_first(t, dim, info.batch_size) for t, dim in zip((loc, seed), in_dims[:2], strict=True))
    z = _sample(loc_BC.flatten(), seed_BS.flatten(), n, *constants)
    return z.unflatten(1, loc_BC.shape), 1


@_sample_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], dz: Tensor, z: Tensor, *constants: Any) -> tuple[Tensor, int]:
    dz_NBC, z_NBC = (
        _batch_first(t, dim, info.batch_size).movedim(0, 1) for t, dim in zip((dz, z), in_dims[:2], strict=True)
    )
    return _sample_backward(dz_NBC.flatten(1), z_NBC.flatten(1), *constants).unflatten(0, z_NBC.shape[1:]), 0


def _batch_first(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class _Sample(torch.autograd.Function):
    """Both passes without the operators."""

    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, seed: Tensor, n: int, constants: tuple[float, float, float], dtype: torch.dtype
    ) -> Tensor:
        from fastmerge.kernels.gate import sampling_triton

        z = sampling_triton.sample(loc, seed, n, *constants, dtype)
        ctx.constants, ctx.dtype = constants, loc.dtype
        ctx.save_for_backward(z)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        from fastmerge.kernels.gate import sampling_triton

        (z,) = ctx.saved_tensors
        return sampling_triton.sample_backward(dz, z, *ctx.constants, ctx.dtype), None, None, None, None


def sample_gates(
    loc: Tensor,
    n: int,
    *,
    beta: float = BETA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draws hard concrete gates, one per sample and channel.

    ``u ~ U(0, 1)``, ``s = sigmoid((log u - log(1 - u) + loc) / beta)``, ``z = clamp(s (zeta - gamma) + gamma, 0, 1)``.

    One fused launch on a CUDA device where Triton is installed, plain PyTorch elsewhere. Either way the draws come from
    the device's default generator, so ``torch.manual_seed`` repeats them, and ``torch.func.vmap`` needs its
    ``randomness``; the two ways draw different numbers. Under
    ``torch.func.grad``, which can't differentiate custom operators, the plain one runs everywhere.

    Args:
        loc: location of each gate, shape (C,): all channel groups of a network, concatenated.
        n: number of samples.
        beta: temperature, above 0.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end of the stretched interval, above 1.
        dtype: dtype of the gates, that of ``loc`` if None. It changes the rounding of the result only: the gates are
            computed in float32, or in float64 for a float64 ``loc``.

    Returns:
        Gates in [0, 1], shape (n, C), differentiable once with respect to ``loc``.

    Raises:
        ValueError: if ``loc`` isn't one-dimensional and floating, or ``n`` is negative.
    """
    if loc.dim() != 1 or not loc.is_floating_point():
        raise ValueError(f"sample_gates needs floating loc of shape (C,); got {loc.dtype} of shape {tuple(loc.shape)}")
    if n < 0:
        raise ValueError(f"sample_gates needs a number of samples of at least 0; got {n}")
    if _runs_fused(loc):
        seed = torch.randint(_MAX_SEED, (1,), device=loc.device)
        if direct.runs_direct(loc):
            gates: Tensor = direct.apply(_Sample, loc, seed, n, (beta, gamma, zeta), dtype or loc.dtype)
            return gates
        return _sample(loc, seed, n, beta, gamma, zeta, dtype or loc.dtype)
    return sample_gates_reference(loc, n, beta=beta, gamma=gamma, zeta=zeta, dtype=dtype)


def _runs_fused(loc: Tensor) -> bool:
    return loc.is_cuda and _HAS_TRITON and not _under_func_grad(loc)


def _under_func_grad(tensor: Tensor) -> bool:
    """Whether ``torch.func.grad`` follows a tensor, at any depth: custom operators can't be differentiated by it."""
    if torch._C._functorch.maybe_current_level() is None:  # this question alone can be traced by torch.compile
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
