"""Plots: what stands in the figures is what the run's files say."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection

from fastmerge.reporting import report
from fastmerge.reporting.report import write_report
from fastmerge.reporting.results import write

RESULTS = {
    "recipe": "sine",
    "metric": "test_loss",
    "strategies": {
        "student": {"values": [0.07, 0.08, 0.09, 0.1, 0.11], "epochs": 9, "seconds": 1},
        "one": {"values": [0.2, 0.3, None], "epochs": 9, "seconds": 1},
    },
    "environment": {"torch": "2.11", "gpus": []},
    "config": {"budget": 0.5, "path": None},
}
HISTORY = {
    "curves": {
        "student": {"epochs": [1, 2, 3], "train_loss": [3, 2, 1], "test_loss": [[3, 5], [2, 4], [1, None]]},
        "one": {"epochs": [1, 3], "train_loss": [4, 2]},
    },
    "stages": {"student": {"merge": 1, "fine-tune": 2}},
    "gates": {
        "epochs": [1, 2],
        "lam": [0.1, 0.4],
        "target": 0.5,
        "open_probability": {"a": [0.9, 0.6], "b": [0.8, 0.5]},
    },
}


def arrays():
    x = np.linspace(0, 1, 5)
    return {"x": x[::-1], "true": x[::-1], "student": np.stack([x[::-1] + 0.1, x[::-1] + 0.3, x[::-1] + 0.2])}


def test_every_replicate_is_a_dot_and_the_paper_a_diamond():
    axes = report.plot_strategies(RESULTS).axes[0]
    dots = [part.get_offsets()[:, 1].tolist() for part in axes.collections if isinstance(part, PathCollection)]
    assert dots == [[0.07, 0.08, 0.09, 0.1, 0.11], [0.077], [0.2, 0.3], [0.249]]
    assert [label.get_text().split("\n")[0] for label in axes.get_xticklabels()] == ["student", "one"]
    assert len(axes.patches) == 1  # a box needs more than three values
    medians = [part for part in axes.collections if isinstance(part, LineCollection)]
    assert [line.get_segments()[0][0][1] for line in medians] == [0.25]


def test_the_median_replicate_stands_for_its_strategy():
    axes = report.plot_learned(arrays()).axes[0]
    *behind, true, median = axes.get_lines()
    assert len(behind) == 3
    assert np.allclose(true.get_ydata(), [0, 0.25, 0.5, 0.75, 1])
    assert np.allclose(true.get_xdata(), true.get_ydata())
    assert np.allclose(median.get_ydata() - true.get_ydata(), 0.2)


@pytest.mark.parametrize("groups", [2, 20])
def test_gates_show_each_group_and_lambda(groups):
    gates = HISTORY["gates"] | {"open_probability": {f"layer{i}": [0.9, i / groups] for i in range(groups)}}
    top, bottom = report.plot_gates(gates).axes[:2]
    assert [line.get_ydata()[-1] for line in top.get_lines()[:groups]] == [i / groups for i in range(groups)]
    assert list(top.get_lines()[-1].get_ydata()) == [0.5, 0.5]
    assert list(bottom.get_lines()[0].get_ydata()) == [0.1, 0.4]
    assert bool(top.get_legend()) == (groups == 2)


def test_training_curves_are_the_median_over_the_replicates():
    loss, test = report.plot_training(HISTORY["curves"], HISTORY["stages"]).axes
    assert [list(line.get_ydata()) for line in loss.get_lines()[:2]] == [[3, 2, 1], [4, 2]]
    assert list(test.get_lines()[0].get_ydata()) == [4, 3, 1]
    assert [line.get_xdata()[0] for line in loss.get_lines()[2:]] == [1, 2]


def test_the_legend_names_strategies_that_the_first_panel_lacks():
    panel, _ = report.plot_training(
        {"one": {"train_loss": [2, 1], "val_loss": [2, 1]}, "repair": {"val_loss": [3, 2]}}
    ).axes
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["one", "repair"]
    assert panel.get_ylabel() == "training loss"


def test_epochs_without_a_score_leave_no_gap():
    (accuracy,) = report.plot_training(
        {"student": {"epochs": [1, 2, 3, 4], "val_accuracy": [None, 0.5, None, 0.7]}}
    ).axes
    (line,) = accuracy.get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 4], [0.5, 0.7])


def test_a_report_writes_what_the_run_allows(tmp_path):
    write(tmp_path, RESULTS)
    text = write_report(tmp_path)
    assert text.startswith("strategy")
    assert "Diverged and left out: 1 of one" in text
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "strategies.png", "report.md"}
    write(tmp_path, RESULTS, HISTORY)
    np.savez(tmp_path / "curves.npz", **arrays())
    write_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    for name in ("strategies", "learned", "gates", "training"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in report
    assert "- budget: 0.5" in report
    assert "- gpus: none" in report


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, fastmerge.reporting.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
