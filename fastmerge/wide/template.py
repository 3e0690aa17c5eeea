"""A teacher without its weights: what a student is built on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fastmerge.copies import copied
from fastmerge.wide.network import Layout


class StudentTemplate:
    """The class, options and constants of a teacher, its merged tensors on the meta device so that they take no memory.

    Args:
        teacher: a network; it is copied.
        layout: names the tensors that a merge replaces.

    Attributes:
        skeleton: the copy.
        merged: names of the tensors that a merge replaces.
    """

    def __init__(self, teacher: nn.Module, layout: Layout) -> None:
        self.skeleton = copied(teacher)
        self.merged = layout.merged
        self.strip(self.skeleton)

    def strip(self, network: nn.Module) -> None:
        """Puts a network's merged tensors on the meta device."""
        names = _names(network)
        _replace(network, {t: torch.empty_like(t, device="meta") for t, name in names.items() if name in self.merged})

    def blank(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A network without the teachers' weights, zeros in their place, to be traced."""
        network = copied(self.skeleton)
        tensors = {}
        for tensor in _names(network):
            new = torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
            tensors[tensor] = new.to(dtype) if new.is_floating_point() else new
        _replace(network, tensors)
        return network

    def __deepcopy__(self, memo: dict[int, Any]) -> StudentTemplate:
        return self  # nobody changes it

    def build(self, tensors: Mapping[str, Tensor], like: Tensor) -> nn.Module:
        """A network with the given parameters and buffers.

        Args:
            tensors: by name; tied parameters under their first name.
            like: device and dtype for what is not among them.
        """
        student = copied(self.skeleton)
        names = _names(student)
        resized = any(t.shape != tensors[name].shape for t, name in names.items() if name in tensors)
        _replace(student, {t: tensors[name] if name in tensors else _like(t, like) for t, name in names.items()})
        if resized:
            for module in student.modules():
                _fit(module)
        return student


def _fit(module: nn.Module) -> None:
    """Has a layer say of itself what its tensors are."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _ConvNd) and module.groups == 1:
        first, second = weight.shape[:2]
        module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)
    elif isinstance(module, _ConvNd) and not module.transposed:  # blocks of one size, of which there are more or fewer
        module.groups = module.groups * len(weight) // module.out_channels
        module.in_channels, module.out_channels = module.groups * weight.shape[1], len(weight)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups, module.num_channels = module.num_groups * len(weight) // module.num_channels, len(weight)
    elif isinstance(module, _NormBase):
        module.num_features = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]


def _names(module: nn.Module) -> dict[Tensor, str]:
    return {tensor: name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def _like(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


def _replace(module: nn.Module, replacements: Mapping[Tensor, Tensor]) -> None:
    """Puts other tensors in the place of a module's parameters and buffers, ties kept."""
    made = {
        old: nn.Parameter(new, new.is_floating_point()) if isinstance(old, nn.Parameter) else new
        for old, new in replacements.items()
    }
    for part in module.modules():
        owned: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in owned:
            for key, old in tensors.items():
                if old is not None and old in made:
                    tensors[key] = made[old]
