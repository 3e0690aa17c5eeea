"""``fastmerge run`` from recipe to files, at the smallest budget, and what it says to bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from fastmerge.cli import main
from fastmerge.networks import small_lenet
from image_files import noise_arrays, spoil, write_tree

# One epoch of merging leaves the gates where they are.
pytestmark = pytest.mark.filterwarnings("ignore:.*P.g>0. did not move:UserWarning")
SMALLEST = ["--budget", "0.0001", "--workers", "1", "--device", "cpu", "--quiet"]


def run(*words: str) -> int:
    return main(["run", *words, *SMALLEST])


def test_a_run_writes_results_students_report_and_plots(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    assert run("digits", "--replicates", "2", "--seed", "3") == 0
    out = tmp_path / "runs" / "digits"
    results = json.loads((out / "results.json").read_text())
    assert list(results["strategies"]) == ["student", "bo3", "one"]
    for strategy in results["strategies"].values():
        assert len(strategy["values"]) == 2
        assert strategy["epochs"] == 6
    assert results["metric"] == "test_accuracy"
    assert results["config"]["seed"] == 3
    assert results["environment"]["torch"]
    for number in (0, 1):
        small_lenet(width=1).load_state_dict(load_file(out / f"student-{number}.safetensors"))
    for name in ("strategies", "gates", "training"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    assert printed.startswith("strategy")
    best = max(results["strategies"], key=lambda name: np.mean(results["strategies"][name]["values"]))
    assert f"**{np.mean(results['strategies'][best]['values']):.4f}**" in (out / "report.md").read_text()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == printed.splitlines()[:5]


def test_the_batch_size_is_recorded_and_goes_on_with_the_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    out = str(tmp_path)
    seen = []
    monkeypatch.setattr("fastmerge.cli.run.run", lambda recipe, *_, **__: seen.append(recipe.batch_size) or stop())

    def stop():
        raise KeyboardInterrupt

    for words in (["digits", "--batch-size", "24"], ["--resume"], ["digits", "--batch-size", "25", "--resume"]):
        main(["run", *words, "--out", out])
    assert seen == [24, 24]
    assert "has --batch-size 24, not 25" in capsys.readouterr().err
    monkeypatch.undo()
    assert run("digits", "--replicates", "1", "--strategy", "one", "--batch-size", "500", "--out", out) == 0
    assert json.loads((tmp_path / "results.json").read_text())["config"]["batch_size"] == 500
    with pytest.raises(SystemExit):
        run("digits", "--batch-size", "0")
    assert "--batch-size: needs a whole number of at least 1; got '0'" in capsys.readouterr().err


def test_sine_draws_what_each_strategy_learned(tmp_path):
    assert run("sine", "--replicates", "1", "--strategy", "one,bo3-big", "--out", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["strategies"]) == ["one", "bo3-big"]
    assert (tmp_path / "learned.png").is_file()
    assert not list(tmp_path.glob("*.safetensors"))


def test_imagewoof_reads_an_npz(tmp_path):
    data, out = tmp_path / "woof.npz", tmp_path / "out"
    np.savez(data, **noise_arrays(40, 20, (28, 28, 3), classes=10))
    assert run("lenet-imagewoof", "--replicates", "1", "--data", str(data), "--out", str(out)) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["train_samples"] == 36
    assert "This run had 0.0001 of the paper's epochs." in (out / "report.md").read_text()


@pytest.mark.filterwarnings("always::fastmerge.data.decoding.BadImageWarning")  # the command prints them
def test_imagewoof_leaves_files_out_that_can_not_be_read(tmp_path, capsys):
    pytest.importorskip("PIL")
    tree, out = write_tree(tmp_path / "tree", train_a=4, train_b=4, val_a=2, val_b=2), tmp_path / "out"
    spoil(tree / "train" / "b" / "002.jpg", "truncated")
    words = ["lenet-imagewoof", "--replicates", "1", "--data", str(tree), "--out", str(out)]
    assert run(*words) == 2
    assert "train/b/002.jpg can't be read as an image" in capsys.readouterr().err
    assert run(*words, "--on-bad-image", "skip") == 0
    assert "train/b/002.jpg can't be read as an image and is left out" in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text())["config"]["train_samples"] == 6


def test_every_option_reaches_the_run(tmp_path, monkeypatch):
    seen = {}

    def record(recipe, chosen, **options):
        seen.update(options, recipe=recipe.name, chosen=chosen)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmerge.cli.run.run", record)
    words = ["--strategy", "one,student", "--replicates", "7", "--budget", "0.5", "--data", "x.npz", "--seed", "3"]
    words += ["--device", "cuda:1", "--out", str(tmp_path), "--workers", "2", "--checkpoint-seconds", "9", "--resume"]
    words += ["--on-bad-image", "skip"]
    assert main(["run", "sine", *words]) == 130
    assert callable(seen.pop("note"))
    assert seen == {
        "checkpoint_dir": tmp_path / "checkpoints",
        "checkpoint_seconds": 9,
        "resume": True,
        "recipe": "sine",
        "chosen": ["one", "student"],
        "replicates": 7,
        "budget": 0.5,
        "data_path": Path("x.npz"),
        "seed": 3,
        "device": "cuda:1",
        "out": tmp_path,
        "workers": 2,
        "progress": None,
        "on_bad_image": "skip",
        "loader": "auto",
        "autocast": None,
        "teachers_in_parallel": False,
        "accumulate": 1,
        "compile": False,
        "sync_batch_norm": False,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lenet-imagewoof"], "lenet-imagewoof needs data: an .npz"),
        (["lenet-imagewoof", "--data", "none.npz"], "none.npz"),
        (["sine", "--data", "x.npz"], "sine makes its own data"),
        (["sine", "--strategy", "student,luck"], "unknown strategy luck"),
        (["sine", "--strategy", "one,one"], "each once"),
        (["sine", "--device", "abacus"], "abacus"),
        (["sine", "--out", "taken"], "taken"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    quiet = [*SMALLEST[:4], "--quiet"] if "--device" in words else SMALLEST
    assert main(["run", *words, *quiet]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastmerge: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("results.json"))
