"""Whole training steps of the big student against everything one could do instead.

Forward, loss with gate loss, backward, SGD with momentum on weights and gates. Cases are named after the network, the image,
the batch, the precision and the device; those of a GPU skip where there is none.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import names
from benchmarks.cases import CASES, Case, parameters
from benchmarks.contenders import makers
from benchmarks.effort import Effort
from benchmarks.race import race
from benchmarks.roofline import measure_ceilings


@pytest.mark.parametrize("case", parameters(CASES))
def bench_step(benchmark: BenchmarkFixture, case: Case, effort: Effort) -> None:
    benchmark.group = f"step, {case.name}"
    benchmark.extra_info["case"] = f"step, {case.name}"
    measure_ceilings(case)  # before, and again after: the best counts
    everybody = makers(case)
    chosen = effort.chosen(everybody)
    rounds, warmup = effort.rounds(case.device), effort.warmup(case.device)
    try:
        race(benchmark, chosen, rounds, warmup, effort.seconds, effort.patience, names.UNLINKED)
    finally:
        contenders = benchmark.extra_info.setdefault("contenders", {})
        contenders |= {name: {"unavailable": "not asked for"} for name in everybody if name not in chosen}
        ceilings = measure_ceilings(case)
        benchmark.extra_info["ceilings"] = {"flops": ceilings.flops, "bandwidth": ceilings.bandwidth}
