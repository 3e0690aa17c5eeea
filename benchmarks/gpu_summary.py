"""What a session on a GPU came to, in fewer characters than a terminal's last pages: what is most wanted stands last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import names
from benchmarks.gpu_parts import RESNET18, RESNET20
from benchmarks.results import Contenders, Ratio, cases, chosen, quartiles, ratio
from benchmarks.targets import TARGETS, Target

MOST = 11_000  # characters
_LINE = 170  # of a failure
_KERNELS = 8  # of a profile
_SMALL = f"step, {RESNET20.replace('-', ' ')}"
# Ratios without a target that say what those with one are worth.
_QUOTED = (
    ("graph / two teachers", _SMALL, names.GRAPHED, names.TEACHERS),
    ("graph / two teachers as graphs", _SMALL, names.GRAPHED, names.TEACHERS_GRAPHED),
    ("linked graph / two teachers as graphs", _SMALL, names.LINKED_GRAPHED, names.TEACHERS_GRAPHED),
)


def summary(data: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    """The text.

    Args:
        data: what summary.json holds.
        report: what benchmarks.json holds, if anything was measured.
    """
    measured = {} if report is None else cases(report)
    convolutions = {} if report is None else chosen(report)
    parts = data["parts"]
    rest = [*_parts(parts), *_profiles(measured), *_contenders(measured), *_stages(measured)]
    rest += [*_bandwidths(measured), *_device(parts), *filter(None, _ratios(measured, convolutions))]
    failed = list(dict.fromkeys(_failures(parts)))
    room = MOST - sum(len(line) + 1 for line in rest) - 100
    shown: list[str] = []
    while len(shown) < len(failed) and room > len(failed[len(shown)]):
        shown.append(failed[len(shown)])
        room -= len(shown[-1]) + 1
    if len(shown) < len(failed):
        shown.append(f"... and {len(failed) - len(shown)} more in summary.json")
    return "\n".join([*shown, *rest])[-MOST:]


def _failures(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What died, then what failed, each once."""
    for wanted in ("died", "failed"):
        for part in parts:
            for event in part["events"]:
                if event["kind"] == "end" and event["outcome"] == wanted:
                    where = event["name"].removeprefix("tests/").removeprefix("parts/")
                    yield f"{wanted.upper()} {where}: {event['says']}"[:_LINE]


def _parts(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    ended = [event["outcome"] for part in parts for event in part["events"] if event["kind"] == "end"]
    counts = ", ".join(f"{ended.count(outcome)} {outcome}" for outcome in sorted(set(ended)))
    yield f"-- {len(parts)} parts; checks: {counts or 'none'}"
    for part in parts:
        yield f"{part['name']:<26}{part['state']:<13}{part['seconds']:6.0f} s  {part['says'][:80]}"


def _profiles(measured: Mapping[str, Contenders]) -> Iterator[str]:
    case = f"step, {RESNET18.replace('-', ' ')}"
    for name in (names.TEACHERS, names.UNLINKED):
        for kernel, ms, count in measured.get(case, {}).get(name, {}).get("profile", {}).get("top", [])[:_KERNELS]:
            yield f"{name:<10}{ms:9.3f} ms {count:5d} x {kernel[:75]}"


def _contenders(measured: Mapping[str, Contenders]) -> Iterator[str]:
    """Whole steps: the device's time beside the CPU's."""
    for case, contenders in measured.items():
        if not case.startswith(("step, ", "rehearsal")):
            continue
        yield f"-- {case}: ms a step, until queued, of the CPU, the device is busy; kernels, launches; peak MiB"
        for name, contender in contenders.items():
            if not contender.get("samples"):
                why = contender.get("error") or contender.get("unavailable") or "it ended the process"
                yield f"{name:<24}{why}"[:120]
                continue
            profile, peak = contender.get("profile", {}), contender.get("peak_bytes")
            seconds = [quartiles(contender["samples"])[1], contender.get("queue_seconds"), contender.get("cpu_seconds")]
            times = "".join(
                "        -" if s is None else f"{1e3 * s:9.2f}" for s in [*seconds, profile.get("busy_seconds")]
            )
            counts = [profile.get("kernels"), profile.get("launches"), None if peak is None else peak >> 20]
            note = f"  ({contender['convolutions']})" if "convolutions" in contender else ""
            yield f"{name:<24}{times}{''.join('       -' if c is None else f'{c:8d}' for c in counts)}{note}"


def _stages(measured: Mapping[str, Contenders]) -> Iterator[str]:
    for case, contenders in measured.items():
        for name, contender in contenders.items():
            if contender.get("step_seconds"):
                steps = " ".join(f"{1e3 * seconds:.2f}" for seconds in contender["step_seconds"])
                fixed = quartiles(contender["fixed_seconds"])[1]
                yield f"{case}, {name}: ms a step by epoch {steps}; {fixed:.1f} s outside"


def _bandwidths(measured: Mapping[str, Contenders]) -> Iterator[str]:
    for case, contenders in measured.items():
        rates = [
            f"{name} {contender['bytes'] / quartiles(contender['samples'])[1] / 1e12:.2f}"
            for name, contender in contenders.items()
            if contender.get("samples") and contender.get("bytes")
        ]
        if rates and case.startswith("BatchNorm"):
            yield f"{case}, TB/s: {', '.join(rates)}"


def _device(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for event in (event for part in parts for event in part["events"] if event["kind"] == "device"):
        rates = f"{event['flops'] / 1e12:.3g} TFLOP/s, {event['bandwidth'] / 1e12:.3g} TB/s copied"
        yield f"-- {rates}, {event['launch_us']:.1f} us a launch; {event['card'] or 'no card'}"
        yield f"   torch {event['torch']}, cuDNN {event['cudnn']}, Python {event['python']}, {event['cpu']['cores']} cores"


def _ratios(measured: Mapping[str, Contenders], convolutions: Mapping[str, Contenders]) -> Iterator[str]:
    for target in TARGETS:
        for case in target.matching(measured):
            yield _ratio(target.name, measured[case], target.numerator, target.denominator, target)
        found = [ratio(convolutions[c], target.numerator, target.denominator) for c in target.matching(convolutions)]
        values = [each.value for each in found if each is not None]
        if values:
            met = f"met in {sum(map(target.is_met, values))} of {len(values)} layers"
            yield f"{target.name:<58}{quartiles(values)[1]:7.3f} ({min(values):.2f} to {max(values):.2f}) {met}"
    for name, case, above, below in _QUOTED:
        yield _ratio(name, measured.get(case, {}), above, below)


def _ratio(name: str, contenders: Contenders, above: str, below: str, target: Target | None = None) -> str:
    found: Ratio | None = ratio(contenders, above, below, *([] if target is None else [target.measure]))
    if found is None:
        return ""
    spread = f"{found.low:.2f} to {found.high:.2f}, n {found.n}" if found.n > 1 else "of medians"
    text = f"{name:<58}{found.value:7.3f} ({spread})"
    if target is None:
        return text
    met = "met" if target.is_met(found.value) else "MISSED"
    return f"{text} {'>=' if target.at_least else '<='} {target.target:.2f} {met}"
