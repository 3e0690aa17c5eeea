"""What a run that was stopped needs to go on: its checkpoints, its random states, and requests to stop.

Checkpoints are the last two states of a run, each one safetensors file, whole, checked, and of this very run. safetensors is
imported where files are, so that a merge without checkpoints runs where it is missing. Ctrl-C and SIGTERM are requests that a
run meets at the next step's end, with a checkpoint, instead of in its middle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmerge.files import atomic

FORMAT = "fastmerge checkpoint"
VERSION = 2
_KEPT = 2
_HEADER = "run"


class Snapshots:
    """The checkpoints of one run in a directory of its own, ``000001.safetensors`` and so on.

    A file holds the state's tensors and, as JSON in its metadata, the rest: no pickle. It appears under its name when it
    is whole, and the one before it stays, so that no crash and no full disk costs more than the work since then.

    Args:
        directory: Made when the first one is written.
        options: What the run depends on, JSON values; a checkpoint of other options is refused.
    """

    def __init__(self, directory: str | Path, options: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self.options: dict[str, Any] = json.loads(json.dumps(options))
        self._passed_over: set[Path] = set()

    def files(self) -> list[Path]:
        """Those there are, the newest last."""
        found = (path for path in self.directory.glob("*.safetensors") if path.stem.isdecimal())
        return sorted(found, key=lambda path: int(path.stem))

    def save(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint and removes the last good one but two; those that :meth:`load` passed over stay.

        Where the disk is full or fails, it warns, and the checkpoints before stay.

        Raises:
            TypeError: The state holds what a checkpoint can't.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        structure, tensors = pack(state)
        text = json.dumps({"torch": torch.__version__, "options": self.options, "state": structure})
        before = self.files()
        good = [file for file in before if file not in self._passed_over]
        self._remove_partial()
        path = self.directory / f"{int(before[-1].stem) + 1 if before else 1:06d}.safetensors"
        metadata = {"format": FORMAT, "version": str(VERSION), _HEADER: text, "checksum": _checksum(text, tensors)}
        try:
            with atomic(path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except (OSError, SafetensorError) as error:
            kept = f"the last one, {good[-1]}, stays" if good else "there is none yet"
            warnings.warn(f"could not write the checkpoint {path} ({error}); {kept}", stacklevel=2)
            return
        for old in good[: 1 - _KEPT]:
            with contextlib.suppress(OSError):
                old.unlink()

    def load(self) -> dict[str, Any] | None:
        """The newest good state, or None where there is no checkpoint. One that can't be used is warned of and passed over.

        Raises:
            ValueError: There are checkpoints but no good one, or they are of a run with other options; the message names
                the file, and the option that differs.
        """
        problems = []
        for path in reversed(self.files()):
            try:
                header, state = read_snapshot(path)
            except ValueError as error:
                problems.append(str(error))
                self._passed_over.add(path)
                continue
            for problem in problems:
                warnings.warn(f"{problem}; going back to {path}", stacklevel=3)
            self._check_options(path, header["options"])
            return state
        if problems:
            raise ValueError(f"there is no good checkpoint to continue from: {'; '.join(problems)}")
        return None

    def _remove_partial(self) -> None:
        """Removes what a process that was killed in writing left half written."""
        for path in self.directory.glob(".*-*.safetensors"):
            if path.name[1:].partition("-")[0].isdecimal():
                with contextlib.suppress(OSError):
                    path.unlink()

    def _check_options(self, path: Path, found: dict[str, Any]) -> None:
        for name in [*self.options, *found]:
            now, then = self.options.get(name), found.get(name)
            if now != then:
                raise ValueError(
                    f"{path} is of a run with {name} {_short(then)}; this one has {_short(now)}. Continue with the same "
                    "options, or begin a run in another directory"
                )


def read_snapshot(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint: (header, state), tensors on the CPU.

    Raises:
        ValueError: It is damaged, not one of fastmerge's, or of another version; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    version = metadata.get("version", "")
    if metadata.get("format") != FORMAT or not version.isdecimal():
        raise ValueError(f"{path} is no checkpoint of a fastmerge run")
    if int(version) != VERSION:  # before the checksum, which other versions make otherwise
        raise ValueError(f"{path} is of version {version} of the format, and this fastmerge reads version {VERSION}")
    if metadata.get("checksum") != _checksum(metadata.get(_HEADER, ""), tensors):
        raise ValueError(f"{path} is damaged (its checksum does not fit its content)")
    header = json.loads(metadata[_HEADER])
    return header, unpack(header["state"], tensors)


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    total = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_PLAIN = (type(None), bool, int, float, str)


def pack(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Takes state apart.

    Args:
        value: Tensors, plain values, and dicts (keys str or int), lists, tuples and Counters of such.
        path: What names of tensors begin with.

    Returns:
        (structure, tensors): JSON values in which ``{"tensor": name}`` stands for a tensor, and copies of the tensors by
        name, contiguous and on the CPU.

    Raises:
        TypeError: Something else is in it; the message says where.
    """
    if isinstance(value, Tensor):
        return {"tensor": path}, {path: value.detach().cpu().clone(memory_format=torch.contiguous_format)}
    if isinstance(value, (np.bool_, np.number)):  # such as a learning rate of np.logspace
        value = value.item()
    if type(value) in _PLAIN:
        return value, {}
    tensors: dict[str, Tensor] = {}

    def inner(item: Any, name: Any) -> Any:
        structure, found = pack(item, f"{path}/{name}" if path else str(name))
        tensors.update(found)
        return structure

    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[key, inner(item, key)] for key, item in value.items()]}, tensors
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [inner(item, index) for index, item in enumerate(value)]}, tensors
    raise TypeError(
        f"a checkpoint holds tensors, numbers, strings, lists and dicts; {path} is a {type(value).__name__}"
    )


def unpack(structure: Any, tensors: dict[str, Tensor]) -> Any:
    """Puts state together again from what :func:`pack` returned."""
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("dict", "counter"):
        found = {key: unpack(item, tensors) for key, item in content}
        return Counter(found) if kind == "counter" else found
    items = [unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def fingerprint(tensors: nn.Module | Mapping[str, Any]) -> str:
    """64 bits of the SHA-256 of names, shapes, dtypes and values.

    Args:
        tensors: By name; what is no tensor is left out. Of a network, its state dict's.
    """
    digest = hashlib.sha256()
    for name, value in (tensors.state_dict() if isinstance(tensors, nn.Module) else tensors).items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fingerprints(teachers: Sequence[nn.Module]) -> dict[str, str]:
    """Which teachers these are."""
    return {f"teacher {index}": fingerprint(teacher) for index, teacher in enumerate(teachers)}


def random_states(device: torch.device) -> dict[str, Any]:
    """What :func:`restore_random_states` needs, as tensors and plain values."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, *rest = np.random.get_state(legacy=True)
    states["numpy"] = (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Goes back to random states; a GPU's stays as it is where the states were taken without one."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def loader_state(loader: Any) -> dict[str, Any]:
    """The states of a loader's own generators, and what its ``state_dict`` gives, if it has one."""
    state: dict[str, Any] = {"generators": [generator.get_state() for generator in _generators(loader)]}
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        state["state"] = loader.state_dict()
    return state


def restore_loader_state(loader: Any, state: dict[str, Any]) -> None:
    """Puts a loader back to where :func:`loader_state` was taken of it or of its like."""
    for generator, saved in zip(_generators(loader), state["generators"], strict=False):
        generator.set_state(saved)
    if "state" in state:
        loader.load_state_dict(state["state"])


@contextlib.contextmanager
def aside(loader: Any, device: torch.device) -> Iterator[None]:
    """What is read of a loader within it changes neither random numbers nor what the loader gives afterwards."""
    states, order = random_states(device), loader_state(loader)
    try:
        yield
    finally:
        restore_random_states(states, device)
        restore_loader_state(loader, order)


def samplers_of(loader: Any) -> list[Any]:
    """A loader's sampler, its batch sampler and that one's own sampler, as far as it has them, each once."""
    of_batches = getattr(loader, "batch_sampler", None)
    found = getattr(loader, "sampler", None), of_batches, getattr(of_batches, "sampler", None)
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _generators(loader: Any) -> list[torch.Generator]:
    found = [getattr(owner, "generator", None) for owner in (loader, *samplers_of(loader))]
    unique = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
    return list(unique.values())


_OWN_TO_PYTHON = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interrupted(KeyboardInterrupt):
    """A run ended at a signal's request.

    Attributes:
        number: The signal's; a process that ends for it exits with 128 + number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class StopRequests:
    """Within this context the first SIGINT or SIGTERM is kept for :meth:`raise_if_any`; a second one acts as ever.

    In a process whose parent sees to its end, where ``ends_by_parent`` is set, a second one does nothing: the first came to
    all processes of a job, and the second is the parent's, which had it too.

    Signals for which the program has a handler of its own are left to it, as are all outside the main thread.

    Args:
        enabled: Whether to.

    Attributes:
        number: The signal that came, or None.
    """

    ends_by_parent = False

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._at_childs_end: Any = None

    def __enter__(self) -> StopRequests:
        if self.enabled and threading.current_thread() is threading.main_thread():
            for number, usual in _OWN_TO_PYTHON.items():
                if signal.getsignal(number) == usual:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._give_back()
        if self._at_childs_end is not None:
            signal.signal(signal.SIGCHLD, self._at_childs_end)
            self._at_childs_end = None

    def raise_if_any(self) -> None:
        """Raises Interrupted where a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        # A DataLoader's workers may have had the signal, too. At their end PyTorch raises an error wherever this process is;
        # when the next batch is asked for, it finds out anyway.
        if self._at_childs_end is None and callable(before := signal.getsignal(signal.SIGCHLD)):
            self._at_childs_end = before
            signal.signal(signal.SIGCHLD, _nothing)
        if not StopRequests.ends_by_parent:
            self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler that lets a signal pass."""
