"""Show what fastmerge finds here: versions, GPU, kernels, extension, DALI."""

from __future__ import annotations

import argparse
import json

from fastmerge.environment import environment

SUMMARY = "versions, GPU, kernels, extension, DALI: what is there and what is not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastmerge info``."""
    parser.add_argument("--json", action="store_true", help="print JSON, as results.json holds it")


def command(options: argparse.Namespace) -> None:
    """Prints the environment."""
    found = environment()
    if options.json:
        print(json.dumps(found, indent=1))
        return
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
    rows["extension"] = "compiled" if found["extension"] else "not built; compaction runs in Python"
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
