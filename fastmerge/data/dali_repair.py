"""Which file made DALI give up, and what to do with it."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmerge.data.dali_graph import Graph
from fastmerge.data.decoding import BadImages, bad_files, read_image

_JPEG_BEGINS, _JPEG_ENDS = b"\xff\xd8", b"\xff\xd9"


class Repair:
    """The files of a data set, without those that can't be read.

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

    def found_ending_early(
        self, samples: NDArray[np.int64], heads: NDArray[np.uint8], tails: NDArray[np.uint8]
    ) -> bool:
        """Looks closer at JPEGs without an end marker, which a decoder may fill up with grey, and reports those cut short.

        Args:
            samples: (n,) of a batch.
            heads, tails: (n, 2), the first and last bytes of their files.
        """
        jpeg = (heads == np.frombuffer(_JPEG_BEGINS, np.uint8)).all(1)
        suspects = samples[jpeg & (tails != np.frombuffer(_JPEG_ENDS, np.uint8)).any(1)]
        suspects = np.array([sample for sample in suspects if sample not in self._whole], np.int64)
        if not len(suspects):
            return False
        found = self._report(suspects)
        self._whole.update(self.left(suspects).tolist())  # bytes after the image do no harm
        return found

    def _report(self, samples: NDArray[np.int64]) -> bool:
        """Reports the files that Pillow can't read; whether there was one."""
        names = {self.files[sample]: sample for sample in samples}
        found = bad_files(names, self.graph.threads)
        for file, reason in found.items():
            self.bad_images.report(file, reason)
            self._bad[names[file]] = True
        return bool(found)

    def _convert(self, samples: NDArray[np.int64]) -> bool:
        """Converts the files that DALI alone can't read; whether there was one."""
        refused = [sample for sample in self._refused(samples.tolist()) if sample not in self._converted]
        for sample in refused:
            if self._folder is None:
                self._folder = tempfile.mkdtemp(prefix="fastmerge-")
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            copy = Path(self._folder) / f"{sample}.png"
            read_image(self.files[sample]).save(copy)
            self._converted[sample] = str(copy)
        return bool(refused)

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
