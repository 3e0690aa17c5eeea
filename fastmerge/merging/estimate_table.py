"""An estimate as a table, for one process or for several."""

from __future__ import annotations

from fastmerge.merging.estimate import Estimate
from fastmerge.merging.progress import peak_memory


def describe(found: Estimate, processes: int = 1, bandwidth: float = 1e10, accumulate: int = 1) -> str:
    """The parts as a table, with the time of all and the most memory that timing them took.

    Args:
        found: Timed with the share that one of the processes reads.
        processes: How many will train together.
        bandwidth: Bytes per second that each of them sends.
        accumulate: Batches per step.
    """
    parts = found.parts
    rows = [("part", "epochs", "batches", "s per batch", "in all")]
    rows += [
        (part.name, str(part.epochs), _or_unknown(part.steps), f"{part.seconds:.3g}", _duration(part.total))
        for part in parts
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.append(f"reading alone takes {found.reading:.3g} s per training batch")
    lines.append(f"checkpoints take up to {found.kept / 2**30:.2f} GiB on the disk")
    totals = [part.total for part in parts]
    known = [total for total in totals if total is not None]
    whole = _duration(sum(known)) if len(known) == len(totals) else "unknown, since a loader has no length"
    if processes > 1:
        messages = sum(part.messages(processes, bandwidth, accumulate) for part in parts)
        largest = max(part.gradients for part in parts)
        whole += (
            f" with {processes} processes, and up to {_duration(messages)} more where gradients (up to "
            f"{largest / 2**20:.0f} MiB a step, at {bandwidth / 1e9:g} GB/s) are not sent during the backward pass"
        )
    return "\n".join([*lines, f"about {whole}; peak memory {peak_memory() / 2**30:.2f} GiB"])


def _or_unknown(value: int | None) -> str:
    return "?" if value is None else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
