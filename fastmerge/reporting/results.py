"""results.json and history.json: what a run leaves behind, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
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
        history: Per-epoch values for the plots; see ``fastmerge.reporting.plots``.

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
