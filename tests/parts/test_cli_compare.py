"""``fastmerge compare`` from files to files."""

import contextlib
import copy
import inspect
import itertools
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fastmerge
from cli_files import MODEL, SOURCE, make
from fastmerge import methods
from fastmerge.checkpoints import Snapshots
from fastmerge.cli import main
from fastmerge.cli.compare import as_run
from fastmerge.evaluation import Criterion
from fastmerge.files import held
from fastmerge.history import Score
from fastmerge.methods.comparison import Row, compare
from fastmerge.methods.registry import METHODS
from fastmerge.reporting.results import write_json
from fastmerge.reporting.tables import comparison_table
from fastmerge.weights import load_weights, save_weights
from small_task import VAL, X, Y, train_loader, train_teachers

pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")


def arguments(names: str) -> list[str]:
    words = f"compare --model {MODEL} --teachers a.safetensors b.pt --data data.npz --out out --methods {names}"
    return f"{words} --epochs 1 --finetune-epochs 1 --batch-size 16 --device cpu".split()


def test_compare_writes_a_table_a_plot_and_the_networks(place: Path, capsys) -> None:
    assert main(arguments("average,reconstruct,distill,ensemble")) == 0
    shown = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((place / "out" / "compare.json").read_text())["rows"]}
    best = max(("teacher 0", "teacher 1"), key=lambda name: rows[name]["at_once"]["accuracy"])
    trained_on = f"{best}, trained on"
    assert [*rows] == ["teacher 0", "teacher 1", "average", "reconstruct", "distill", "ensemble", trained_on]
    assert rows["average"]["epochs"] == 1
    assert rows["average"]["cost"] == pytest.approx(1)
    assert rows["distill"]["epochs"] == 2
    assert 2.5 < rows["distill"]["cost"] < 3.5
    assert rows["ensemble"]["tuned"] is None
    assert rows[trained_on]["at_once"] == rows[best]["at_once"]
    dearest = max(rows[name]["cost"] for name in ("average", "reconstruct", "distill"))
    assert rows[trained_on]["epochs"] == rows[trained_on]["cost"] == round(dearest)
    table = (place / "out" / "compare.md").read_text()
    for name in rows:
        assert f"\n{name}" in shown
        assert f"\n| {name}" in table
    assert (place / "out" / "compare.png").stat().st_size > 5000
    load_weights(make(), place / "out" / "reconstruct.safetensors")
    (place / "out" / "compare.md").unlink()
    assert main(["report", "out"]) == 0
    assert "teacher 0" in capsys.readouterr().out
    assert (place / "out" / "compare.md").read_text() == table


def test_on_a_recipe_methods_are_strategies_of_a_run(tmp_path: Path, capsys) -> None:
    words = [
        "compare",
        "digits",
        "--methods",
        "repair,average",
        "--replicates",
        "2",
        "--budget",
        "0.2",
        "--workers",
        "1",
    ]
    assert main([*words, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["strategies"]
    assert list(found) == ["repair", "average"]
    assert len(found["average"]["at_once"]) == 2
    assert "repair - average" in shown
    assert "at once" in shown
    assert f"results, log.jsonl, report.md and plots in {tmp_path / 'out'}\n" in shown
    assert (tmp_path / "out" / "strategies.png").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("compare digits --methods=gates,zipit --seed 3", "run digits --strategy ours-plain,zipit --seed 3"),
        ("compare sine", "run sine --strategy ours-plain,average,ensemble,rebasin,transplant,reconstruct,repair,zipit"),
        ("compare digits --out a --resume", "run digits --out a --resume"),
        ("compare --model a --methods gates", "compare --model a --methods gates"),
        ("run digits", "run digits"),
        ("", ""),
    ],
)
def test_a_recipe_in_place_of_teachers(words: str, expected: str) -> None:
    assert as_run(words.split()) == expected.split()


def test_a_recipe_that_is_not_there(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "digit"])
    assert "invalid choice: 'digit'" in capsys.readouterr().err
    assert main(["compare", "digits", "--methods", "soup"]) == 2
    assert "unknown strategy soup; there are " in capsys.readouterr().err


def test_merge_takes_another_method(place: Path, capsys) -> None:
    words = arguments("average")[1:-10]
    words += ["--method", "reconstruct", "--finetune-epochs", "0", "--batch-size", "16", "--device", "cpu"]
    assert main(["merge", *words]) == 0
    assert capsys.readouterr().out.startswith(
        "cost: about 0 epochs of training one network (0 of fine-tuning); methods that read samples "
    )
    load_weights(make(), place / "out" / "student.safetensors")
    table = (place / "out" / "compare.md").read_text()
    assert "| reconstruct" in table
    assert "trained on" not in table
    for given, named in (
        (["--dry-run"], "--dry-run"),
        (["--autocast", "bfloat16", "--tensorboard"], "--autocast, --tensorboard"),
    ):
        assert main(["merge", *words, *given]) == 2
        assert f"--method reconstruct takes no {named}: only --method gates does" in capsys.readouterr().err
    for wrong, message in (("{", "is not JSON"), ("{}", "holds no rows of a comparison")):
        (place / "out" / "compare.json").write_text(wrong)
        assert main(["merge", "--out", "out", "--resume"]) == 2
        assert f"error: out/compare.json {message}" in capsys.readouterr().err
    assert main(["merge", *words, "--method", "ensemble"]) == 2
    assert "--method ensemble makes no network of the teachers' class; fastmerge compare" in capsys.readouterr().err


def test_merge_takes_a_method_that_the_models_module_registers(place: Path, capsys) -> None:
    own = """
import copy
from fastmerge.methods import register

@register("first", needs="weights", source="this test")
def first(teachers, batches):
    return copy.deepcopy(teachers[0])
"""
    (place / "fastmerge_compare_own_net.py").write_text(SOURCE + own)
    words = arguments("average")[1:-10]
    words[words.index("--model") + 1] = "fastmerge_compare_own_net:make"
    words += ["--finetune-epochs", "0", "--batch-size", "16", "--device", "cpu"]
    try:
        assert main(["merge", *words, "--method", "second"]) == 2
        assert "there is no method 'second'" in capsys.readouterr().err
        assert main(["merge", *words, "--method", "first"]) == 0
    finally:
        methods.METHODS.pop("first", None)
    assert torch.equal(load_file("out/student.safetensors")["0.weight"], load_file("a.safetensors")["0.weight"])


def test_merge_with_a_method_that_fails_has_no_student_and_says_so(place: Path, capsys) -> None:
    """Exit status 1, as of a merge by gates that diverges; a script goes on with the student otherwise."""
    words = arguments("average")[1:-10]
    words += ["--method", "average", "--finetune-epochs", "2", "--lr", "1e9", "--weight-decay", "1", "--device", "cpu"]
    for given in (words, ["--out", "out", "--resume"]):
        assert main(["merge", *given]) == 1
        assert "error: there is no student.safetensors; average: the loss became nan" in capsys.readouterr().err
    assert not (place / "out" / "student.safetensors").exists()


def test_methods_take_options(place: Path, capsys) -> None:
    words = [*arguments("reconstruct,average"), "--finetune-epochs", "0"]
    assert main([*words, "--set", "reconstruct.keep=luck", "reconstruct.samples=20"]) == 0
    rows = {row["name"]: row for row in json.loads((place / "out" / "compare.json").read_text())["rows"]}
    assert (
        rows["reconstruct"]["error"]
        == 'reconstruct keeps "pivots" or channels of the largest "magnitude"; got \'luck\''
    )
    assert rows["average"]["error"] == ""
    shown = capsys.readouterr().out
    assert shown.startswith("cost: about 0 epochs of training one network (0 of fine-tuning, 0 of the teacher that is ")
    assert "failed: reconstruct; go on with: fastmerge compare --out out --resume, which tries again\n" in shown
    (place / "out").rename(place / "before")
    assert main([*words, "--set", "reconstruct.luck=1"]) == 2
    assert "method 'reconstruct' has no option luck; it has samples, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--set", "by=activations"])
    assert "needs METHOD.OPTION=VALUE, such as rebasin.by=activations; got 'by=activations'" in capsys.readouterr().err
    merge = [*arguments("reconstruct")[1:-10], "--out", "merged", "--set", "reconstruct.samples=20"]
    assert main(["merge", *merge]) == 2
    assert "--set is for other methods than gates" in capsys.readouterr().err
    assert main(["merge", *merge, "--method", "reconstruct", "--finetune-epochs", "0", "--device", "cpu"]) == 0


def test_unknown_methods_end_before_anything_is_run(place: Path, capsys) -> None:
    assert main(arguments("average,glue")) == 2
    assert "there is no method 'glue'" in capsys.readouterr().err
    assert not (place / "out" / "compare.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--teachers b.pt", "merge needs at least two teachers; got 1"),
        ("--data five.npz", "train_loader has targets 0..4; the teachers have 3 classes, 0..2"),
        ("--device meta", "can't use device meta: it holds no values"),
        ("--lr nan", "a finite number above 0; got nan"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_run(place: Path, capsys, more: str, message: str) -> None:
    arrays = dict(np.load("data.npz"))
    np.savez("five.npz", **arrays | {"train_labels": np.arange(49) % 5})
    assert main([*arguments("average"), *more.split()]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_a_finished_run_keeps_its_files(place: Path, capsys) -> None:
    """Its student would be another's, beside its own history."""
    out = place / "out"
    out.mkdir()
    with held(out / ".lock"):
        assert main(arguments("average")) == 2
        assert "out is in use by another run, " in capsys.readouterr().err
    (out / "command.json").write_text('{"words": ["merge"], "finished": true}')
    assert main(arguments("average")) == 2
    assert "out holds a finished run, which would be replaced" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [".lock", "command.json"]


def test_a_comparison_has_one_process(place: Path, capsys, monkeypatch) -> None:
    """A second one would say that the first one's directory is in use by another run."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments("average")) == 2
    assert "in one process; start fastmerge without torchrun, not 2 times" in capsys.readouterr().err
    assert not (place / "out").exists()


OWN = """
from pathlib import Path
from fastmerge.methods import average, register

@register("own", needs="training", source="this test")
def own(teachers, batches, *, epochs=4):
    \"\"\"Fails until there is a file.\"\"\"
    if not Path("mended").exists():
        raise RuntimeError("not mended")
    Path("made").touch()
    return average(teachers)
"""


def test_rows_that_failed_are_tried_again_and_those_alone(place: Path, capsys) -> None:
    (place / "fastmerge_compare_tried_again.py").write_text(SOURCE + OWN)
    words = arguments("own,average,reconstruct")
    words[words.index("--model") + 1] = "fastmerge_compare_tried_again:make"
    try:
        assert main(words) == 0
        first = {row["name"]: row for row in json.loads((place / "out" / "compare.json").read_text())["rows"]}
        assert first["own"]["error"].startswith(f"RuntimeError: not mended ({place}/")
        assert first["own"]["tuned"] is None
        said = "own; go on with: fastmerge compare --out out --resume"
        assert f"failed: {said}, which tries again\n" in capsys.readouterr().out
        assert main(["report", "out"]) == 0
        assert "out holds a run that is not finished; go on with: fastmerge compare" in capsys.readouterr().out
        (place / "mended").touch()
        assert main(["compare", "--out", "out", "--resume"]) == 0
        assert "failed: " not in capsys.readouterr().out
        then = {row["name"]: row for row in json.loads((place / "out" / "compare.json").read_text())["rows"]}
        assert [*then] == [*first]
        assert (then["own"]["error"], then["own"]["tuned"]) == ("", then["average"]["tuned"])
        assert {name: row for name, row in then.items() if name != "own"} == {
            name: row for name, row in first.items() if name != "own"
        }
        (place / "made").unlink()
        assert main(["compare", "--out", "out", "--resume"]) == 0
        assert capsys.readouterr().out.startswith("the comparison in out is finished\n")
        assert not (place / "made").exists()
    finally:
        METHODS.pop("own", None)


def test_the_baseline_is_trained_as_long_as_the_dearest_method_that_was_tried_again(tmp_path: Path) -> None:
    teachers, mended = train_teachers(2), False

    def dear(teachers: list[nn.Module], batches: Iterable[Any], *, epochs: int = 3) -> nn.Module:
        """Fails, or trains."""
        if not mended:
            raise RuntimeError("not mended")
        return methods.distill(teachers, batches, epochs=epochs)

    methods.register("dear", needs="training", source="nobody")(dear)
    options = {"finetune_epochs": 1, "checkpoint_dir": tmp_path / "kept", "checkpoint_seconds": 0.0}
    try:
        first = compare(teachers, train_loader(), VAL, ["dear", "average"], **options)
        mended = True
        then = compare(teachers, train_loader(), VAL, ["dear", "average"], resume=True, **options)
        again = compare(teachers, train_loader(), VAL, ["dear", "average"], resume=True, **options)
    finally:
        del METHODS["dear"]
    assert (first[2].error.partition(" (")[0], first[-1].epochs) == ("RuntimeError: not mended", 1)
    assert (then[2].error, then[2].epochs, then[3]) == ("", 4, first[3])
    assert then[-1].epochs == round(then[2].cost) > 4
    assert again == then


def test_the_cost_that_is_printed_first_is_what_all_come_to(place: Path, capsys) -> None:
    (place / "fastmerge_compare_own_epochs.py").write_text(SOURCE + OWN)
    words = arguments("gates,distill,average,ensemble,own")
    words[words.index("--model") + 1] = "fastmerge_compare_own_epochs:make"
    try:
        assert main([*words, "--set", "distill.epochs=3", "--quiet"]) == 0
    finally:
        METHODS.pop("own", None)
    said = capsys.readouterr().out.splitlines()[0]
    rows = {row["name"]: row for row in json.loads((place / "out" / "compare.json").read_text())["rows"]}
    gates, longest = rows["gates"]["cost"] - 1, 1 + 5
    assert rows[next(name for name in rows if "trained on" in name)]["epochs"] == pytest.approx(longest, abs=1)
    assert rows["distill"]["cost"] == pytest.approx(1 + 5, rel=0.15)  # of so few layers a forward pass takes more
    total = 4 + gates + 5 + 1 + longest
    assert said == (
        f"cost: about {total:.0f} epochs of training one network (4 of fine-tuning, {gates:.0f} for 1 epochs of gates, 5 for 3 "
        f"epochs of distill, 1 for 1 epochs of own, {longest:.0f} of the teacher that is trained on for as long as the dearest)"
        "; the epochs of own may be dearer"
    )


def test_what_methods_warn_of_is_kept_with_their_rows(place: Path, capsys) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main([*arguments("average,gates"), "--quiet"]) == 0
    printed = capsys.readouterr()
    rows = {row["name"]: row for row in json.loads((place / "out" / "compare.json").read_text())["rows"]}
    assert rows["average"]["warnings"] == []
    assert rows["gates"]["warnings"]
    for warning in rows["gates"]["warnings"]:
        assert f"fastmerge: warning: {warning}\n" in printed.err
        for text in (printed.out, (place / "out" / "compare.md").read_text()):
            assert f"Warning of gates: {warning.rstrip('.')}.\n" in text
    assert Row.from_dict(rows["gates"]).warnings == tuple(rows["gates"]["warnings"])
    (before,) = [{key: value for key, value in rows["gates"].items() if key != "warnings"}]
    assert Row.from_dict(before).warnings == ()
    assert "Warning" not in comparison_table([before])


class Stopped(BaseException):
    """As a kill: nobody catches it."""


def test_a_comparison_that_was_stopped_goes_on_where_it_was(place: Path, capsys, monkeypatch) -> None:
    """After any row, and within any training, it comes to what it would have without a stop."""
    assert main(arguments("repair,distill,gates")) == 0
    whole = json.loads((place / "out" / "compare.json").read_text())["rows"]
    networks = {path.name: load_file(path) for path in (place / "out").glob("*.safetensors")}
    (place / "out").rename(place / "whole")
    capsys.readouterr()
    save, count = Snapshots.save, itertools.count(1)

    def then_stop(*arguments: object, **options: object) -> None:
        save(*arguments, **options)
        if next(count) % 7 == 0:
            raise Stopped

    monkeypatch.setattr(Snapshots, "save", then_stop)
    words, stopped = [*arguments("repair,distill,gates"), "--checkpoint-seconds", "0"], 0
    while True:
        try:
            assert main(words) == 0
            break
        except Stopped:
            stopped += 1
            words = ["compare", "--out", "out", "--resume"]
    assert stopped > 3
    found = json.loads((place / "out" / "compare.json").read_text())["rows"]
    for row, expected in zip(found, whole, strict=True):
        for key in ("name", "at_once", "tuned", "epochs", "error"):
            assert row[key] == expected[key]
        assert row["cost"] == pytest.approx(expected["cost"], rel=0.03)  # caches save some
    for name, tensors in networks.items():
        again = load_file(place / "out" / name)
        assert all(torch.equal(again[key], value) for key, value in tensors.items())
    assert not (place / "out" / "checkpoints").exists()
    capsys.readouterr()
    assert main(words) == 0
    assert "the comparison in out is finished\n\nteacher" in capsys.readouterr().out.replace("method ", "teacher", 1)
    assert main([*words, "--lr", "0.5"]) == 2
    assert "the run in out has --lr 0.01, not 0.5" in capsys.readouterr().err


def test_a_directory_is_of_one_comparison(tmp_path: Path) -> None:
    teachers, kept = train_teachers(2), tmp_path / "kept"
    first = compare(teachers, train_loader(), VAL, ["average"], finetune_epochs=1, checkpoint_dir=kept)
    with pytest.raises(ValueError, match=r"kept holds the checkpoints of a comparison; continue it \(resume=True\)"):
        compare(teachers, train_loader(), VAL, ["average"], finetune_epochs=1, checkpoint_dir=kept)
    with pytest.raises(
        ValueError, match="kept holds a comparison with other finetune_epochs, teacher 0, teacher 1; choose"
    ):
        compare(teachers[::-1], train_loader(), VAL, ["average"], finetune_epochs=2, checkpoint_dir=kept, resume=True)
    told: list[nn.Module | None] = []
    again = compare(
        teachers,
        train_loader(),
        VAL,
        ["average"],
        finetune_epochs=1,
        checkpoint_dir=kept,
        resume=True,
        callback=lambda row, network: told.append(network),
    )
    assert again == first
    assert told == [None] * len(first)
    assert Row.from_dict(json.loads(json.dumps(first[0].to_dict()))) == first[0]
    lost = Row("lost", Score(math.nan, 0.1))
    write_json(tmp_path / "row.json", lost.to_dict())
    assert math.isnan(Row.from_dict(json.loads((tmp_path / "row.json").read_text())).at_once.loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: "", "rows.json is damaged, or of another version of fastmerge .Expecting value"),
        (lambda found: "null", "rows.json is damaged, or of another version"),
        (lambda found: json.dumps(found)[:200], "rows.json is damaged, or of another version"),
        (
            lambda found: json.dumps({"same": {}}),
            "rows.json is damaged, or of another version of fastmerge .'finished'",
        ),
        (
            lambda found: json.dumps(found | {"rows": []}),
            r"it lacks average, teacher 0.*; remove \S+kept to begin anew",
        ),
        (lambda found: json.dumps(found | {"rows": [{"name": "x", "new": 1}]}), "rows.json is damaged, or of another"),
        (lambda found: json.dumps(found | {"same": found["same"] | {"new": 1}}), "holds a comparison with other new; "),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, change: Callable[[Any], str], message: str) -> None:
    teachers, kept = train_teachers(2), tmp_path / "kept"
    compare(teachers, train_loader(), VAL, ["average"], finetune_epochs=0, checkpoint_dir=kept)
    file = kept / "rows.json"
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=message):
        compare(teachers, train_loader(), VAL, ["average"], finetune_epochs=0, checkpoint_dir=kept, resume=True)


@contextlib.contextmanager
def stopped_by_the_first_checkpoint() -> Iterator[None]:
    """Within it the first checkpoint of a training is written, and nothing after it."""
    save = Snapshots.save

    def then_stop(*arguments: object, **options: object) -> None:
        save(*arguments, **options)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshots, "save", then_stop)
        with pytest.raises(Stopped):
            yield


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"x")])
def test_a_network_that_is_lost_is_made_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    teachers, kept = train_teachers(2), tmp_path / "kept"
    expected = compare(teachers, train_loader(), VAL, ["average"], finetune_epochs=1)
    with stopped_by_the_first_checkpoint():
        compare(teachers, train_loader(), VAL, ["average"], finetune_epochs=1, checkpoint_dir=kept)
    damage(kept / "average" / "network.safetensors")
    with pytest.warns(UserWarning, match="network.safetensors.*; average makes its network again"):
        rows = compare(teachers, train_loader(), VAL, ["average"], finetune_epochs=1, checkpoint_dir=kept, resume=True)
    assert [row.tuned for row in rows] == [row.tuned for row in expected]


class Stateful(nn.Module):
    """A network whose state is more, and less, than its state dict's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.register_buffer("shift", torch.rand(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) + self.shift

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


def test_a_network_goes_on_with_all_its_tensors(tmp_path: Path) -> None:
    teachers, kept = [Stateful(), Stateful()], tmp_path / "kept"
    data = [(torch.randn(16, 4), torch.randint(0, 3, (16,)))]
    expected = compare(teachers, data, data, ["average"], finetune_epochs=1)
    with stopped_by_the_first_checkpoint():
        compare(teachers, data, data, ["average"], finetune_epochs=1, checkpoint_dir=kept, checkpoint_seconds=0)
    shutil.rmtree(next((kept / "average").glob("finetune*")))
    rows = compare(teachers, data, data, ["average"], finetune_epochs=1, checkpoint_dir=kept, resume=True)
    assert rows[2].tuned == expected[2].tuned
    save_weights(teachers[0], tmp_path / "a.safetensors")
    load_weights(teachers[1], tmp_path / "a.safetensors")
    assert torch.equal(teachers[1].module[0].weight, teachers[0].module[0].weight)


def test_what_functions_a_comparison_was_given_is_known_by_their_names(tmp_path: Path) -> None:
    """Another process has them at other addresses."""
    teachers, kept = train_teachers(2), tmp_path / "kept"

    def smooth(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output, target, label_smoothing=0.1)

    def begin(own_criterion: Criterion, **more: Any) -> list[Row]:
        own = {"distill": {"criterion": own_criterion, "how": {"checkpoint_dir": tmp_path / "own"}}}
        common = {"finetune_epochs": 0, "epochs": 1, "options": own, "checkpoint_dir": kept}
        return compare(teachers, train_loader(), VAL, ["distill"], **common | more)

    first = begin(smooth)
    assert (tmp_path / "own").is_dir()
    assert json.loads((kept / "rows.json").read_text())["same"]["options"]["distill"]["criterion"].endswith("smooth")
    assert begin(smooth, resume=True) == first
    with pytest.raises(ValueError, match="with other options; "):
        begin(cross_entropy, resume=True)
    with pytest.raises(ValueError, match="with other criterion; "):
        begin(smooth, resume=True, criterion=smooth)


def test_fine_tuning_that_diverges_is_a_row_even_of_the_baseline() -> None:
    rows = compare(
        train_teachers(2), train_loader(), VAL, ["average"], finetune_epochs=3, lr=1e9, weight_decay=1.0, baseline=True
    )
    assert [row.error.partition(" in ")[0] for row in rows] == ["", "", *["the loss became nan"] * 2]
    lost = Row("lost", Score(math.nan, 0.1)).to_dict()
    as_read = lost | {"at_once": lost["at_once"] | {"loss": None}}
    assert comparison_table([lost]) == comparison_table([as_read])


def test_an_error_of_the_callback_is_not_the_methods() -> None:
    seen: list[str] = []

    def look(row: Row, network: nn.Module | None) -> None:
        seen.append(row.name)
        if row.name == "average":
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        compare(train_teachers(2), train_loader(), VAL, ["average"], finetune_epochs=0, callback=look)
    assert seen == ["teacher 0", "teacher 1", "average"]


def test_a_method_that_fails_leaves_the_others_their_rows() -> None:
    teachers = train_teachers(2)

    def broken(teachers: object, batches: object) -> nn.Module:
        """Fails."""
        raise RuntimeError("of no use here")

    methods.register("broken", needs="weights", source="nobody")(broken)
    try:
        rows = compare(teachers, train_loader(), VAL, ["broken", "average"], finetune_epochs=0)
    finally:
        del methods.METHODS["broken"]
    by_name = {row.name: row for row in rows}
    assert by_name["broken"].error.startswith(f"RuntimeError: of no use here ({__file__}:")
    assert by_name["average"].at_once is not None
    assert by_name["average"].tuned is None


def test_rows_have_other_metrics_too() -> None:
    def top2(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.topk(2).indices == target[:, None]).any(1).double().mean()

    teachers = train_teachers(2)
    rows = compare(teachers, train_loader(), VAL, ["average"], finetune_epochs=1, metrics={"top-2": top2})
    x, y = (torch.cat(each) for each in zip(*VAL, strict=True))
    with torch.no_grad():
        assert rows[0].at_once.metrics["top-2"] == pytest.approx(float(top2(teachers[0](x), y)))
    assert rows[2].tuned.metrics.keys() == {"top-2"}
    assert Row.from_dict(json.loads(json.dumps(rows[2].to_dict()))) == rows[2]
    header, _, _, _, average, *_ = comparison_table([row.to_dict() for row in rows]).splitlines()
    assert header.split()[4:6] == ["loss", "top-2"]
    assert average.split()[4] == f"{rows[2].tuned.metrics['top-2']:.4f}"
    with pytest.raises(TypeError, match="metrics by name"):
        compare(teachers, train_loader(), VAL, ["average"], metrics=[top2])


def test_a_method_that_changes_its_teachers_ends_the_comparison() -> None:
    """What all rows after it are made of would not be what the first rows are of."""
    teachers, mended = train_teachers(2), False

    def careless(teachers: list[nn.Module], batches: Iterable[Any]) -> nn.Module:
        """Trains a teacher, and fails."""
        methods.train(copy.deepcopy(teachers[1]) if mended else teachers[1], batches, epochs=1)
        raise KeyError("x")

    methods.register("careless", needs="training", source="nobody")(careless)
    try:
        with pytest.raises(RuntimeError, match="method 'careless' changed teacher 1, which all methods work on"):
            compare(teachers, train_loader(), VAL, ["careless", "average"], finetune_epochs=0)
        mended = True
        rows = compare(teachers, train_loader(), VAL, ["careless", "average"], finetune_epochs=0)
    finally:
        del METHODS["careless"]
    assert [row.error.partition(" (")[0] for row in rows[2:4]] == ["KeyError: 'x'", ""]


def test_each_network_is_fine_tuned_with_the_same_batches() -> None:
    """A row does not depend on what ran before it."""
    teachers = train_teachers(2)
    alone = compare(teachers, train_loader(), VAL, ["repair"], finetune_epochs=1)
    after = compare(teachers, train_loader(), VAL, ["distill", "repair"], finetune_epochs=1, epochs=1)
    assert alone[-2].tuned == after[-2].tuned


def test_methods_that_train_do_so_for_as_long_as_each_does_by_default() -> None:
    assert inspect.signature(fastmerge.merge).parameters["merge_epochs"].default == METHODS["gates"].options["epochs"]
    rows = compare(train_teachers(2), train_loader(), VAL, ["gates", "distill"], finetune_epochs=0, baseline=False)
    assert [row.epochs for row in rows[2:]] == [METHODS[name].options["epochs"] for name in ("gates", "distill")]
    assert len({row.epochs for row in rows[2:]}) == 2


def test_each_row_reads_a_loader_with_a_generator_of_its_own_in_the_same_order() -> None:
    teachers, own = train_teachers(2), torch.Generator().manual_seed(3)
    order = DataLoader(TensorDataset(X[:64], Y[:64]), 16, shuffle=True, generator=own)
    seen: list[list[int]] = []

    def first(teachers: list[nn.Module], batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> nn.Module:
        """Looks at the order."""
        seen.append([int(label) for _, labels in batches for label in labels])
        return teachers[0]

    names = ["first look", "second look"]
    for name in names:
        methods.register(name, needs="weights", source="nobody")(first)
    try:
        rows = compare(teachers, order, VAL, names, finetune_epochs=1)
    finally:
        for name in names:
            del methods.METHODS[name]
    assert seen[0] == seen[1]
    assert rows[-2].tuned == rows[-3].tuned


def test_comparisons_that_make_no_sense_are_refused() -> None:
    teachers = train_teachers(2)
    with pytest.raises(ValueError, match="each one once; got average, average"):
        compare(teachers, train_loader(), VAL, ["average", "average"])
    with pytest.raises(ValueError, match="got some for zipt"):
        compare(teachers, train_loader(), VAL, ["zipit"], options={"zipt": {}})
    with pytest.raises(ValueError, match="a criterion that is the mean over the batch; this one has reduction='sum'"):
        compare(teachers, train_loader(), VAL, ["average"], criterion=nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match="methods: a list of names; got 'average'"):
        compare(teachers, train_loader(), VAL, "average")
    with pytest.raises(ValueError, match="a whole number of at least 1, or None; got 0"):
        compare(teachers, train_loader(), VAL, ["gates"], epochs=0)
    wider = type(teachers[0])(width=7)
    with pytest.raises(ValueError, match=r"conv\.weight is \(6, .*\) in teacher 0 and \(7, .*\) in teacher 1"):
        compare([teachers[0], wider], train_loader(), VAL, ["average"])
