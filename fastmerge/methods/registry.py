"""The methods by name, and running one of them with a record of what it cost."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastmerge.merging.checks import listed_teachers
from fastmerge.methods.cost import Meter, peak_memory
from fastmerge.validation import check_teachers

Function = Callable[..., nn.Module]
Needs = Literal["weights", "samples", "training"]


@dataclass(frozen=True)
class Method:
    """A way to make one network of several.

    Attributes:
        name: what it is called by.
        function: ``function(teachers, batches, **options)`` returns the network; the teachers are never changed.
        needs: "weights", "samples" or "training": what it reads.
        source: the paper.
        one_network: whether the result is a network of the teachers' class.
    """

    name: str
    function: Function
    needs: Needs
    source: str
    one_network: bool = True

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the options."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def epochs(self) -> int:
        """For how many epochs it trains by default, as far as it says so."""
        default = self.options.get("epochs")
        return default if isinstance(default, int) else 0


METHODS: dict[str, Method] = {}


def register(name: str, *, needs: Needs, source: str, one_network: bool = True) -> Callable[[Function], Function]:
    """Decorator that makes a function a method by name, for :func:`apply` and the command line.

    The function's options are its keyword-only arguments, those after a ``*``.

    Args:
        name: of the method: letters, digits, spaces, - and _.
        needs: "weights", "samples" or "training": what it reads.
        source: the paper.
        one_network: whether the result is a network of the teachers' class.

    Raises:
        ValueError: there is a method of this name, or a name, what it needs or the function is not of this form.
    """
    if not re.fullmatch(r"[\w -]+", name) or name.startswith("teacher "):
        raise ValueError(
            f"a method needs a name of letters, digits, spaces, - and _, and not a teacher's; got {name!r}"
        )
    if needs not in get_args(Needs):
        raise ValueError(f"method {name!r}: it needs one of {', '.join(get_args(Needs))}; got {needs!r}")

    def decorate(function: Function) -> Function:
        positional = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        if len(positional) > 2:
            raise ValueError(
                f"method {name!r}: options are keyword-only arguments; put a * before {positional[2]}, after the teachers and "
                "batches"
            )
        if name in METHODS and METHODS[name].function is not function:
            raise ValueError(
                f"there is a method {name!r} already, {METHODS[name].function.__module__}; choose another name"
            )
        METHODS[name] = Method(name, function, needs, source, one_network)
        return function

    return decorate


@dataclass(frozen=True)
class Outcome:
    """What a method gave, and what it took.

    Attributes:
        network: the result.
        seconds: wall-clock time.
        cost: counted operations of matrix products and convolutions, forward and backward, in epochs of one teacher's training.
        memory: bytes at the peak beyond those in use before; None where they can't be measured.
    """

    network: nn.Module
    seconds: float
    cost: float
    memory: int | None


def apply(name: str, teachers: Sequence[nn.Module], batches: Iterable[Any], **options: Any) -> Outcome:
    """Makes one network of several by a method.

    Args:
        name: of the method, one of :data:`METHODS`.
        teachers: trained networks of one architecture; they are never changed.
        batches: yields (input, target) of the training data, once over it per ``iter``.
        options: of the method.

    Returns:
        The network, and what it took to make it.

    Raises:
        ValueError: there is no such method, or it has no such option; and what the method raises.
        TypeError: it returns no network.
        TypeError, ValueError: the teachers are not two or more of one class, structure and shapes, or not finite.
    """
    method, teachers = checked(name, options), listed_teachers(teachers)
    check_teachers(teachers)
    started = time.perf_counter()
    with torch.inference_mode(False):
        with peak_memory(teachers) as peak, Meter() as meter:
            network = method.function(teachers, batches, **options)
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"method {name!r} must return a network (torch.nn.Module); it returned a {type(network).__name__}"
            )
        seconds = time.perf_counter() - started
        return Outcome(network, seconds, meter.epochs(teachers[0], batches), peak())


def checked(name: str, options: Iterable[str] = ()) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is no such method, or it has no such option.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(sorted(METHODS))}")
    method = METHODS[name]
    unknown = set(options) - method.options.keys()
    if unknown:
        known = ", ".join(method.options) or "none"
        raise ValueError(f"method {name!r} has no option {', '.join(sorted(unknown))}; it has {known}")
    return method
