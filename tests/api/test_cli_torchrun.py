"""``torchrun`` runs ``fastmerge merge`` and recipes over loaders unchanged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_files import arguments, make
from fastmerge.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*P.g>0. is:UserWarning", "ignore:.*P.g>0. did not move:UserWarning"),
]


def begin(*words: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastmerge"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.getcwd()])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def torchrun(*words: str) -> subprocess.CompletedProcess:
    process = begin(*words)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def test_merge_by_two_processes(place):
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


def test_the_same_line_goes_on_after_a_sigterm(place, capsys):
    """What a cluster does at a time limit, and its requeued job: --resume is there from the beginning; two processes are one
    run, and another one has no place beside them.
    """
    words = [*arguments(), "--merge-epochs", "1000", "--finetune-epochs", "1", "--resume"]
    process = begin(*words)
    wait_for_epochs(process, 3)
    assert main(words) == 2
    assert "out is in use by another run, process " in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "go on with: torchrun --nproc-per-node 2 -m fastmerge merge --out out --resume" in err
    assert len(list(Path("out/checkpoints").glob("*.safetensors"))) == 1
    before = epochs_in_log()
    process = begin(*words)
    try:
        wait_for_epochs(process, len(before) + 1)
        assert epochs_in_log()[: len(before) + 1] == [*before, before[-1] + 1]
    finally:
        process.terminate()
        process.communicate(timeout=60)


def wait_for_epochs(process: subprocess.Popen, count: int) -> None:
    deadline = time.monotonic() + 200
    while len(epochs_in_log()) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def epochs_in_log() -> list[int]:
    log = Path("out/log.jsonl")
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line)["epoch"] for line in lines if line.endswith("\n")]


def test_bad_input_is_told_once(place):
    save_file(make().state_dict(), "a.safetensors")
    done = torchrun(*arguments(), "--batch-size", "15")
    assert done.returncode != 0
    assert done.stderr.count("a batch of 15 can't be shared out evenly to 2 processes") == 1
    assert not torch.distributed.is_initialized()


def test_what_is_wrong_for_one_process_is_told_by_it(place):
    """The other one only knows that it is alone."""
    model = "import os\nimport fastmerge_cli_test_net\n\ndef make():\n    if os.environ['RANK'] == '1':\n"
    Path("of_one.py").write_text(
        model + "        raise ValueError('not here')\n    return fastmerge_cli_test_net.make()\n"
    )
    done = torchrun(*arguments(model=["of_one:make"]))
    assert done.returncode != 0
    assert done.stderr.count("fastmerge: error: could not build of_one:make(): not here\n") == 1


def test_who_survives_a_killed_process_names_the_checkpoint(tree):
    words = [*tree, "--merge-epochs", "1000", "--checkpoint-seconds", "0"]
    process = begin(*words)
    wait_for_epochs(process, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = (pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    (line,) = (line for line in error.splitlines() if line.startswith("fastmerge: error: "))
    assert line.startswith("fastmerge: error: process 0 of 2 lost another one, which ended or hangs (")
    assert line.endswith("; go on with: torchrun --nproc-per-node 2 -m fastmerge merge --out out --resume")
    assert "DataLoader worker" not in error
    assert list(Path("out/checkpoints").glob("*.safetensors"))
