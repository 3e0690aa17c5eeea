"""Which implementation of a convolution in blocks is fastest, by shape and pass: as whole steps chose, and if block-sparse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.results import Contenders, ratio
from fastmerge.reporting.tables import table

SPLIT, GROUPS, TRITON = "split", "groups", "triton"
MASKED, DENSE = "masked", "dense"
_SPARSE = (
    "Two networks' convolutions as one, twice as wide, with a half or a quarter of the weight's blocks live, or those of a "
    "block diagonal: *masked* is cuDNN with zeros in the others, *dense* cuDNN with all of them, which is more than asked for, "
    "*Triton* the fastest tile of our kernels. Milliseconds on the device, each time with a cold L2 cache; the least is the "
    "winner. Ratios are those of whole calls, taken in turn and waited for."
)
_CHOSEN = (
    "What the big students of these benchmarks ran, layer by layer: each shape and pass was timed at its first use, and the "
    "winner used from then on. *split* is cuDNN one network after another, *groups* cuDNN with T groups, *Triton* the fastest "
    "of our kernels' tiles whose result agreed with cuDNN's. Milliseconds on the device."
)


def fastest(contenders: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The contender with the least time on the device, or None where none was timed."""
    times = {name: contender["device_ms"] for name, contender in contenders.items() if contender.get("device_ms")}
    return min(times, key=times.__getitem__) if times else None


def raced_cases(run: Mapping[str, Any]) -> set[str]:
    """The cases of a run that its table of block-sparse convolutions holds."""
    return {info["case"] for info in _sparse(run)}


def convolutions(run: Mapping[str, Any]) -> list[str]:
    """Markdown: the tables of a run, without those that it has no figures for."""
    parts = []
    rows = [_sparse_row(info) for info in _sparse(run)]
    if rows:
        header = ["pass", "layer of each network", "live", "masked", "dense", "Triton", "winner", "tile"]
        header += ["Triton / masked", "Triton / dense"]
        parts += ["### Block-sparse convolutions", _SPARSE, table(header, rows, markdown=True), *_problems(run)]
    chosen = run["machine_info"].get("convolution_choices") or []
    if chosen:
        header = ["pass", "layer of each network", "split", "groups", "Triton", "winner"]
        rows = [_chosen_row(choice) for choice in chosen]
        parts += ["### Convolutions chosen", _CHOSEN, table(header, rows, markdown=True)]
    return parts


def _sparse(run: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    return (benchmark["extra_info"] for benchmark in run["benchmarks"] if "sparse" in benchmark["extra_info"])


def _sparse_row(info: Mapping[str, Any]) -> list[str]:
    what, contenders = info["sparse"], info["contenders"]
    return [
        what["pass"],
        f"{what['layer']} {what['dtype']}",
        what["live"],
        *(_milliseconds(contenders.get(name, {}).get("device_ms")) for name in (MASKED, DENSE, TRITON)),
        what.get("winner") or "–",
        contenders.get(TRITON, {}).get("tile", "–").removeprefix("triton "),
        _calls(contenders, MASKED),
        _calls(contenders, DENSE),
    ]


def _calls(contenders: Contenders, other: str) -> str:
    """Triton's whole calls over another's."""
    found = ratio(contenders, TRITON, other)
    return "–" if found is None else f"{found.value:.2f}"


def _problems(run: Mapping[str, Any]) -> list[str]:
    """What of the raced convolutions failed or did not run, each reason once."""
    reasons: dict[str, list[str]] = {}
    for info in _sparse(run):
        for name, contender in info["contenders"].items():
            for key, verb in (("error", "failed"), ("unavailable", "did not run")):
                if key in contender:
                    where = reasons.setdefault(f"*{name}* {verb}: {contender[key]}", [])
                    where.append(info["case"].partition(", ")[2])
    return [f"{reason}, in {'; '.join(cases)}." for reason, cases in reasons.items()]


def _chosen_row(choice: Mapping[str, Any]) -> list[str]:
    """Of a ``choice_table``'s entry; its key is "card | pass dtype | streams | shapes"."""
    _, step, streams, shapes = choice["key"].split(" | ")
    name, _, dtype = step.rpartition(" ")
    times = choice["milliseconds"]
    triton = [time for tile, time in times.items() if tile.startswith(TRITON)]
    return [
        name,
        f"{streams} of {shapes}, {dtype}",
        _milliseconds(times.get(SPLIT)),
        _milliseconds(times.get(GROUPS)),
        _milliseconds(min(triton, default=None)),
        choice["winner"],
    ]


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
