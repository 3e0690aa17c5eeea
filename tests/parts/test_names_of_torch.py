"""PyTorch and Triton have what the code names of them, on the lines too that only a machine with a GPU reaches."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything of torch and triton that a module reads."""
    full: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname or alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names}
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    full = {short: name for short, name in full.items() if name.split(".")[0] in ("torch", "triton")}
    yield from ((1, name) for name in full.values())
    for node in ast.walk(tree):
        attributes, inner = [], node
        while isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Load):
            attributes.append(inner.attr)
            inner = inner.value
        if attributes and isinstance(inner, ast.Name) and inner.id in full:
            yield inner.lineno, ".".join([full[inner.id], *reversed(attributes)])


def exists(name: str) -> bool:
    """Whether there is an attribute or a module of this name."""
    found: Any = None
    words = name.split(".")
    for count, word in enumerate(words, 1):
        if count == 1 or not hasattr(found, word):
            try:
                found = importlib.import_module(".".join(words[:count]))
            except ImportError:
                return False
        else:
            found = getattr(found, word)
    return True


@pytest.mark.parametrize("package", ["fastmerge", "kernels", "benchmarks"])
def test_what_is_named_exists(package: str) -> None:
    used = [
        (name, f"{path.relative_to(ROOT)}:{line}")
        for path in (ROOT / package).rglob("*.py")
        for line, name in names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    there = {name: exists(name) for name in {name for name, _ in used}}
    assert len(there) > 20
    assert [f"{place}: {name}" for name, place in used if not there[name]] == []
