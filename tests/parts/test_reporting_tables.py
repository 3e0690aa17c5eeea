"""Tables: the statistics, the layout, and the paper's figures beside them."""

import math
from statistics import mean, stdev

import pytest
from scipy import stats

from fastmerge.reporting.tables import caption, differences_table, holm, paired, results_table, summarise, table

VALUES = [0.07, 0.08, 0.12]


def results(**changes):
    strategies = {
        "student": {"values": VALUES, "epochs": 900, "seconds": 12.3},
        "one": {"values": [0.25, math.nan], "epochs": 900, "seconds": 4},
    }
    return {
        "recipe": "sine",
        "metric": "test_loss",
        "strategies": strategies,
        "environment": {},
        "config": {},
    } | changes


def test_statistics_are_of_the_finite_values():
    summary = summarise([*VALUES, math.nan, math.inf])
    assert (summary.n, summary.diverged) == (3, 2)
    assert (summary.min, summary.max, summary.median) == (0.07, 0.12, 0.08)
    assert summary.mean == pytest.approx(mean(VALUES))
    assert summary.std == pytest.approx(stdev(VALUES))
    assert summarise([1.0]).mean == 1.0
    assert math.isnan(summarise([1.0]).std)
    assert math.isnan(summarise([math.nan]).mean)


def test_columns_are_aligned():
    assert table(["a", "b"], [["long", "1"], ["x", "22"]]) == "a      b\n----  --\nlong   1\nx     22"
    assert table(["a", "b"], [["x", "22"]], markdown=True) == "| a |  b |\n|---|---:|\n| x | 22 |"


def test_a_column_without_entries_is_left_out():
    assert table(["a", "b", "c"], [["x", "–", "1"], ["–", "–", "–"]]) == "a  c\n-  -\nx  1\n–  –"
    assert table(["a", "b"], [["–", "–"]]) == "a\n-\n–"
    assert table(["a", "b"], []) == "a  b\n-  -"


def test_the_papers_mean_stands_beside_the_runs():
    header, _, student, one = results_table(results()).splitlines()
    assert header.split()[:8] == ["strategy", "epochs", "n", "min", "max", "median", "mean", "std"]
    assert header.endswith("paper's mean")
    assert student.split() == ["student", "900", "3", "0.0700", "0.1200", "0.0800", "0.0900", "0.0265", "0.0770"]
    assert one.split() == ["one", "900", "1", "0.2500", "0.2500", "0.2500", "0.2500", "–", "0.2490"]
    assert "paper" not in results_table(results(recipe="digits"))


@pytest.mark.parametrize(("metric", "best"), [("test_loss", "**0.0900**"), ("test_accuracy", "**0.2500**")])
def test_markdown_marks_the_best_mean(metric, best):
    text = results_table(results(metric=metric), markdown=True)
    assert best in text
    assert text.count("**") == 2


def test_the_caption_says_what_the_table_does_not():
    seconds = "Seconds for all replicates: student 12 s, one 4 s."
    assert caption(results()) == f"Test loss, lower is better. {seconds} Diverged and left out: 1 of one."
    short = caption(results(config={"budget": 0.25}))
    assert "This run had 0.25 of the paper's epochs." in short
    assert "paper" not in caption(results(recipe="digits", config={"budget": 0.25}))
    assert "higher is better" in caption(results(metric="test_accuracy"))


def test_differences_are_of_the_same_replicates_and_costs_stand_beside_the_epochs():
    strategies = {
        "student": {"values": [0.5, 0.7, math.nan, 0.9], "epochs": 6, "cost": 7.8, "seconds": 1},
        "one": {"values": [0.4, 0.5, 0.1, 0.6], "epochs": 6, "cost": 6.0, "seconds": 1},
    }
    both = results(recipe="digits", metric="test_accuracy", strategies=strategies)
    rows = differences_table(both).splitlines()
    assert rows[-1].split() == ["student", "-", "one", "3", "+0.2000", "0.0577", "0.074"]
    assert results_table(both).splitlines()[2].split()[:4] == ["student", "6", "8", "3"]
    assert "Cost is in epochs of one network" in caption(both)
    del strategies["one"]["cost"]  # an older run, whose strategies had teachers of their own
    assert differences_table(both) == ""
    assert results_table(both).splitlines()[2].split()[:3] == ["student", "6", "3"]
    assert differences_table(results(strategies={"one": strategies["student"]})) == ""


def test_what_came_before_fine_tuning_and_the_loss_stand_beside_the_accuracy():
    strategies = {
        "repair": {
            "values": [0.5, 0.7],
            "losses": [0.6, 0.8],
            "at_once": [0.2, None],
            "epochs": 6,
            "cost": 6,
            "seconds": 1,
        },
        "one": {"values": [0.4, 0.5], "losses": [0.9, 1.0], "epochs": 6, "cost": 6, "seconds": 1},
    }
    found = results(recipe="digits", metric="test_accuracy", strategies=strategies)
    header, _, repair, one = results_table(found).splitlines()
    assert header.split()[-3:] == ["at", "once", "loss"]
    assert repair.split()[-2:] == ["0.2000", "0.7000"]
    assert one.split()[-2:] == ["–", "0.9500"]
    assert caption(found).endswith("At once: before fine-tuning.")
    strategies["repair"].pop("at_once")
    assert "at once" not in results_table(found)
    assert "loss" not in results_table(found | {"metric": "test_loss"})


def test_differences_are_tested_in_pairs():
    one, other = [0.5, 0.7, math.nan, 0.9, 0.8], [0.4, 0.5, 0.1, 0.6, math.inf]
    found = paired(one, other)
    assert (found.n, found.mean) == (3, pytest.approx(0.2))
    assert found.p == pytest.approx(stats.ttest_rel([0.5, 0.7, 0.9], [0.4, 0.5, 0.6]).pvalue)
    assert paired(one, one).p == 1.0
    assert paired([1.0, 2.0], [0.0, 1.0]).p == 0.0
    assert math.isnan(paired([1.0], [0.5]).p)


def test_many_comparisons_are_corrected_as_holm_does():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, math.nan, 0.6])[::2] == [1.0, 1.0]
    assert math.isnan(holm([0.9, math.nan])[1])
    assert holm([]) == []
