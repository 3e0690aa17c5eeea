"""What fastmerge finds on a machine (versions, hardware, which optional parts are there), and what it makes of a big student.

Every figure fastmerge writes down goes with one of these, so a question such as "which torch was that?" has an answer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastmerge.big_student import BigStudent

_PACKAGES = ("numpy", "triton", "torchvision", "safetensors", "scikit-learn", "matplotlib", "pillow")
_ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, Any]:
    """Describes the software and hardware of this process.

    It never raises: what can't be found out is None. Optional packages are looked up in the installation's metadata and
    not imported, so asking costs milliseconds.

    Returns:
        Plain JSON values. ``fastmerge``, ``python``, ``torch``, ``cuda``, ``cudnn``, ``dali`` and ``packages`` (a dict)
        are versions or None; ``commit`` is the git commit of a source checkout, with ``-dirty`` where tracked files
        differ from it, or None for an installed package; ``cpu`` holds ``name``, ``cores`` (usable by this process) and
        ``threads`` (torch's); ``gpus`` lists ``name``, ``memory_gib`` and ``capability`` of each, ``driver`` is their
        driver's version; ``extension`` says whether the compiled extensions are built, ``kernels`` whether the Triton
        kernels can run here.
    """
    gpus = _gpus()
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpus else ""
    packages = {name: _version(name) for name in _PACKAGES}
    return {
        "fastmerge": _version("fastmerge"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "packages": packages,
        "dali": _dali(),
        "cpu": {"name": _cpu_name(), "cores": cores(), "threads": torch.get_num_threads()},
        "gpus": gpus,
        "driver": driver.partition("\n")[0] or None,
        "extension": _found("fastmerge._compaction") and _found("fastmerge._batch_norm"),
        "kernels": bool(gpus) and packages["triton"] is not None and _found("fastmerge.kernels"),
    }


@dataclass(frozen=True, repr=False)
class Information:
    """Facts that print as text.

    Attributes:
        data: plain JSON values.
        text: the same for people.
    """

    data: dict[str, Any]
    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def info(big: BigStudent | None = None) -> Information:
    """Describes the machine, as ``fastmerge info`` prints it, or a big student.

    Args:
        big: a big student, of which each normalisation is listed, with what runs in one operation with it or why nothing does;
            None: the machine.
    """
    return _of_machine() if big is None else _of_big_student(big)


def _of_big_student(big: BigStudent) -> Information:
    norms = [{"name": use.name, "fused": list(use.fused), "reason": use.reason} for use in big.norms()]
    count = sum(bool(use.fused) for use in big.norms())
    data = {
        "teachers": big.num_teachers,
        "groups": len(big.groups),
        "linked": big.linked,
        "fused": big.fused,
        "normalisations": norms,
        "normalisations_fused": count,
    }
    when = {True: "always", False: "never", "auto": "on CUDA devices, in training on CPUs with the C++ extension"}[
        big.fused
    ]
    lines = [
        f"big student of {big.num_teachers} teachers, {len(big.groups)} channel groups, "
        f"{'linked' if big.linked else 'block-diagonal'}",
        f"{count} of {len(norms)} normalisations can run in one operation with what follows ({when}):",
    ]
    patterns = Counter(" + ".join(use.fused) for use in big.norms() if use.fused)
    lines += [f"  {number:>4}  BatchNorm + {pattern}" for pattern, number in patterns.items()]
    alone = [use for use in big.norms() if not use.fused]
    reasons: dict[str, list[str]] = {}
    for use in alone:
        reasons.setdefault(use.reason, []).append(use.name)
    lines += [f"{len(alone)} run alone:"] if alone else []
    lines += [f"  {len(names):>4}  {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    return Information(data, "\n".join(lines))


def _of_machine() -> Information:
    found = environment()
    cpu, gpus = found["cpu"], found["gpus"]
    rows = {"fastmerge": found["fastmerge"] or "not installed, run from its source"}
    if found["commit"]:
        rows["commit"] = found["commit"]
    rows |= {"python": found["python"], "platform": found["platform"], "torch": found["torch"]}
    rows |= {name: version or "not installed" for name, version in found["packages"].items()}
    rows["DALI"] = found["dali"] or "not installed"
    rows["CPU"] = f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads"
    for gpu in gpus:
        rows[f"GPU {gpus.index(gpu)}"] = f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}"
    if gpus:
        rows["driver"] = found["driver"] or "unknown"
        rows["CUDA, cuDNN"] = f"{found['cuda']}, {found['cudnn']}"
    else:
        rows["GPU"] = "none"
    rows["kernels"] = "Triton" if found["kernels"] else "plain PyTorch"
    rows["extension"] = (
        "compiled"
        if found["extension"]
        else "not built; compaction runs in Python, fused BatchNorm not at all on a CPU"
    )
    width = max(map(len, rows))
    return Information(found, "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dali() -> str | None:
    # DALI's distribution carries the CUDA version in its name: nvidia-dali-cuda120, nvidia-dali-cuda130, ...
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.lower().replace("_", "-").startswith("nvidia-dali-cuda"):
            return distribution.version
    return None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _cudnn() -> int | None:
    try:
        return torch.backends.cudnn.version()
    except RuntimeError:  # torch found a cuDNN other than the one it was compiled for
        return None


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    try:
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            memory_gib = round(properties.total_memory / 2**30, 1)
            gpus.append({"name": properties.name, "memory_gib": memory_gib, "capability": capability})
    except (RuntimeError, AssertionError):  # a driver too old for this torch, or a card that fell off the bus
        return gpus
    return gpus


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def _commit() -> str | None:
    # A package installed into a virtual environment inside somebody else's repository must not report their commit.
    if not (_ROOT / ".git").exists():
        return None
    commit = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit}-dirty" if _output("git", "-C", str(_ROOT), "status", "--porcelain", "-uno") else commit


def _output(command: str, *arguments: str) -> str:
    if shutil.which(command) is None:
        return ""
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
