"""Networks by name, and their weights in files."""

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastmerge.checkpoints import build_network, load_weights, read_weights, save_weights
from full_disk import files_of_at_most


def network(classes: int = 3, width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 4, classes))


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(left == right and torch.equal(x, y) for (left, x), (right, y) in pairs)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_survive_a_file(tmp_path, suffix):
    original, copy, path = network(), network(), tmp_path / f"weights{suffix}"
    assert not equal(original, copy)
    if suffix == ".safetensors":
        save_weights(original, path)
    else:
        torch.save(original.state_dict(), path)
    load_weights(copy, path)
    assert equal(original, copy)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_training_checkpoints_are_unwrapped(tmp_path, wrapper, prefix):
    original, copy = network(), network()
    state = {prefix + name: value for name, value in original.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "last.pt")
    load_weights(copy, tmp_path / "last.pt")
    assert equal(original, copy)


def test_a_name_that_only_some_weights_share_is_no_prefix(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pt")
    assert list(read_weights(tmp_path / "w.pt")) == ["module.a", "b"]


def test_saving_writes_shared_and_channels_last_tensors_in_full(tmp_path):
    tied = Tied()
    save_weights(tied, tmp_path / "tied.safetensors")
    assert set(load_file(tmp_path / "tied.safetensors")) == set(tied.state_dict())
    load_weights(Tied(), tmp_path / "tied.safetensors")
    strided = network().to(memory_format=torch.channels_last)
    save_weights(strided.state_dict(), tmp_path / "strided.safetensors")
    assert torch.equal(load_file(tmp_path / "strided.safetensors")["0.weight"], strided[0].weight)


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    save_weights({"a": torch.ones(3)}, tmp_path / "w.safetensors")
    with files_of_at_most(200), pytest.raises(OSError, match=r"could not write .*w.safetensors: .*File too large"):
        save_weights({"a": torch.zeros(1000)}, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a"], torch.ones(3))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "student.safetensors"
    save_weights(network(), path)
    before = path.read_bytes()

    def fail(tensors, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("fastmerge.checkpoints.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(network(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        (network(classes=5), "it has 3 classes and the network 5"),
        (network(width=6), r"0\.weight is \(4, 1, 3, 3\) in it and \(6, 1, 3, 3\) in the network"),
        (nn.Sequential(*network(), nn.Linear(3, 3)), "it lacks 4.weight, 4.bias"),
        (nn.Sequential(*network()[:3]), "it has besides 3.bias, 3.weight"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path, needed, message):
    save_weights(network(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(needed, tmp_path / "w.safetensors")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    torch.save(network(), tmp_path / "object.pt")
    with pytest.raises(ValueError, match="Python objects, which are not loaded because they could run code"):
        read_weights(tmp_path / "object.pt")
    for name in ("damaged.pt", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"hello")
        with pytest.raises(ValueError, match=f"{name} is damaged or no checkpoint"):
            read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.pt"):
        read_weights(tmp_path / "none.pt")


def test_networks_are_built_by_name(tmp_path, monkeypatch):
    assert build_network("torch.nn:Linear", in_features=2, out_features=3).weight.shape == (3, 2)
    (tmp_path / "my_factory_module.py").write_text("import torch\ndef make(n=1): return torch.nn.Linear(n, n)\n")
    monkeypatch.chdir(tmp_path)
    assert build_network("my_factory_module:make", n=4).weight.shape == (4, 4)
    pytest.importorskip("torchvision")
    assert build_network("resnet18", num_classes=7).fc.weight.shape == (7, 512)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("resnet17", {}, ValueError, "no classification model resnet17; near it: resnet18"),
        ("resnet18", {"num_clases": 3}, ValueError, r"could not build resnet18\(num_clases=3\): .*num_clases"),
        ("no_such_module:make", {}, ValueError, "could not import 'no_such_module'"),
        ("torch.nn:NoSuchLayer", {}, ValueError, "torch.nn has no 'NoSuchLayer'"),
        ("math:pi", {}, ValueError, "math:pi must be a class or function"),
        ("builtins:dict", {}, TypeError, "must return a torch.nn.Module; it returned a dict"),
    ],
)
def test_networks_that_can_not_be_built_are_refused(name, arguments, error, message):
    pytest.importorskip("torchvision")
    with pytest.raises(error, match=message):
        build_network(name, **arguments)


def test_timm_is_imported_when_asked_for_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm:tiny is a model of timm, which is not installed"):
        build_network("timm:tiny")

    made = []

    def create_model(name, **arguments):
        made.append((name, arguments))
        return nn.Linear(2, arguments["num_classes"])

    fake = SimpleNamespace(
        is_model=lambda name: name == "tiny", list_models=lambda: ["tiny"], create_model=create_model
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert build_network("timm:tiny", num_classes=3).out_features == 3
    assert made == [("tiny", {"num_classes": 3})]
    with pytest.raises(ValueError, match="timm has no model tinny; near it: tiny"):
        build_network("timm:tinny")
