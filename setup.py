"""The compiled extension and where the packages lie; everything else stands in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

kernels = ["fastmerge.kernels", *(f"fastmerge.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=find_packages(include=["fastmerge", "fastmerge.*"]) + kernels,
    package_dir={"fastmerge.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "fastmerge._compaction",
            ["csrc/bindings.cpp"],
            depends=["csrc/compact.h", "csrc/release.h"],
            cxx_std=17,  # given, or pybind11 asks the compiler and a missing one ends the install
            optional=True,  # without a compiler fastmerge.compaction runs in Python
        )
    ],
)
