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
    ceilings = measure_ceilings(case)  # and again beside every floor: the best counts
    benchmark.extra_info["ceilings"] = {"flops": ceilings.flops, "bandwidth": ceilings.bandwidth}
    race(benchmark, makers(case), effort, case.device, principal=names.UNLINKED)
