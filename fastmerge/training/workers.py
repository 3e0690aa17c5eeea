"""Jobs in processes of their own, with one thread each.

Small networks gain nothing from threads, and everything from cores. A job computes the same wherever it runs, so results
don't depend on how many processes there are.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch
from tqdm import tqdm

from fastmerge.data.dataset import Dataset
from fastmerge.merging.progress import peak_memory
from fastmerge.processes import ProcessLostError
from fastmerge.resuming.stop_requests import Interrupted, StopRequests
from fastmerge.training.job_bar import JobBar, Note, Shown
from fastmerge.training.jobs import Job, Outcome, Reporter


class Run(Protocol):
    """A function that does a job; at the top level of a module, so that another process can find it."""

    def __call__(self, job: Job, data: Dataset, reporter: Reporter) -> Outcome: ...


_GRACE = 5  # seconds for processes to end by themselves after an error
_GRACE_TO_SAVE = 60  # and after an interrupt, which they meet between epochs


def run_jobs(
    run: Run, jobs: Sequence[Job], data: Dataset, workers: int | None, progress: bool | None, note: Note | None = None
) -> list[Outcome]:
    """Does all jobs and returns their outcomes, in the order of the jobs.

    Args:
        run: does one job.
        jobs: the longest first, for the processes to end together.
        data: on the CPU.
        workers: processes; None for one per core where jobs run on the CPU. With one, or one job, or on a GPU, jobs run
            one after another in this process.
        progress: whether to show a bar of epochs, summed over networks; None on a terminal.
        note: told of every epoch, in this process.

    Raises:
        Interrupted: a signal came; jobs that have checkpoints wrote one.
        ProcessLostError: a RuntimeError: a process died, or raised what can't be sent.
        Exception: whatever else a job raises.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = sum(job.recipe.epochs * len(job.replicates) for job in jobs)
    hidden = None if progress is None else not progress
    with tqdm(total=total, disable=hidden, unit="epoch", smoothing=0.05, dynamic_ncols=True) as bar:
        shown = Shown(bar, len(data.train_inputs))
        if min(workers, len(jobs)) > 1 and all(job.device.type == "cpu" for job in jobs):
            return _in_processes(run, jobs, data, min(workers, len(jobs)), shown, note)
        return [_in_this_process(run, job, data, JobBar(job, shown, note)) for job in jobs]


def _in_this_process(run: Run, job: Job, data: Dataset, bar: JobBar) -> Outcome:
    devices = [job.device] if job.device.type == "cuda" else []
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=devices):
        try:
            torch.set_num_threads(1)
            return run(job, data.to(job.device), bar)
        finally:
            torch.set_num_threads(threads)


def _in_processes(
    run: Run, jobs: Sequence[Job], data: Dataset, workers: int, shown: Shown, note: Note | None
) -> list[Outcome]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of torch's threads
    waiting = list(enumerate(jobs))
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    outcomes: dict[int, Outcome] = {}
    grace = _GRACE
    with StopRequests(enabled=any(job.checkpoints is not None for job in jobs)) as stop:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    index, job = waiting.pop(0)
                    ours, theirs = context.Pipe(duplex=False)
                    # As bytes, by value: multiprocessing would put tensors into /dev/shm, which containers keep small.
                    payload = pickle.dumps((run, job, data))
                    process: BaseProcess = context.Process(target=_work, args=(theirs, payload), daemon=True)
                    with _ctrl_c_blocked():
                        process.start()
                    theirs.close()
                    running[ours] = (index, process)
                ready = wait(list(running), timeout=0.5)
                stop.raise_if_any()  # a process may have ended for the signal that came to this one
                for connection in ready:
                    assert isinstance(connection, Connection)
                    index, process = running[connection]
                    message = _receive(connection, process, jobs[index])
                    if message[0] == "outcome":
                        outcomes[index] = pickle.loads(message[1])
                        process.join()
                        shown.memory.pop(process.pid or 0, None)
                        del running[connection]
                    elif message[0] == "error":
                        raise message[1]
                    else:
                        getattr(JobBar(jobs[index], shown, note), message[0])(*message[1:])
            stop.raise_if_any()
        except Interrupted:
            grace = _GRACE_TO_SAVE
            raise
        finally:  # after an error or Ctrl-C the others must not go on
            _end([process for _, process in running.values()], grace)
    return [outcomes[index] for index in range(len(jobs))]


def _end(processes: list[BaseProcess], grace: float) -> None:
    """Asks processes to end, which they do at once or after a checkpoint, and ends those that have not within the grace."""
    for process in processes:
        process.terminate()
    last = time.monotonic() + grace
    for process in processes:
        process.join(max(0.0, last - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """A process started in this context leaves Ctrl-C, which reaches all of a terminal's processes, to the main one.

    Here it waits for the end of the context, and is not lost.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(connection: Connection, process: BaseProcess, job: Job) -> tuple[Any, ...]:
    try:
        message: tuple[Any, ...] = connection.recv()
    except EOFError:
        process.join()
        raise ProcessLostError(
            f"the process for {job.strategy}, replicates {job.replicates[0]}..{job.replicates[-1]}, ended with exit "
            f"code {process.exitcode}; it may have run out of memory: try workers=1 or fewer replicates"
        ) from None
    return message


def _work(connection: Connection, payload: bytes) -> None:
    """Runs in the other process."""
    torch.set_num_threads(1)
    StopRequests.ends_by_parent = True
    try:
        run, job, data = pickle.loads(payload)
        outcome = run(job, data, _Messages(connection))
        connection.send(("outcome", pickle.dumps(outcome)))
    except Interrupted:
        return  # the main process ended this one, and reads no more
    except Exception as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"in the process for this job:\n{traceback.format_exc()}")
        connection.send(("error", error))


class _Messages:
    """Sends a job's reports to the main process."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def epoch(self, *values: Any) -> None:
        self.connection.send(("tell", os.getpid(), peak_memory(), *values))

    def skip(self, *values: Any) -> None:
        self.connection.send(("skip", *values))

    def warn(self, message: str) -> None:
        self.connection.send(("warn", message))
