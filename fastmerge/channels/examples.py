"""Example inputs for running a network once: the user's own, or inferred from its first layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmerge.channels.traced_network import samples_in
from fastmerge.isolation import copied, undisturbed

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_SIZES = (64, 32, 28, 96, 128, 224, 299, 16, 8, 48, 256, 20, 24, 40, 56, 84, 112, 160, 192, 384, 512)
_LENGTHS = (8, 16, 32, 64, 128, 256, 512)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def example_arguments(model: nn.Module, given: Any = None) -> Inputs:
    """The positional and keyword arguments to run a network with once, of at least two samples.

    Args:
        model: the network; it is not changed.
        given: a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or a pair of such a tuple and
            dict; None to infer it. Arguments may be nested and hold tensors of any dtype, numbers, flags and None.

    Raises:
        TypeError: if what is given holds no tensor.
        ValueError: if nothing is given and it can't be inferred, or the network does not run on what is given.
    """
    name, root = type(model).__name__, copied(model)
    if given is not None:
        register_dataclasses(given)
        inputs = pytree.tree_map_only(Tensor, _plain, _arguments(given))
        if any(isinstance(x, Tensor) and not x.numel() for x in pytree.tree_leaves(inputs)):
            raise ValueError(f"example_inputs of {name} hold a tensor without elements; it is read from samples")
        inputs = two_samples(inputs)
        error = failure(root, inputs)
        if error is not None:
            shapes = ", ".join(str(tuple(x.shape)) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
            raise ValueError(f"{name} does not run on the example_inputs of shape {shapes}: {error}")
        return inputs
    last_error: Exception | None = None
    for candidate in _candidates(root):
        last_error = failure(root, ((candidate,), {}), keeps_batch=True)
        if last_error is None:
            return (candidate,), {}
    raise ValueError(
        f"the input of {name} can't be inferred from its first layer"
        + (f" (last try: {str(last_error).splitlines()[0]})" if last_error else "")
        + "; pass example_inputs=x, a tensor (N, C, ...) or a tuple of tensors that its forward takes"
    )


def _arguments(given: Any) -> Inputs:
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, Mapping):
        inputs: Inputs = (), dict(given)
    elif (
        isinstance(given, (tuple, list))
        and len(given) == 2
        and isinstance(given[1], dict)
        and isinstance(given[0], tuple)
    ):
        inputs = given[0], dict(given[1])
    elif isinstance(given, (tuple, list)):
        inputs = tuple(given), {}
    else:
        inputs = (), {}
    if not any(isinstance(x, Tensor) for x in pytree.tree_leaves(inputs)):
        raise TypeError(
            "example_inputs needs a tensor, a tuple of arguments, a dict of keyword arguments, or a pair of both; got a "
            f"{type(given).__name__}"
        )
    return inputs


def _plain(tensor: Tensor) -> Tensor:
    """A tensor without what libraries add to its class (MONAI's MetaTensor, torchvision's Image).

    Raises:
        ValueError: it is sparse or nested.
    """
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"one of layout {str(tensor.layout).removeprefix('torch.')}"
        raise ValueError(
            f"example_inputs need dense tensors; got {kind}. Let the networks take its dense form, or what it consists of"
        )
    return tensor.as_subclass(Tensor)


def with_samples(inputs: Any, count: int) -> Any:
    """Inputs of another number of samples: the first ones, the only one over and over, or zeros where there are none."""
    given = samples_in(pytree.tree_leaves(inputs))

    def resized(x: Tensor) -> Tensor:
        if not x.dim() or len(x) != given:
            return x
        if given >= count:
            return x[:count]
        return torch.cat([x] * count) if given else x.new_zeros(count, *x.shape[1:])

    return pytree.tree_map_only(Tensor, resized, inputs)


def two_samples(inputs: Inputs) -> Inputs:
    """A batch of one twice, since export would take a length of 1 for a constant; for an empty one two samples of zeros."""
    args, kwargs = with_samples(inputs, 2) if samples_in(pytree.tree_leaves(inputs)) < 2 else inputs
    return args, kwargs


def few_samples(inputs: Any) -> Any:
    """Inputs cut to two samples, which tell as much as many; as they are where something else, too, may count the samples."""
    lengths = {len(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()}
    return with_samples(inputs, min(2, *lengths)) if len(lengths) == 1 else inputs


def register_dataclasses(value: Any) -> None:
    """Makes the dataclasses among a network's inputs or outputs known to PyTorch as containers of tensors."""
    unknown = {type(leaf) for leaf in pytree.tree_leaves(value) if dataclasses.is_dataclass(leaf)}
    for kind in unknown:
        torch.export.register_dataclass(kind)
    if unknown:
        register_dataclasses(value)


def failure(root: nn.Module, inputs: Inputs, keeps_batch: bool = False) -> Exception | None:
    """Why the network does not run on these inputs, if so.

    Args:
        root: a copy of the network, whose buffers may change.
        inputs: what its forward takes.
        keeps_batch: whether a batch that changes its size on the way is a failure: ``x.view(-1, 400)`` accepts images of a
            wrong size that way.
    """
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    with undisturbed(leaves):
        for mode in ("eval", "train"):
            try:
                args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs)
                out = root.train(mode == "train")(*args, **kwargs)
                register_dataclasses(out)
            except Exception as error:  # whatever the user's forward raises on a wrong shape
                return error
            sizes = [y.shape[0] for y in pytree.tree_leaves(out) if isinstance(y, Tensor) and y.dim()]
            if keeps_batch and any(size != leaves[0].shape[0] for size in sizes):
                return ValueError(f"a batch of {leaves[0].shape[0]} comes out as {sizes}")
    return None


def example_batch(root: nn.Module, shape: Sequence[int]) -> Tensor:
    """Two samples of a shape: numbers, or for one length the rows of an embedding that is the network's first layer."""
    embedding = _first_embedding(root)
    if embedding is not None and len(shape) == 1:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(embedding.num_embeddings, (2, *shape), generator=generator, device="cpu")
        return rows.to(embedding.weight.device)
    return _numbers(shape, next((p for p in root.parameters() if p.is_floating_point()), torch.empty(0)))


def _numbers(shape: Sequence[int], like: Tensor) -> Tensor:
    """Two samples of a shape, of a tensor's dtype and on its device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, generator=generator, device="cpu").to(like.device, like.dtype)


def _first(root: nn.Module, kinds: tuple[type[nn.Module], ...]) -> nn.Module | None:
    """The first module of some kinds in the order in which the network registers them."""
    return next((module for module in root.modules() if isinstance(module, kinds)), None)


def _first_embedding(root: nn.Module) -> nn.Embedding | None:
    """The embedding that is the network's first layer, if it is one."""
    first = _first(root, (*_LAYERS, nn.Embedding))
    return first if isinstance(first, nn.Embedding) else None


def _candidates(root: nn.Module) -> Iterator[Tensor]:
    """Inputs that the first layer takes."""
    if _first_embedding(root) is not None:  # which may be one of places, too
        yield from (example_batch(root, (length,)) for length in _LENGTHS)
    first = _first(root, _LAYERS)
    weight = None if first is None else first.weight
    if not isinstance(weight, Tensor):  # no layer, or none that computes with a plain weight
        weight = next((p for p in root.parameters() if p.dim() >= 2), None)
        if weight is None:
            return
    spatial, channels = weight.dim() - 2, weight.shape[1]
    if isinstance(first, nn.modules.conv._ConvNd):
        channels = first.in_channels
    yield from (_numbers(shape, weight) for shape in _shapes(spatial, channels))


def _shapes(spatial: int, channels: int) -> Iterator[tuple[int, ...]]:
    if spatial:
        sizes = _SIZES if spatial < 3 else (16, 32, 8, 64)
        yield from ((channels, *[s] * spatial) for s in sizes)
        return
    yield (channels,)
    for colours in (1, 3):
        side = math.isqrt(channels // colours)
        if colours * side * side == channels:
            yield (colours, side, side)
