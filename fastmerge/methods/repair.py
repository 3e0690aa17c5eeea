"""REPAIR: an average whose channels have the means and deviations that the teachers' have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastmerge.channels.aten import bind, op_name
from fastmerge.channels.traced_network import tensor_at
from fastmerge.lock_step import Family, Moment
from fastmerge.methods.average import mean_of
from fastmerge.methods.rebasin import align
from fastmerge.methods.registry import register
from fastmerge.methods.samples import exact, family_of


@register("repair", needs="samples", source="K. Jordan et al., REPAIR (arXiv 2211.08403)")
def repair(
    teachers: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    by: str | None = "activations",
    samples: int = 512,
    seed: int = 0,
) -> nn.Module:
    """The mean of the matched weights, with each channel's mean and deviation restored to the teachers'.

    Args:
        teachers: two or more.
        batches: of the data.
        by: how channels are matched, see ``rebasin``; None: they are averaged as they are.
        samples: that means and deviations are taken over, the loader's first.
        seed: see ``rebasin``.

    Source: K. Jordan et al., REPAIR (arXiv 2211.08403).

    Raises:
        ValueError: a layer has weight normalisation.
    """
    family = family_of(teachers, batches, samples)
    aligned = [*teachers] if by is None else align(family, by, seed)
    merged = mean_of(aligned)
    restore_statistics(merged, aligned, family)
    return merged


@torch.no_grad()
def restore_statistics(merged: nn.Module, parents: Sequence[nn.Module], family: Family) -> None:
    """Gives what each layer writes, front to back, the mean over the parents of its mean and of its deviation.

    A BatchNorm gets the statistics of what it reads, and a scale and shift for what it writes; without a scale its statistics
    do that. What goes into a BatchNorm alone is left as it is. A layer without a bias keeps its mean, and one whose weight has
    other users keeps both.

    Args:
        merged: a network of the architecture; changed in place.
        parents: with their channels in its order.
        family: the architecture, and samples.

    Raises:
        ValueError: a layer has weight normalisation, whose weight can't be scaled.
    """
    done: set[str] = set()
    for moment in family.run([*parents, merged]):
        if moment.call is not None and moment.call.norm is not None:
            raise ValueError(
                f"repair scales weights, and that of {moment.call.name} is computed by weight normalisation; remove it "
                "first, by torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm"
            )
        if moment.call is not None and moment.call.is_plain and moment.call.weight not in done:
            done.add(moment.call.weight)
            hidden = family.groups.outputs[moment.call.weight].numbers
            if hidden and not all(op_name(user) == "batch_norm" for user in moment.node.users):
                _restore_layer(moment, merged, family)
        elif op_name(moment.node) == "batch_norm":
            _restore_norm(moment, merged, done)


def _restore_layer(moment: Moment, merged: nn.Module, family: Family) -> None:
    call = moment.call
    assert call is not None
    dim = call.geometry.channel_dim
    mean, deviation, now, spread = _wanted(moment.compute(), dim)
    factor = deviation / spread.clamp_min(1e-6)
    weight = tensor_at(merged, call.weight)
    if call.groups > 1 and call.geometry.out_dim == 1:  # transposed: blocks of inputs, each with its own outputs
        blocks = weight.unflatten(0, (call.groups, -1))
        blocks.mul_(factor.view(call.groups, 1, -1, *[1] * (weight.dim() - 2)))
    else:
        weight.mul_(factor.view([-1 if d == call.geometry.out_dim else 1 for d in range(weight.dim())]))
    if call.bias is not None:
        bias = tensor_at(merged, call.bias)
        bias.copy_((bias - now) * factor + mean)
    moment.compute(-1)


def _restore_norm(moment: Moment, merged: nn.Module, done: set[str]) -> None:
    tensors = {
        key: str(node.target)
        for key, node in bind(moment.node).items()
        if key in ("weight", "bias", "running_mean", "running_var") and isinstance(node, fx.Node)
    }
    if not tensors or not done.isdisjoint(tensors.values()):
        return
    done.update(tensors.values())
    if "running_mean" in tensors:
        reset_statistics(moment, merged)
    mean, deviation, now, spread = _wanted(moment.compute(), 1)
    factor = deviation / spread.clamp_min(1e-6)
    if {"weight", "bias"} <= tensors.keys():
        weight, bias = (tensor_at(merged, tensors[key]) for key in ("weight", "bias"))
        weight.mul_(factor)
        bias.copy_((bias - now) * factor + mean)
    elif tensors.keys() == {"running_mean", "running_var"}:
        centre, variance = (tensor_at(merged, tensors[key]) for key in ("running_mean", "running_var"))
        eps = bind(moment.node)["eps"]
        deviation = (variance + eps).sqrt() / factor.clamp_min(1e-6)
        variance.copy_((deviation.square() - eps).clamp_min(0))
        centre.sub_((mean - factor * now) * deviation)
    moment.compute(-1)


def reset_statistics(moment: Moment, network: nn.Module) -> None:
    """Sets a BatchNorm's running statistics to those of what it is about to read, in the last of the networks."""
    arguments = bind(moment.node)
    x = exact(moment.values(arguments["input"])[-1])
    variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    for key, value in (("running_mean", mean), ("running_var", variance)):
        tensor_at(network, str(arguments[key].target)).copy_(value)


def _wanted(outputs: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per channel the parents' mean mean and mean deviation, and the mean and deviation of the last network's output."""
    moments = []
    for output in outputs:
        dims = [d for d in range(output.dim()) if d != dim % output.dim()]
        variance, mean = torch.var_mean(exact(output), dims, correction=0)
        moments.append((mean, variance.sqrt()))
    means, deviations = (torch.stack(each[:-1]).mean(0) for each in zip(*moments, strict=True))
    return means, deviations, *moments[-1]
