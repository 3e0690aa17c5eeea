"""Types of command-line arguments: each turns a string into a value or says what is needed."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from typing import Any


def integer(least: int) -> Callable[[str], int]:
    """A whole number of at least ``least``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"needs a whole number of at least {least}; got {text!r}")
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
