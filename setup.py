"""The compiled extensions and where the packages lie; everything else stands in pyproject.toml."""

import sys

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

kernels = ["fastmerge.kernels", *(f"fastmerge.kernels.{name}" for name in find_packages("kernels"))]
# torch's own threads, where its OpenMP is the compiler's
openmp = ["-fopenmp"] if sys.platform == "linux" else []


def extension(name: str, source: str, headers: list[str], flags: list[str]) -> Pybind11Extension:
    return Pybind11Extension(
        name,
        [source],
        depends=headers,
        cxx_std=17,  # given, or pybind11 asks the compiler and a missing one ends the install
        extra_compile_args=flags,
        extra_link_args=flags,
        optional=True,  # without a compiler PyTorch does the same, slower
    )


setup(
    options={"build_ext": {"parallel": 2}},
    packages=find_packages(include=["fastmerge", "fastmerge.*"]) + kernels,
    package_dir={"fastmerge.kernels": "kernels"},
    ext_modules=[
        extension("fastmerge._compaction", "csrc/compaction_bindings.cpp", ["csrc/compact.h", "csrc/release.h"], []),
        extension("fastmerge._batch_norm", "csrc/batch_norm_bindings.cpp", ["csrc/batch_norm.h"], ["-O3", *openmp]),
    ],
)
