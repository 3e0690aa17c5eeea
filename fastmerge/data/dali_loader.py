"""Batches from image files through DALI, on the GPU or the CPU."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmerge.data.dali_graph import Graph
from fastmerge.data.decoding import JPEG_END, BadImages, bad_files, in_threads, open_image, read_image
from fastmerge.data.epochs import Batches, EpochLoader

_JPEG_BEGINS, _TIFF_BEGINS = b"\xff\xd8", (b"II", b"MM")
_BEGINS = (b"\x89P", b"RI", b"BM", b"GI", *(b"P%d" % number for number in range(1, 7)))  # PNG, WebP, BMP, GIF, PNM
# Pillow's names of modes of which DALI makes the same RGB.
_SAME_COLOURS = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B")


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


class Repair:
    """The files of a data set, without those that can't be read: which one made DALI give up, and what to do with it.

    What Pillow can't read either is a bad image, and is reported. What Pillow reads and DALI doesn't, a GIF for one, is
    written to a temporary folder as PNG, so that every loader has the same images.

    Args:
        files: Paths.
        graph: The pipeline in which they are read.
        bad_images: What happens to files that can't be read.
    """

    def __init__(self, files: Sequence[str], graph: Graph, bad_images: BadImages) -> None:
        self.files, self.graph, self.bad_images = files, graph, bad_images
        self._bad = np.zeros(len(files), bool)
        self._whole: set[int] = set()
        self._converted: dict[int, str] = {}
        self._folder: str | None = None

    def sources(self, samples: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The names of samples' files, as DALI takes them."""
        files = [self._converted.get(sample, self.files[sample]) for sample in samples.tolist()]
        return [np.frombuffer(os.fsencode(file), np.uint8) for file in files]

    def left(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples without those known to be bad."""
        return samples[~self._bad[samples]]

    def find(self, under_way: list[NDArray[np.int64]], error: RuntimeError) -> None:
        """Finds the files that made DALI give up.

        Args:
            under_way: The batches that the pipeline was at, the first one first.
            error: What DALI said.

        Raises:
            BadImageError: As ``bad_images`` says.
            RuntimeError: No single file is to blame.
        """
        for samples in under_way:
            if self._report(samples) or self._convert(samples):
                return
        raise RuntimeError(f"DALI failed, though it can decode each of the images by itself: {error}") from error

    def found_otherwise(self, samples: NDArray[np.int64], heads: NDArray[np.uint8], tails: NDArray[np.uint8]) -> bool:
        """Looks closer at files that DALI decodes and Pillow may not, or otherwise; whether one has to be read anew.

        * JPEGs without an end marker, which a decoder may fill up with grey: those cut short are reported.
        * What begins as none of the promised formats does, such as JPEG 2000: reported.
        * TIFFs of floating-point numbers are reported, and those of colours other than RGB's converted by Pillow.

        Args:
            samples: (n,) of a batch.
            heads, tails: (n, 2), the first and last bytes of their files.
        """
        starts = heads.view("S2")[:, 0] if len(samples) else np.empty(0, "S2")
        jpeg = starts == _JPEG_BEGINS
        early = jpeg & (tails != np.frombuffer(JPEG_END, np.uint8)).any(1)
        tiff = np.isin(starts, _TIFF_BEGINS)
        known = jpeg | tiff | np.isin(starts, _BEGINS)
        suspects, tiffs = (
            np.array([sample for sample in samples[which] if sample not in self._whole], np.int64)
            for which in (early | ~known, tiff)
        )
        if not len(suspects) and not len(tiffs):
            return False
        converted = [self._convert_colours(sample) for sample in tiffs.tolist()]
        found = self._report(suspects) if len(suspects) else False
        self._whole.update(self.left(suspects).tolist())  # bytes after the image do no harm
        return found or any(converted)

    def _convert_colours(self, sample: int) -> bool:
        """Converts a TIFF whose colours DALI takes otherwise, or reports it; whether it did."""
        self._whole.add(sample)
        file = self.files[sample]
        with open_image(file) as image:
            if image.mode in _SAME_COLOURS:
                return False
        if not self._report(np.array([sample])):
            self._copy(sample)
        return True

    def _report(self, samples: NDArray[np.int64]) -> bool:
        """Reports the files that Pillow can't read; whether there was one."""
        names = {self.files[sample]: sample for sample in samples}
        each = in_threads(bad_files, ([name] for name in names), self.graph.threads)
        found = dict(entry for bad in each for entry in bad.items())
        for file, reason in found.items():
            self.bad_images.report(file, reason)
            self._bad[names[file]] = True
        return bool(found)

    def _convert(self, samples: NDArray[np.int64]) -> bool:
        """Converts the files that DALI alone can't read; whether there was one."""
        refused = [sample for sample in self._refused(samples.tolist()) if sample not in self._converted]
        for sample in refused:
            self._copy(sample)
        return bool(refused)

    def _copy(self, sample: int) -> None:
        """Writes what Pillow reads of a file, to be read in its place."""
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="fastmerge-")
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        copy = Path(self._folder) / f"{sample}.png"
        read_image(self.files[sample]).save(copy)
        self._converted[sample] = str(copy)

    def _refused(self, samples: list[int]) -> list[int]:
        """The samples whose files DALI can't decode, found by halving."""
        if self._decodes(samples):
            return []
        if len(samples) == 1:
            return samples
        middle = len(samples) // 2
        return self._refused(samples[:middle]) + self._refused(samples[middle:])

    def _decodes(self, samples: list[int]) -> bool:
        from nvidia.dali import Pipeline, fn, types

        sources = self.sources(np.array(samples))
        pipeline = Pipeline(len(samples), self.graph.threads, self.graph.device_id, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.io.file.read(fn.external_source(source=lambda: sources, batch=True))
            device = "cpu" if self.graph.device_id is None else "mixed"
            pipeline.set_outputs(fn.decoders.image(encoded, device=device, output_type=types.RGB))
        try:
            pipeline.run()
        except RuntimeError:
            return False
        return True
