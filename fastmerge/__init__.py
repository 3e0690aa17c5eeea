"""Merge trained neural networks of one architecture into one better network of the same size."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# In a source checkout the kernels lie beside the package, in kernels/; an installed copy holds them inside it.
_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).resolve().parent / "kernels").is_dir() and (_checkout / "csrc" / "compact.h").is_file():
    __path__.append(str(_checkout))

from fastmerge.batch_statistics import recalibrate
from fastmerge.big_student import BigStudent
from fastmerge.channels.grouping import channel_groups
from fastmerge.channels.groups import ChannelGroup, ChannelGroups, permute
from fastmerge.environment import Information, info
from fastmerge.gate_budget import GateBudget
from fastmerge.gates import HardConcrete
from fastmerge.history import History
from fastmerge.lock_step import activations
from fastmerge.mergeability import Report, check
from fastmerge.merging import merge
from fastmerge.schedules import QuadraticLambda

__all__ = [
    "BigStudent",
    "ChannelGroup",
    "ChannelGroups",
    "GateBudget",
    "HardConcrete",
    "History",
    "Information",
    "QuadraticLambda",
    "Report",
    "__version__",
    "activations",
    "channel_groups",
    "check",
    "info",
    "merge",
    "permute",
    "recalibrate",
]
