"""Loaders: whichever reads, the same batches."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from fastmerge.data import loading, torch_loader
from fastmerge.data.augmentation import AUGMENTATIONS, Augmentation, Changes, colour_maps, draw_changes
from fastmerge.data.epochs import ReaderLostError
from fastmerge.data.loading import IMAGENET_MEAN, IMAGENET_STD, image_loaders
from fastmerge.data.torch_loader import TreeBatches
from full_disk import files_of_at_most
from image_files import noise_arrays, write_odd_images, write_tree

pytest.importorskip("PIL")
SIZE = 24


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    folders = {"train_ant": 7, "train_cat": 6, "val_ant": 4, "val_cat": 5}
    return write_tree(tmp_path_factory.mktemp("tree"), **folders)


@pytest.fixture
def arrays(tmp_path) -> Path:
    made = noise_arrays(33, 21, (7, 6, 3), classes=33)
    np.savez(tmp_path / "x.npz", **made | {"test_images": made["train_images"][:21]})
    return tmp_path / "x.npz"


def make(path: Path, loader: str, batch_size: int = 4, **options):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    options = {"image_size": SIZE, "seed": 3, "workers": 0 if loader == "torch" else 1} | options
    return image_loaders(path, batch_size, loader=loader, **options)


def whole(loader) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass; its batches are of float32, channels-last."""
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return images, labels


def levels(images: torch.Tensor) -> torch.Tensor:
    """Back to 0..255."""
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (images.float() * std + mean) * 255


@pytest.mark.parametrize(
    "loader", ["device", "torch", "torch with workers", "torch on arrays", "device on arrays", "dali"]
)
def test_other_batches_of_the_same_images(tree, arrays, loader: str) -> None:
    """As those made anew; the loaders that they come from go on as if nothing had happened."""
    on_arrays, kind = "arrays" in loader, loader.split()[0]
    path = arrays if on_arrays else tree
    options = {"image_size": None if on_arrays else SIZE, "augmentation": Augmentation(shift=1), "workers": 1}
    options["workers"] *= kind == "dali" or "workers" in loader
    first, alone = make(path, kind, **options), make(path, kind, **options)
    before = iter(first.train)
    batches = [next(before)]
    for batch_size, seed, shard, shards in ((4, 7, 0, 1), (3, 3, 1, 2), (9, 1, 0, 2)):
        others = first.again(batch_size, seed, shard, shards)
        fresh = make(path, kind, batch_size, **options | {"seed": seed}, shard=shard, shards=shards)
        for _ in range(2):  # epochs
            for mine, theirs in ((others.train, fresh.train), (others.val, fresh.val)):
                assert len(mine) == len(theirs)
                assert mine.samples == theirs.samples
                for (images, labels), (same, of_it) in zip(mine, theirs, strict=True):
                    assert torch.equal(images, same)
                    assert torch.equal(labels, of_it)
    batches += before
    for (images, _), (same, _) in zip(batches, alone.train, strict=True):
        assert torch.equal(images, same)
    assert (first.train.epoch, others.train.epoch) == (1, 2)
    if kind == "device":  # once in memory
        assert others.train.images.data_ptr() == first.train.images.data_ptr()
        assert others.val.images.data_ptr() == first.val.images.data_ptr()
    with pytest.raises(ValueError, match="images are too few for 50 shards"):
        first.again(1, 0, 0, 50)


# Two libraries round to 8 bits once each, which makes a level of 255 at most.
PAIRS = [
    ("imagenet", "dali", 1.01),
    ("imagewoof", "dali", 1.01),
    ("cifar", "dali", 1.01),
    ("cifar", "device", 0.01),
    ("none", "dali", 1.01),
    ("none", "device", 0.01),
]


def jitter_of_a_level(loader, name: str, epoch: int) -> torch.Tensor | float:
    """How much further than one level apart each image's jitter can take colours that are a level apart; it rounds again."""
    if not AUGMENTATIONS[name].jitters:
        return 0.0
    samples = np.concatenate(loader.batches.of(epoch))
    maps, _ = colour_maps(draw_changes(AUGMENTATIONS[name], loader.batches.seed, epoch, samples))
    return maps.abs().sum(2).amax(1)


def test_the_papers_jitter_makes_at_most_five_levels_of_one():
    extremes = np.float32([0.85, 1.15])
    gain, saturation, hue = (axis.ravel() for axis in np.meshgrid(extremes, extremes, np.linspace(-54, 54, 10_001)))
    none = np.zeros(len(gain))
    maps, _ = colour_maps(Changes(none, none, none, gain, gain, saturation, hue))
    assert 4.1 < maps.abs().sum(2).max() < 4.2  # and the two roundings make one more


@pytest.mark.parametrize(("augmentation", "loader", "most"), PAIRS)
def test_loaders_give_the_same_batches(tree, augmentation, loader, most):
    loaders, fallback = (make(tree, name, augmentation=augmentation) for name in (loader, "torch"))
    assert (loaders.loader, fallback.loader) == (loader, "torch")
    assert loaders.classes == fallback.classes == 2
    for ours, theirs in ((loaders.train, fallback.train), (loaders.val, fallback.val)):
        for epoch in range(2):
            (images, labels), (expected, targets) = whole(ours), whole(theirs)
            limit = most + (jitter_of_a_level(theirs, augmentation, epoch) if ours is loaders.train else 0.0)
            assert labels.tolist() == targets.tolist()
            assert images.shape == (len(labels), 3, SIZE, SIZE)
            assert ((levels(images) - levels(expected)).abs().amax((1, 2, 3)) <= limit).all()
            assert levels(expected).std() > 30  # there is something to compare


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_validation_is_torchvisions(tree, loader):
    transforms = pytest.importorskip("torchvision.transforms")
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()]
    folder = ImageFolder(tree / "val", transforms.Compose(steps))
    expected = 255 * torch.stack([image for image, _ in folder])
    images, labels = whole(make(tree, loader, image_size=28).val)
    assert labels.tolist() == folder.targets
    assert (levels(images) - expected).abs().max() <= 2.01


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_random_crops_are_distributed_as_torchvisions(tree, loader):
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image

    # In an image whose colours are its coordinates, the mean colour is the middle of the crop, the spread its size.
    ramp = np.zeros((60, 90, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(90) * 2, np.arange(60)[:, None] * 2
    (tree.parent / "ramp").mkdir(exist_ok=True)
    for split in ("train", "val"):
        (tree.parent / "ramp" / split / "a").mkdir(parents=True, exist_ok=True)
        for number in range(4):
            Image.fromarray(ramp).save(tree.parent / "ramp" / split / "a" / f"{number}.png")
    train = make(tree.parent / "ramp", loader, augmentation="imagenet").train
    images = levels(torch.cat([whole(train)[0] for _ in range(60)]))
    crop = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()])
    theirs = torch.stack([torch.from_numpy(np.array(crop(Image.fromarray(ramp)))) for _ in range(600)]).permute(
        0, 3, 1, 2
    )
    for statistic in (torch.mean, torch.std):
        ours = statistic(images[:, :2], (2, 3))
        other = statistic(theirs[:, :2].float(), (2, 3))
        torch.testing.assert_close(ours.mean(0), other.mean(0), rtol=0.1, atol=0)
        torch.testing.assert_close(ours.std(0), other.std(0), rtol=0.2, atol=0)


@pytest.mark.parametrize("loader", ["dali", "torch", "device"])
def test_seeds_and_epochs_repeat_and_differ(tree, loader):
    def first(seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        train = make(tree, loader, augmentation="cifar", seed=seed).train
        train.set_epoch(epoch)
        return whole(train)

    once, again, other_seed, other_epoch = first(3, 1), first(3, 1), first(4, 1), first(3, 2)
    assert torch.equal(once[0], again[0])
    assert once[1].tolist() == again[1].tolist()
    for other in (other_seed, other_epoch):
        assert not torch.equal(once[0], other[0])
        assert once[1].tolist() != other[1].tolist()


@pytest.mark.parametrize("loader", ["dali", "torch", "device"])
def test_a_pass_moves_on_and_a_look_does_not(tree, loader):
    train = make(tree, loader, augmentation="cifar").train
    looked = next(iter(train))[0].clone()
    images, _ = whole(train)
    assert torch.equal(images[: len(looked)], looked)
    assert train.epoch == 1
    state = copy.deepcopy(train.state_dict())
    following, _ = whole(train)
    resumed = make(tree, loader, augmentation="cifar").train
    resumed.load_state_dict(state)
    assert torch.equal(whole(resumed)[0], following)
    with pytest.raises(ValueError, match="a loader with seed 3; this one has seed 5"):
        make(tree, loader, augmentation="cifar", seed=5).train.load_state_dict(state)


@pytest.mark.parametrize("loader", ["dali", "torch", "device"])
def test_a_pass_that_a_new_one_ends_says_so(tree, loader):
    train = make(tree, loader, augmentation="cifar").train
    old = iter(train)
    next(old)
    assert len(whole(train)[1]) == 12  # of 13 in fours, as the last one alone is left out
    with pytest.raises(RuntimeError, match="another pass over this loader has begun"):
        next(old)


@pytest.mark.parametrize("loader", ["dali", "torch", "device"])
def test_batches_held_are_not_overwritten(tree, loader):
    val = make(tree, loader, augmentation="cifar", batch_size=2).val
    held = list(val)
    copies = [images.clone() for images, _ in held]
    for _ in range(3):
        list(val)
    assert all(torch.equal(images, copied) for (images, _), copied in zip(held, copies, strict=True))


@pytest.mark.parametrize("loader", ["dali", "torch", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_dtype_and_memory_format(tree, loader, dtype, channels_last):
    loaders = make(tree, loader, augmentation="cifar", dtype=dtype, channels_last=channels_last)
    reference = make(tree, loader, augmentation="cifar")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for ours, theirs in ((loaders.train, reference.train), (loaders.val, reference.val)):
        for (images, labels), (expected, _) in zip(ours, theirs, strict=True):
            assert images.dtype == dtype
            assert labels.dtype == torch.int64
            assert images.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(images.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_unusual_images_are_read(tmp_path, loader):
    write_odd_images(tmp_path / "train" / "a")
    write_odd_images(tmp_path / "val" / "a")
    loaders = make(tmp_path, loader, augmentation="none", batch_size=5)
    images = levels(whole(loaders.val)[0])
    assert len(images) == len(whole(loaders.train)[0]) == 12
    rotated, grey, cmyk, progressive, png = images[:5]
    assert (progressive - png).abs().mean() < 4  # JPEG
    assert (cmyk - png).abs().mean() < 8
    assert (grey[0] - grey[1]).abs().max() < 1
    assert (rotated - png.rot90(-1, (1, 2))).abs().mean() < 6
    for other in images[[5, 8, 9]]:
        assert (other - png).abs().max() < 0.01
    assert (images[6] - png).abs().mean() < 40  # of few colours
    assert (images[7] - png[:1]).abs().max() <= 1.01  # 16 bits
    assert (images[10] - png).abs().mean() < 40
    assert torch.equal(images[11], grey)
    assert not loaders.bad_images.found


def test_what_reads_is_chosen_and_said(tree, arrays, monkeypatch):
    assert make(arrays, "auto", image_size=None).why.startswith("loader device: 54 images of 0 MiB stay on cpu")
    assert make(tree, "auto", augmentation="small").why.startswith("loader device: 22 image files, decoded once")
    monkeypatch.setattr(loading, "dali_is_there", lambda: True)
    assert make(tree, "auto").why == "loader dali: 22 image files are decoded on the CPU, in 1 thread"
    assert make(tree, "auto", dtype=torch.bfloat16).why.endswith("DALI gives no bfloat16")
    on_gpu = mock.Mock(
        device=torch.device("cuda"), dtype=torch.float32, size=8, workers=2, augmentation=mock.Mock(crops=True)
    )
    trees = (mock.Mock(files=["a"]), mock.Mock(files=["b"]))
    loader, why = loading.choose_for_trees(trees, "auto", on_gpu)
    assert (loader, why.partition("; ")[2]) == (
        "torch",
        "DALI has not been tried on a GPU yet (loader='dali' takes it)",
    )
    assert loading.choose_for_trees(trees, "dali", on_gpu)[0] == "dali"
    monkeypatch.setattr(loading, "dali_is_there", lambda: False)
    chosen = make(tree, "auto", workers=0)
    assert chosen.why.startswith(
        "loader torch: 22 image files are decoded by Pillow in this process; DALI is not installed"
    )
    assert make(tree, "torch").why.endswith("as asked for")
    monkeypatch.setattr(loading, "_room", lambda device: 100)
    assert make(arrays, "auto", image_size=None).loader == "torch"
    assert make(tree, "auto", augmentation="small").loader == "torch"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dalis_outputs_are_bound_to_torchs_stream(tree, device, monkeypatch):
    """On a GPU DALI may take their memory back only after the work that torch has queued."""
    pytest.importorskip("nvidia.dali")
    loader = make(tree, "dali").val
    loader.device, loader._pipeline, stream = torch.device(device), mock.Mock(), object()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    loader._run()
    loader._pipeline.run.assert_called_once_with(stream if device == "cuda" else None)


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    assert loading.cores() == 12
    for processes, each in ((4, 3), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert loading.cores() == each


def test_workers_give_what_one_process_gives(tree):
    alone, together = (make(tree, "torch", workers=workers) for workers in (0, 2))
    for _ in range(2):
        (images, labels), (expected, targets) = whole(together.train), whole(alone.train)
        assert labels.tolist() == targets.tolist()
        assert torch.equal(images, expected)


def test_a_worker_that_is_killed_is_said_to_be(tree, monkeypatch):
    alone = os.getpid()

    def read(self, key):
        assert os.getpid() != alone
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(TreeBatches, "__getitem__", read)
    with pytest.raises(ReaderLostError, match=r"images ended: .*; if memory is short, take fewer"):
        whole(make(tree, "torch", workers=1).train)


@pytest.mark.parametrize("told", [False, True], ids=["never-told", "told-later"])
@pytest.mark.parametrize("error", [ConnectionRefusedError, EOFError])
def test_a_worker_that_dies_while_it_hands_over_is_said_to_be(tree, monkeypatch, error, told):
    """For a moment its sockets are closed and it still counts as alive."""

    def connect(sharer, ident):
        if told:
            (child,) = multiprocessing.active_children()
            threading.Timer(0.5, child.kill).start()
        raise error

    monkeypatch.setattr("multiprocessing.resource_sharer._ResourceSharer.get_connection", connect)
    monkeypatch.setattr(torch_loader, "_UNTIL_TOLD", 30.0 if told else 0.0)
    loader = make(tree, "torch", workers=1).train
    reason = "DataLoader worker .* killed" if told else "while it handed over a batch"
    with pytest.raises(ReaderLostError, match=f"^a process that reads images ended.*{reason}"):
        whole(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_reading_raises_is_no_lost_worker(tree, monkeypatch, workers):
    def read(self, key):
        raise EOFError("of a file")

    monkeypatch.setattr(TreeBatches, "__getitem__", read)
    with pytest.raises(EOFError, match="of a file"):
        whole(make(tree, "torch", workers=workers).train)


@pytest.mark.parametrize("queue", [False, True])
def test_a_worker_that_has_no_shared_memory_is_an_error(tree, monkeypatch, queue):
    """Where the queue's thread fails to hand a batch over, it drops the batch: both processes would wait for ever."""
    if queue:
        monkeypatch.setattr("fastmerge.data.torch_loader.get_worker_info", lambda: None)
    reason = (
        "ended: DataLoader worker" if queue else r"has no shared memory for the 0.0 MiB of a batch \(.*File too large"
    )
    lost = pytest.raises(ReaderLostError, match=f"^a process that reads images {reason}")
    with files_of_at_most(4096), lost as raised:
        whole(make(tree, "torch", workers=1).train)
    assert "\n" not in str(raised.value)


def test_shared_memory_that_is_too_small_is_found_before_the_run(tree, monkeypatch):
    system = os.statvfs("/dev/shm")
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*system[:4], 30, *system[5:])))
    with pytest.raises(
        ValueError, match=r"^images read by 2 other processes need 0\.\d MiB .* has 0\.1 MiB free: make /dev/shm"
    ):
        make(tree, "torch", workers=2)
    whole(make(tree, "torch", workers=0).train)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_leaves_the_readers_to_their_parent(tree, number, monkeypatch):
    """Who writes a checkpoint after it needs more batches; at the end they are ended by it."""
    begin = torch_loader._begin_worker

    def begin_late(worker):
        time.sleep(worker)
        begin(worker)

    monkeypatch.setattr(torch_loader, "_begin_worker", begin_late)  # the second has hardly begun when the signal comes
    loader = make(tree, "torch", workers=2).train
    earlier = {child.pid for child in multiprocessing.active_children()}  # of a test before, which end soon
    batches = iter(loader)
    next(batches)
    children = [child for child in multiprocessing.active_children() if child.pid not in earlier]
    assert len(children) == 2
    for child in children:
        subprocess.run(["kill", f"-{int(number)}", str(child.pid)], check=True)
    assert len(list(batches)) == 2
    assert all(child.is_alive() for child in children)
    for child in children:
        child.terminate()
        child.join(5)
        assert not child.is_alive()


@pytest.mark.parametrize(
    ("error", "is_told"), [(ConnectionResetError(), False), (EOFError(), False), (OSError(), True)]
)
def test_a_worker_whose_parent_left_says_nothing(error, is_told, monkeypatch, capsys):
    """multiprocessing's thread, which hands batches over, would print a traceback beside the parent's one line."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name in ("gc", "Queue", "_leave_signals_to_parent"):
        monkeypatch.setattr(torch_loader, name, mock.Mock())
    torch_loader._begin_worker(0)
    sys.excepthook(type(error), error, None)
    assert (type(error).__name__ in capsys.readouterr().err) == is_told


class Ending:
    """Thrown away in a cycle, so that a collection ends it; notes in which process."""

    def __init__(self, file: Path) -> None:
        self.file, self.self = file, self

    def __del__(self) -> None:
        with self.file.open("a") as stream:
            print(os.getpid(), file=stream)


def test_workers_do_not_end_what_their_parent_had_thrown_away(tree, tmp_path, monkeypatch):
    """A DALI pipeline's end would wait for threads that a forked process doesn't have."""
    read, file = TreeBatches.__getitem__, tmp_path / "ended in"

    def collect_and_read(self, key):
        gc.collect()
        return read(self, key)

    monkeypatch.setattr(TreeBatches, "__getitem__", collect_and_read)
    was_on = gc.isenabled()
    gc.disable()
    try:
        Ending(file)
        assert len(whole(make(tree, "torch", workers=2).val)[1]) == 9
        assert not file.exists()
        gc.collect()
        assert file.read_text() == f"{os.getpid()}\n"
    finally:
        if was_on:
            gc.enable()


@pytest.mark.parametrize("loader", ["device", "torch"])
def test_arrays_are_normalised_by_the_training_images(arrays, loader):
    loaders = make(arrays, loader, 8, image_size=None)
    images = np.load(arrays)["train_images"].astype(np.float64)
    expected = (images - images.mean((0, 1, 2))) / images.std((0, 1, 2))
    inputs, targets = whole(loaders.val)
    np.testing.assert_allclose(inputs, expected[:21].transpose(0, 3, 1, 2), atol=1e-5)
    assert targets.tolist() == list(range(21))
    assert loaders.classes == 33


def test_arrays_are_shifted_mirrored_and_jittered_alike_by_both_loaders(arrays):
    augmentation = Augmentation(shift=2, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)
    device, fallback = (
        make(arrays, name, 8, image_size=None, augmentation=augmentation) for name in ("device", "torch")
    )
    plain = make(arrays, "device", 8, image_size=None)
    (images, labels), (expected, targets) = whole(device.train), whole(fallback.train)
    assert labels.tolist() == targets.tolist()
    assert torch.equal(images, expected)
    assert not torch.equal(images, whole(plain.train)[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loader": "tape"}, ValueError, "loader must be 'auto', 'dali', 'device', 'torch'; got 'tape'"),
        ({"augmentation": "blur"}, ValueError, "augmentation must be imagenet, .* got 'blur'"),
        ({"dtype": torch.int8}, ValueError, "float32, float16 or bfloat16; got dtype=torch.int8"),
        ({"on_bad_image": "ignore"}, ValueError, "on_bad_image must be 'raise' or 'skip'; got 'ignore'"),
        ({"loader": "device"}, ValueError, "'device' holds images of their final size; this augmentation cuts them"),
        ({"loader": "dali", "dtype": torch.bfloat16}, ValueError, "'dali' gives float32 or float16"),
        ({"device": "abacus"}, ValueError, "can't use device abacus"),
        ({"batch_size": 0}, ValueError, "batch_size of at least 1; got 0"),
        ({"seed": -1}, ValueError, "seed of at least 0; got -1"),
        ({"shards": 2, "shard": 2}, ValueError, r"shard in 0..1 of 2; got 2"),
        ({"shards": 10}, ValueError, "9 images are too few for 10 shards"),
    ],
)
def test_options_that_do_not_work_are_refused(tree, options, error, message):
    with pytest.raises(error, match=message):
        image_loaders(tree, **{"batch_size": 4, "workers": 0} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 6}, "are 7 pixels high; image_size is only for trees"),
        ({"loader": "dali"}, "reads trees of image files; .* holds arrays"),
        ({"augmentation": "imagenet"}, "are of their final size, 7x6; the augmentation cuts them out of larger ones"),
    ],
)
def test_options_for_trees_are_refused_for_arrays(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        image_loaders(arrays, 4, **options)


def test_grey_arrays_have_no_colours_to_change(tmp_path):
    np.savez(tmp_path / "x.npz", **noise_arrays(4, 4, (5, 5), classes=4))
    assert whole(image_loaders(tmp_path / "x.npz", 4, augmentation="small").train)[0].shape == (4, 1, 5, 5)
    with pytest.raises(ValueError, match="have 1 channels, not 3"):
        image_loaders(tmp_path / "x.npz", 4, augmentation=Augmentation(hue=0.1))


def test_dali_that_is_missing_is_named(tree, monkeypatch):
    monkeypatch.setattr(loading, "dali_is_there", lambda: False)
    with pytest.raises(ImportError, match=r"needs NVIDIA DALI: pip install 'fastmerge\[dali\]'"):
        make(tree, "dali")


def test_augmentations_are_those_of_their_sources():
    assert AUGMENTATIONS["imagenet"] == Augmentation(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), shorter_side=256 / 224)
    jitter = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.15)
    assert AUGMENTATIONS["imagewoof"] == Augmentation(scale=(0.4, 0.8), **jitter)
    assert AUGMENTATIONS["cifar"] == Augmentation(shift=4)


TREES = [
    ({"val_cat": 1}, FileNotFoundError, "there is no .*train; a tree needs"),
    ({"train_cat": 1}, FileNotFoundError, "there is no .*val; a tree needs"),
    ({"train_cat": 1, "val_cat": 0}, ValueError, r"val holds no images \(.jpg, .*\) of cat"),
    ({"train_cat": 1, "val_cat": 1, "val_dog": 1}, ValueError, "the classes of .* differ: dog in only one of them"),
]


@pytest.mark.parametrize(("folders", "error", "message"), TREES)
def test_trees_of_another_form_are_refused(tmp_path, folders, error, message):
    with pytest.raises(error, match=message):
        image_loaders(write_tree(tmp_path, **folders), 4)


def test_paths_that_lead_nowhere_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none"):
        image_loaders(tmp_path / "none", 4)
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"train has no class folders; a tree needs train/<class>/<image>"):
        image_loaders(tmp_path, 4)
