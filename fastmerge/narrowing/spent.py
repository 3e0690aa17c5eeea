"""What is left of a network whose tensors became another's."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

_WHY = (
    "this big student was compressed in place: its tensors are the student's now, and nothing is left to use. "
    "Use the student that compress() returned, or compress(in_place=False) to keep both"
)


class SpentBigStudent(nn.Module):
    """A big student after ``compress(in_place=True)``: any use raises a RuntimeError that says so."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        raise RuntimeError(_WHY)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise RuntimeError(_WHY)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RuntimeError(_WHY)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(_WHY)

    def __repr__(self) -> str:
        return "SpentBigStudent(compressed in place)"


def spend(network: nn.Module) -> None:
    """Lets go of everything a network holds and leaves a :class:`SpentBigStudent` in its place."""
    network.__dict__.clear()
    network.__dict__["_compiled_call_impl"] = None
    network.__class__ = SpentBigStudent
