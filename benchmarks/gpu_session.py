"""Everything that needs a GPU, in one command: what may crash first, then whether it is right, how fast it is, and why.

``python3 -m benchmarks.gpu_session OUT`` runs with any Python that has torch, Triton, torchvision, pytest and pytest-benchmark,
from a checkout; nothing is installed and no network needed. ``--plan first`` is for nine minutes on a card that nobody has run
on, ``--plan second`` for four minutes on the same machine, ``--plan full`` (the default) for everything.

Every part is a process of its own with a time limit. One that crashes, hangs or runs over costs no other's results, nor its own
of before: what it has measured is in its journal. A part that died goes on after what it died of, while there is time. No part
outlives this process. OUT receives four files, rewritten after each part: ``session.tar.gz`` with logs and journals,
``benchmarks.json``, ``summary.json`` and ``summary.txt``, which is also what is printed last.

``--rehearse`` goes through the plan on a machine without a card: tests skip, steps are timed on the CPU, and stand-ins that
fail, hang, die, flood and leave processes behind show that the others are spared.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import events
from benchmarks.gpu_parts import ROOT, Part, Stage, plan
from benchmarks.gpu_summary import summary
from benchmarks.journal import joined, write_whole
from benchmarks.rehearsal import stand_ins

LEAST = 5.0  # with less left, no part is begun
GRACE = 6.0  # kept at the end, for the last files
TRIES = 4  # of a part that dies each time of something else
ARCHIVE = 14 * 2**20  # bytes of the archive at most
_WRITTEN = 2**22  # bytes of a file in a part's own folder that goes into the archive
_LOG = 2**18  # bytes of a log's beginning, and of its end, that are kept
SECONDS = {"first": 530.0, "second": 230.0, "full": 1500.0}
# Makes the kernel end a child together with its parent, then becomes the child: ctypes' call is lost by no exec.
_TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


class OverError(BaseException):
    """The session has to end now."""


@dataclass
class Outcome:
    """How a part ended, and what it wrote on the way.

    Attributes:
        name: of the part.
        state: "ok", "failed", "over time", "no time left", a signal's name, or an exit code.
        seconds: that it took.
        says: what it had begun and not ended, or its last line.
        events: what it wrote, in order.
    """

    name: str
    state: str = "no time left"
    seconds: float = 0.0
    says: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.state == "ok"


class Job:
    """A part while it runs.

    Args:
        part: what to run.
        command: filled in.
        environment: of the process.
        until: when it must have ended, on the monotonic clock.
        earlier: what processes wrote that began the part and died.
    """

    def __init__(
        self,
        part: Part,
        command: Sequence[str],
        environment: dict[str, str],
        until: float,
        earlier: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.part, self.until, self.start = part, until, time.monotonic()
        self.events: list[dict[str, Any]] = list(earlier)
        self._told = len(earlier)
        self.head, self.tail = bytearray(), collections.deque[bytes]()
        self._tail_size = 0
        self.child = subprocess.Popen(
            [sys.executable, "-c", _TIED, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._code: int | None = None
        self._asked: float | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        with self.child.stdout as output:
            while line := output.readline(2**14):
                event = events.read(line.decode(errors="replace"))
                if event is not None:
                    self.events.append(event | {"at": round(time.monotonic() - self.start, 2)})
                if len(self.head) < _LOG:
                    self.head += line
                    continue
                self.tail.append(line)
                self._tail_size += len(line)
                while self._tail_size > _LOG:
                    self._tail_size -= len(self.tail.popleft())

    @property
    def log(self) -> bytes:
        return bytes(self.head) + b"".join(self.tail)

    @property
    def open(self) -> list[str]:
        """What it has begun and not ended."""
        count: collections.Counter[str] = collections.Counter()
        for event in self.events:
            count[event["name"]] += {"begin": 1, "end": -1}.get(event["kind"], 0)
        return [name for name, times in count.items() if times > 0]

    def failures(self) -> list[dict[str, Any]]:
        """What has failed since this was asked last."""
        new, self._told = self.events[self._told :], len(self.events)
        return [event for event in new if event.get("outcome") == "failed"]

    def ask_to_end(self) -> float:
        """Asks the process to end, where it has not, upon which Python says where it is; when it was asked first."""
        if self._asked is None:
            self._code, self._asked = self.child.poll(), time.monotonic()
            if self._code is None:
                self._signal(signal.SIGABRT)
        return self._asked

    def end(self) -> int | None:
        """Ends the process and its children; the exit code, or None where it had not ended by itself."""
        asked = self.ask_to_end()
        if self._code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(max(0.0, asked + 1 - time.monotonic()))
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it
            self.child.wait(5)
        self._reader.join(2)  # longer only if a process that left the group holds the pipe
        return self._code

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, number)


class Session:
    """Runs stages and writes down what has come out, again after each part.

    Args:
        out: folder for the results.
        seconds: for all of it.
        environment: variables set for all parts.
        rehearsed: whether there is no card.
    """

    def __init__(self, out: Path, seconds: float, environment: dict[str, str], rehearsed: bool = False) -> None:
        self.out, self.rehearsed = out, rehearsed
        self.start = time.monotonic()
        self.end = self.start + seconds - min(GRACE, seconds / 10)
        # Kept between two calls on one machine: compiled kernels, measured convolutions, and which tests failed.
        self.scratch = Path(tempfile.gettempdir()) / f"fastmerge-gpu-{os.getuid()}{'-rehearsed' * rehearsed}"
        self.folder = Path(tempfile.mkdtemp(prefix="fastmerge-session-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        # a worker of pytest-xdist would pass its role on, and pytest-benchmark be switched off by it
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        self.environment = inherited | _environment(self.scratch) | environment
        self.outcomes: list[Outcome] = []
        self.running: list[Job] = []
        self.logs: dict[str, bytes] = {}
        self.died: set[str] = set()  # names of parts that something ended
        self.journals: list[Path] = []  # in the order of their parts

    def run(self, stages: Sequence[Stage]) -> None:
        """Runs the stages in turn; what one leaves of its time goes to the next."""
        scale = (self.end - self.start) / sum(stage.seconds for stage in stages)
        until = self.start
        for stage in stages:
            until += scale * stage.seconds
            self._run(stage, until)

    def _run(self, stage: Stage, until: float) -> None:
        waiting = list(stage.parts)
        while waiting or self.running:
            late = until - time.monotonic() < LEAST
            while waiting and (late or len(self.running) < stage.at_once):
                part = waiting.pop(0)
                if late:
                    self._record(Outcome(part.name))
                else:
                    self._begin(part, until)
            for job in list(self.running):
                for event in job.failures():
                    self._say(f"FAIL {event['name']}: {event['says']}")
                if job.child.poll() is not None or time.monotonic() > job.until:
                    self._close(job, until)
            time.sleep(0.05)

    def _begin(self, part: Part, until: float, earlier: Sequence[dict[str, Any]] = ()) -> None:
        until = min(until, time.monotonic() + part.seconds)
        command = list((part.rehearsal or part.command) if self.rehearsed else part.command)
        if earlier and part.is_tests:
            begun = dict.fromkeys(event["name"] for event in earlier if event["kind"] == "begin")
            command += [f"--deselect={name}" for name in begun]
        if part.careful and (earlier or self.died & {name for name in self.logs if "convolution" in name}):
            command.append("--careful")
        folder, journal = self.folder / part.name, self.folder / f"{part.name}.json"
        if journal not in self.journals:
            self.journals.append(journal)
        filled = {"journal": journal, "folder": folder, "until": until}
        for key, value in filled.items():
            command = [word.replace(f"{{{key}}}", str(value)) for word in command]
        if not command[0].startswith("/"):
            command.insert(0, sys.executable)
        environment = self.environment | dict(part.environment)
        self.running.append(Job(part, command, environment, until, earlier))

    def _close(self, job: Job, until: float) -> None:
        code = job.end()
        self.running.remove(job)
        self.logs[job.part.name] = self.logs.get(job.part.name, b"") + job.log
        died = list(job.open)
        tries = 1 + sum(event["kind"] == "died" for event in job.events)
        state = "hung" if code == 1 and b"\nTimeout (" in job.log else _state(code)
        if died or code == events.DEAD:
            lost = [event["name"] for event in job.events if event["kind"] == "lost"]
            culprit = lost[-1] if code == events.DEAD and lost else died[-1]
            ends = {name: "died" if name == culprit else "cut off" for name in died}
            job.events += [{"kind": "end", "name": name, "outcome": end, "says": state} for name, end in ends.items()]
            job.events.append({"kind": "died", "name": culprit, "says": state})
            self.died.add(job.part.name)
            if job.part.resumes and code is not None and tries < TRIES and until - time.monotonic() > 2 * LEAST:
                self._say(f"{job.part.name}: {state} at {culprit}; it goes on without")
                self._begin(job.part, until, job.events)
                return
        self._record(Outcome(job.part.name, state, time.monotonic() - job.start, _last_word(job, died), job.events))

    def _record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._say(f"{outcome.name}: {outcome.state}, {outcome.seconds:.0f} s{': ' * bool(outcome.says)}{outcome.says}")
        self.write()

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text[:200]}", flush=True)

    def stop(self) -> None:
        """Ends what still runs; parts that don't listen have the same second to do so."""
        for job in self.running:
            job.ask_to_end()
        for job in list(self.running):
            self._close(job, 0.0)

    def open(self) -> None:
        """Makes the folder for the results, where nothing of an earlier session may pass for this one's.

        Raises:
            OSError: if nothing can be written there.
        """
        write_whole(self.out / "summary.txt", b"nothing has ended yet\n")
        for name in ("benchmarks.json", "summary.json", "session.tar.gz"):
            (self.out / name).unlink(missing_ok=True)

    def write(self) -> str:
        """Writes all files anew; returns the summary."""
        report = joined(self.journals)
        seconds = time.monotonic() - self.start
        data = {"seconds": round(seconds, 1), "parts": [asdict(outcome) for outcome in self.outcomes]}
        try:
            text = summary(data, report)
        except Exception as error:  # whatever is wrong with it must not cost the results
            text = f"the summary could not be written: {type(error).__name__}: {error}"
        try:
            self._write(report, data, text)
        except OSError as error:  # a full disk, say; the next part's files may fit
            self._say(f"the results could not be written: {error}")
        return text

    def _write(self, report: dict[str, Any] | None, data: dict[str, Any], text: str) -> None:
        if report is not None:
            write_whole(self.out / "benchmarks.json", json.dumps(report, indent=1).encode() + b"\n")
        write_whole(self.out / "summary.json", json.dumps(data, indent=1).encode() + b"\n")
        write_whole(self.out / "summary.txt", text.encode() + b"\n")
        logs = self.logs | {job.part.name: self.logs.get(job.part.name, b"") + job.log for job in self.running}
        files = {f"{name}.log": content for name, content in logs.items()}
        written = [path for path in self.folder.rglob("*") if path.is_file() and path.stat().st_size < _WRITTEN]
        files |= {str(path.relative_to(self.folder)): path.read_bytes() for path in written}
        write_whole(self.out / "session.tar.gz", packed(files))
        write_whole(self.scratch / "summary.json", json.dumps(data).encode())


def packed(files: dict[str, bytes], most: int = ARCHIVE) -> bytes:
    """An archive of some files; where it would be larger than ``most`` bytes, of ever less from the middle of each."""
    kept = max(map(len, files.values()), default=0)
    while True:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
            for name, content in sorted(files.items()):
                short = content if len(content) <= kept else content[: kept // 2] + content[-(kept // 2) :]
                information = tarfile.TarInfo(name)
                information.size, information.mtime = len(short), int(time.time())
                archive.addfile(information, io.BytesIO(short))
        if buffer.tell() <= most:
            return buffer.getvalue()
        kept //= 2


def _environment(scratch: Path) -> dict[str, str]:
    return {
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(scratch),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }


def _state(code: int | None) -> str:
    if code is None:
        return "over time"
    if code < 0:
        return signal.Signals(-code).name
    if code == events.DEAD:
        return "lost CUDA"
    # pytest has 1 for failures and 5 where no test was selected.
    return {0: "ok", 1: "failed", 5: "ok"}.get(code, f"exit {code}")


def _last_word(job: Job, died: Sequence[str]) -> str:
    """What it was at, how many checks failed, or its last line."""
    if died:
        return f"at {died[-1]}"
    ended = collections.Counter(event["outcome"] for event in job.events if event["kind"] == "end")
    if ended:
        return ", ".join(f"{count} {outcome}" for outcome, count in ended.items())
    lines = [line.strip() for line in job.log.decode(errors="replace").split("\n")]
    return next((line[:150] for line in reversed(lines) if line and not line.startswith(events.MARK)), "")


def reds(scratch: Path) -> list[str]:
    """The tests that failed in an earlier call on this machine."""
    try:
        parts = json.loads((scratch / "summary.json").read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        return []
    ended = [event for part in parts for event in part["events"] if event["kind"] == "end"]
    return [event["name"] for event in ended if event["outcome"] in ("failed", "died") and "::" in event["name"]]


def has_gpu() -> bool:
    """Whether this Python's torch sees a GPU; asked in a process of its own, which gives the GPU back."""
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


def _over(number: int, frame: object) -> None:
    raise OverError(signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; the exit code is 1 where a part failed, 2 without GPU or OUT, 3 where it had to end early."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--plan", choices=SECONDS, default="full", help="what to do (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="for all of it, in place of the plan's time")
    parser.add_argument("--only", default="", metavar="STAGE,..", help="only these of the plan's stages")
    parser.add_argument(
        "--data", metavar="NPZ", help="images of Imagewoof at 28 pixels, for the second plan's training run"
    )
    parser.add_argument("--commit", default="", help="what the checkout is of, where its history is not there")
    parser.add_argument("--rehearse", action="store_true", help="without a card")
    options = parser.parse_args(arguments)
    seconds = SECONDS[options.plan] if options.minutes is None else 60 * options.minutes
    session = Session(options.out, seconds, {"FASTMERGE_COMMIT": options.commit}, options.rehearse)
    stages = plan(options.plan, reds(session.scratch), options.data)
    if options.rehearse:
        stages.insert(0, stand_ins())
    wanted = set(filter(None, options.only.split(",")))
    if unknown := wanted - {stage.name for stage in stages}:
        known = ", ".join(stage.name for stage in stages)
        parser.error(f"--only takes stages of the plan: {known}; got {', '.join(sorted(unknown))}")
    stages = [stage for stage in stages if not wanted or stage.name in wanted]
    if not options.rehearse and not has_gpu():
        print(
            "gpu_session needs a CUDA GPU and a torch that can use it; torch.cuda.is_available() is False "
            "(--rehearse needs none)",
            file=sys.stderr,
        )
        return 2
    try:
        session.open()
    except OSError as error:
        print(f"gpu_session needs a folder OUT that it can write to: {error}", file=sys.stderr)
        return 2
    before = {number: signal.signal(number, _over) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_REAL, session.end - time.monotonic() + GRACE / 3)
    early = False
    try:
        session.run(stages)
    except OverError as error:
        early = True
        print(f"ended early: {error}", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        session.stop()
    print("\n" + session.write(), flush=True)
    return 3 if early else 0 if all(outcome.good for outcome in session.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
