"""Which networks of torchvision and of other libraries merge, how exactly: writes docs/coverage.json and docs/coverage.md.

``--libraries`` measures those of timm, transformers and the others (tests/library_networks.py) that are installed, in place of
torchvision's. Each network is merged in a process of its own, as its library makes it: two teachers whose parameters and
buffers all differ and whose BatchNorm is calibrated on data. Errors are relative to the part of the output that depends on
the input:

* open: the big student with open gates against the mean of the teachers, before and after ``link()``;
* compress: the compressed network against the big student with random n of T·n gates at 1 and the others at 0, before and
  after ``link()``.

Networks that are done are kept, so that an interrupted run goes on where it was; ``--again`` starts anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastmerge
from fastmerge.environment import environment
from fastmerge.files import atomic
from fastmerge.reporting.tables import table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the teachers and the measure of error are those of the tests

import torchvision_networks as vision  # noqa: E402
from library_networks import NETWORKS  # noqa: E402
from teachers import exactness, make_batch, make_teachers, mean_output  # noqa: E402

BATCH = 4
COPIES = 11  # of a teacher's weights in memory at the most: two teachers, what tracing copies, block-diagonal and dense
# Fractions of the machine's memory that one network may take: beside others, and, with the swap, alone.
BESIDE, ALONE = 0.3, 0.8


def measure(name: str) -> dict[str, Any]:
    """Merges two teachers of one network.

    Returns:
        ``parameters``, ``groups``, ``dtype``, ``image_size``, ``open_error``, ``compress_error``, ``seconds`` (of
        building the big student); or ``parameters`` and ``reason``, why it can't be merged.
    """
    torch.manual_seed(0)
    parameters = _parameters(name)
    dtype = torch.float64 if COPIES * 8 * parameters < ALONE * (_memory() + _swap()) else torch.float32
    make, inputs = _network(name, dtype)
    result: dict[str, Any] = {"parameters": parameters, "dtype": str(dtype).removeprefix("torch.")}
    result |= {"inputs": [list(x.shape[1:]) for x in inputs], "library": _library(name)}
    teachers = make_teachers(make, inputs, 2, dtype)
    start = time.perf_counter()
    try:
        big = fastmerge.BigStudent(*teachers, example_inputs=inputs)
    except ValueError as error:
        return {"parameters": parameters, "reason": str(error)}
    result["seconds"] = time.perf_counter() - start
    result["groups"] = len(big.groups)
    result["without_choice"] = big.groups.choice.fixed_share
    with torch.no_grad():
        expected = mean_output(teachers, inputs)
        del teachers
        gc.collect()
        opened, compressed = exactness(big, inputs, expected)
    result["open_error"], result["compress_error"] = max(opened), max(compressed)
    result["commit"] = environment()["commit"]
    return result


def _network(name: str, dtype: torch.dtype) -> tuple[Callable[[], torch.nn.Module], tuple[torch.Tensor, ...]]:
    """How to make a network, and a batch of its inputs."""
    if name in NETWORKS:
        return NETWORKS[name].make, NETWORKS[name].inputs(BATCH, dtype)
    side = vision.size(name)
    make = lambda: vision.models.get_model(name, weights=None, **_quick(name))  # noqa: E731
    return make, (make_batch(BATCH, (3, side, side), dtype=dtype),)


def _library(name: str) -> str:
    """The library that has the network, and its version."""
    package = NETWORKS[name].package if name in NETWORKS else "torchvision"
    return f"{package} {version(package.replace('_', '-'))}"


def _quick(name: str) -> dict[str, Any]:
    return {"init_weights": False} if name.startswith(("googlenet", "inception", "vgg")) else {}


def _parameters(name: str) -> int:
    if name in NETWORKS:
        return sum(parameter.numel() for parameter in NETWORKS[name].make().parameters())
    return int(next(iter(vision.models.get_model_weights(name))).meta["num_params"])


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _swap() -> int:
    found = re.search(r"^SwapTotal: *(\d+) kB$", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _in_child(name: str, connection: Any) -> None:
    torch.set_num_threads(1)
    connection.send(measure(name))


def in_process(name: str) -> dict[str, Any]:
    """As :func:`measure`, in a process of its own, so that its memory is free afterwards."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(name, sender))
    child.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        child.join()
        result = {"reason": f"the process ended with exit code {child.exitcode} (-9: out of memory)"}
    child.join()
    return result


def markdown(report: dict[str, Any]) -> str:
    """docs/coverage.md from docs/coverage.json."""
    networks = report["networks"]
    merged = {name: network for name, network in networks.items() if "open_error" in network}
    refused = [[name, network["reason"]] for name, network in networks.items() if name not in merged]
    vision_names = set(vision.names())
    made = report["environment"]
    commits = Counter((network["commit"] or "no commit")[:10] for network in merged.values())
    libraries = sorted({network["library"] for network in merged.values() if "library" in network})
    return "\n\n".join(
        [
            "# Coverage",
            "Every network was made as its library makes it, and two teachers of it were merged. Written by `make coverage` "
            "(torchvision's classifiers) and `make coverage-zoo` (other libraries').",
            "* *groups*: the number of channel groups; channels of a group compete for the same places in the student.\n"
            "* *no choice*: the share of channels that can't be chosen one by one; they are kept from one teacher, all "
            "together.\n"
            "* *open*: the difference of the big student with open gates from the mean of the teachers, before `link()` or "
            "after it, whichever is larger.\n"
            "* *compress*: the difference of the compressed network from the big student with the kept gates at 1 and the "
            "others at 0, before `link()` or after it and a change of all weights, whichever is larger.\n"
            "* *seconds*: the time to build the big student on one core of a busy machine.",
            "Differences are relative to how much the outputs vary within a batch.",
            *_section("torchvision", {n: m for n, m in networks.items() if n in vision_names}, vision_names),
            *_section("Other libraries", {n: m for n, m in networks.items() if n not in vision_names}, set(NETWORKS)),
            *(["## Not merged", table(["network", "reason"], refused, markdown=True)] if refused else []),
            f"fastmerge {made['fastmerge']}, PyTorch {made['torch']}, {', '.join(libraries)}; "
            f"{made['cpu']['name']}, {made['cpu']['cores']} cores. Networks by commit: "
            f"{', '.join(f'{count} at {commit}' for commit, count in commits.items())}.\n",
        ]
    )


def _section(title: str, networks: dict[str, Any], expected: set[str]) -> list[str]:
    """A heading, a table and a count."""
    header = ["network", "groups", "no choice", "parameters", "open", "compress", "precision", "inputs", "seconds"]
    rows = [
        [
            name,
            str(network["groups"]),
            f"{network['without_choice']:.0%}" if "without_choice" in network else "",
            f"{network['parameters'] / 1e6:.1f} M",
            f"{network['open_error']:.0e}",
            f"{network['compress_error']:.0e}",
            network["dtype"],
            ", ".join("×".join(map(str, shape)) for shape in network["inputs"]),
            f"{network['seconds']:.1f}",
        ]
        for name, network in networks.items()
        if "open_error" in network
    ]
    waiting = sorted(expected - set(networks))
    count = f"{len(rows)} of the {len(networks)} networks that were measured merge."
    missing = [f" Not measured yet: {', '.join(waiting)}."] if waiting else []
    return [f"## {title}", table(header, rows, markdown=True), "".join([count, *missing])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is missing and writes both files after every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="default all of torchvision's")
    parser.add_argument("--libraries", action="store_true", help="all of the other libraries' that are installed")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md", metavar="FILE.md")
    parser.add_argument("--again", action="store_true", help="measure networks anew that are done")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="at a time, one thread each")
    options = parser.parse_args(arguments)
    chosen = options.networks or ([] if options.libraries else vision.names())
    if options.libraries:
        chosen += [name for name, network in NETWORKS.items() if find_spec(network.package)]
    path = options.out.with_suffix(".json")
    done = json.loads(path.read_text(encoding="utf-8"))["networks"] if path.exists() and not options.again else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = [name for name in chosen if "open_error" not in done.get(name, {})]
    large = [name for name in missing if COPIES * 8 * _parameters(name) > BESIDE * _memory()]
    for names, jobs in (([n for n in missing if n not in large], options.jobs), (large, 1)):
        with ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(in_process, name): name for name in names}
            for future in tqdm(as_completed(running), total=len(running), unit="network"):
                done[running[future]] = future.result()
                _write(options.out, done)
    _write(options.out, done)


def _write(out: Path, done: dict[str, Any]) -> None:
    report = {"environment": environment(), "networks": {name: done[name] for name in sorted(done)}}
    for file, text in ((out.with_suffix(".json"), json.dumps(report, indent=1) + "\n"), (out, markdown(report))):
        with atomic(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
