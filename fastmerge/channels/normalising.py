"""Normalisations: every channel keeps to itself, to its block, or to those that are kept with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmerge.channels.aten import bound
from fastmerge.channels.record import NO_ID, Computed, IdRun, compact


def batch_norm(run: IdRun, args: Any) -> Computed:
    x: Tensor = run.ids[args[0]]
    operands = []
    for parameter in args[1:5]:
        vector = _vector(run, parameter, x.dim())
        if vector is not None:
            run.record.unite(vector, x)
            x = _fill(x, vector)  # a channel of zeros takes a value that depends on the parameters alone
            operands.append(vector)
    if x.dim() > 2:
        run.record.unite(x.flatten(2).amax(dim=2, keepdim=True), x.flatten(2))
    return Computed(x, operands)


def group_norm(run: IdRun, args: Any) -> Computed:
    x: Tensor = run.ids[args[0]]
    channel = x[:1].flatten(2).amax(dim=2) if x.dim() > 2 else x[:1]
    zeros = channel == NO_ID  # channels of zeros, whose value will depend on the others of their block
    fresh = run.record.new_ids(int(zeros.sum()))
    run.record.positions += [("padding", i) for i in fresh.tolist()]
    x = _fill(x, channel.masked_scatter(zeros, fresh).reshape(1, -1, *[1] * (x.dim() - 2)))
    operands = [v for parameter in args[1:3] if (v := _vector(run, parameter, x.dim())) is not None]
    for vector in operands:
        run.record.unite(vector, x)
    blocks = x[:1].reshape(args[6], -1)
    run.record.tie(blocks[:, :1], blocks)
    return Computed(x, operands)


def layer_norm(run: IdRun, func: Any, args: Any, kwargs: Any) -> Computed:
    """Statistics over one dimension of channels, weighted by gates, leave them apart; others make all of them one channel."""
    x: Tensor = run.ids[args[0]]
    arguments = bound(func, args, kwargs)
    parameters = [arguments.get(name) for name in ("weight", "bias")]
    vectors = [run.ids[p] for p in parameters if isinstance(p, Tensor) and p in run.ids]
    if len(arguments["normalized_shape"]) > 1:
        one = run.record.collapse([x, *vectors], run.where(), "layer_norm")
        return Computed(one.expand(x.shape), [])
    for vector in vectors:
        run.record.unite(vector, x)
        x = _fill(x, vector)
    apart = not vectors and not bool(run.record.constant_ids(compact(x)).any())
    if apart and run.node is not None and bool((x != x[(slice(0, 1),) * (x.dim() - 1)]).any()):
        run.record.normalised_apart[run.mode, run.node.name] = x
        return Computed(x, [])
    # tokens may come from several places, such as a class token
    first = x.amax(dim=tuple(range(x.dim() - 1)), keepdim=True)
    run.record.unite(first, x)
    constant = run.record.constant_ids(x.flatten(0, -2)[0] if x.dim() > 1 else x)
    if bool(constant.any()) and not bool(constant.all()):
        raise ValueError(
            f"layer '{run.where()}' normalises channels of the network's input together with hidden ones, which "
            "fastmerge can't merge: the input is the same for all teachers. Normalise them separately"
        )
    channels = first.flatten()
    if len(channels.unique()) > 1:
        assert run.node is not None
        run.record.normalised[run.mode, run.node.name] = channels.numpy()
    return Computed(first.expand(x.shape), vectors)


def _vector(run: IdRun, tensor: Any, dims: int) -> Tensor | None:
    if isinstance(tensor, Tensor) and tensor in run.ids:
        return run.ids[tensor].reshape(1, -1, *[1] * (dims - 2))
    return None


def _fill(ids: Tensor, others: Tensor) -> Tensor:
    """Other ids where there are none; as it is, and as small, where nothing is missing."""
    return torch.where(ids == NO_ID, others, ids) if bool((compact(ids) == NO_ID).any()) else ids
