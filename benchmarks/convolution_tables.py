"""Which implementation of a convolution in blocks is fastest, by shape and pass: as raced, and as whole steps chose it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.results import Contenders, ratio
from fastmerge.reporting.tables import table

SPLIT, GROUPS, TRITON = IMPLEMENTATIONS = ("split", "groups", "triton")
MASKED, DENSE = "masked", "dense"
_EXPLAINED = (
    "Two networks' convolutions, by pass and layer: *split* is cuDNN one network after another, *groups* cuDNN with two "
    "groups, *Triton* the fastest tile of our kernels. Milliseconds on the device, each time with a cold L2 cache; the "
    "least is the winner. *Triton / split* is the ratio of whole calls, taken in turn and waited for."
)
_SPARSE = (
    "Two networks' convolutions as one, twice as wide, with a half or a quarter of the weight's blocks live, or those of a "
    "block diagonal: *masked* is cuDNN with zeros in the others, *dense* cuDNN with all of them, which is more than asked for, "
    "*Triton* the fastest tile of our kernels. Milliseconds on the device, each time with a cold L2 cache; the least is the "
    "winner. Ratios are those of whole calls, taken in turn and waited for."
)
_CHOSEN = (
    "What the big students of these benchmarks ran, layer by layer: each shape and pass was timed at its first use, and the "
    "winner used from then on. Milliseconds on the device; of Triton's tiles the fastest whose result agreed with cuDNN's."
)


def fastest(contenders: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The contender with the least time on the device, or None where none was timed."""
    times = {name: contender["device_ms"] for name, contender in contenders.items() if contender.get("device_ms")}
    return min(times, key=times.__getitem__) if times else None


def raced_cases(run: Mapping[str, Any]) -> set[str]:
    """The cases of a run that its tables of convolutions hold."""
    return {benchmark["extra_info"]["case"] for what in ("convolution", "sparse") for benchmark in _raced(run, what)}


def convolutions(run: Mapping[str, Any]) -> list[str]:
    """Markdown: the tables of a run, without those that it has no figures for."""
    parts = []
    rows = [_raced_row(benchmark["extra_info"]) for benchmark in _raced(run, "convolution")]
    if rows:
        header = ["pass", "layer of each network", "split", "groups", "Triton", "winner", "tile", "Triton / split"]
        parts += [
            "### Block convolutions",
            _EXPLAINED,
            table(header, rows, markdown=True),
            *_problems(run, "convolution"),
        ]
    rows = [_sparse_row(benchmark["extra_info"]) for benchmark in _raced(run, "sparse")]
    if rows:
        header = ["pass", "layer of each network", "live", "masked", "dense", "Triton", "winner", "tile"]
        header += ["Triton / masked", "Triton / dense"]
        parts += [
            "### Block-sparse convolutions",
            _SPARSE,
            table(header, rows, markdown=True),
            *_problems(run, "sparse"),
        ]
    chosen = run["machine_info"].get("convolution_choices") or []
    if chosen:
        header = ["pass", "layer of each network", "split", "groups", "Triton", "winner"]
        rows = [_chosen_row(choice) for choice in chosen]
        parts += ["### Convolutions chosen", _CHOSEN, table(header, rows, markdown=True)]
    return parts


def _raced(run: Mapping[str, Any], what: str) -> Iterator[dict[str, Any]]:
    return (benchmark for benchmark in run["benchmarks"] if what in benchmark["extra_info"])


def _raced_row(info: Mapping[str, Any]) -> list[str]:
    what, contenders = info["convolution"], info["contenders"]
    return [
        what["pass"],
        f"{what['layer']} {what['dtype']}",
        *_compared(what, contenders, IMPLEMENTATIONS),
        _calls(contenders, SPLIT),
    ]


def _sparse_row(info: Mapping[str, Any]) -> list[str]:
    what, contenders = info["sparse"], info["contenders"]
    return [
        what["pass"],
        f"{what['layer']} {what['dtype']}",
        what["live"],
        *_compared(what, contenders, (MASKED, DENSE, TRITON)),
        _calls(contenders, MASKED),
        _calls(contenders, DENSE),
    ]


def _compared(what: Mapping[str, Any], contenders: Contenders, names: Sequence[str]) -> list[str]:
    """Each one's time, who won, and Triton's tile."""
    return [
        *(_milliseconds(contenders.get(name, {}).get("device_ms")) for name in names),
        what["winner"] or "–",
        contenders.get(TRITON, {}).get("tile", "–").removeprefix("triton "),
    ]


def _calls(contenders: Contenders, other: str) -> str:
    """Triton's whole calls over another's."""
    found = ratio(contenders, TRITON, other)
    return "–" if found is None else f"{found.value:.2f}"


def _problems(run: Mapping[str, Any], what: str) -> list[str]:
    """What of the raced convolutions failed or did not run, each reason once."""
    reasons: dict[str, list[str]] = {}
    for benchmark in _raced(run, what):
        info: Contenders = benchmark["extra_info"]["contenders"]
        for name, contender in info.items():
            for key, verb in (("error", "failed"), ("unavailable", "did not run")):
                if key in contender:
                    where = reasons.setdefault(f"*{name}* {verb}: {contender[key]}", [])
                    where.append(benchmark["extra_info"]["case"].partition(", ")[2])
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
