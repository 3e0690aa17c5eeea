"""The ablations: paired, resumable, and their edits at compression are what they say."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import ablation_lab, ablations
from benchmarks.ablation_lab import Ablation
from benchmarks.ablation_report import base_of, overview, paired, section
from benchmarks.ablation_variants import BASE, OneDrawPerBatch, fold_gates, foldable_groups, rescale_head, variants
from fastmerge import BigStudent
from fastmerge.data.dataset import Dataset
from fastmerge.experiments.place import Place
from fastmerge.experiments.recipes import RECIPES, Recipe, digits
from fastmerge.networks import ResNetCifar, small_lenet
from teachers import make_batch, make_teachers, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*P.g>0.:UserWarning")  # in so few steps no gate gets anywhere
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("make", [lambda: ResNetCifar(1, 5), lambda: small_lenet(5)], ids=["resnet", "lenet"])
def test_folded_gates_make_the_student_compute_what_the_big_student_does(make: Any) -> None:
    inputs = (make_batch(4, (3, 12, 12)) if make().conv1.in_channels == 3 else make_batch(4, (1, 8, 8)),)
    teachers = make_teachers(make, inputs, 2)
    big: Any = BigStudent(*teachers, example_inputs=inputs)
    folded = {big.groups[number].name for number in foldable_groups(big)}
    assert len(folded) == (3 if isinstance(teachers[0], ResNetCifar) else 4)
    with torch.no_grad():
        for name, keep in big.keep().items():
            loc = big.gates[name].loc
            chosen = torch.randperm(len(loc))[: len(keep)]
            loc.fill_(-30)
            loc[chosen] = torch.linspace(-1.5, 1.5, len(keep), dtype=loc.dtype) if name in folded else 30.0
        student = big.eval().compress()
        plain = student(*inputs)
        fold_gates(student, big, [])
        assert relative_error(student(*inputs), big(*inputs)) < 1e-9
        assert relative_error(plain, big(*inputs)) > 1e-3


def test_the_heads_weights_are_multiplied() -> None:
    big: Any = BigStudent(small_lenet(), small_lenet(), small_lenet())
    student = big.compress()
    before = copy.deepcopy(student.state_dict())
    rescale_head(student, big, [])
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name] * (3 if name == "fc3.weight" else 1))


def test_one_draw_is_shared_by_a_batch() -> None:
    torch.manual_seed(0)
    networks = [small_lenet(), small_lenet()]
    x = torch.randn(1, 1, 8, 8).expand(6, -1, -1, -1)
    rows = [len(kind(*networks).train()(x).unique(dim=0)) for kind in (OneDrawPerBatch, BigStudent)]
    assert rows == [1, 6]


def tiny(classes: int, width: int) -> nn.Module:
    return small_lenet(4, width)


def tiny_images(path: Path | None, seed: int, on_bad_image: str = "raise") -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(48, 1, 8, 8, generator=generator), torch.arange(48) % 4
    return Dataset(x[:32], y[:32], x[32:], y[32:])


def tiny_recipe() -> Recipe:
    recipe = digits().scaled(2 / 15)
    return replace(recipe, name="tiny", make_network=tiny, load_data=tiny_images, batch_size=16, stack=1)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "digits", tiny_recipe)

    def call(*words: str) -> dict[str, Any]:
        out = tmp_path / "tiny.json"
        ablations.main(["--recipe", "digits", "--out", str(out), *words])
        return json.loads(out.read_text())

    return call


def test_all_variants_of_all_replicates_and_going_on(run, tmp_path, monkeypatch):
    first = run("--replicates", "1", "--variants", "gates folded")
    assert list(first["variants"]) == [BASE, "gates folded"]
    chosen = ["--variants", "compacted", "gates folded"]
    everything = run("--replicates", "2", *chosen)
    assert sorted(everything["variants"]) == sorted([BASE, *chosen[1:]])
    names = [variant.name for variant in variants(tiny(4, 1), ablations.LINK_AT)]
    assert {"link_at 0.1", "link_at 1", "compacted", "head × T", "gates folded", "paper (4)"} <= set(names)
    assert "recalibrated" not in names
    assert not any(name.startswith("gate_lr") for name in names)
    assert variants(tiny(4, 1), (), 0.8333)[4].changes == {"gate_lr": 0.8333}
    assert "recalibrated" in [variant.name for variant in variants(ResNetCifar(1), (0.0,))]
    for variant in everything["variants"].values():
        assert list(variant["replicates"]) == ["0", "1"]
        assert all(0 <= found["student"] <= 1 for found in variant["replicates"].values())
    assert len(everything["teachers"]) == 2
    base, folded = (everything["variants"][name]["replicates"] for name in (BASE, "gates folded"))
    assert everything["variants"]["gates folded"]["compared_with"] == BASE
    assert everything["variants"]["compacted"]["compared_with"] == BASE
    assert "compared_with" not in everything["variants"][BASE]
    assert all(base[key]["open_probability"] == folded[key]["open_probability"] for key in base)  # one merge stage

    def never(self: Any, *arguments: Any) -> None:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(Ablation, "_train", never)
    assert run("--replicates", "2", *chosen) == everything
    with pytest.raises(ValueError, match="results of another configuration"):
        run("--seed", "1")


def test_variants_differ_only_by_their_choice(monkeypatch):
    """The same gates and orders; other draws are others."""
    seen: dict[str, tuple[list[float], list[float]]] = {}

    def stop(big: Any, options: Any, trainer: Any) -> None:
        first = next(iter(trainer.train_loader))[1].flatten().tolist()
        seen[name] = (torch.cat([p.flatten() for p in big.gate_parameters()]).tolist(), [*first, torch.rand(()).item()])
        raise InterruptedError

    place = Place(recipe=replace(tiny_recipe(), stack=2), data=None, device=torch.device("cpu"), seed=0).opened_here()
    ablation = Ablation(place, [0, 1], lambda networks: None)
    teachers = [[tiny(4, 1), tiny(4, 1)] for _ in range(2)]
    monkeypatch.setattr(ablation_lab, "learn_importance", stop)
    for variant in variants(tiny(4, 1), ()):
        if variant.merges and variant.name != "compacted":  # whose replicates train one by one
            name = variant.name
            with pytest.raises(InterruptedError):
                ablation.merged(teachers, variant)
    draws = {name: each[1] for name, each in seen.items()}
    assert all(gates == seen[BASE][0] for gates, _ in seen.values())
    others = [draws.pop(f"{BASE} ({number})") for number in (2, 3, 4)]
    assert len({*map(tuple, others), tuple(draws[BASE])}) == 4
    assert all(drawn == draws[BASE] for drawn in draws.values())


def test_a_stack_of_replicates_is_ablated_as_one_by_one(tmp_path) -> None:
    """Compacted ones come to differ in size."""
    place = Place(recipe=replace(tiny_recipe(), stack=2), data=None, device=torch.device("cpu"), seed=0).opened_here()
    ablation = Ablation(place, [0, 1], lambda networks: None)
    teachers = [[tiny(4, 1), tiny(4, 1)] for _ in range(2)]
    compacted = next(variant for variant in variants(tiny(4, 1), ()) if variant.name == "compacted")
    bigs = ablation.merged(teachers, compacted)
    bigs[1].gates["fc1"].loc.data[:3] = -9
    bigs[1].compact()
    students = ablation.compressed(bigs, compacted)
    assert len(ablation.scores(bigs)) == len(ablation.scores(ablation.finetuned(students, compacted))) == 2


def test_unknown_variants_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--variants", "luck")
    assert "got luck" in capsys.readouterr().err


def test_differences_are_paired() -> None:
    base = {str(k): {"student": 0.1 * k} for k in range(4)}
    found = {str(k): {"student": 0.1 * k + 0.01 + 0.002 * (k % 2)} for k in range(1, 4)}
    mean, error = paired(found, base, "student")
    assert mean == pytest.approx(0.01 + 0.004 / 3)
    assert error == pytest.approx(0.0011547 / math.sqrt(3), rel=1e-3)
    assert math.isnan(paired({"1": found["1"]}, base, "student")[1])


def test_the_base_is_the_mean_of_its_runs() -> None:
    runs = {
        name: {"replicates": {"0": {"student": value, "compressed": 2 * value}}}
        for name, value in {BASE: 0.25, f"{BASE} (2)": 0.5, "paperless": 0.9}.items()
    }
    assert base_of(runs) == {"0": {"student": 0.375, "compressed": 0.75}}


def test_clear_differences_are_bold() -> None:
    def variant(*values: float) -> dict[str, Any]:
        each = {"compressed": 0.5, "open_probability": {"a": 0.4, "b": 0.5}, "seconds": 2.0}
        return {"what": "x", "replicates": {str(key): each | {"student": value} for key, value in enumerate(values)}}

    results = {
        "config": {
            "name": "tiny",
            "metric": "test_accuracy",
            "epochs": 6,
            "budget": 1.0,
            "train_samples": 9,
            "batch_size": 4,
        },
        "environment": {"cpu": {"name": "C"}, "torch": "2"},
        "teachers": {"0": [0.4, 0.6]},
        "variants": {BASE: variant(*[0.5, 0.6] * 2), "worse": variant(*[0.4, 0.51] * 2), "same": variant(0.4, 0.7)},
    }
    results["variants"][f"{BASE} (2)"] = variant(*[0.5, 0.6] * 2)
    results["variants"]["few"] = variant(0.4, 0.51)
    results["variants"]["edited"] = variant(*[0.6, 0.75] * 2) | {"compared_with": "worse"}
    text = section(results)
    assert "**-0.0950 ± 0.0029**" in text
    assert " -0.0950 ± 0.0050 |" in text  # as far from zero, but two replicates say little
    assert " +0.0000 ± 0.1000 |" in text
    assert "**+0.2200 ± 0.0115**" in text  # to the run whose big students it shares
    assert "0.40–0.50" in text
    assert "9 training samples in batches of 4. The teachers" in text
    short = overview([results, {**results, "config": results["config"] | {"epochs": 1200}}])
    (worse,) = (line for line in short.splitlines() if line.startswith("| worse"))
    assert worse.count("**-0.0950 ± 0.0029**") == 2  # as in the sections
    assert "tiny, 6 epochs" in short
    assert "tiny, 1,200 epochs" in short
    assert f"| {BASE}" not in short
    results["config"]["autocast"] = "bfloat16"
    assert "in batches of 4, bfloat16. The teachers" in section(results)


def test_runs_beside_each_other_are_put_together(run, tmp_path):
    first = run("--replicates", "1", "--variants", "gates folded")
    beside = tmp_path / "beside.json"
    (tmp_path / "tiny.json").rename(beside)
    second = run("--replicates", "1", "--variants", "budget")
    both = run("--replicates", "1", "--variants", "budget", "gates folded", "--add", str(beside))
    assert set(both["variants"]) == {BASE, "budget", "gates folded"}
    for name in ("gates folded", BASE):
        assert (
            both["variants"][name]["replicates"]["0"]["student"]
            == first["variants"][name]["replicates"]["0"]["student"]
        )
    assert both["variants"][BASE] == second["variants"][BASE]
    beside.write_text(json.dumps(first | {"teachers": {"0": [0.0, 0.0]}}))
    with pytest.raises(ValueError, match="another teachers"):
        run("--replicates", "1", "--add", str(beside))
