"""T networks as one of T times the width, out of plain layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def stack(teachers: Sequence[nn.Module], grouped: bool = False) -> Any:
    """A copy of the first teacher with every convolution, linear layer and BatchNorm replaced by one for all teachers.

    Weights are block-diagonal in a dense layer; the first layer reads the shared input, the last gives the mean.

    Args:
        teachers: T networks whose first layer is registered first and whose last layer, linear, is registered last.
        grouped: convolutions with ``groups=T`` in place of dense ones. Linear layers have no groups.
    """
    wide = copy.deepcopy(teachers[0])
    modules = [dict(teacher.named_modules()) for teacher in teachers]
    layers = [name for name, module in modules[0].items() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for name, module in modules[0].items():
        parts = [found[name] for found in modules]
        if name in layers:
            weights = [part.weight.detach() for part in parts]
            biases = None if module.bias is None else [part.bias.detach() for part in parts]
            if name == layers[-1]:
                weight = torch.cat(weights, dim=1) / len(parts)
                bias = None if biases is None else torch.stack(biases).mean(0)
            else:
                side_by_side = name == layers[0] or (grouped and isinstance(module, nn.Conv2d))
                weight = torch.cat(weights) if side_by_side else block_diagonal(weights)
                bias = None if biases is None else torch.cat(biases)
            groups = len(parts) if grouped and name != layers[0] else 1
            wide.set_submodule(name, _layer(module, weight, bias, groups))
        elif isinstance(module, nn.BatchNorm2d):
            wide.set_submodule(name, _batch_norm(parts))
    return wide


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Weights (a, b, ...) as one of (T·a, T·b, ...), zero but for the blocks."""
    rows, columns = blocks[0].shape[:2]
    wide = blocks[0].new_zeros(len(blocks) * rows, len(blocks) * columns, *blocks[0].shape[2:])
    for t, block in enumerate(blocks):
        wide[t * rows : (t + 1) * rows, t * columns : (t + 1) * columns] = block
    return wide


def _layer(like: nn.Module, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Module:
    layer: nn.Module
    if isinstance(like, nn.Conv2d):
        made: Any = nn.Conv2d  # whose attributes are typed more loosely than its arguments
        size, stride, padding = like.kernel_size, like.stride, like.padding
        inputs = weight.shape[1] * groups
        layer = made(inputs, weight.shape[0], size, stride, padding, groups=groups, bias=bias is not None)
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.to(weight)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def _batch_norm(parts: Sequence[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(parts) * parts[0].num_features, parts[0].eps, parts[0].momentum).to(parts[0].weight)
    states = [part.state_dict() for part in parts]
    joined = {key: torch.cat([state[key] for state in states]) for key, value in states[0].items() if value.dim()}
    norm.load_state_dict(joined | {"num_batches_tracked": states[0]["num_batches_tracked"]})
    return norm
