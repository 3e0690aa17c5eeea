"""What the page of many teachers shows, and what merging them costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import evidence, many_teachers
from fastmerge.experiments.strategies import STRATEGIES
from tiny_recipes import images_recipe


def results() -> dict:
    values = {name: [0.6 + 0.01 * n for n in range(6)] for name in ("ours", "one", "ensemble")}
    values |= {f"side by side, {count}": [0.7, 0.71, 0.72, 0.7, 0.7, 0.7] for count in (3, 4, 8)}
    values |= {"ours-3": [0.7 + 0.01 * n + 0.001 * (n % 2) for n in range(6)]}
    values |= {"ours-4": [0.6, 0.62, 0.61, 0.64, 0.63, 0.65], "recursive-4": [0.6, 0.62, 0.61, 0.64, 0.63, 0.65]}
    values |= {name: [0.4 + 0.01 * n + 0.001 * (n % 2) for n in range(6)] for name in ("ours-8", "recursive-8")}
    strategies = {name: {"values": each, "epochs": 6, "cost": 6.0} for name, each in values.items()}
    merging = {str(t): {"apart": float(t), "linked": t**2 / 2, "bytes": t * 2**20, "one": 2**20} for t in (2, 3, 4, 8)}
    config = {
        "teachers": 2,
        "teacher": {"epochs": 24},
        "merge": {"merge_epochs": 12},
        "replicates": 6,
        "test_samples": 100,
    }
    made = {"cpu": {"name": "a CPU"}, "torch": "2"}
    return {
        "strategies": strategies,
        "merging": merging,
        "config": config,
        "environment": made,
        "what": "toys",
        "minutes": 3.2,
    }


def test_the_page_says_first_where_more_teachers_are_ahead_and_where_behind() -> None:
    blocks = many_teachers.blocks({"toys": results()})
    line = blocks["verdict"]
    assert line.startswith("* toys (two teachers train for 24 epochs each): behind: `ours-8` -19.95 ")
    assert "`recursive-8` -19.95 ± 0.02; ahead: `ours-3` +10.05 ± 0.02; no clear difference: `ours-4` " in line
    assert line.endswith("The best numbers of teachers are 3 at once, 2 pair by pair, 3 side by side, unmerged.")
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in blocks["parts"].splitlines() if row.startswith("| ")
    ]
    three = next(row for row in rows if row[0] == "ours-3")
    assert three[1:5] == ["3", "16", "6", "6"]
    assert three[6] == "**+10.05 ± 0.02**"
    assert ["8", "8.0", "32.0", "8.0", "8.0"] in rows


def test_the_picture_has_a_panel_for_each_part(tmp_path: Path) -> None:
    figure = many_teachers.plot({"toys": results(), "more": results()})
    assert [axes.get_title() for axes in figure.axes] == ["toys", "more"]
    path = many_teachers.save_figure(figure, tmp_path / "a.png")
    assert path.stat().st_size > 5000


def test_strategies_are_registered_and_costs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in many_teachers.LINES.values():
        assert set(line.values()) <= set(STRATEGIES)
    recipe = replace(images_recipe(), stack=2)
    monkeypatch.setattr(evidence, "PARTS", {"tiny": evidence.Part("columns", lambda: recipe, 2, 1)})
    monkeypatch.setattr(many_teachers, "COUNTS", (2, 3))
    found = many_teachers._merging(many_teachers.Part("tiny", 1, 2), None)
    assert (found["2"]["apart"], found["3"]["apart"]) == pytest.approx((2, 3), rel=0.01)
    assert found["2"]["linked"] > 2
    assert found["3"]["bytes"] > found["2"]["bytes"] > 2 * found["2"]["one"]
