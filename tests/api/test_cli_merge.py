"""``fastmerge merge`` from files to files, and what it says to bad input."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_files import MODEL, arguments, make
from fastmerge.cli import main
from image_files import noise_arrays

# Stages this short leave the gates where they are.
pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")


def test_two_checkpoints_become_a_student(place, capsys):
    before = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    assert main(arguments()) == 0
    assert {name: (place / name).read_bytes() for name in before} == before
    student = make()
    student.load_state_dict(load_file("out/student.safetensors"))

    printed = capsys.readouterr().out
    assert re.search(
        r"^cost: \d+ epochs of training one network, .*; a plain run as long costs 3\. A step", printed, re.M
    )
    rows = [line.split("  ")[0].strip() for line in printed.splitlines()]
    names = "teacher 0", "teacher 1", "big student, gates open", "big student", "compressed", "student"
    assert [row for row in rows if row in names] == list(names)
    history = json.loads(Path("out/history.json").read_text())
    assert [record["stage"] for record in history["epochs"]] == ["merge", "merge", "finetune"]
    assert history["config"]["teachers"] == ["a.safetensors", "b.pt"]
    assert history["config"]["seed"] == 0
    assert history["environment"]["torch"] == torch.__version__
    assert "| student" in Path("out/report.md").read_text()
    for name in ("gates", "training"):
        assert Path(f"out/{name}.png").read_bytes().startswith(b"\x89PNG")

    arrays = np.load("data.npz")
    pixels, tests = arrays["train_images"].astype(np.float32), arrays["test_images"].astype(np.float32)
    inputs = torch.from_numpy((tests - pixels.mean()) / pixels.std())[:, None]
    with torch.no_grad():
        accuracy = (student.eval()(inputs).argmax(1) == torch.from_numpy(arrays["test_labels"])).double().mean().item()
    assert history["borders"]["student"]["accuracy"] == pytest.approx(accuracy)


def test_three_teachers_and_precision(place):
    save_file(make().state_dict(), "c.safetensors")
    teachers = ["a.safetensors", "b.pt", "c.safetensors"]
    assert main([*arguments(teachers=teachers), "--autocast", "bfloat16", "--channels-last"]) == 0
    history = json.loads(Path("out/history.json").read_text())
    assert history["num_teachers"] == 3
    assert history["config"]["autocast"] == "bfloat16"


def test_every_option_reaches_the_merge(place, monkeypatch):
    given = {
        "merge_epochs": 3,
        "finetune_epochs": 4,
        "link_at": 0.5,
        "compact_at": 0.75,
        "lr": 0.02,
        "momentum": 0.8,
        "weight_decay": 0.001,
        "gate_lr": 0.3,
        "lam_start": 0.5,
        "lam_step": 4.0,
        "gate_schedule": "budget",
        "finetune_lr": 0.04,
        "clip_norm": 2.0,
        "distill": 0.5,
        "temperature": 3.0,
        "keep": 0.5,
        "layerwise": 2,
        "val_every": 2,
        "warmup": 1,
        "seed": 7,
        "device": "cpu",
    }
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += [
        "--milestones",
        "1",
        "3",
        "--merge-milestones",
        "2",
        "--autocast",
        "bfloat16",
        "--channels-last",
        "--batch-size",
        "5",
    ]
    words += ["--checkpoint-seconds", "7", "--resume", "--accumulate", "5"]
    words += ["--compile", "--sync-batch-norm", "--no-recalibrate", "--tie-streams"]
    seen = {}

    def record(teachers, loader, *, val_loader, **options):
        seen.update(options, sizes=[len(next(iter(each))[0]) for each in (loader, val_loader)])
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmerge.cli.merge.merge", record)
    assert main([*arguments(), *words]) == 130
    rest = {
        "milestones": [1, 3],
        "merge_milestones": [2],
        "autocast": torch.bfloat16,
        "channels_last": True,
        "progress": False,
        "sizes": [1, 1],
    }
    rest |= {"checkpoint_seconds": 7, "checkpoint_dir": Path("out/checkpoints"), "resume": True, "accumulate": 5}
    rest |= {
        "compile": True,
        "sync_batch_norm": True,
        "recalibrate": False,
        "tie_streams": True,
        "heads": "average",
        "all_classes": False,
    }
    assert callable(seen.pop("callback"))
    assert seen == given | rest


def test_a_seed_repeats_the_student(place):
    weights = []
    for out in ("first", "second"):
        assert main(arguments(out=[out])) == 0
        weights.append(load_file(f"{out}/student.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_model_arguments_build_the_network(place):
    for name in ("a.safetensors", "c.safetensors"):
        save_file(make(width=6).state_dict(), name)
    wide = arguments(teachers=["a.safetensors", "c.safetensors"], **{"model-args": ["width=6"]})
    assert main(wide) == 0
    assert load_file("out/student.safetensors")["0.weight"].shape[0] == 6


def test_an_image_tree_and_a_torchvision_model(tmp_path, monkeypatch, capsys):
    models = pytest.importorskip("torchvision.models")
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8))
                image.save(tmp_path / "tree" / split / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(models.squeezenet1_1(num_classes=2).state_dict(), f"{seed}.safetensors")
    tree = arguments(model=["squeezenet1_1"], teachers=["0.safetensors", "1.safetensors"], data=["tree"])
    assert main([*tree, "--image-size", "32", "--workers", "0"]) == 0
    models.squeezenet1_1(num_classes=2).load_state_dict(load_file("out/student.safetensors"))
    assert "compressed" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_trains_nothing(place, capsys):
    assert main([*arguments(), "--dry-run", "--link-at", "0.5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    table = [re.split(r"  +", line) for line in printed if re.match("merge, |fine-tune|validation", line)]
    assert [(name, *numbers[:2]) for name, *numbers in table] == [
        ("merge, block-diagonal", "1", "3"),
        ("merge, linked", "1", "3"),
        ("validation of the big student", "2", "2"),
        ("fine-tune", "1", "3"),
        ("validation of the student", "1", "2"),
    ]
    assert all(float(row[3]) > 0 for row in table)
    assert re.fullmatch(r"about .*; peak memory \d+\.\d\d GiB", printed[-2])
    costs = r"cost: 5 epochs of training one network, by .* \(2 of merging at 2\.0 each, 1 of .* costs 3\. A step .*"
    assert re.fullmatch(costs, printed[-1])
    assert not list(Path("out").iterdir())
    assert main([*arguments(**{"model-args": ["classes=7"]}), "--dry-run"]) == 2
    assert "build the network for 3" in capsys.readouterr().err


BAD = [
    ({}, ["--ema"], "a.safetensors holds no moving average of weights under state_dict_ema, "),
    ({"teachers": ["a.safetensors"]}, [], "at least two teachers; got 1"),
    ({"teachers": ["a.safetensors", "none.pt"]}, [], "there is no checkpoint none.pt"),
    ({"teachers": ["a.safetensors", "data.npz"]}, [], "data.npz is damaged or holds no weights"),
    ({"model": ["no_such_module:make"]}, [], "could not import 'no_such_module'"),
    ({"model": ["fastmerge_cli_test_net:other"]}, [], "has no 'other'"),
    ({"model-args": ["width=5"]}, [], "does not fit Sequential: 0.weight is (4, 1, 3, 3) in it and (5, 1, 3, 3)"),
    ({"model-args": ["depth=5"]}, [], "unexpected keyword argument 'depth'"),
    ({"model-args": ["classes=7"]}, [], "has 3 classes and the network 7 (4.weight, 4.bias); build the network for 3"),
    ({"data": ["none.npz"]}, [], "none.npz"),
    ({"data": ["b.pt"]}, [], "b.pt"),
    ({"data": ["."]}, [], "a tree needs train/<class>/<image> and val/<class>/<image>"),
    ({"out": ["b.pt"]}, [], "b.pt"),
    ({}, ["--link-at", "2"], "link_at, the fraction of the merge stage before linking, a finite number in 0..1; got 2"),
    ({}, ["--lr", "-1"], "lr, learning rate of the weights, a finite number above 0; got -1"),
    ({}, ["--device", "abacus"], "can't use device abacus"),
    ({}, ["--image-size", "9"], "the images of data.npz are 6 pixels high"),
]


@pytest.mark.parametrize(("changes", "options", "message"), BAD, ids=[case[2][:40] for case in BAD])
def test_bad_input_gets_one_line_and_exit_code_2(place, capsys, changes, options, message):
    assert main([*arguments(**changes), *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fastmerge: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not Path("out/student.safetensors").exists()


def test_classes_the_teachers_do_not_have_are_bad_input(place, capsys):
    arrays = dict(np.load("data.npz"))
    arrays["train_labels"] = np.arange(49) % 5
    np.savez("data.npz", **arrays)
    assert main(arguments()) == 2
    assert "the teachers have 3 classes, 0..2" in capsys.readouterr().err


def test_one_image_of_a_class_that_the_teachers_do_not_have(place, capsys):
    arrays = dict(np.load("data.npz"))
    arrays["train_labels"][30] = 3  # the last image of the first epoch, in the order of seed 0
    np.savez("data.npz", **arrays)
    assert main(arguments(**{"model-args": ["classes=3"]})) == 2
    assert "train_loader has targets 0..3; the teachers have 3 classes, 0..2" in capsys.readouterr().err


def test_a_divergence_is_a_failure_and_no_bad_input(place, capsys):
    assert main([*arguments(), "--lr", "1e30"]) == 1
    assert "the loss became" in capsys.readouterr().err
    assert not Path("out/student.safetensors").exists()


def test_teachers_of_different_label_sets(place, capsys):
    """Each with its own data, and a number of classes that follows from it."""
    np.savez(place / "two.npz", **noise_arrays(40, 40, (6, 6), classes=2))
    save_file(make(2).state_dict(), place / "two.safetensors")
    both = {"teachers": ["a.safetensors", "two.safetensors"], "heads": ["concatenate"]}
    assert main([*arguments(**both), "--data", "two.npz"]) == 0
    student = make(5)
    student.load_state_dict(load_file("out/student.safetensors"))
    history = json.loads((place / "out/history.json").read_text())
    assert history["config"]["data"] == ["data.npz", "two.npz"]
    assert set(history["borders"]["student"]["metrics"]) == {"own part", "part 0", "part 1"}
    capsys.readouterr()
    assert main([*arguments(**both | {"heads": ["separate"], "out": ["apart"]}), "--data", "two.npz"]) == 0
    student.load_state_dict(load_file("apart/student.safetensors"))
    capsys.readouterr()
    asked = ["--heads", "concatenate", "--classes", "3", "2", "--input", "1", "6", "6"]
    assert main(["check", "--model", MODEL, "--teachers", *both["teachers"], *asked]) == 0
    assert main([*arguments(**both, out=["dry"]), "--data", "two.npz", "--dry-run"]) == 0
    assert "merge, linked" in capsys.readouterr().out
    assert main([*arguments(out=["other"]), "--data", "two.npz"]) == 2
    assert "with --heads concatenate or separate once for each teacher" in capsys.readouterr().err
    assert main([*arguments(**both, data=["two.npz"]), "--data", "data.npz", "--resume"]) == 2
    assert "has --data data.npz two.npz, not two.npz data.npz; leave out --data" in capsys.readouterr().err
    assert main([*arguments(**both, out=["other"]), "--data", "two.npz", "--batch-size", "1"]) == 2
    said = "a batch of 1 can't be shared out evenly to 1 processes times 1 accumulated batches of 2 data sets"
    assert said in capsys.readouterr().err
