"""Types of command-line arguments: each turns a string into a value or says what is needed."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Callable, Container, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmerge.data.augmentation import AUGMENTATIONS
from fastmerge.merging.options import Options
from fastmerge.weights import TIMM, build_network, load_weights, own_factory


def integer(least: int) -> Callable[[str], int]:
    """A whole number of at least ``least``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            most = " and of 64 bits" if value > least else ""
            raise argparse.ArgumentTypeError(f"needs a whole number of at least {least}{most}; got {text!r}")
        return value

    return parse


def fraction(text: str) -> float:
    """A number above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"needs a number above 0 and at most 1; got {text!r}")
    return value


def seconds(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:  # NaN would be never
        raise argparse.ArgumentTypeError(f"needs a number of at least 0; got {text!r}")
    return value


def names(text: str) -> list[str]:
    """Names separated by commas."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"needs one or more names separated by commas; got {text!r}")
    return found


def key_value(text: str) -> tuple[str, Any]:
    """``key=value``; the value is a Python literal where it is one, else a string."""
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise argparse.ArgumentTypeError(f"needs key=value, such as num_classes=10; got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def method_option(text: str) -> tuple[str, str, Any]:
    """``METHOD.OPTION=VALUE``; the value as :func:`key_value` takes it."""
    name, dot, rest = text.partition(".")
    if not (name and dot):
        raise argparse.ArgumentTypeError(f"needs METHOD.OPTION=VALUE, such as rebasin.by=activations; got {text!r}")
    return (name, *key_value(rest))


def compact_at(text: str) -> float | str:
    """A fraction or "settled"; whether it is in range is for those to say who use it."""
    if text == "settled":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs a fraction of the merge stage or 'settled'; got {text!r}") from None


def keep(text: str) -> float | dict[str, float]:
    """A fraction, or fractions and numbers of channels by name of the channel group."""
    try:
        if "=" not in text:
            return _number(text)
        pairs = [part.strip().rpartition("=") for part in text.split(",")]
        return {name: _number(value) for name, _, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"needs a fraction, or NAME=X for channel groups separated by commas; got {text!r}"
        ) from None


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


def add_teachers(add: Callable[..., object]) -> None:
    """Adds the options that name teachers, which :func:`load_teachers` reads."""
    add("--model", required=True, metavar="NAME", help="torchvision model, timm:NAME, or module:function of your own")
    add("--model-args", nargs="+", type=key_value, default=[], metavar="KEY=VALUE", help="arguments of the model")
    add(
        "--teachers",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="two or more files of weights, or hf-hub:OWNER/NAME",
    )
    add(
        "--classes",
        nargs="+",
        type=integer(1),
        metavar="N",
        help="number of classes of each teacher, with --heads; without it those of its --data",
    )
    add("--ema", action="store_true", help="take the moving averages of the teachers' weights from their files")


def load_teachers(options: argparse.Namespace, classes: Sequence[int] | int | None = None) -> list[nn.Module]:
    """The networks that options name.

    Args:
        options: of the command.
        classes: of a torchvision or timm model, unless its arguments say so; or of each teacher, which a model of your own
            takes too, as ``num_classes`` or ``classes``.

    Raises:
        ValueError, TypeError, OSError: see :func:`~fastmerge.weights.build_network` and ``load_weights``.
    """
    given = options.classes or classes
    each = list(given) if isinstance(given, Sequence) else [given] * len(options.teachers)
    if len(each) != len(options.teachers):
        raise ValueError(
            f"one number of classes is needed per teacher; got {len(each)} for {len(options.teachers)} teachers"
        )
    is_own = ":" in options.model and not options.model.startswith(TIMM)
    name = (
        _name_of_classes(options.model) if is_own and isinstance(given, Sequence) else None if is_own else "num_classes"
    )
    teachers = []
    for path, count in zip(options.teachers, each, strict=True):
        arguments = {} if name is None or count is None else {name: count}
        teachers.append(build_network(options.model, **arguments | dict(options.model_args)))
        load_weights(teachers[-1], path, options.ema)
    return teachers


def _name_of_classes(model: str) -> str | None:
    """What a factory of one's own calls its number of classes, if it takes one."""
    parameters = inspect.signature(own_factory(model)).parameters
    return next((name for name in ("num_classes", "classes") if name in parameters), None)


def add_options(add: Callable[..., object], varying: bool = False, names: Container[str] | None = None) -> None:
    """Adds a flag for every option of a merge that has one.

    Args:
        add: as ``parser.add_argument``.
        varying: whether only those that may differ from a recipe's, whose own values are the defaults then.
        names: of the options to add; None: all.
    """
    for each in fields(Options):
        facts = each.metadata
        if facts["flag"] is None or (varying and not facts["varies"]) or (names is not None and each.name not in names):
            continue
        default = None if varying else each.default
        said = "; default the recipe's" if varying else "" if default is None else f"; default {default}"
        words: dict[str, Any] = {"help": facts["what"].replace("%", "%%") + said}
        if facts["flag"] is bool:
            words |= {"action": argparse.BooleanOptionalAction if varying or default else "store_true"}
            words["help"] = facts["what"]
        else:
            words |= {"metavar": "N" if facts["flag"] in (int, list) else "X"} | _parsed(each.name, facts)
        add(f"--{each.name.replace('_', '-')}", default=default, **words)


_TYPES = {"compact_at": compact_at, "keep": keep}


def _parsed(name: str, facts: Any) -> dict[str, Any]:
    if facts["choices"] is not None:
        return {"choices": facts["choices"], "metavar": None}
    if facts["flag"] is list:
        return {"nargs": "*", "type": integer(1)}
    if name in _TYPES:
        return {"type": _TYPES[name]}
    return {"type": integer(facts["least"]) if facts["flag"] is int else float}


def precision(options: argparse.Namespace) -> torch.dtype | None:
    """The dtype that ``--autocast`` names."""
    return None if options.autocast is None else getattr(torch, options.autocast)


STEPS = ("accumulate", "compile", "sync_batch_norm")  # options that say how steps are run, whatever is trained


def add_images(add: Callable[..., object]) -> None:
    """Adds the options of how images are read."""
    add("--batch-size", type=integer(1), default=64, metavar="N", help="images per step, of all processes; default 64")
    add("--image-size", type=integer(1), metavar="N", help="of an image tree; default 224")
    add("--augmentation", choices=AUGMENTATIONS, help="default imagenet for a tree, cifar for CIFAR, none for an .npz")
    usual = "of pixels in 0..1, as the teachers were trained; default ImageNet's for a tree, else the data's"
    add("--mean", nargs="+", type=float, metavar="X", help=f"what is subtracted from each channel {usual}")
    add("--std", nargs="+", type=float, metavar="X", help="what each channel is divided by afterwards")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ...; default cuda where there is one")


def chosen(options: argparse.Namespace, varying: bool = False) -> dict[str, Any]:
    """The options of a merge that have flags, as they were given."""
    flagged = [each for each in fields(Options) if each.metadata["flag"] is not None]
    names = [each.name for each in flagged if each.metadata["varies"] or not varying]
    return {name: getattr(options, name) for name in names if hasattr(options, name)}
