"""How long a big student takes to build: CPU seconds of one core, each time in a fresh process, which has traced nothing yet.

Writes benchmarks/results/experiments/building.json: per network the samples in the order in which they were taken, the first
of all networks before the second of any.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

import fastmerge
from fastmerge.environment import environment
from fastmerge.files import atomic

# CPU seconds that they may take.
TARGETS = {"resnet18": 2.0, "timm/mobileone_s0": 8.0, "mobilenet_v2": None, "googlenet": None}
OUT = Path(__file__).resolve().parent / "results" / "experiments" / "building.json"


def _network(name: str) -> torch.nn.Module:
    if name.startswith("timm/"):
        import timm

        made: torch.nn.Module = timm.create_model(name.removeprefix("timm/"))
        return made
    from torchvision import models

    quick = {"init_weights": False} if name == "googlenet" else {}
    plain: torch.nn.Module = models.get_model(name, weights=None, **quick)
    return plain


def measure(name: str) -> float:
    """CPU seconds in which two networks become a big student that has checked itself; its input is inferred."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teachers = [_network(name) for _ in range(2)]
    start = time.process_time()
    fastmerge.BigStudent(*teachers)
    return time.process_time() - start


def sentence(measured: dict[str, Any]) -> str:
    """What docs/your-network.md says of the results."""
    networks, where = measured["networks"], measured["environment"]
    seconds = [f"{of['median']:.1f} s for {name.removeprefix('timm/')}" for name, of in networks.items()]
    count = len(next(iter(networks.values()))["cpu_seconds"])
    return (
        f"Building a big student of two networks, with its checks, takes {', '.join(seconds[:-1])} and {seconds[-1]}: "
        f"CPU time of one core ({where['cpu']['name']}, PyTorch {where['torch']}), the median of {count} fresh processes."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", metavar="NAME", default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE.json")
    options = parser.parse_args(arguments)
    needed = {"timm" if name.startswith("timm/") else "torchvision" for name in options.networks}
    for package in sorted(needed):
        if importlib.util.find_spec(package) is None:
            sys.exit(
                f"benchmarks.building needs {package}, which is not installed; pip install {package}, or see --networks"
            )
    samples: dict[str, list[float]] = {name: [] for name in options.networks}
    for _ in trange(options.rounds):
        for name, seconds in samples.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                seconds.append(fresh.submit(measure, name).result())
    networks: dict[str, Any] = {
        name: {"cpu_seconds": seconds, "median": sorted(seconds)[len(seconds) // 2], "target": TARGETS.get(name)}
        for name, seconds in samples.items()
    }
    with atomic(options.out) as temporary:
        temporary.write_text(json.dumps({"environment": environment(), "networks": networks}, indent=1) + "\n")
    for name, of in networks.items():
        print(f"{name}: {of['median']:.2f} s of CPU, at most {of['target'] or '-'}")


if __name__ == "__main__":
    main()
