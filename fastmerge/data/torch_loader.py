"""Loaders that need no DALI: images that stay on the device, and image files through torch's DataLoader and Pillow.

On the device a batch is one gather and one normalisation, with no Python per image.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fastmerge.data.augmentation import Augmentation, cut_windows, draw_changes, jitter_colours
from fastmerge.data.decoding import BadImages, read_batch
from fastmerge.data.epochs import Batches, EpochLoader, ReaderLostError, readers_watched


class Finish:
    """From uint8 images of the final size to what networks read.

    Args:
        mean, std: Of each channel, for values of 0..255.
        dtype: float32, float16 or bfloat16.
        channels_last: The memory format of the batches, whose shape is (N, C, H, W) either way.
        device: Where.
    """

    def __init__(
        self,
        mean: NDArray[np.float64],
        std: NDArray[np.float64],
        dtype: torch.dtype,
        channels_last: bool,
        device: torch.device,
    ) -> None:
        self.mean = torch.from_numpy(mean).float().to(device)
        self.scale = torch.from_numpy(1 / std).float().to(device)
        self.dtype, self.channels_last, self.device = dtype, channels_last, device

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises uint8 images (N, H, W, C) and gives them the shape (N, C, H, W)."""
        # Whole rows at once: on a CPU, loops over three channels take ten times as long.
        rows = images.flatten(2).float()
        rows.sub_(self.mean.repeat(images.shape[2])).mul_(self.scale.repeat(images.shape[2]))
        normal = rows.to(self.dtype).view(images.shape).permute(0, 3, 1, 2)
        return normal if self.channels_last else normal.contiguous()


class DeviceLoader(EpochLoader):
    """Batches from images on a device.

    Args:
        images: uint8 (N, H, W, C), already there.
        labels: int64 (N,), already there.
        batches: Which samples make which batch.
        augmentation: Random changes, or None. It may not need larger images than these.
        finish: Normalisation.
        good: bool (N,), which images could be read; the others are left out of their batches. None is all.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batches: Batches,
        augmentation: Augmentation | None,
        finish: Finish,
        good: NDArray[np.bool_] | None = None,
    ) -> None:
        super().__init__(batches)
        self.height, self.width = images.shape[1:3]
        shift = 0 if augmentation is None else augmentation.shift
        self.images = F.pad(images, (0, 0, shift, shift, shift, shift)) if shift else images
        self.labels, self.augmentation, self.finish, self.good = labels, augmentation, finish, good

    def _read(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        parts = self._parts(epoch)
        if not parts:
            return
        order = np.concatenate(parts)
        if self.augmentation is None:
            changes, windows = None, torch.from_numpy(order)[None].to(self.images.device)
        else:
            changes = draw_changes(self.augmentation, self.batches.seed, epoch, order)
            # once an epoch, so that no batch waits for the host
            windows = changes.windows(order).to(self.images.device)
        ends = np.cumsum([len(part) for part in parts])
        for end, part in zip(ends.tolist(), parts, strict=True):
            piece = slice(end - len(part), end)
            samples = windows[0, piece]
            if self.augmentation is None or changes is None:
                images = self.images[samples]
            else:
                images = cut_windows(self.images, windows[:, piece], self.height, self.width)
                images = jitter_colours(images, self.augmentation, changes.of(piece))
            yield self.finish(images), self.labels[samples]

    def _parts(self, epoch: int) -> list[NDArray[np.int64]]:
        """The samples of each batch, without those that could not be read."""
        parts = self.batches.of(epoch)
        if self.good is None:
            return parts
        left = [part[self.good[part]] for part in parts]
        return [part for part in left if not self.batches.leaves_out(len(part))]


Key = tuple[int, NDArray[np.int64]]  # an epoch and the samples of a batch


class TreeBatches(Dataset[tuple[Tensor, Tensor, dict[str, str]]]):
    """Reads a whole batch of files; runs in the workers."""

    def __init__(self, files: Sequence[str], size: int, augmentation: Augmentation, batches: Batches) -> None:
        self.files, self.size, self.augmentation, self.batches = files, size, augmentation, batches

    @property
    def image_bytes(self) -> int:
        """Of each image that it gives."""
        return 3 * self.size**2

    def in_batches(self, batches: Batches) -> TreeBatches:
        """The same files, in other batches."""
        return TreeBatches(self.files, self.size, self.augmentation, batches)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, dict[str, str]]:
        epoch, samples = key
        images, kept, bad = read_batch(
            self.files,
            samples,
            self.size,
            self.augmentation,
            training=self.batches.training,
            seed=self.batches.seed,
            epoch=epoch,
        )
        return torch.from_numpy(images), torch.from_numpy(kept), bad


class ArrayBatches(Dataset[tuple[Tensor, Tensor, dict[str, str]]]):
    """Picks a whole batch of images out of an array."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images = images

    @property
    def image_bytes(self) -> int:
        """Of each image that it gives."""
        return self.images[0].nbytes

    def in_batches(self, batches: Batches) -> ArrayBatches:
        """Itself: it has no batches of its own."""
        return self

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, dict[str, str]]:
        _, samples = key
        return torch.from_numpy(self.images[samples]), torch.from_numpy(samples), {}


class TorchLoader(EpochLoader):
    """Batches from a data set of whole batches.

    Args:
        source: Gives uint8 images (n, H, W, C) of the final size, their samples, and the files that can't be read.
        labels: int64, of every sample.
        batches: Which samples make which batch.
        augmentation: Random changes after the cut, or None.
        finish: Normalisation, and on which device.
        bad_images: What happens to files that can't be read.
        workers: Processes that read; with 0 this one does.

    Raises:
        ValueError: There is too little shared memory for what they hand over.
    """

    def __init__(
        self,
        source: TreeBatches | ArrayBatches,
        labels: NDArray[np.int64],
        batches: Batches,
        augmentation: Augmentation | None,
        finish: Finish,
        bad_images: BadImages,
        workers: int,
    ) -> None:
        super().__init__(batches)
        self.labels, self.augmentation, self.finish = torch.from_numpy(labels), augmentation, finish
        self.bad_images = bad_images
        self._source, self._workers = source, workers
        if workers:
            _check_shared_memory(workers, min(batches.batch_size, len(labels)) * source.image_bytes)
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self._source = self._source.in_batches(self.batches)
        self._keys = _Keys(self.batches)
        self._loader: DataLoader[Any] = DataLoader(
            self._source,
            batch_size=None,  # a key is a batch
            sampler=self._keys,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=self.finish.device.type == "cuda",
            collate_fn=_share,
            worker_init_fn=_begin_worker,
        )

    def _read(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._keys.epoch = epoch
        device = self.finish.device
        for images, samples, bad in self._batches_of_files():
            for file, reason in bad.items():
                self.bad_images.report(file, reason)
            if self.batches.leaves_out(len(samples)):
                continue
            labels = self.labels[samples].to(device, non_blocking=True)
            yield self.finish(self._change(images.to(device, non_blocking=True), samples.numpy(), epoch)), labels

    def _batches_of_files(self) -> Iterator[Any]:
        with _signals_held():  # a worker that has hardly begun has them from here
            batches = iter(self._loader)
        while True:
            with readers_watched(), _handover_watched(self._workers):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _change(self, images: Tensor, samples: NDArray[np.int64], epoch: int) -> Tensor:
        if self.augmentation is None:
            return images
        height, width = images.shape[1:3]
        changes = draw_changes(self.augmentation, self.batches.seed, epoch, samples)
        windows = changes.windows(np.arange(len(samples))).to(images.device)
        shift = self.augmentation.shift
        padded = F.pad(images, (0, 0, shift, shift, shift, shift))
        return jitter_colours(cut_windows(padded, windows, height, width), self.augmentation, changes)


class _Keys:
    """The sampler: the keys of the epoch that is set."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.epoch = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Key]:
        return ((self.epoch, samples) for samples in self.batches.of(self.epoch))


_AHEAD = 2  # batches that each process reads ahead, the DataLoader's own choice
_SHARED = "/dev/shm"
_LOCKS = 2**15  # bytes of shared memory for each process's queue, a page for every lock
_REMEDY = (
    "make /dev/shm larger (docker run --shm-size 2g), or take fewer images per batch or fewer workers, none for example"
)


def _check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Finds out before the run what would end it in its middle."""
    try:
        system = os.statvfs(_SHARED)
    except OSError:
        return  # another system; a worker that finds none says so
    free, needed = system.f_bavail * system.f_frsize, workers * (_AHEAD * batch_bytes + _LOCKS) + _LOCKS
    if free < needed:
        raise ValueError(
            f"images read by {workers} other processes need {needed / 2**20:.1f} MiB of shared memory, and {_SHARED} has "
            f"{free / 2**20:.1f} MiB free: {_REMEDY}"
        )


@contextmanager
def _handover_watched(workers: int) -> Iterator[None]:
    """A worker that dies while it hands over a batch: its sockets are closed a moment before the system tells of its end."""
    try:
        yield
    except (ConnectionError, EOFError) as error:
        if not workers or str(error).startswith("Caught "):  # what reading itself raised, here or in a worker
            raise
        time.sleep(_UNTIL_TOLD)  # here PyTorch raises what became of it, once it is told
        raise ReaderLostError(
            "a process that reads images ended while it handed over a batch; if memory is short, take fewer workers or fewer "
            "images per batch"
        ) from error


def _share(batch: Any) -> Any:
    """Puts a batch where another process can read it: later, in the queue's thread, a failure would be lost, and waited for."""
    if get_worker_info() is not None:
        try:
            for tensor in batch[:2]:
                tensor.share_memory_()
        except RuntimeError as error:
            needed = sum(tensor.nbytes for tensor in batch[:2]) / 2**20
            raise ReaderLostError(
                f"a process that reads images has no shared memory for the {needed:.1f} MiB of a batch "
                f"({str(error).splitlines()[0]}): {_REMEDY}"
            ) from None
    return batch


def _begin_worker(worker: int) -> None:
    # A forked worker must not collect what its parent had thrown away: a DALI pipeline's end waits for threads that the worker
    # doesn't have, for ever.
    gc.freeze()
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
    sys.excepthook = _unless_parent_left
    _leave_signals_to_parent()


def _unless_parent_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says nothing of a connection that ends while a thread of the worker hands a batch over: its parent tells why it ended."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end(error: Exception, batch: object) -> None:
    """Ends a worker that can't hand a batch over, which its parent notices; it would wait for the batch."""
    os._exit(1)


_UNTIL_TOLD = 1.0
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@contextmanager
def _signals_held() -> Iterator[None]:
    """Within it no signal of those that end a run is acted on, in this thread and the processes that it begins."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_parent() -> None:
    """Ctrl-C and a cluster's SIGTERM reach all processes of a run; the parent writes a checkpoint, for which it needs this one.

    A SIGTERM that the parent sends ends it all the same.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(_SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
