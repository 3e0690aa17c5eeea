"""What an installation of fastmerge holds, with and without a compiler."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}

COMPACTION = """
import sys, warnings, torch, fastmerge, fastmerge.kernels, fastmerge.compaction
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        weight = torch.arange(12.0).view(4, 3)
        weight = weight.clone()
        fastmerge.compaction.compact_(weight, torch.tensor([1, 3]), torch.tensor([0, 2]))
        assert weight.tolist() == [[3, 5], [9, 11]]
print(fastmerge.__file__, fastmerge.kernels.__file__, len(caught), fastmerge.__version__, sep="\\n")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without what was built in it, so that building here leaves it alone."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("fastmerge", "kernels", "csrc", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=variables | environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(checkout: Path, kind: str, out: Path, **environment: str) -> Path:
    """Builds an sdist or a wheel with the packages of this environment."""
    command = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", command, out, cwd=checkout, **environment)
    (result,) = out.iterdir()
    return result


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as a machine without a compiler builds it."""
    return zipfile.ZipFile(build(checkout, "wheel", tmp_path_factory.mktemp("wheel"), **NO_COMPILER))


def test_the_wheel_holds_fastmerge_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"fastmerge", f"fastmerge-{_version()}.dist-info"}


def test_the_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    expected = {f"fastmerge/{path.relative_to(ROOT / 'fastmerge')}" for path in (ROOT / "fastmerge").rglob("*.py*")}
    expected |= {f"fastmerge/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    expected = {name for name in expected if "__pycache__" not in name} | {"fastmerge/py.typed"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    assert {"fastmerge/_batch_norm.pyi", "fastmerge/_compaction.pyi"} <= expected


def test_the_metadata_asks_for_lower_bounds(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_bytes(wheel.read(f"fastmerge-{_version()}.dist-info/METADATA"))
    requirements = metadata.get_all("Requires-Dist")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"dali", "dev", "recipes"} <= set(metadata.get_all("Provides-Extra"))
    assert {re.split(r"[\s>;\[]", line)[0] for line in requirements if "extra ==" not in line} == {
        "numpy",
        "safetensors",
        "torch",
        "scipy",
        "tqdm",
        "triton",
    }
    assert all(re.fullmatch(r"[\w.-]+(\[[\w,]+\])?(>=[\d.]+)?(;.*)?", line) for line in requirements), requirements


def test_the_wheel_holds_licence_and_command(wheel: zipfile.ZipFile) -> None:
    info = f"fastmerge-{_version()}.dist-info"
    assert "fastmerge = fastmerge.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_constraints_name_what_the_package_asks_for(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_bytes(wheel.read(f"fastmerge-{_version()}.dist-info/METADATA"))
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    constrained = {re.split(r"[=<]", line)[0] for line in lines if line}
    assert constrained <= {re.split(r"[\s>;\[]", line)[0] for line in metadata.get_all("Requires-Dist")}
    assert {"torch==2.11.0", "torchvision==0.26.0", "triton==3.6.0", "numpy<2.4"} <= set(lines)


def test_a_plain_checkout_can_be_imported(checkout: Path) -> None:
    # Without the site module, or this environment's own editable fastmerge would offer its extension.
    packages = sysconfig.get_path("purelib")
    files = run(sys.executable, "-S", "-c", COMPACTION, cwd=checkout, PYTHONPATH=packages).splitlines()
    assert files[:3] == [str(checkout / "fastmerge/__init__.py"), str(checkout / "kernels/__init__.py"), "1"]


def test_the_sdist_holds_what_a_build_needs(checkout: Path, tmp_path: Path) -> None:
    with tarfile.open(build(checkout, "sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "kernels/__init__.py", "fastmerge/_compaction.pyi"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
@pytest.mark.parametrize("compiler", [True, False])
def test_an_isolated_install_works_anywhere(checkout: Path, tmp_path: Path, editable: bool, compiler: bool) -> None:
    source = shutil.copytree(checkout, tmp_path / "checkout")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere).strip())
    # What fastmerge needs comes from this environment; as a line of sys.path it does not bring this fastmerge along.
    (site / "needs.pth").write_text(sysconfig.get_path("purelib"))

    install = [
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--ignore-installed",
        *(["--editable"] if editable else []),
        ".",
    ]
    run(*install, cwd=source, **({} if compiler else NO_COMPILER))

    installed = source if editable else site
    kernels = source / "kernels" if editable else site / "fastmerge" / "kernels"
    for directory in (elsewhere, source):
        inside = directory == source
        home = source if inside else installed
        found = run(python, "-c", COMPACTION, cwd=directory).splitlines()
        built_there = compiler and (editable or not inside)  # a checkout beside an installation has no extension
        assert found == [
            str(home / "fastmerge" / "__init__.py"),
            str((source / "kernels" if inside else kernels) / "__init__.py"),
            "0" if built_there else "1",
            _version(),
        ]
    assert "usage: fastmerge" in run(python.with_name("fastmerge"), "--help", cwd=elsewhere)


def _version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "fastmerge" / "__init__.py").read_text(), re.MULTILINE)[1]
