"""The file in which measured choices of convolutions outlive a process.

``$XDG_CACHE_HOME/fastmerge/convolutions.json``, or ``~/.cache`` where that isn't set. Choices are kept apart by the versions
of PyTorch, Triton, CUDA, the driver and the kernels themselves, so that an update of any of them measures anew. A file that
can't be read is ignored with a warning and replaced at the next measurement; one that can't be written costs no more than a
warning either.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FORMAT = 1


def cache_file() -> Path:
    """Where the choices are kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fastmerge" / "convolutions.json"


@functools.cache
def versions() -> str:
    """Everything, the card aside, that may change which implementation is fastest."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    driver = _driver() if torch.cuda.is_available() else "none"
    cudnn = torch.backends.cudnn.version()
    return (
        f"torch {torch.__version__}, triton {triton}, cuda {torch.version.cuda}, cudnn {cudnn}, driver {driver}, "
        f"kernels {digest.hexdigest()[:12]}"
    )


def _driver() -> str:
    """The version of CUDA that the driver is for, for which PyTorch has no function."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):  # as on Windows, or with a card that is not NVIDIA's
        return "unknown"
    return str(version.value)


def read_entries() -> dict[str, dict[str, Any]]:
    """The stored choices for these versions: ``{"winner": name, "milliseconds": {name: time}}`` by key."""
    return dict(_read_file().get(versions(), {}))


def write_entries(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds choices to the file, in one step: another process sees the file before or after, never in between.

    Two that write at once may lose each other's choices, which are then measured again.
    """
    file = cache_file()
    everything = _read_file()
    everything[versions()] = {**everything.get(versions(), {}), **entries}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                json.dump({"format": _FORMAT, "choices": everything}, stream, indent=1)
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        warnings.warn(f"the measured choices of convolutions can't be kept in {file}: {error}", stacklevel=2)


def _read_file() -> dict[str, Any]:
    file = cache_file()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} is ignored: {error}", stacklevel=2)
        return {}
    if not isinstance(content, dict) or content.get("format") != _FORMAT or not _well_formed(content.get("choices")):
        warnings.warn(f"{file} is ignored: it holds no choices of format {_FORMAT}", stacklevel=2)
        return {}
    return dict(content["choices"])


def _well_formed(choices: Any) -> bool:
    return isinstance(choices, dict) and all(
        isinstance(entries, dict)
        and all(
            isinstance(entry, dict)
            and entry.keys() == {"winner", "milliseconds"}
            and isinstance(entry["winner"], str)
            and isinstance(entry["milliseconds"], dict)
            for entry in entries.values()
        )
        for entries in choices.values()
    )
