"""What docs/benchmarks.md and the README show of the committed JSON of runs.

Targets stand beside results, whatever the results are. A ratio is the median over pairs of samples, taken in turn in one
process.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from benchmarks import names
from benchmarks.convolution_tables import convolutions, raced_cases
from benchmarks.results import CPU_TIME, Contenders, Gap, Ratio, cases, chosen, quartiles, ratio, read
from benchmarks.stage_tables import judged, stage_tables
from benchmarks.targets import TARGETS, Target
from fastmerge.reporting.tables import table

RESULTS = Path(__file__).resolve().parent / "results"
NO_GPU = "No GPU has been measured yet: none was available. `make gpu OUT=folder` on a machine with one does so."
_TARGET_HEADER = ["ratio", "case", "target", "stretch", "result", "quartiles", "n", "verdict"]
_COUNTED = (
    "One training step, counted on a machine without a GPU. *Launches* are the kernels that PyTorch and Triton would launch, "
    "*GB* the bytes that they read and write at full size. *CPU* is the process time of a step with tiny tensors and without "
    "launches, measured in turn with the teachers'. *Before* is the same at an earlier commit."
)


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The committed runs, by file name, each with what NAME.txt beside NAME.json says of it, if anything, as its ``note``,
    and the run of an earlier commit in before/NAME.json as its ``before``."""
    runs = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    for path in folder.glob("before/*.json"):
        runs[path.stem]["before"] = read(path)
    for name, run in runs.items():
        note = folder / f"{name}.txt"
        run["note"] = note.read_text(encoding="utf-8").strip() if note.exists() else ""
    return runs


def blocks(runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What docs/benchmarks.md shows of the runs."""
    targets, parts = _targets(runs), []
    if not any(_has_gpu(run) for run in runs.values()):
        targets.insert(0, NO_GPU)
    for name, run in runs.items():
        parts += [f"## {name}", machine(run)]
        together = raced_cases(run)
        for case, contenders in cases(run).items():
            if case not in together:
                parts += [f"### {case}", *_tables(case, contenders, run.get("before")), *_problems(contenders)]
        parts += convolutions(run)
    return {"targets": "\n\n".join(targets), "runs": "\n\n".join(parts)}


def readme(runs: dict[str, dict[str, Any]]) -> str:
    """The README's block: the targets that were measured, and on what."""
    rows: list[list[str]] = []
    machines: list[str] = []
    for run in runs.values():
        found = [_target_row(target, ratios) for target, ratios in _target_rows(run) if ratios is not None]
        if found:
            letter = ascii_lowercase[len(machines)]
            rows += [[*row, letter] for row in found]
            machines.append(f"* {letter}: {machine(run)}")
    blocks = [table([*_TARGET_HEADER, "on"], rows, markdown=True), "\n".join(machines)] if rows else []
    if not any(_has_gpu(run) for run in runs.values()):
        blocks.insert(0, NO_GPU)
    return "\n\n".join(blocks)


def machine(run: dict[str, Any]) -> str:
    """What a run ran on, in a sentence."""
    made = run["machine_info"]["fastmerge"]
    cards = ", ".join(f"{gpu['name']} ({gpu['memory_gib']:g} GiB)" for gpu in made["gpus"])
    card = f"{cards}, driver {made['driver']}, cuDNN {made['cudnn']}, " if cards else ""
    cpu = f"{made['cpu']['name']}, {made['cpu']['threads']} of {made['cpu']['cores']} cores"
    versions = f"Python {made['python']}, PyTorch {made['torch']}, Triton {made['packages']['triton']}"
    commit = (made["commit"] or "no commit")[:10] + ("-dirty" if str(made["commit"]).endswith("-dirty") else "")
    sentence = f"{card}{cpu}, {versions}, commit {commit}, {run['datetime'][:10]}."
    return " ".join(filter(None, [sentence, _load(run), run.get("note")]))


def _load(run: dict[str, Any]) -> str:
    """How busy the machine was at the end of the run; of two cores' own work it would be 2."""
    load = run["machine_info"].get("load_average")
    return "" if load is None else f"Load average {load:.1f}."


def verdict(target: Target, value: float, gap: Gap | None = None) -> str:
    """How a ratio stands to its target.

    Args:
        target: the target.
        value: the ratio.
        gap: of the accuracies, where the target asks for the same; it is missed without one, too.
    """
    said = f"; {judged(gap)}" if target.same_accuracy else ""
    if not target.is_met(value) or (target.same_accuracy and (gap is None or gap.is_worse)):
        return f"**missed**{said}"
    met = "met, stretch too" if target.stretch is not None and target.is_met(value, target.stretch) else "met"
    return met + said


def _targets(runs: dict[str, dict[str, Any]]) -> list[str]:
    tables = []
    measured: set[Target] = set()
    for name, run in runs.items():
        rows = [row for row in _target_rows(run) if row[1] is not None]
        if rows:
            tables += [f"On {name}:", _target_table(rows)]
            measured |= {target for target, _ in rows}
    missing: list[tuple[Target, list[Ratio] | None]] = [(target, None) for target in TARGETS if target not in measured]
    if missing:
        tables += ["Not measured yet:", _target_table(missing)]
    return tables


def _target_rows(run: dict[str, Any]) -> list[tuple[Target, list[Ratio] | None]]:
    """Every target with its ratios, one for each case that it is read in, or None where there is none."""
    found = cases(run) | chosen(run)
    rows: list[tuple[Target, list[Ratio] | None]] = []
    for target in TARGETS:
        ratios = [ratio(found[c], target.numerator, target.denominator, target.measure) for c in target.matching(found)]
        rows.append((target, [r for r in ratios if r is not None] or None))
    return rows


def _target_table(rows: Sequence[tuple[Target, list[Ratio] | None]]) -> str:
    return table(_TARGET_HEADER, [_target_row(target, found) for target, found in rows], markdown=True)


def _target_row(target: Target, found: list[Ratio] | None) -> list[str]:
    sign = "≥" if target.at_least else "≤"
    bounds = [f"{sign} {target.target:.2f}", "–" if target.stretch is None else f"{sign} {target.stretch:.2f}"]
    name = [target.name, target.case]
    if found is None:
        return [*name, *bounds, "–", "–", "0", "not measured"]
    values = [r.value for r in found]
    if len(found) == 1:
        (one,) = found
        spread = f"{one.low:.2f} to {one.high:.2f}" if one.n > 1 else "–"
        return [*name, *bounds, f"{one.value:.2f}", spread, str(one.n), verdict(target, one.value, one.gap)]
    low, middle, high = quartiles(values)
    met = sum(map(target.is_met, values))
    return [
        *name,
        *bounds,
        f"{middle:.2f}",
        f"{low:.2f} to {high:.2f}",
        str(len(values)),
        f"met in {met} of {len(values)} cases",
    ]


def _tables(case: str, contenders: Contenders, before: dict[str, Any] | None) -> list[str]:
    if any("launches" in contender for contender in contenders.values()):
        return _launch_table(contenders, cases(before).get(case, {}) if before else {})
    return [_case_table(contenders), *stage_tables(contenders)]


def _case_table(contenders: Contenders) -> str:
    profiled = any("profile" in contender for contender in contenders.values())
    header = ["contender", "ms", "quartiles", "n", "items/s", "GFLOP/s", "GB/s", "activations", "peak", "of the first"]
    header += ["queued", "busy", "kernels"] if profiled else []
    reference = next((name for name, contender in contenders.items() if contender.get("samples")), None)
    rows = []
    for name, contender in contenders.items():
        if not contender.get("samples"):
            continue
        low, middle, high = quartiles(contender["samples"])
        share = None if reference is None else ratio(contenders, name, reference)
        rows.append(
            [
                name,
                f"{1e3 * middle:.4g}",
                f"{1e3 * low:.4g} to {1e3 * high:.4g}",
                str(len(contender["samples"])),
                _rate(contender.get("items"), middle, 1),
                _rate(contender.get("flops"), middle, 1e9),
                _rate(contender.get("bytes"), middle, 1e9),
                _size(contender.get("activation_bytes")),
                _size(contender.get("peak_bytes")),
                "–" if share is None else f"{share.value:.2f}",
                *(_device_cells(contender) if profiled else []),
            ]
        )
    return table(header, rows, markdown=True)


def _device_cells(contender: dict[str, Any]) -> list[str]:
    """Milliseconds until a step's last launch, those that the device is busy, and how many kernels run."""
    profile = contender.get("profile")
    busy = ["–", "–"] if profile is None else [f"{1e3 * profile['busy_seconds']:.4g}", str(profile["kernels"])]
    queued = contender.get("queue_seconds")
    return ["–" if queued is None else f"{1e3 * queued:.4g}", *busy]


def _launch_table(contenders: Contenders, before: Contenders) -> list[str]:
    """Markdown.

    Args:
        contenders: with ``launches``, ``moved_bytes`` and ``cpu_samples``.
        before: likewise, of an earlier commit; may be empty.
    """
    header = ["contender", "launches", "before", "GB", "before", "CPU, ms", "of the teachers'", "before"]
    rows = []
    for name, contender in contenders.items():
        old = before.get(name, {})
        rows.append(
            [
                name,
                str(contender["launches"]),
                str(old.get("launches", "–")),
                f"{contender['moved_bytes'] / 1e9:.3g}",
                f"{old['moved_bytes'] / 1e9:.3g}" if old else "–",
                f"{1e3 * statistics.median(contender['cpu_samples']):.3g}",
                _beside_teachers(contenders, name),
                _beside_teachers(before, name),
            ]
        )
    return [_COUNTED, table(header, rows, markdown=True)]


def _beside_teachers(contenders: Contenders, name: str) -> str:
    found = ratio(contenders, name, names.TEACHERS, CPU_TIME)
    return "–" if found is None else f"{found.value:.2f}"


def _problems(contenders: Contenders) -> list[str]:
    """What did not run or went wrong, and why."""
    failed = [f"*{name}* failed: {c['error']}." for name, c in contenders.items() if "error" in c]
    return failed + [
        f"*{name}* did not run: {c['unavailable']}." for name, c in contenders.items() if "unavailable" in c
    ]


def _rate(amount: float | None, seconds: float, unit: float) -> str:
    return "–" if not amount else f"{amount / seconds / unit:.4g}"


def _size(count: float | None) -> str:
    return "–" if not count else f"{count / 2**20:.4g} MiB"


def _has_gpu(run: dict[str, Any]) -> bool:
    return bool(run["machine_info"]["fastmerge"]["gpus"])
