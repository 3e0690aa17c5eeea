"""The stub of a compiled extension beside what the extension has."""

from __future__ import annotations

import inspect
from ast import AnnAssign, FunctionDef, parse
from pathlib import Path
from types import ModuleType

import fastmerge


def check_stub(module: ModuleType) -> None:
    """Compares functions and their arguments' names with those in the module's ``.pyi``."""
    stub = parse((Path(fastmerge.__file__).parent / f"{module.__name__.rpartition('.')[2]}.pyi").read_text())
    functions = {node.name: [a.arg for a in node.args.args] for node in stub.body if isinstance(node, FunctionDef)}
    public = [name for name in dir(module) if not name.startswith("_")]
    constants = [node.target.id for node in stub.body if isinstance(node, AnnAssign)]
    assert sorted([*constants, *functions]) == public
    for name, arguments in functions.items():
        described = inspect.getdoc(getattr(module, name)).splitlines()[0]  # name(a: type, b: type = 1) -> type
        assert [part.split(":")[0].strip() for part in _arguments(described)] == arguments
        assert described.endswith("-> None")


def _arguments(signature: str) -> list[str]:
    """The arguments of a signature as pybind11 writes it, split at the commas outside brackets."""
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
