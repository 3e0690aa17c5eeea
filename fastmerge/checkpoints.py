"""Networks by name, and their weights in files."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmerge.files import atomic

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put these before every name
_LISTED = 4
TIMM = "timm:"


def build_network(name: str, **arguments: Any) -> nn.Module:
    """Builds a network with fresh weights.

    Args:
        name: A torchvision classification model (``resnet18``); ``timm:NAME``, one of timm's; or ``module:factory``: a
            class or function that returns the network, in a module on the path or in the current directory.
        arguments: For the model or factory, such as ``num_classes=10``.

    Raises:
        ValueError: There is no such model, module or factory, or it does not take these arguments.
        TypeError: What the factory returns is not a module.
    """
    if name.startswith(TIMM):
        factory = _timm_factory(name)
    else:
        factory = _own_factory(name) if ":" in name else _torchvision_factory(name)
    if name in ("googlenet", "inception_v3"):
        arguments = {"init_weights": False} | arguments  # their scipy initialisation takes a minute and warns
    try:
        network = factory(**arguments)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ValueError(f"could not build {name}({given}): {error}") from error
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name} must return a torch.nn.Module; it returned a {type(network).__name__}")
    return network


def _torchvision_factory(name: str) -> Callable[..., Any]:
    try:
        from torchvision import models
    except ImportError as error:
        raise ValueError(
            f"{name} is looked up in torchvision, which is not installed; or give module:factory"
        ) from error
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(
            f"torchvision has no classification model {name}{hint}; for your own network give module:factory"
        )
    return models.get_model_builder(name)


def _timm_factory(name: str) -> Callable[..., Any]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{name} is a model of timm, which is not installed (pip install timm)") from error
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), 3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"timm has no model {model}{hint}")
    return functools.partial(timm.create_model, model)


def _own_factory(name: str) -> Callable[..., Any]:
    module_name, _, path = name.partition(":")
    with _current_directory_on_path():
        try:
            target: Any = importlib.import_module(module_name)
        except (ImportError, ValueError) as error:
            raise ValueError(f"could not import {module_name!r} of {name!r}: {error}") from error
    for attribute in path.split("."):
        if not hasattr(target, attribute):
            raise ValueError(f"{module_name} has no {path!r}; give module:factory")
        target = getattr(target, attribute)
    if not callable(target):
        raise ValueError(
            f"{name} must be a class or function that returns the network; it is a {type(target).__name__}"
        )
    return target


@contextlib.contextmanager
def _current_directory_on_path() -> Iterator[None]:
    # A console script, unlike python -m, does not have it there.
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint, to the CPU.

    A ``.safetensors`` file is read as such; anything else by ``torch.load(weights_only=True)``, which runs no code. A
    state dict inside ``{"state_dict": ...}`` (or ``model_state_dict``, ``model``) is taken out, and the prefix that
    DistributedDataParallel or torch.compile put before every name is dropped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds more than weights, or holds none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects, which are not loaded because they could run code; "
            "save the weights alone: torch.save(network.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__}: {error})") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict; save the weights with torch.save(network.state_dict(), path)")
    weights = dict(content)
    for prefix in (*_PREFIXES, *_PREFIXES):  # in either order
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Loads the weights of a checkpoint into a network, strictly.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The checkpoint is of another network; the message says what is missing, unexpected or misshapen.
    """
    weights, own = read_weights(path), network.state_dict()
    shapes = [
        (name, tuple(weights[name].shape), tuple(value.shape))
        for name, value in own.items()
        if isinstance(weights.get(name), Tensor) and weights[name].shape != value.shape
    ]
    if shapes:
        raise ValueError(f"{path} does not fit {type(network).__name__}: {_misfit(shapes)}")
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if missing or unexpected:
        lists = [
            f"{what} {_listed(names)}" for what, names in (("lacks", missing), ("has besides", unexpected)) if names
        ]
        raise ValueError(f"{path} does not fit {type(network).__name__}: it {' and '.join(lists)}")


def _misfit(shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> str:
    sizes = {(came[:1], needed[:1]) for _, came, needed in shapes}
    # Of another width, the inputs of layers would differ too; where only outputs do, and in one way, it is the classes.
    if len(sizes) == 1 and all(came[1:] == needed[1:] and came and needed for _, came, needed in shapes):
        came, needed = shapes[0][1][0], shapes[0][2][0]
        names = ", ".join(name for name, _, _ in shapes)
        return f"it has {came} classes and the network {needed} ({names}); build the network for {came}"
    return _listed([f"{name} is {came} in it and {needed} in the network" for name, came, needed in shapes])


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def save_weights(weights: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Writes the weights of a network as safetensors, atomically.

    Tensors that share memory are each written in full, so that the file loads strictly, without metadata, anywhere.

    Args:
        weights: The network, or its state dict.
        path: The file; its directory is made if missing.

    Raises:
        OSError: It can't be written; a file that was there before stays.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    # clone() keeps a channels-last layout, which safetensors refuses.
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error
