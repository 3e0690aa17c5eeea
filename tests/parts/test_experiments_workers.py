"""Jobs in processes: same results, errors that arrive, no process left behind."""

import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from fastmerge.checkpoints import Interrupted, StopRequests
from fastmerge.experiments.workers import Bar, Job, run_jobs
from fastmerge.processes import ProcessLostError


def jobs(work, count: int = 2, folder=None, needs=(), **more) -> list[Job]:
    return [Job(f"job {index}", work, (index, folder), needs, 12, **more) for index in range(count)]


def work(arguments, given, note):
    index, _ = arguments
    for epoch in range(12):
        note({"replicates": [0], "stage": "long run", "epoch": epoch + 1})
    if index == 1:
        warnings.warn("mind the gap", stacklevel=2)
    return index + sum(given) + torch.get_num_threads() / 10


def fail(arguments, given, note):
    if arguments[0] == 0:
        raise FloatingPointError("this is the end")
    time.sleep(600)


def die(arguments, given, note):
    os._exit(3)


def save_late(arguments, given, note):
    index, folder = arguments
    with StopRequests() as stop:
        (folder / f"begun {index}").touch()
        while stop.number is None:
            time.sleep(0.01)
        time.sleep(1.5)  # the parent asks for the end meanwhile
        (folder / f"saved {index}").touch()
        stop.raise_if_any()


def lock_of_bars(arguments, given, note):
    return type(tqdm.get_lock()).__module__


def interrupt(arguments, given, note):
    raise KeyboardInterrupt


def test_bars_of_other_processes_hold_no_semaphore_of_the_system(forked_jobs):
    """Who is terminated would leave it behind, and Python warns of it at the end of the run."""
    assert set(run_jobs(jobs(lock_of_bars), 2, False).values()) == {"_thread"}


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
        run_jobs(jobs(save_late, 2, tmp_path, saves=True), 2, False)
    thread.join()
    assert sorted(path.name for path in tmp_path.glob("saved *")) == ["saved 0", "saved 1"]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_have_the_names_of_the_jobs_and_jobs_wait_for_what_they_need(workers, capfd):
    threads, told = torch.get_num_threads(), []
    last = Job("last", work, (10, None), ("job 1", "job 2"), 12)
    with pytest.warns(UserWarning, match="mind the gap"):
        results = run_jobs([*jobs(work, 3), last], workers, True, 0, told.append)
    assert results == pytest.approx({"job 0": 0.1, "job 1": 1.1, "job 2": 2.1, "last": 13.3})
    assert torch.get_num_threads() == threads
    assert len(told) == 48
    printed = capfd.readouterr().err
    assert "48/48" in printed
    assert re.search(r"(last|job 0): long run 12, (\d+ samples/s, )?[\d.]+ GiB", printed)
    assert not multiprocessing.active_children()


def test_the_bar_counts_the_samples_of_all_networks_and_the_memory_of_all_processes():
    bar = SimpleNamespace(format_dict={"rate": None})
    shown = Bar(bar, 1000)
    shown.memory = {1: 2**30, 2: 2**29}
    assert shown.figures() == ", 1.50 GiB"
    bar.format_dict["rate"] = 2.5  # epochs of single networks a second
    assert shown.figures() == ", 2500 samples/s, 1.50 GiB"


def test_an_error_arrives_and_the_other_process_ends(forked_jobs):
    start = time.monotonic()
    with pytest.raises(FloatingPointError, match="this is the end"):
        run_jobs(jobs(fail), 2, progress=False)
    assert time.monotonic() - start < 300
    assert not multiprocessing.active_children()


def test_a_process_that_dies_is_reported(forked_jobs):
    with pytest.raises(ProcessLostError, match=r"the process for job [01] ended with exit code 3"):
        run_jobs(jobs(die), 2, progress=False)
    assert not multiprocessing.active_children()


def test_random_state_stays_as_it_was():
    state = torch.get_rng_state()

    def draw(arguments, given, note):
        torch.manual_seed(7)

    run_jobs(jobs(draw), 1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupt_in_this_process_comes_through():
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs(interrupt, 1), None, progress=False)
