"""Jobs in processes: same results, errors that arrive, no process left behind."""

import multiprocessing
import os
import re
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastmerge.data.dataset import Dataset
from fastmerge.processes import ProcessLostError
from fastmerge.recipes import RECIPES
from fastmerge.resuming.stop_requests import Interrupted, StopRequests
from fastmerge.training.job_bar import Shown
from fastmerge.training.jobs import Job, Outcome
from fastmerge.training.scores import Curves
from fastmerge.training.workers import run_jobs

DATA = Dataset(*torch.arange(8.0).view(4, 2, 1))


def jobs(count: int = 2) -> list[Job]:
    recipe = RECIPES["sine"]().scaled(0.01)
    return [Job("one", (index,), recipe, 0, torch.device("cpu")) for index in range(count)]


def outcome(value: float) -> Outcome:
    return Outcome([value], Curves(1), [None])


def work(job, data, reporter):
    for epoch in range(job.recipe.epochs):
        reporter.epoch("long run", epoch + 1, job.recipe.epochs, 1)
    if job.replicates == (1,):
        reporter.warn("mind the gap")
    return outcome(job.replicates[0] + data.train_inputs.sum().item() + torch.get_num_threads() / 10)


def fail(job, data, reporter):
    if job.replicates == (0,):
        raise FloatingPointError("this is the end")
    time.sleep(600)


def die(job, data, reporter):
    os._exit(3)


def save_late(job, data, reporter):
    with StopRequests() as stop:
        (job.checkpoints / f"begun {job.replicates[0]}").touch()
        while stop.number is None:
            time.sleep(0.01)
        time.sleep(1.5)  # the parent asks for the end meanwhile
        (job.checkpoints / f"saved {job.replicates[0]}").touch()
        stop.raise_if_any()


def interrupt(job, data, reporter):
    raise KeyboardInterrupt


def test_a_signal_to_all_processes_lets_each_write_a_checkpoint(tmp_path):
    """As job managers send it: the parent, which had it too, asks for the end of processes that are about to save."""

    def signal_to_all():
        while len(list(tmp_path.glob("begun *"))) < 2:
            time.sleep(0.01)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=signal_to_all)
    thread.start()
    with pytest.raises(Interrupted):
        run_jobs(save_late, [replace(job, checkpoints=tmp_path) for job in jobs()], DATA, 2, False)
    thread.join()
    assert sorted(path.name for path in tmp_path.glob("saved *")) == ["saved 0", "saved 1"]


@pytest.mark.parametrize("workers", [1, 2])
def test_outcomes_come_in_the_order_of_the_jobs(workers, capfd):
    threads = torch.get_num_threads()
    with pytest.warns(UserWarning, match="sine, mind the gap"):
        outcomes = run_jobs(work, jobs(3), DATA, workers, progress=True)
    assert [found.values for found in outcomes] == [[1.1], [2.1], [3.1]]
    assert torch.get_num_threads() == threads
    printed = capfd.readouterr().err
    assert "27/27" in printed.replace("162/162", "27/27") or "100%" in printed
    assert re.search(r"one: long run 12/12, (\d+ samples/s, )?[\d.]+ GiB", printed)
    assert not multiprocessing.active_children()


def test_the_bar_counts_the_samples_of_all_networks_and_the_memory_of_all_processes():
    bar = SimpleNamespace(format_dict={"rate": None})
    shown = Shown(bar, 1000)
    shown.memory = {1: 2**30, 2: 2**29}
    assert shown.figures() == ", 1.50 GiB"
    bar.format_dict["rate"] = 2.5  # epochs of single networks a second
    assert shown.figures() == ", 2500 samples/s, 1.50 GiB"


def test_an_error_arrives_and_the_other_process_ends():
    start = time.monotonic()
    with pytest.raises(FloatingPointError, match="this is the end"):
        run_jobs(fail, jobs(2), DATA, 2, progress=False)
    assert time.monotonic() - start < 300
    assert not multiprocessing.active_children()


def test_a_process_that_dies_is_reported():
    with pytest.raises(ProcessLostError, match=r"one, replicates [01]..[01], ended with exit code 3"):
        run_jobs(die, jobs(2), DATA, 2, progress=False)
    assert not multiprocessing.active_children()


def test_random_state_stays_as_it_was():
    state = torch.get_rng_state()

    def draw(job, data, reporter):
        torch.manual_seed(7)
        return outcome(0.0)

    run_jobs(draw, jobs(2), DATA, 1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupt_in_this_process_comes_through():
    with pytest.raises(KeyboardInterrupt):
        run_jobs(interrupt, jobs(1), DATA, None, progress=False)
