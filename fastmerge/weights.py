"""Networks by name, and their weights in files."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib
import json
import logging
import os
import pathlib
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmerge.files import atomic

LOG = logging.getLogger("fastmerge")

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module")  # the last is DeepSpeed's
_EMA = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "ema_model", "model_ema_state_dict", "params_ema")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put these before every name
_AVERAGED = "n_averaged"  # beside the weights of torch.optim.swa_utils.AveragedModel
_LIGHTNING = "pytorch-lightning_version"
_INDEX = ".index.json"
# What training programs keep beside the weights. None of it runs anything; Lightning's dictionaries become plain ones.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    *(
        (dict, f"{package}.AttributeDict")
        for package in (
            "lightning_fabric.utilities.data",
            "lightning.fabric.utilities.data",
            "pytorch_lightning.utilities.parsing",
        )
    ),
]
_LISTED = 4
TIMM = "timm:"
HUB = "hf-hub:"
_ON_HUB = ("model.safetensors", "pytorch_model.bin")


def build_network(name: str, **arguments: Any) -> nn.Module:
    """Builds a network with fresh weights.

    Args:
        name: A torchvision classification model (``resnet18``); ``timm:NAME``, one of timm's, or ``timm:hf-hub:OWNER/NAME``,
            which timm finds on the Hugging Face hub; or ``module:function``: a class or function that returns the network, in a
            module on the path or in the current directory.
        arguments: For the model or factory, such as ``num_classes=10``.

    Raises:
        ValueError: There is no such model, module or factory, or it does not take these arguments.
        TypeError: What the factory returns is not a module.
    """
    find = _timm_factory if name.startswith(TIMM) else own_factory if ":" in name else _torchvision_factory
    factory = find(name)
    if name in ("googlenet", "inception_v3"):
        arguments = {"init_weights": False} | arguments  # their scipy initialisation takes a minute and warns
    try:
        network = factory(**arguments)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the user's code raises
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"could not build {name}({given}): {kind}{error}") from error
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name} must return a torch.nn.Module; it returned a {type(network).__name__}")
    return network


def _torchvision_factory(name: str) -> Callable[..., Any]:
    try:
        from torchvision import models
    except ImportError as error:
        raise ValueError(
            f"the model {name} is looked up in torchvision, which is not installed (pip install torchvision); for your own "
            "network give module:function"
        ) from error
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"torchvision has no classification model {name}{_near(name, known)}; for your own network give module:function"
        )
    return models.get_model_builder(name)


def _timm_factory(name: str) -> Callable[..., Any]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{name} is a model of timm, which is not installed (pip install timm)") from error
    model = name.removeprefix(TIMM)
    if not model.startswith(HUB) and not timm.is_model(model):  # timm fetches the hub's by itself
        raise ValueError(f"timm has no model {model}{_near(model, timm.list_models())}")
    return functools.partial(timm.create_model, model)


def _near(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, 3)
    return f"; near it: {', '.join(found)}" if found else ""


def own_factory(name: str) -> Callable[..., Any]:
    """The class or function that ``module:function`` names."""
    module_name, _, path = name.partition(":")
    with _current_directory_on_path():
        try:
            target: Any = importlib.import_module(module_name)
        except Exception as error:  # whatever the user's module raises
            kind = "" if isinstance(error, (ImportError, ValueError)) else f"{type(error).__name__}: "
            raise ValueError(f"could not import {module_name!r} of {name!r}: {kind}{error}") from error
    for attribute in path.split("."):
        if not hasattr(target, attribute):
            raise ValueError(f"{module_name} has no {path!r}; give module:function")
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


def read_weights(path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint, to the CPU, as training programs write them.

    * ``.safetensors`` and ``.pt`` files, the latter by ``torch.load(weights_only=True)``, which runs no code, and compared
      with the checksums that their zip holds; or the index of sharded weights, ``model.safetensors.index.json``.
    * The state dict itself, or inside ``{"state_dict": ...}``, ``model_state_dict``, ``model``, ``net``, ``network`` or
      ``module``.
    * Names as DistributedDataParallel, torch.compile and AveragedModel write them: their prefix is dropped.

    Args:
        path: The file, or ``hf-hub:OWNER/NAME``, a repository on the Hugging Face hub, whose ``model.safetensors`` or
            ``pytorch_model.bin`` is fetched by huggingface_hub into its cache.
        ema: Takes the exponential moving average of the weights, where one lies beside them (``state_dict_ema``,
            ``model_ema``, ``ema`` and so on). Without it the log says that there is one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds more than weights, or none; a tensor is quantised, sparse or without values; or
            there is no moving average.
    """
    weights, _, averaged = _read(Path(path), ema)
    if ema and not averaged:
        raise ValueError(f"{path} holds no moving average of weights under {', '.join(_EMA)}")
    return _unwrapped(weights)


def load_weights(network: nn.Module, path: str | Path, ema: bool = False) -> None:
    """Loads the weights of a checkpoint into a network, strictly.

    Names that all begin with one more prefix, such as the ``model.`` of a LightningModule, fit without it. What a Lightning
    checkpoint holds besides the network is left out.

    Args:
        network: Of the checkpoint's architecture.
        path, ema: As :func:`read_weights`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As :func:`read_weights`; or the checkpoint is of another network: the message says what is missing,
            unexpected, misshapen, or of another kind of number; or a parameter is not finite.
    """
    path = Path(path)
    weights, lightning, averaged = _read(path, ema)
    # what else a module adds to its state dict (get_extra_state) need not be in a file
    own = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    weights, prefix = _without_prefix(path, weights, own, lightning, ema and not averaged)
    if ema and not averaged and not _of_average(prefix):
        raise ValueError(f"{path} holds no moving average of weights under {', '.join(_EMA)}")
    fits = f"{path} does not fit {type(network).__name__}"
    if strange := [name for name in own if name in weights and not isinstance(weights[name], Tensor)]:
        raise ValueError(f"{fits}: {_listed(strange)} are not tensors in it")
    both = {name: (weights[name], value) for name, value in own.items() if name in weights}
    shapes = [
        (name, tuple(came.shape), tuple(needed.shape))
        for name, (came, needed) in both.items()
        if came.shape != needed.shape
    ]
    if shapes:
        raise ValueError(f"{fits}: {_misfit(shapes)}")
    if kinds := [
        f"{name} is {_dtype(came)} in it and {_dtype(needed)} in the network"
        for name, (came, needed) in both.items()
        if not _is_of_kind(came, needed)
    ]:
        raise ValueError(f"{fits}: {_listed(kinds)}; weights are not converted from one kind of number to another")
    missing, unexpected = network.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name in own]
    if missing or unexpected:
        lists = [f"{what} {_listed(names)}" for what, names in (("lacks", missing), ("also has", unexpected)) if names]
        raise ValueError(f"{fits}: it {' and '.join(lists)}")
    if broken := [name for name, value in network.named_parameters() if not torch.isfinite(value).all()]:
        raise ValueError(
            f"{path} has weights that are NaN or infinite: {_listed(broken)}; this network can't be merged"
        )


def _read(path: Path, ema: bool) -> tuple[dict[str, Tensor], bool, bool]:
    """Weights, whether Lightning wrote them, and whether they are a moving average."""
    if str(path).startswith(HUB):
        path = _from_hub(str(path).removeprefix(HUB))
    content: Any = _sharded(path) if path.name.endswith(_INDEX) else _content(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no state dict; save the weights with torch.save(network.state_dict(), path)")
    lightning = _LIGHTNING in content
    averages = [key for key in _EMA if isinstance(content.get(key), Mapping)]
    beside = [key for key in content if key not in averages]
    if averages and not ema:
        LOG.info("%s holds a moving average of weights (%s), which is not taken without --ema", path, averages[0])
    outer = content
    if ema and averages:
        content = content[averages[0]]
    while wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[wrapper]
    if not any(isinstance(value, Tensor) for value in content.values()):
        only = f" but for a moving average ({averages[0]}), which --ema takes" if averages and not ema else ""
        keys = f"; its keys are {_listed(map(repr, outer))}" if beside and not only else ""
        raise ValueError(
            f"{path} holds no state dict{only}{keys}; save the weights with torch.save(network.state_dict(), path)"
        )
    if strange := [name for name in content if not isinstance(name, str)]:
        raise ValueError(
            f"{path} holds no state dict: names of weights are strings; it has {_listed(map(repr, strange))}"
        )
    weights = dict(content)
    averaged = ema and (bool(averages) or _AVERAGED in weights)
    if _AVERAGED in weights and all(name.startswith("module.") or name == _AVERAGED for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items() if name != _AVERAGED}
    if unusual := [f"{name} is {kind}" for name, value in weights.items() if (kind := _unusual(value))]:
        raise ValueError(
            f"{path} holds no plain tensors: {_listed(unusual)}; save the weights as floating-point numbers"
        )
    return weights, lightning, averaged


def _content(path: Path) -> Any:
    """What a file holds, with nothing of it run."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with path.open("rb") as file:
            begins = file.read(9)
        if begins[8:] == b"{":  # safetensors, whatever its name: the header's length, and JSON
            return load_file(path)
        _check_zip(path)
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of its own ways to make quantised and sparse tensors
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        named = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if named:
            raise ValueError(
                f"{path} holds Python objects ({named[1]}), which are not loaded because they could run code; save the weights "
                "alone: torch.save(network.state_dict(), path)"
            ) from error
        if isinstance(error, pickle.UnpicklingError):  # torch says at length what it advises against
            raise ValueError(
                f"{path} is damaged or holds no weights: it is neither a safetensors file nor one that torch.save wrote"
            ) from error
        raise ValueError(f"{path} is damaged or holds no weights ({type(error).__name__}: {error})") from error


def _from_hub(name: str) -> Path:
    """The weights of a repository on the Hugging Face hub."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ValueError(
            f"{HUB}{name} is a repository of Hugging Face's, for which huggingface_hub is not installed (pip install "
            "huggingface_hub)"
        ) from error
    for file in _ON_HUB:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf_hub_download(name, file))
    raise FileNotFoundError(f"{HUB}{name} has no {' and no '.join(_ON_HUB)}, or the hub can't be reached")


def _check_zip(path: Path) -> None:
    """Compares a zip's content with its checksums, which torch.load does not; torch may have been told to write none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.CRC for part in archive.infolist()) and (part := archive.testzip()):
                raise ValueError(f"the checksum of {part} in it differs")


def _sharded(path: Path) -> dict[str, Tensor]:
    """The weights of all files that an index names; they lie beside it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        files: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        if any(Path(file).name != file for file in files.values()):
            raise ValueError("it names files in other folders")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of sharded weights ({type(error).__name__}: {error})") from error
    weights: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        weights |= _content(path.parent / file)
    if lacking := files.keys() - weights.keys():
        raise ValueError(f"{path} names weights that its files do not hold: {_listed(sorted(lacking))}")
    return weights


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by names without what DistributedDataParallel and torch.compile put before them."""
    for prefix in (*_PREFIXES, *_PREFIXES):  # in either order
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _without_prefix(
    path: Path, weights: dict[str, Tensor], own: Mapping[str, Tensor], lightning: bool, average: bool
) -> tuple[dict[str, Tensor], str]:
    """The weights by the network's own names, where all of these stand behind one prefix; and the prefix."""
    for named in (weights, unwrapped := _unwrapped(weights)):  # the network's own names may begin with "module."
        if own.keys() <= named.keys():
            return named, ""
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in weights if name.endswith(f".{first}")]
    fitting = [
        prefix
        for prefix in prefixes
        if all(prefix + name in weights for name in own)
        and (lightning or all(name.startswith(prefix) for name in weights))
    ]
    if len(fitting) > 1:  # Lightning callbacks hold averages beside the network
        fitting = [prefix for prefix in fitting if _of_average(prefix) == average]
    if len(fitting) > 1:
        raise ValueError(f"{path} holds this network more than once, under {_listed(fitting)}; save one of them alone")
    if not fitting:
        return unwrapped, ""
    (prefix,) = fitting
    if beside := [name for name in weights if not name.startswith(prefix)]:
        LOG.info("%s: the weights under %s are taken; left out are %s", path, prefix, _listed(beside))
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, prefix


def _of_average(prefix: str) -> bool:
    return "ema" in re.split(r"[._]", prefix)


def _unusual(value: Any) -> str:
    """What keeps a tensor's values from being read, or an empty string."""
    if not isinstance(value, Tensor):
        return ""
    if value.is_quantized:
        return f"quantised ({_dtype(value)})"
    if value.is_meta:
        return "on the meta device, without values"
    return "" if value.layout is torch.strided else f"sparse ({str(value.layout).removeprefix('torch.')})"


def _is_of_kind(came: Tensor, needed: Tensor) -> bool:
    """Whether both are floating-point, complex, or neither; counts that were averaged may be whole floating-point numbers."""
    if came.is_complex() or needed.is_complex():
        return came.is_complex() and needed.is_complex()
    if came.is_floating_point() and not needed.is_floating_point():
        return bool((came.double() == came.double().round()).all())
    return came.is_floating_point() == needed.is_floating_point()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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

    Tensors that share memory are each written in full, so that the file loads strictly, without metadata, anywhere. What a
    module adds to its state dict and is no tensor (``get_extra_state``) is left out.

    Args:
        weights: The network, or its state dict.
        path: The file; its directory is made if missing.

    Raises:
        OSError: It can't be written; a file that was there before stays.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    # clone() keeps a channels-last layout, which safetensors refuses.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error
