"""Files for `fastmerge merge`: teachers, the module that makes them, images, and the words of a short merge."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from image_files import noise_arrays, write_tree

MODEL = "fastmerge_cli_test_net:make"
SOURCE = """
from torch import nn

def make(classes=3, width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, classes)
    )
"""
SHORT = [
    "--merge-epochs",
    "2",
    "--finetune-epochs",
    "1",
    "--batch-size",
    "16",
    "--seed",
    "0",
    "--device",
    "cpu",
    "--quiet",
]


def make(classes: int = 3, width: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, classes)
    )


def _write(network: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file  # a GPU machine may not have it, and needs no such file

    save_file(network.state_dict(), path)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with a network's module, teachers a.safetensors and b.pt, and data.npz."""
    (tmp_path / "fastmerge_cli_test_net.py").write_text(SOURCE)
    _write(make(), tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in make().state_dict().items()}}, tmp_path / "b.pt")
    np.savez(tmp_path / "data.npz", **noise_arrays(49, 20, (6, 6), classes=3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(**changes: list[str]) -> list[str]:
    chosen = {"model": [MODEL], "teachers": ["a.safetensors", "b.pt"], "data": ["data.npz"], "out": ["out"]} | changes
    return ["merge", *SHORT, *(part for name, values in chosen.items() for part in (f"--{name}", *values))]


@pytest.fixture
def tree(place) -> list[str]:
    """Words that read a tree of images in processes of their own."""
    write_tree(place / "tree", train_ant=8, train_cat=8, val_ant=4, val_cat=4)
    model, files = "fastmerge_cli_test_colours", ["1.safetensors", "2.safetensors"]
    Path(f"{model}.py").write_text(SOURCE.replace("Conv2d(1,", "Conv2d(3,"))
    for file in files:
        network = make(2)
        network[0] = nn.Conv2d(3, 4, 3)
        _write(network, Path(file))
    words = arguments(data=["tree"], model=[f"{model}:make"], teachers=files)
    more = ["--model-args", "classes=2", "--image-size", "6", "--loader", "torch", "--workers", "2"]
    return [*words, *more, "--batch-size", "4"]
