"""Networks by name, and their weights in files."""

import argparse
import json
import logging
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastmerge.weights import build_network, load_weights, read_weights, save_weights
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


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "net", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_training_checkpoints_are_unwrapped(tmp_path, wrapper, prefix):
    original, copy = network(), network()
    state = {prefix + name: value for name, value in original.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "last.pt")
    load_weights(copy, tmp_path / "last.pt")
    assert equal(original, copy)


def test_what_training_programs_keep_beside_the_weights_is_no_obstacle(tmp_path, monkeypatch):
    """The arguments of the command, and Lightning's, which need not be installed to read them."""
    original, copy = network(), network()
    module = ModuleType("lightning_fabric.utilities.data")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    names = ["lightning_fabric", "lightning_fabric.utilities", module.__name__]
    for name in names:
        monkeypatch.setitem(sys.modules, name, module)
    hyper_parameters = module.AttributeDict(lr=0.1)
    content = {"state_dict": {f"model.{name}": value for name, value in original.state_dict().items()}}
    content |= {"pytorch-lightning_version": "2.5", "hyper_parameters": hyper_parameters}
    content["args"] = argparse.Namespace(lr=0.1, out=Path("runs"))
    content["state_dict"]["loss.weight"] = torch.ones(3)
    torch.save(content, tmp_path / "last.ckpt")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    load_weights(copy, tmp_path / "last.ckpt")
    assert equal(original, copy)
    del content["pytorch-lightning_version"], content["hyper_parameters"]
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"it lacks 0.weight, .* and also has model.0.weight, .*"):
        load_weights(copy, tmp_path / "other.ckpt")  # of another program, one weight too many is another network


def test_averaged_models_are_read(tmp_path):
    averaged, copy = AveragedModel(nn.DataParallel(network())), network()
    averaged.n_averaged += 3
    torch.save({"model": averaged.state_dict()}, tmp_path / "swa.pt")
    load_weights(copy, tmp_path / "swa.pt")
    assert equal(averaged.module.module, copy)
    load_weights(copy, tmp_path / "swa.pt", ema=True)  # an average, too


class Holding(nn.Module):
    """A network whose own names begin as a wrapper's, and whose state dict holds more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.module = network()

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


@pytest.mark.parametrize("wrap", [nn.Identity, nn.DataParallel, AveragedModel])
def test_a_networks_own_module_is_no_wrapper(tmp_path, wrap):
    original, copy, path = Holding(), Holding(), tmp_path / "last.pt"
    torch.save((original if wrap is nn.Identity else wrap(original)).state_dict(), path)
    load_weights(copy, path)
    assert equal(original.module, copy.module)


def test_moving_averages_are_taken_when_asked_for(tmp_path, caplog):
    last, average, copy, path = network(), network(), network(), tmp_path / "last.pt"
    for key, prefix in (("state_dict_ema", ""), ("model_ema", "module."), ("ema", "")):
        state = {prefix + name: value for name, value in average.state_dict().items()}
        torch.save({"model": last.state_dict(), key: {"model": state} if key == "ema" else state}, path)
        with caplog.at_level(logging.INFO, "fastmerge"):
            load_weights(copy, path)
        assert equal(copy, last)
        assert caplog.messages == [
            f"{path} holds a moving average of weights ({key}), which is not taken without --ema"
        ]
        caplog.clear()
        load_weights(copy, path, ema=True)
        assert equal(copy, average)
        torch.save({key: average.state_dict(), "epoch": 3}, path)
        with pytest.raises(ValueError, match=rf"no state dict but for a moving average \({key}\), which --ema takes"):
            read_weights(path)
    torch.save(last.state_dict(), path)
    for read in (read_weights, lambda *words: load_weights(copy, *words)):
        with pytest.raises(ValueError, match=r"last.pt holds no moving average of weights under state_dict_ema, "):
            read(path, True)


def test_lightning_callbacks_average_is_told_from_the_network(tmp_path):
    last, average, copy, path = network(), network(), network(), tmp_path / "last.ckpt"
    state = {f"model.{name}": value for name, value in last.state_dict().items()}
    state |= {f"ema.module.{name}": value for name, value in average.state_dict().items()}
    for more in ({}, {f"teacher.{name}": value for name, value in last.state_dict().items()}):
        torch.save({"state_dict": state | more, "pytorch-lightning_version": "2.5"}, path)
        load_weights(copy, path, ema=True)
        assert equal(copy, average)
        if not more:
            load_weights(copy, path)
            assert equal(copy, last)
    with pytest.raises(ValueError, match=r"holds this network more than once, under model\., teacher\."):
        load_weights(copy, path)


def test_sharded_weights_are_read_by_their_index(tmp_path):
    original, copy, index = network(), network(), tmp_path / "model.safetensors.index.json"
    state, files = original.state_dict(), {}
    for number, names in enumerate((list(state)[:3], list(state)[3:])):
        save_file({name: state[name] for name in names}, tmp_path / f"model-{number}.safetensors")
        files |= dict.fromkeys(names, f"model-{number}.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    load_weights(copy, index)
    assert equal(original, copy)
    for damaged, message in (
        ({"weight_map": files | {"0.weight": "../x.safetensors"}}, "it names files in other folders"),
        ({"weights": files}, r"is no index of sharded weights \(KeyError: 'weight_map'\)"),
        ({"weight_map": files | {"4.weight": "model-0.safetensors"}}, "weights that its files do not hold: 4.weight"),
        ({"weight_map": files | {"4.weight": "model-2.safetensors"}}, "there is no checkpoint .*model-2.safetensors"),
    ):
        index.write_text(json.dumps(damaged))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_weights(copy, index)


def test_changed_bits_of_a_zip_are_found(tmp_path):
    path, weights = tmp_path / "w.pt", network().state_dict()
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        name = next(part.filename for part in archive.infolist() if part.filename.endswith("/data/0"))
    content[content.index(weights["0.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"w.pt is damaged or holds no weights .*the checksum of {name} in it differs"):
        read_weights(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(path).keys() == weights.keys()


SPARSE = "ignore:Sparse invariant checks"


@pytest.mark.filterwarnings(SPARSE)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: (weight * 100).to(torch.int8), "0.weight is int8 in it and float32 in the network"),
        (lambda weight: weight > 0, "0.weight is bool in it and float32 in the network"),
        (lambda weight: weight.to(torch.complex64), "0.weight is complex64 in it and float32 in the network"),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), r"0.weight is quantised \(qint8\)"),
        (lambda weight: weight.to_sparse(), r"0.weight is sparse \(sparse_coo\)"),
        (lambda weight: weight.to("meta"), "0.weight is on the meta device, without values"),
        (lambda weight: weight.where(weight != weight.max(), torch.nan), "are NaN or infinite: 0.weight"),
        (lambda weight: [1.0, 2.0], "0.weight are not tensors in it"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(tmp_path, change, message):
    state = network().state_dict()
    torch.save(state | {"0.weight": change(state["0.weight"])}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"w.pt .*{message}"):
        load_weights(network(), tmp_path / "w.pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_other_precisions_are_read(tmp_path, dtype):
    """Also where everything was converted, the count of batches too."""
    original, copy = network(), network()
    original[1].num_batches_tracked += 8
    torch.save({name: value.to(dtype) for name, value in original.state_dict().items()}, tmp_path / "w.pt")
    load_weights(copy, tmp_path / "w.pt")
    assert copy[1].num_batches_tracked == 8
    assert copy[0].weight.dtype == torch.float32
    assert torch.equal(copy[0].weight, original[0].weight.to(dtype).float())


@pytest.mark.parametrize("name", ["w.SAFETENSORS", "w.pt", "w"])
def test_a_files_content_decides_how_it_is_read(tmp_path, name):
    original, copy = network(), network()
    save_file(original.state_dict(), tmp_path / name)
    load_weights(copy, tmp_path / name)
    assert equal(original, copy)


def test_names_that_are_no_strings_are_refused(tmp_path):
    torch.save({0: torch.ones(2), ("a", 1): torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"names of weights are strings; it has 0, \('a', 1\)"):
        read_weights(tmp_path / "w.pt")


def test_what_a_file_holds_instead_of_weights_is_named(tmp_path):
    torch.save({"generator": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt holds no state dict; its keys are 'generator', 'epoch'; save"):
        read_weights(tmp_path / "w.pt")


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

    monkeypatch.setattr("fastmerge.weights.save_file", fail)
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
        (nn.Sequential(*network()[:3]), "it also has 3.bias, 3.weight"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path, needed, message):
    save_weights(network(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(needed, tmp_path / "w.safetensors")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    torch.save(network(), tmp_path / "object.pt")
    with pytest.raises(ValueError, match=r"Python objects \(torch.nn.*Sequential\), which are not loaded because they"):
        read_weights(tmp_path / "object.pt")
    for name in ("damaged.pt", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"hello")
        with pytest.raises(ValueError, match=f"{name} is damaged or holds no weights"):
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
        ("builtins:next", {"n": 3}, ValueError, r"could not build builtins:next\(n=3\): "),
        (
            "this_one_raises:make",
            {},
            ValueError,
            r"could not build this_one_raises:make\(\): RuntimeError: no weights here",
        ),
        (
            "half_a_module:make",
            {},
            ValueError,
            "could not import 'half_a_module' of 'half_a_module:make': SyntaxError: ",
        ),
        ("no_such_module:make", {}, ValueError, "could not import 'no_such_module'"),
        ("torch.nn:NoSuchLayer", {}, ValueError, "torch.nn has no 'NoSuchLayer'"),
        ("math:pi", {}, ValueError, "math:pi must be a class or function"),
        ("builtins:dict", {}, TypeError, "must return a torch.nn.Module; it returned a dict"),
    ],
)
def test_networks_that_can_not_be_built_are_refused(name, arguments, error, message, tmp_path, monkeypatch):
    (tmp_path / "this_one_raises.py").write_text("def make():\n    raise RuntimeError('no weights here')\n")
    (tmp_path / "half_a_module.py").write_text("def make(\n")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("torchvision")
    with pytest.raises(error, match=message):
        build_network(name, **arguments)


def test_weights_are_fetched_from_the_hub_where_its_library_is(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"hf-hub:me/net is a repository .* huggingface_hub is not installed"):
        load_weights(network(), Path("hf-hub:me/net"))

    class EntryNotFoundError(Exception):
        pass

    def hf_hub_download(name, file):
        assert name == "me/net"
        if not (tmp_path / file).exists():
            raise EntryNotFoundError
        return str(tmp_path / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    errors = SimpleNamespace(EntryNotFoundError=EntryNotFoundError)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    with pytest.raises(FileNotFoundError, match=r"hf-hub:me/net has no model.safetensors and no pytorch_model.bin, or"):
        load_weights(network(), Path("hf-hub:me/net"))
    original, copy = network(), network()
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    load_weights(copy, Path("hf-hub:me/net"))
    assert equal(original, copy)


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
    build_network("timm:hf-hub:timm/resnet18.a1_in1k", num_classes=3)
    assert made == [("tiny", {"num_classes": 3}), ("hf-hub:timm/resnet18.a1_in1k", {"num_classes": 3})]
    with pytest.raises(ValueError, match="timm has no model tinny; near it: tiny"):
        build_network("timm:tinny")
