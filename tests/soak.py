"""Random harm to random commands, for as long as one likes: ``python tests/soak.py --minutes 30`` or ``make soak``.

Each round runs one command of the command line in a folder of its own and does something to it: kills and signals to the
process or its whole group, a full disk, no shared memory, a damaged checkpoint, damaged images or weights, two runs at once.
Then the command is called again until it ends. A round is a loss if

* what comes out is not, bit for bit, what came out of the same command undisturbed, where that is promised,
* a message is a traceback, or bad input has none,
* something hangs, or a process is left over.

It prints the seed, every loss with its round's folder, which stays, and a table of counts; the exit status is 1 after a loss.
``--seed S`` repeats the choices, though not the moments at which signals strike.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

from fastmerge.cli import main as fastmerge  # noqa: E402
from fastmerge.weights import build_network, save_weights  # noqa: E402
from image_files import write_tree  # noqa: E402

NETWORKS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu()).mean((2, 3)))
"""
MERGE = "merge --model soaked:Net --teachers {here}/1.pt {here}/2.pt --data {here}/tree --image-size 12 --batch-size 4 --seed 1"
MERGE += " --device cpu --merge-epochs 12 --finetune-epochs 8 --link-at 0.5 --checkpoint-seconds 0 --quiet --out out"
RUN = "--replicates 2 --device cpu --checkpoint-seconds 0 --quiet --out out"
COMMANDS = {
    "merge, torch": MERGE + " --loader torch --workers 1",
    "merge, dali": MERGE + " --loader dali --workers 1",
    "merge, device": MERGE + " --loader device --augmentation small --compact-at 0.5",
    "run sine": "run sine --budget 0.02 --workers 1 " + RUN,
    "run digits, 2 workers": "run digits --budget 0.1 --workers 2 " + RUN,
    "data prepare": "data prepare {here}/large out --size 24 --workers 2 --quiet",
}
PATIENCE = 300  # seconds until a command hangs
CLONE_NEWNS = 0x20000


class Loss(Exception):  # noqa: N818
    """Something that must not happen."""


class Running:
    """A command in a forked process, the leader of a group, with a copy of its output in the files ``out.N`` and ``err.N``.

    Args:
        words: Of the command.
        folder: It runs in.
        before: Called in the process first.
    """

    made = 0

    def __init__(self, words: list[str], folder: Path, before: Callable[[], None] | None = None) -> None:
        Running.made += 1
        self.words, self.error = words, folder / f"err.{Running.made}"
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                os.setpgid(0, 0)
                os.chdir(folder)
                for number, name in ((1, f"out.{Running.made}"), (2, f"err.{Running.made}")):
                    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
                if before is not None:
                    before()
                status = fastmerge(words)
            except SystemExit as error:  # argparse
                status = int(error.code or 0)
            except KeyboardInterrupt:  # before or after the command's own handling
                status = 130
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        with contextlib.suppress(OSError):  # here and there: whoever comes first
            os.setpgid(self.pid, self.pid)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status, negative for a signal; None where it still runs then."""
        end = time.monotonic() + (PATIENCE if seconds is None else seconds)
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                return None
            time.sleep(0.01)

    def send(self, number: int, to_group: bool) -> None:
        (os.killpg if to_group else os.kill)(self.pid, number)

    def end(self, allowed: set[int]) -> int:
        """Waits for the end, and looks at what was said and left behind."""
        status = self.wait()
        if status is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()
            raise Loss("hangs")
        said = self.error.read_text(errors="replace")
        if "Traceback" in said:
            raise Loss(f"a traceback: {said.strip().splitlines()[-1]}")
        if status not in allowed:
            raise Loss(f"exit status {status}: {said.strip()[-300:]}")
        if status in (1, 2) and "error: " not in said:
            raise Loss(f"exit status {status} without a message")
        self.nobody_is_left()
        return status

    def nobody_is_left(self) -> None:
        """Processes of the group end when their leader has."""
        end = time.monotonic() + PATIENCE / 5
        while True:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise Loss("a process is left over")
            time.sleep(0.05)


class Soak:
    """The rounds.

    Args:
        here: Folder of all files.
        seed: Of all choices.
    """

    def __init__(self, here: Path, seed: int) -> None:
        self.here, self.random = here, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.losses: list[str] = []
        self.wanted: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        (here / "soaked.py").write_text(NETWORKS)
        sys.path.insert(0, str(here))
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
        for number in (1, 2):
            torch.manual_seed(number)
            network = build_network("soaked:Net")
            save_weights(network, here / f"{number}.safetensors")
            torch.save(network.state_dict(), here / f"{number}.pt")
        write_tree(here / "tree", train_ant=10, train_cat=10, val_ant=4, val_cat=4)
        write_tree(here / "large", train_ant=200, train_cat=200, val_ant=20, val_cat=20)
        self.rounds = [
            self.kills, self.kills, self.kills, self.kills,
            self.full_disk, self.no_shared_memory, self.damaged_checkpoint, self.damaged_image, self.damaged_weights,
            self.two_at_once,
        ]  # fmt: skip

    def words(self, name: str) -> list[str]:
        return COMMANDS[name].format(here=self.here).split()

    def begin(self, name: str, folder: Path, *more: str, before: Callable[[], None] | None = None) -> Running:
        words = self.words(name)
        resumes = words[0] != "data" and (folder / "out" / "command.json").is_file()
        self.counts["commands begun"] += 1
        return Running([*words, *more, *(["--resume"] if resumes else [])], folder, before)

    def undisturbed(self, name: str) -> dict[str, str]:
        """What comes out of a command, by file, and in how many seconds it does."""
        if name not in self.wanted:
            folder = self.folder("undisturbed")
            started = time.monotonic()
            self.begin(name, folder).end({0})
            self.seconds[name] = time.monotonic() - started
            self.wanted[name] = results(folder / "out")
            if not self.wanted[name]:
                raise Loss(f"nothing came out of {name}")
        return self.wanted[name]

    def folder(self, kind: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{kind.replace(' ', '-')}-", dir=self.here))

    def finish(self, name: str, folder: Path) -> None:
        """Calls the command until it ends, and compares."""
        wanted = self.undisturbed(name)
        self.begin(name, folder).end({0})
        found = results(folder / "out")
        if found != wanted:
            changed = sorted(file for file in wanted.keys() | found.keys() if wanted.get(file) != found.get(file))
            raise Loss(f"{name}: {', '.join(changed[:3])} of {len(wanted)} files differ")
        self.counts["ended with the same bits"] += 1

    def kills(self, folder: Path) -> None:
        """Signals, one to three times, to the process or its group, at random moments."""
        name = self.random.choice(list(COMMANDS))
        self.undisturbed(name)
        for _ in range(self.random.randint(1, 3)):
            number = self.random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            running, to_group = self.begin(name, folder), self.random.random() < 0.5
            if self.random.random() < 0.2:  # a machine that stands still for a moment
                running.send(signal.SIGSTOP, True)
                time.sleep(0.2)
                running.send(signal.SIGCONT, True)
            status = running.wait(self.random.random() * self.seconds[name])
            if status is None:
                running.send(number, to_group)
                self.counts[f"{number.name} to the {'group' if to_group else 'process'}"] += 1
                if number == signal.SIGKILL:
                    running.wait()
                    running.nobody_is_left()
                else:
                    running.end({0, -number, 128 + number})
            elif status:
                raise Loss(f"exit status {status} of a command that nothing was done to")
        self.finish(name, folder)

    def full_disk(self, folder: Path) -> None:
        """A disk without room; later it has."""
        name = self.random.choice(list(COMMANDS))
        self.undisturbed(name)
        (folder / "out").mkdir()
        nbytes = int(2 ** self.random.uniform(9, 18))
        if mounts():
            self.counts["small file systems"] += 1

            def before() -> None:
                mount(folder / "out", nbytes)

            running = self.begin(name, folder, before=before)
        else:
            self.counts["limits on the size of files"] += 1
            running = self.begin(name, folder, before=lambda: limit_files(nbytes))
        status = running.end({0, 2})
        self.counts[f"exit status {status} on a full disk"] += 1
        self.finish(name, folder)

    def no_shared_memory(self, folder: Path) -> None:
        """A process that reads images has little shared memory, or none."""
        name, nbytes = "merge, torch", int(2 ** self.random.uniform(12, 16))
        is_small = mounts() and self.random.random() < 0.5  # found before the run; in the other case by who reads
        self.counts["small /dev/shm" if is_small else "limits on shared memory"] += 1
        before = (lambda: mount(Path("/dev/shm"), nbytes)) if is_small else (lambda: limit_files(nbytes))
        running = self.begin(name, folder, before=before)
        status = running.end({0, 1, 2})
        self.counts[f"exit status {status} with little shared memory"] += 1
        self.finish(name, folder)

    def damaged_checkpoint(self, folder: Path) -> None:
        """The newest checkpoint of a killed run."""
        name = self.random.choice([name for name in COMMANDS if not name.startswith("data")])
        self.undisturbed(name)
        running = self.begin(name, folder)
        if running.wait(self.random.uniform(0.5, 1) * self.seconds[name]) is None:
            running.send(signal.SIGKILL, True)
            running.wait()
        files = sorted((folder / "out" / "checkpoints").rglob("[0-9]*.safetensors"))
        if len(files) > 1 and files[-1].parent == files[-2].parent:
            self.counts[f"checkpoint {damage(files[-1], self.random)}"] += 1
        self.finish(name, folder)

    def damaged_image(self, folder: Path) -> None:
        """One image of the tree; every command that reads it names it, or takes it."""
        tree = shutil.copytree(self.here / "tree", folder / "tree")
        file = self.random.choice(sorted(tree.rglob("*.jpg")))
        self.counts[f"image {damage(file, self.random)}"] += 1
        for command in ("data check {tree} --quiet", "data prepare {tree} small --quiet", *MERGES):
            words = command.format(tree=tree, here=self.here).split()
            running = Running(words, folder)
            status = running.end({0, 1, 2}) if words[1] != "check" else running.wait()
            if status is None or "Traceback" in running.error.read_text(errors="replace"):
                raise Loss(f"fastmerge {command} hangs or ends with a traceback")
            if status and words[1] != "check" and file.name not in running.error.read_text(errors="replace"):
                raise Loss(f"fastmerge {command} does not name the file")
            self.counts[f"exit status {status} with a damaged image"] += 1
            shutil.rmtree(folder / "out", ignore_errors=True)

    def damaged_weights(self, folder: Path) -> None:
        """A teacher's file is refused in one line, unless it is as good as before."""
        file = folder / "1.pt"
        shutil.copy(self.here / "1.pt", file)
        self.counts[f"weights {damage(file, self.random)}"] += 1
        words = [str(file) if word == f"{self.here}/1.pt" else word for word in self.words("merge, device")]
        status = Running(words, folder).end({0, 2})
        self.counts[f"exit status {status} with damaged weights"] += 1
        if status == 0 and results(folder / "out") != self.undisturbed("merge, device"):
            raise Loss("damaged weights were merged")

    def two_at_once(self, folder: Path) -> None:
        """Two runs into one folder: one of them has it."""
        name = self.random.choice([name for name in COMMANDS if not name.startswith("data")])
        self.undisturbed(name)
        first = self.begin(name, folder)
        time.sleep(self.random.choice([0, self.random.random() * self.seconds[name]]))
        second = Running(self.words(name), folder)
        self.counts["commands begun"] += 1
        statuses = sorted([second.end({0, 2}), first.end({0, 2})])
        self.counts[f"exit statuses {statuses} of two at once"] += 1
        if statuses == [2, 2]:
            raise Loss("both were refused")
        if results(folder / "out") != self.undisturbed(name):
            raise Loss("two runs at once gave something else")

    def soak(self, seconds: float) -> None:
        """Goes on until the time is over, and at least once through all kinds."""
        end, waiting = time.monotonic() + seconds, list(dict.fromkeys(self.rounds))
        while waiting or time.monotonic() < end:
            do = waiting.pop(0) if waiting else self.random.choice(self.rounds)
            kind = do.__name__.replace("_", " ")
            folder = self.folder(kind)
            try:
                do(folder)
            except Loss as loss:
                self.losses.append(f"{kind} in {folder}: {loss}")
                print(f"LOSS: {self.losses[-1]}", flush=True)
            else:
                shutil.rmtree(folder)
            self.counts[f"rounds: {kind}"] += 1


MERGES = tuple(
    f"{MERGE.replace('{here}/tree', '{tree}')} --merge-epochs 1 --finetune-epochs 1 --loader {loader} --on-bad-image {do}"
    for loader in ("torch --workers 0", "dali --workers 1")
    for do in ("raise", "skip")
)


def results(out: Path) -> dict[str, str]:
    """Digests of what is promised to come out the same: students and prepared images."""
    files = [
        file for file in out.rglob("*") if file.suffix in (".safetensors", ".jpg") and "checkpoints" not in file.parts
    ]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def damage(file: Path, random: random.Random) -> str:
    """Changes a file; returns how."""
    data = bytearray(file.read_bytes())
    how = random.choice(["flipped", "cut", "emptied", "overwritten", "exchanged"])
    if how == "flipped":
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif how == "cut":
        del data[random.randrange(len(data)) :]
    elif how == "emptied":
        data.clear()
    elif how == "overwritten":
        at = random.randrange(len(data))
        data[at : at + 64] = random.randbytes(len(data[at : at + 64]))
    else:
        data = bytearray(random.randbytes(100))
    file.write_bytes(data)
    return how


def mounts() -> bool:
    """Whether this user may mount file systems, in a name space of its own."""
    pid = os.fork()
    if pid == 0:
        os._exit(ctypes.CDLL(None).unshare(CLONE_NEWNS) and 1)
    return os.waitpid(pid, 0)[1] == 0


def mount(path: Path, nbytes: int) -> None:
    """Puts a small, empty file system at a path, for this process and those that it begins."""
    libc = ctypes.CDLL(None, use_errno=True)
    private = 1 << 18 | 1 << 14  # MS_PRIVATE, MS_REC
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, private, None):
        raise OSError(ctypes.get_errno(), "unshare")
    if libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, f"size={nbytes}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


def limit_files(nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=30, help="default 30; every kind of harm is done once at least"
    )
    parser.add_argument("--seed", type=int, help="default another one each time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed = random.randrange(2**32) if options.seed is None else options.seed
    here = Path(tempfile.mkdtemp(prefix="fastmerge-soak-"))
    print(f"seed {seed}, in {here}", flush=True)
    soak = Soak(here, seed)
    try:
        soak.soak(60 * options.minutes)
    finally:
        for name, count in sorted(soak.counts.items()):
            print(f"{count:6} {name}")
        print(f"{len(soak.losses):6} LOSSES")
        print(*soak.losses, sep="\n")
    if not soak.losses:
        shutil.rmtree(here)
    return bool(soak.losses)


if __name__ == "__main__":
    sys.exit(main())
