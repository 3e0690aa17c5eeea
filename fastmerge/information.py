"""What fastmerge finds on a machine, and what it makes of a big student, to print or to read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from fastmerge.big_student import BigStudent
from fastmerge.environment import environment


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
