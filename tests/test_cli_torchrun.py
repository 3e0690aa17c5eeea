"""``torchrun`` runs ``fastmerge merge`` and recipes over loaders unchanged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastmerge.checkpoints import save_weights
from fastmerge.cli import main
from test_cli_merge import arguments, make, place  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*P.g>0. is:UserWarning", "ignore:.*P.g>0. did not move:UserWarning"),
]


def torchrun(*words: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fastmerge",
    ]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.getcwd()])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)


def test_merge_by_two_processes(place):  # noqa: F811
    arrays = dict(np.load("data.npz"))
    arrays |= {name: arrays[name][:48] for name in ("train_images", "train_labels")}  # whole batches
    np.savez("data.npz", **arrays)
    done = torchrun(*arguments(), "--accumulate", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("big student, gates open") == 1
    student = make()
    student.load_state_dict(load_file("out/student.safetensors"))
    history = json.loads(Path("out/history.json").read_text())
    assert history["config"]["processes"] == 2
    assert len(Path("out/log.jsonl").read_text().splitlines()) == 3

    assert main(arguments(out=["one"])) == 0
    alone = json.loads(Path("one/history.json").read_text())
    for border in ("teacher 0", "big student, gates open"):  # uneven shards of 20 images, every image once
        assert history["borders"][border] == pytest.approx(alone["borders"][border], rel=1e-5)


def test_bad_input_is_told_once(place):  # noqa: F811
    save_weights(make(), "a.safetensors")
    done = torchrun(*arguments(), "--batch-size", "15")
    assert done.returncode != 0
    assert done.stderr.count("a batch of 15 can't be shared out evenly to 2 processes") == 1
    assert not torch.distributed.is_initialized()
