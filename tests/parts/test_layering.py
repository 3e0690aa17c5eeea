"""Imports go one way: the command line at the top, the kernels at the bottom."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A module imports from its own layer and the ones below it. What is not named here finds or widens channels, trains
# nothing, and lies under BigStudent.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["experiments"],
    ["methods"],
    ["merging"],
    ["gate_budget", "evaluation", "history", "weights", "mergeability", "stack"],
    ["data", "environment", "files", "networks", "processes", "reporting", "checkpoints"],
    ["big_student", "lock_step"],
    ["gated_network"],
    ["narrowing"],
    ["lowering"],
    ["wide"],
    ["everything else"],
    ["kernels"],
    ["_batch_norm", "_compaction"],
]
# What these import of fastmerge, whatever lies below them.
ALONE = {
    "checkpoints": {"files"},
    "data": {"data", "files"},
    "environment": set(),
    "files": set(),
    "kernels": {"_batch_norm", "kernels"},
    "networks": {"networks"},
    "reporting": {"files", "reporting"},
}
# Imported inside the functions that need them, so that a missing one is missed only there.
OPTIONAL = {"PIL", "huggingface_hub", "matplotlib", "nvidia", "sklearn", "timm", "torchvision", "triton"}

EXTENSIONS = {"_batch_norm", "_compaction"}
RANK = {name: rank for rank, names in enumerate(reversed(LAYERS)) for name in names}


def sources() -> dict[str, Path]:
    """Module names under fastmerge, without the package's own, and their files."""
    files = {path.relative_to(ROOT / "fastmerge"): path for path in (ROOT / "fastmerge").rglob("*.py")}
    files |= {path.relative_to(ROOT): path for path in (ROOT / "kernels").rglob("*.py")}
    names = {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for name, path in files.items()}
    return {name: path for name, path in names.items() if name != "__init__"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, everywhere: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Absolute modules that a file imports, each with the names taken from it; those for type checkers alone left out.

    Args:
        path: The file.
        everywhere: Inside functions too.
    """
    waiting: list[ast.AST] = [parsed(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def inner_imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of fastmerge that a file imports, named as in ``modules``."""
    found = set()
    for module, names in imported(path):
        if module.partition(".")[0] != "fastmerge":
            continue
        base = module.removeprefix("fastmerge").removeprefix(".")
        for name in names or [""]:
            full = f"{base}.{name}".strip(".")
            found.add(full if full in modules or full in EXTENSIONS else base)
    return found - {""}


def layer(module: str) -> int:
    return RANK.get(module.partition(".")[0], RANK["everything else"])


MODULES = sources()


def test_imports_go_down_and_none_leads_back() -> None:
    graph = {module: inner_imports(path, MODULES) - {module} for module, path in MODULES.items()}
    edges = [(module, target) for module, targets in graph.items() for target in targets]
    assert not [f"{module} imports {target}, above it" for module, target in edges if layer(target) > layer(module)]
    tops = [(module.partition(".")[0], target.partition(".")[0]) for module, target in edges]
    assert not [f"{module} imports {target}" for module, target in tops if target not in ALONE.get(module, {target})]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports lead back to where they began: {' <- '.join(error.args[1])}")


def test_optional_packages_are_imported_where_they_are_used() -> None:
    for module, path in MODULES.items():
        if not (module.startswith("kernels.") and module.endswith("_triton")):
            tops = {name.partition(".")[0] for name, _ in imported(path, everywhere=False)}
            assert not tops & OPTIONAL, module


def test_the_layers_name_modules_that_exist() -> None:
    packages = {module.partition(".")[0] for module in MODULES}
    assert {name for names in LAYERS for name in names} - {"everything else"} <= packages | EXTENSIONS
    assert set(ALONE) <= packages


def test_importing_fastmerge_imports_nothing_optional() -> None:
    """Nor what takes as long as PyTorch itself, before somebody asks for it: its compiler, and SciPy."""
    listing = "import sys, torch; own = {*sys.modules}; import fastmerge.cli; print(*{*sys.modules} - own)"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {*done.stdout.split()} | {name.partition(".")[0] for name in done.stdout.split()}
    assert "fastmerge" in loaded
    assert not loaded & OPTIONAL - {"triton"}  # PyTorch looks for triton by itself
    assert not loaded & {"torch._dynamo", "sympy", "scipy"}


def test_a_wrong_import_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "import sklearn.svm\n"
        "from fastmerge import merging\n"
        "if TYPE_CHECKING:\n"
        "    from fastmerge import experiments\n"
        "def use():\n"
        "    from fastmerge.cli import main\n"
        "    import matplotlib\n"
    )
    assert inner_imports(path, MODULES) == {"merging", "cli"}
    assert {name for name, _ in imported(path, everywhere=False)} == {"typing", "sklearn.svm", "fastmerge"}
    assert layer("kernels.gate") < layer("tracing") < layer("big_student") < layer("merging") < layer("cli.run")


@cache
def documented() -> dict[str, set[str]]:
    """Modules that the API reference documents or that list their names, and these names."""
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    found = {"fastmerge.cli": {"main"}}
    for name in re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE):
        module, _, what = name.rpartition(".")
        found.setdefault(module, set(getattr(importlib.import_module(module), "__all__", ()))).add(what)
    return found


def helpers(path: Path) -> Iterator[Path]:
    """A file of tests and what it imports of tests/, whatever that imports."""
    yield path
    for name, _ in imported(path):
        beside = ROOT / "tests" / f"{name.partition('.')[0]}.py"
        if beside.exists():
            yield from helpers(beside)


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "api").glob("test_*.py")), ids=lambda path: path.stem)
def test_tests_of_the_api_use_what_is_documented(path: Path) -> None:
    public = documented()
    for file in helpers(path):
        for module, names in imported(file):
            top = module.partition(".")[0]
            assert top not in ("benchmarks", "kernels", "csrc"), f"{file}: {module}"
            if top == "fastmerge":
                assert set(names) <= public.get(module, {None}), f"{file}: {module} {names}"
                assert module in public, f"{file}: {module}"
