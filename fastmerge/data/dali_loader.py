"""Batches from image files through DALI, on the GPU or the CPU."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmerge.data.dali_graph import Graph
from fastmerge.data.dali_repair import Repair
from fastmerge.data.decoding import BadImages
from fastmerge.data.epochs import Batches, EpochLoader


class DaliLoader(EpochLoader):
    """Batches from the files of a tree.

    DALI gives a pipeline up at the first file that it can't decode. This loader then looks for the file among those under
    way, reports it, and goes on from there with a new pipeline, so that clean data costs nothing.

    Args:
        files: Paths.
        labels: int64, of each file.
        batches: Which samples make which batch.
        graph: What is done with them.
        bad_images: What happens to files that can't be read.
    """

    def __init__(
        self, files: Sequence[str], labels: NDArray[np.int64], batches: Batches, graph: Graph, bad_images: BadImages
    ) -> None:
        super().__init__(batches)
        self.labels = torch.from_numpy(labels)
        self.graph = graph
        self.device = torch.device("cpu") if graph.device_id is None else torch.device("cuda", graph.device_id)
        self._repair = Repair(files, graph, bad_images)
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self.graph = replace(self.graph, batch_size=self.batches.batch_size)
        self._pipeline: Any = None
        self._fresh = True
        self._epoch = 0
        self._waiting: list[NDArray[np.int64]] = []
        self._under_way: list[NDArray[np.int64]] = []

    def _read(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._drain()
        self._epoch, self._waiting = epoch, self.batches.of(epoch)[::-1]
        while (batch := self._next()) is not None:
            yield batch

    def _next(self) -> tuple[Tensor, Tensor] | None:
        """The next batch, or None after the last."""
        while True:
            if self._pipeline is None:
                self._pipeline = self._build()
            try:
                outputs = self._run()
            except RuntimeError as error:
                self._repair.find(self._under_way, error)
            else:
                if outputs is None:
                    return None
                samples = self._under_way[0]
                heads, tails = (np.array(output.as_tensor()) for output in outputs[1:])
                if not self._repair.found_otherwise(samples, heads, tails):
                    self._under_way.pop(0)
                    return self._images(outputs[0]), self.labels[samples].to(self.device, non_blocking=True)
            # A file was found bad: what is under way is fed anew, without it.
            self._pipeline = None
            self._waiting += self._under_way[::-1]
            self._under_way = []

    def _build(self) -> Any:
        # A pipeline that knew its loader would live on after it, until garbage collection.
        feed = weakref.WeakMethod(self._feed)

        def source() -> tuple[Any, ...]:
            alive = feed()
            assert alive is not None
            return alive()

        pipeline = self.graph.build(source)
        pipeline.build()
        return pipeline

    def _run(self) -> Any:
        """What the pipeline gives, or None after the last batch.

        On a GPU it is bound to torch's stream. Otherwise DALI would take the memory back as soon as torch has queued the work
        that reads it.

        Raises:
            RuntimeError: It can't decode a file; the pipeline is gone.
        """
        try:
            self._fresh = False
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            return self._pipeline.run(stream)
        except StopIteration:
            self._pipeline.reset()
            self._fresh = True
            return None
        except RuntimeError:
            self._pipeline = None
            self._fresh = True
            raise

    def _feed(self) -> tuple[Any, ...]:
        """What DALI calls when it has room for another batch."""
        while self._waiting:
            samples = self._repair.left(self._waiting.pop())
            if not self.batches.leaves_out(len(samples)):
                self._under_way.append(samples)
                return self.graph.feed(self._repair.sources(samples), self.batches.seed, self._epoch, samples)
        raise StopIteration

    def _images(self, output: Any) -> Tensor:
        images = torch.from_dlpack(output.as_tensor())  # no copy: the tensor owns DALI's buffer
        return images.permute(0, 3, 1, 2) if self.graph.channels_last else images

    def _drain(self) -> None:
        """Throws away what is under way of a pass that was broken off."""
        self._waiting = []
        while not self._fresh:
            with contextlib.suppress(RuntimeError):  # a bad file in a batch that nobody asked for
                self._run()
        self._under_way = []
