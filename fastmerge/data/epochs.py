"""Passes over a data set: which samples make which batch on which rank, and the protocol that all loaders share.

Random numbers are a function of seed, epoch and sample. Whoever asks gets the same number: any loader, any rank, any batch
size, a resumed run. No state is kept, and the bits do not depend on the version of a library.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_ORDER = 0x6F72646572  # a stream apart from those of the samples' draws


def uniforms(seed: int, epoch: int, samples: NDArray[np.int64], streams: range) -> NDArray[np.float64]:
    """Draws from U[0, 1).

    ``mix(mix(mix(mix(seed) + epoch) + sample) + stream)``, where ``mix`` is the finaliser of SplitMix64.

    Args:
        seed, epoch: At least 0.
        samples: (n,), the samples' places in the data set.
        streams: Which of a sample's draws; each number is an independent one.

    Returns:
        (n, len(streams)).
    """
    per_sample = _mix(_key(seed, epoch) + samples.astype(np.uint64))
    bits = _mix(per_sample[:, None] + np.arange(streams.start, streams.stop).astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """A random permutation of ``range(samples)``."""
    key = _mix(_key(seed, epoch) + np.uint64(_ORDER))
    return np.argsort(_mix(key + np.arange(samples, dtype=np.uint64)), kind="stable")


def _key(seed: int, epoch: int) -> NDArray[np.uint64]:
    return _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))  # of shape (1,): scalars would warn of overflow


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators" (2014)."""
    x = (x + np.uint64(1)) * _WEYL  # modulo 2⁶⁴, as all of it
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


AnyLoader = TypeVar("AnyLoader", bound="EpochLoader")


class ReaderLostError(RuntimeError):
    """A process that reads images ended, or can't hand them over."""


@contextlib.contextmanager
def readers_watched() -> Iterator[None]:
    """Turns what a DataLoader says of a worker that ended into an error of one line.

    PyTorch raises it in the main process wherever that is when its child ends, not only where it waits for a batch.

    Raises:
        ReaderLostError: A worker ended, or can't hand over what it read.
    """
    try:
        yield
    except ReaderLostError as error:  # from within a worker it comes with a traceback before it
        raise ReaderLostError(str(error).strip().splitlines()[-1].removeprefix(f"{_RAISED}: ")) from error
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        if not first.startswith("DataLoader worker"):
            raise
        raise ReaderLostError(
            f"a process that reads images ended: {first}; if memory is short, take fewer workers or fewer images per batch"
        ) from error


_RAISED = f"{ReaderLostError.__module__}.{ReaderLostError.__qualname__}"


class EmptyBatchError(ValueError):
    """A step of one of several processes has no image that can be read."""


@dataclass(frozen=True)
class Batches:
    """Which samples make which batch.

    In training every epoch has an order of its own, and all shards have equally many samples: up to ``shards - 1`` samples,
    others each epoch, are left out. Together the shards' k-th batches are the k-th batch of ``shards · batch_size`` samples
    that one process would read. In validation each sample comes once, in one shard.

    Attributes:
        samples: Of the data set.
        batch_size: Of one shard; the last batch may be smaller.
        training: Whether this is training.
        seed: Of the orders.
        shard, shards: Which part of how many.
        drop_last: Leaves out a smaller last batch in training. A last one of a single sample is left out anyway where there
            are others: BatchNorm can't train on it.
    """

    samples: int
    batch_size: int
    training: bool
    seed: int = 0
    shard: int = 0
    shards: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"a loader needs a batch_size of at least 1; got {self.batch_size}")
        if self.seed < 0:
            raise ValueError(f"a loader needs a seed of at least 0; got {self.seed}")
        if not 0 <= self.shard < self.shards:
            raise ValueError(f"a loader needs a shard in 0..{self.shards - 1} of {self.shards}; got {self.shard}")
        if self.samples < self.shards:
            raise ValueError(f"{self.samples} images are too few for {self.shards} shards; each needs one")

    @property
    def shard_samples(self) -> int:
        """How many samples this shard reads in an epoch."""
        if self.training:
            count = self.samples // self.shards
            rest = count % self.batch_size
            lonely = rest == 1 and count > 1
            return count - rest if lonely or (self.drop_last and count > rest) else count
        return len(range(self.shard, self.samples, self.shards))

    def __len__(self) -> int:
        return -(-self.shard_samples // self.batch_size)

    def of(self, epoch: int) -> list[NDArray[np.int64]]:
        """The samples of each batch."""
        whole = order(self.seed, epoch, self.samples) if self.training else np.arange(self.samples)
        mine = whole[self.shard :: self.shards][: self.shard_samples]
        return [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]

    def leaves_out(self, left: int) -> bool:
        """Whether a batch is left out, of which so many images can be read: none, or a single one in training.

        Of several shards, each has to give an image for each step.

        Raises:
            EmptyBatchError: It has none, and other processes would wait for this one's step.
        """
        if left > 1 or not self.training:
            return left == 0
        if self.shards == 1:
            return left == 0 or (self.batch_size > 1 and self.shard_samples > 1)
        if left == 0:
            raise EmptyBatchError(
                "no image of a batch can be read, and with several processes each needs one in every step: remove damaged "
                "files (fastmerge data check DATA lists them)"
            )
        return False


class EpochLoader(ABC):
    """Batches (images, labels), one epoch per ``iter``.

    A whole pass moves on to the next epoch; a pass that is broken off does not, so looking at the first batch changes
    nothing. The same seed and epoch give the same batches, in whatever process. There is one pass at a time: a new one ends
    the one before.

    Attributes:
        epoch: The epoch that the next pass reads.
        labels: int64, the class of every image of the data set.
    """

    labels: Tensor

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.epoch = 0
        self._passes = 0

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def samples(self) -> int:
        """Images per pass."""
        return self.batches.shard_samples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._passes += 1
        return self._pass(self.epoch, self._passes)

    def _pass(self, epoch: int, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._read(epoch):
            yield batch
            if number != self._passes:
                raise RuntimeError("another pass over this loader has begun; only one pass at a time can read it")
        if self.epoch == epoch:
            self.epoch += 1

    def in_batches(self: AnyLoader, batches: Batches) -> AnyLoader:
        """A loader of the same images in other batches, at its first epoch.

        What this one holds of them, in memory or on a device, is not read again and is there once; both can be read at a
        time.
        """
        other = copy.copy(self)
        other.batches = batches
        other._begin()
        return other

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next pass reads."""
        if epoch < 0:
            raise ValueError(f"epochs are counted from 0; got {epoch}")
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on at the border of two epochs."""
        return {"epoch": self.epoch, "seed": self.batches.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            ValueError: It was taken of a loader with another seed, whose order would be another.
        """
        if state["seed"] != self.batches.seed:
            raise ValueError(
                f"the state is of a loader with seed {state['seed']}; this one has seed {self.batches.seed}"
            )
        self.set_epoch(state["epoch"])

    def _begin(self) -> None:
        """Makes anew what one loader alone goes on with."""
        self.epoch = self._passes = 0

    @abstractmethod
    def _read(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch."""
