"""Jobs in processes of their own, with one thread each, in the order that their needs allow.

Small networks gain nothing from threads, and everything from cores. A job computes the same wherever it runs, so results
don't depend on how many processes there are.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch
from tqdm import tqdm

from fastmerge.checkpoints import Interrupted, StopRequests
from fastmerge.environment import cores
from fastmerge.merging.progress import peak_memory
from fastmerge.processes import ProcessLostError

Note = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Job:
    """Some work, which may need what other jobs come to.

    Attributes:
        name: of it, no two alike.
        work: does it; at the top level of a module, so that another process can find it.
        arguments: of the work.
        needs: names of the jobs whose results it is given.
        epochs: of single networks, for the bar.
        saves: whether it writes a checkpoint when it is interrupted.
    """

    name: str
    work: Work
    arguments: Any
    needs: tuple[str, ...] = ()
    epochs: int = 0
    saves: bool = False


class Work(Protocol):
    """What a job does.

    Args:
        arguments: the job's.
        given: results of the jobs that it needs, in their order.
        note: told of every epoch: ``note(values)``, whose "replicates" are the networks that it was of.
    """

    def __call__(self, arguments: Any, given: list[Any], note: Note, /) -> Any: ...


_GRACE = 5  # seconds for processes to end by themselves after an error
_GRACE_TO_SAVE = 60  # and after an interrupt, which they meet between steps


class Bar:
    """A bar of epochs of single networks, with the time left, samples per second and memory.

    Args:
        bar: of tqdm.
        samples: in an epoch.
        note: told of every epoch.

    Attributes:
        memory: the most bytes that each process that trains has held so far.
    """

    def __init__(self, bar: Any, samples: int, note: Note | None = None) -> None:
        self.bar, self.samples, self.note = bar, samples, note
        self.memory: dict[int, int] = {}
        self._seen: dict[str, int] = {}

    def epoch(self, job: str, process: int, memory: int, values: dict[str, Any]) -> None:
        """Counts an epoch of a process that has held so many bytes."""
        self.memory[process] = memory
        networks = len(values.get("replicates", [0]))
        self._seen[job] = self._seen.get(job, 0) + networks
        where = f"{values.get('stage', job)} {values.get('epoch', '')}".strip()
        self.bar.set_postfix_str(f"{job}: {where}{self.figures()}", refresh=False)
        self.bar.update(networks)
        if self.note is not None:
            self.note(values)

    def end(self, job: Job) -> None:
        """Counts what was done before the run was interrupted, too."""
        left = job.epochs - self._seen.get(job.name, 0)
        if left > 0 and not self.bar.disable:
            self.bar.initial += left  # the time left follows from what is done now
        self.bar.update(max(0, left))

    def figures(self) -> str:
        """Samples per second, all networks' together, once that is known; and memory, all processes' together."""
        rate = self.bar.format_dict["rate"]
        speed = f", {rate * self.samples:.0f} samples/s" if rate else ""
        return f"{speed}, {sum(self.memory.values()) / 2**30:.2f} GiB"


def run_jobs(
    jobs: Sequence[Job],
    workers: int | None,
    progress: bool | None,
    samples: int = 0,
    note: Note | None = None,
) -> dict[str, Any]:
    """Does all jobs and returns their results by name.

    Args:
        jobs: each after those that it needs; the longest first, for the processes to end together.
        workers: processes; None for one per core. With one, or one job, jobs run one after another in this process.
        progress: whether to show a bar; None on a terminal.
        samples: in an epoch.
        note: told of every epoch, in this process.

    Raises:
        Interrupted: a signal came; jobs that save wrote a checkpoint.
        ProcessLostError: a RuntimeError: a process died, or raised what can't be sent.
        Exception: whatever else a job raises.
    """
    workers = cores() if workers is None else workers
    hidden = None if progress is None else not progress
    total = sum(job.epochs for job in jobs)
    with tqdm(total=total, disable=hidden, unit="epoch", smoothing=0.05, dynamic_ncols=True) as shown:
        bar = Bar(shown, samples, note)
        if min(workers, len(jobs)) > 1:
            return _in_processes(jobs, min(workers, len(jobs)), bar)
        results: dict[str, Any] = {}
        for job in jobs:
            results[job.name] = _in_this_process(job, results, bar)
            bar.end(job)
        return results


def _in_this_process(job: Job, results: Mapping[str, Any], bar: Bar) -> Any:
    threads = torch.get_num_threads()

    def note(values: dict[str, Any]) -> None:
        bar.epoch(job.name, os.getpid(), peak_memory(), values)

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            torch.set_num_threads(1)
            return job.work(job.arguments, [results[name] for name in job.needs], note)
        finally:
            torch.set_num_threads(threads)


def _in_processes(jobs: Sequence[Job], workers: int, bar: Bar) -> dict[str, Any]:
    waiting = list(jobs)
    idle: list[tuple[Connection, BaseProcess]] = []
    running: dict[Connection, tuple[Job, BaseProcess]] = {}
    results: dict[str, Any] = {}
    grace = _GRACE
    with StopRequests(enabled=any(job.saves for job in jobs)) as stop:
        try:
            while waiting or running:
                can_run = [job for job in waiting if all(name in results for name in job.needs)]
                for job in can_run[: workers - len(running)]:
                    waiting.remove(job)
                    pipe, process = idle.pop() if idle else _started()
                    # As bytes, by value: multiprocessing would put tensors into /dev/shm, which containers keep small.
                    pipe.send_bytes(pickle.dumps((job, [pickle.loads(results[name]) for name in job.needs])))
                    running[pipe] = (job, process)
                ready = wait(list(running), timeout=0.5)
                stop.raise_if_any()  # a process may have ended for the signal that came to this one
                for connection in ready:
                    assert isinstance(connection, Connection)
                    job, process = running[connection]
                    message = _receive(connection, process, job)
                    if message[0] == "result":
                        results[job.name] = message[1]
                        bar.memory.pop(process.pid or 0, None)
                        bar.end(job)
                        idle.append((connection, process))
                        del running[connection]
                    elif message[0] == "error":
                        raise message[1]
                    elif message[0] == "warning":
                        with bar.bar.external_write_mode():
                            warnings.warn(message[1], stacklevel=2)
                    else:
                        bar.epoch(job.name, process.pid or 0, *message[1:])
            stop.raise_if_any()
        except Interrupted:
            grace = _GRACE_TO_SAVE
            raise
        finally:  # after an error or Ctrl-C the others must not go on
            _end([process for _, process in (*running.values(), *idle)], grace)
    return {name: pickle.loads(result) for name, result in results.items()}


def _started() -> tuple[Connection, BaseProcess]:
    """A process that does the jobs that it is sent."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of torch's threads
    ours, theirs = context.Pipe()
    process: BaseProcess = context.Process(target=_work, args=(theirs,), daemon=True)
    with _ctrl_c_blocked():
        process.start()
    theirs.close()
    return ours, process


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
            f"the process for {job.name} ended with exit code {process.exitcode}; it may have run out of memory: try "
            "workers=1 or fewer replicates"
        ) from None
    return message


def _work(connection: Connection) -> None:
    """Runs in the other process."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which who is terminated leaves behind
    StopRequests.ends_by_parent = True

    def note(values: dict[str, Any]) -> None:
        connection.send(("epoch", peak_memory(), values))

    def warn(message: Warning | str, *more: object) -> None:
        connection.send(("warning", str(message)))

    try:
        while True:
            job, given = pickle.loads(connection.recv_bytes())
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = warn  # type: ignore[assignment]
                result = job.work(job.arguments, given, note)
            connection.send(("result", pickle.dumps(result)))
    except (EOFError, Interrupted):
        return  # the main process ended this one, and reads no more
    except Exception as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"in the process for this job:\n{traceback.format_exc()}")
        connection.send(("error", error))
