"""results.json and history.json: written whole, read back as they were, refused where they are wrong."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from fastmerge.reporting.results import read, write, write_json

RESULTS = {
    "recipe": "sine",
    "metric": "test_loss",
    "strategies": {"student": {"values": [0.1, 0.2], "epochs": 900, "seconds": 1.5}},
    "environment": {"torch": "2"},
    "config": {"budget": 1.0},
}


def test_what_is_written_is_read_back(tmp_path):
    history = {"gates": {"lam": [0.1]}}
    write(tmp_path / "new" / "run", RESULTS, history)
    assert read(tmp_path / "new" / "run") == (RESULTS, history)
    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == ["history.json", "results.json"]
    assert (tmp_path / "new" / "run" / "results.json").stat().st_mode & 0o777 == 0o644


def test_history_is_optional(tmp_path):
    write(tmp_path, RESULTS)
    assert read(tmp_path) == (RESULTS, None)


def test_tensors_arrays_and_diverged_replicates_become_json(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["strategies"]["student"]["values"] = torch.tensor([0.5, math.inf], dtype=torch.float64)
    results["config"] = {"path": tmp_path, "sizes": np.arange(2), "pair": (np.float32(0.5), None)}
    write(tmp_path, results, {"x": [math.nan]})
    assert "NaN" not in (tmp_path / "results.json").read_text() + (tmp_path / "history.json").read_text()
    back, history = read(tmp_path)
    first, second = back["strategies"]["student"]["values"]
    assert first == 0.5
    assert math.isnan(second)
    assert back["config"] == {"path": str(tmp_path), "sizes": [0, 1], "pair": [0.5, None]}
    assert history == {"x": [None]}


def test_a_value_that_is_no_json_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(TypeError, match="a object came"):
        write_json(tmp_path / "x.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("metric"), "lacks metric"),
        (lambda r: r.update(metric="speed"), "metric must be one of test_loss, test_accuracy; it is 'speed'"),
        (lambda r: r.update(strategies={}), "at least one strategy"),
        (lambda r: r.update(strategies={"one": 3}), "strategy one must be an object"),
        (lambda r: r["strategies"]["student"].update(values=[]), "strategy student needs values"),
        (lambda r: r["strategies"]["student"].update(values=["x"]), "strategy student needs values"),
        (lambda r: r["strategies"]["student"].pop("epochs"), "strategy student needs epochs"),
        (lambda r: r["strategies"]["student"].update(seconds=True), "strategy student needs seconds"),
    ],
)
def test_results_of_another_form_are_refused(tmp_path, change, message):
    wrong = copy.deepcopy(RESULTS)
    change(wrong)
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", wrong)
    assert not (tmp_path / "out").exists()
    (tmp_path / "results.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=f"results.json.*{message}"):
        read(tmp_path)


def test_what_can_not_be_read_is_said_clearly(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no results\.json"):
        read(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is not JSON"):
        read(tmp_path)
    write(tmp_path, RESULTS)
    (tmp_path / "history.json").write_text("[]")
    with pytest.raises(ValueError, match=r"history\.json must hold an object; it holds a list"):
        read(tmp_path)
