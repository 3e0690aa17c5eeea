"""What a run leaves behind: results.json and history.json, written whole or not at all, and each epoch as it happens.

Epochs go into a JSONL file, and into TensorBoard's event files where they are asked for.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastmerge.files import atomic

METRICS = ("test_loss", "test_accuracy")
_KEYS = ("recipe", "metric", "strategies", "environment", "config")
_MERGE_KEYS = ("borders", "num_teachers", "kept", "warnings", "gates", "curves", "environment", "config")


def write(out: str | Path, results: dict[str, Any], history: dict[str, Any] | None = None) -> None:
    """Writes ``out/results.json`` and, where given, ``out/history.json``.

    Each file appears under its name only when it is complete; results.json comes last, so where it is, the run is
    whole. Tensors and arrays become lists. A number that is not finite (a replicate that diverged) becomes null.

    Args:
        out: Directory of the run; made if missing.
        results: An object with ``recipe``, ``metric`` ("test_loss" or "test_accuracy"), ``strategies`` (for each name
            ``values``, one per replicate, ``epochs`` and ``seconds``), ``environment`` and ``config``.
        history: Per-epoch values for the plots; see ``fastmerge.reporting.report``.

    Raises:
        ValueError: results lacks a key, or holds a value of the wrong kind.
    """
    out = Path(out)
    plain = _plain(results)
    _validate(plain, "results")
    if history is not None:
        write_json(out / "history.json", history)
    write_json(out / "results.json", plain)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, atomically; tensors and arrays become lists, NaN and Inf null."""
    text = json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read(out: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Reads what ``write`` wrote.

    Returns:
        (results, history); history is None where the run has no history.json. A null among a strategy's values comes
        back as NaN.

    Raises:
        FileNotFoundError: There is no results.json in ``out``.
        ValueError: A file is not JSON or not of the form that ``write`` writes; the message names the file and the key.
    """
    out = Path(out)
    path = out / "results.json"
    if not out.is_dir():
        raise FileNotFoundError(f"there is no directory {out}")
    if not path.is_file():
        raise FileNotFoundError(f"{out} holds no results.json; give the --out directory of a finished run")
    results = _load(path)
    _validate(results, str(path))
    for strategy in results["strategies"].values():
        strategy["values"] = [math.nan if value is None else value for value in strategy["values"]]
    history = _load(out / "history.json") if (out / "history.json").is_file() else None
    if history is not None and not isinstance(history, dict):
        raise ValueError(f"{out / 'history.json'} must hold an object; it holds a {type(history).__name__}")
    return results, history


def read_merge(out: str | Path) -> dict[str, Any]:
    """Reads the history.json of ``fastmerge merge``.

    Raises:
        ValueError: It is not JSON, or not the history of a merge.
    """
    path = Path(out) / "history.json"
    history = _load(path)
    if not isinstance(history, dict) or (missing := [key for key in _MERGE_KEYS if key not in history]):
        lacks = f"; it lacks {', '.join(missing)}" if isinstance(history, dict) else ""
        raise ValueError(f"{path} is not the history of a merge{lacks}")
    return history


def read_comparison(out: str | Path) -> dict[str, Any]:
    """Reads the compare.json of ``fastmerge compare``: its rows, what they were made by, and where.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not JSON, or holds no rows.
    """
    path = Path(out) / "compare.json"
    found = _load(path)
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise ValueError(f"{path} holds no rows of a comparison")
    return {"config": {}, "environment": {}, **found}


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _validate(results: Any, where: str) -> None:
    if not isinstance(results, dict):
        raise ValueError(f"{where} must be an object; it is a {type(results).__name__}")
    if missing := [key for key in _KEYS if key not in results]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if results["metric"] not in METRICS:
        raise ValueError(f"{where}: metric must be one of {', '.join(METRICS)}; it is {results['metric']!r}")
    strategies = results["strategies"]
    if not isinstance(strategies, dict) or not strategies:
        raise ValueError(f"{where}: strategies must be an object with at least one strategy")
    for name, strategy in strategies.items():
        if not isinstance(strategy, dict):
            raise ValueError(f"{where}: strategy {name} must be an object; it is a {type(strategy).__name__}")
        values = strategy.get("values")
        if (
            not isinstance(values, list)
            or not values
            or not all(value is None or _is_number(value) for value in values)
        ):
            raise ValueError(
                f"{where}: strategy {name} needs values, a list of one number per replicate; it has {values!r}"
            )
        for key in ("epochs", "seconds"):
            if not _is_number(strategy.get(key)):
                raise ValueError(f"{where}: strategy {name} needs {key}, a number; it has {strategy.get(key)!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors and numpy's arrays and scalars
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"results hold JSON values, tensors, arrays and paths; a {type(value).__name__} came: {value!r}")


class EpochLog:
    """One JSON object per line and epoch. A run that goes on appends, and an epoch that it repeats is not told twice.

    Args:
        path: The file.
        key: Which values tell an epoch from others.
        resume: Whether to append to what is there; a last line that was cut off is dropped.
        tensorboard: Directory for event files, or None.

    Raises:
        ValueError: Event files are asked for and the package ``tensorboard`` is not installed.
    """

    def __init__(self, path: Path, key: Sequence[str], resume: bool, tensorboard: Path | None = None) -> None:
        self.path, self.key = path, key
        lines = _whole_lines(path) if resume and path.is_file() else []
        self._told = {self._key(json.loads(line)) for line in lines}
        with atomic(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._board = None if tensorboard is None else _writer_class()(str(tensorboard))

    def write(self, values: dict[str, Any], step: int, tag: str = "") -> None:
        """Tells of an epoch, unless it was told of before. Where the disk is full or fails, it warns instead.

        Args:
            values: JSON values.
            step: Its place on TensorBoard's axis.
            tag: What TensorBoard's names of the values begin with.
        """
        key = self._key(values)
        if key in self._told:
            return
        with _warning_of_disks(self.path):
            _append(self.path, f"{json.dumps(values)}\n".encode())
            self._told.add(key)
        if self._board is None:
            return
        with _warning_of_disks(self._board.log_dir):
            for name, value in _scalars({k: v for k, v in values.items() if k not in self.key}, tag):
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Closes the event files."""
        if self._board is not None:
            with _warning_of_disks(self._board.log_dir):
                self._board.close()

    def _key(self, values: dict[str, Any]) -> str:
        return json.dumps([values.get(name) for name in self.key])


@contextlib.contextmanager
def _warning_of_disks(path: Path | str) -> Iterator[None]:
    """What the log can't tell costs no run."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"could not write to {path} ({error}); the run goes on, and its log has a gap", stacklevel=4)


def _append(path: Path, line: bytes) -> None:
    """Appends a line, or nothing where it fails in the middle."""
    with path.open("ab", buffering=0) as file:
        before, written = file.seek(0, os.SEEK_END), 0
        try:
            while written < len(line):
                written += file.write(line[written:])
        except OSError:
            file.truncate(before)
            raise


def _whole_lines(path: Path) -> list[str]:
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            json.loads(line)
        except ValueError:
            break  # a crash or a full disk cut it off; what follows repeats it
        found.append(line)
    return found


def check_tensorboard() -> None:
    """Raises where event files can't be written.

    Raises:
        ValueError: The package ``tensorboard`` is not installed.
    """
    _writer_class()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"--tensorboard needs the package tensorboard (pip install 'fastmerge[tensorboard]'): {error}"
        ) from error
    return SummaryWriter


def _scalars(values: Any, name: str) -> list[tuple[str, float]]:
    """Names with slashes and numbers; a list's are told apart by their places."""
    if not isinstance(values, (dict, list)):
        number = isinstance(values, (int, float)) and math.isfinite(values)
        return [(name, float(values))] if number else []
    parts: Iterable[tuple[Any, Any]] = values.items() if isinstance(values, dict) else enumerate(values)
    return [scalar for key, value in parts for scalar in _scalars(value, f"{name}/{key}" if name else str(key))]
