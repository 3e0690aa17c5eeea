"""The DALI pipeline: read, decode what the crop needs, resize, change colours, mirror and normalise.

It draws nothing itself. Everything random comes from outside, a function of seed, epoch and sample, so that it makes the same
batches as the other loaders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.data.augmentation import CROP_TRIES, Augmentation, draw_changes, draw_crops
from fastmerge.data.decoding import most_pixels

# The size for which a hardware decoder makes room in advance; how much of the work it gets is left to DALI.
_WIDTH_HINT, _HEIGHT_HINT = 1024, 1024


@dataclass(frozen=True)
class Graph:
    """What the pipeline does.

    Attributes:
        batch_size: The most images of a batch.
        size: Height and width in the end.
        augmentation: How images are cut and changed.
        training: Whether they are changed at random.
        mean, std: Of the three channels, for values of 0..255.
        half: float16 in place of float32.
        channels_last: The memory layout.
        device_id: The GPU, or None for the CPU.
        threads: That decode on the CPU.
    """

    batch_size: int
    size: int
    augmentation: Augmentation
    training: bool
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    half: bool
    channels_last: bool
    device_id: int | None
    threads: int

    def inputs(self) -> list[str]:
        """The names of what the pipeline is fed with: DALI warns of inputs that it has no use for."""
        found = ["file"]
        if self.training:
            found += ["mirrored"] * self.augmentation.mirror + ["start"] * (self.augmentation.shift > 0)
            found += ["twist"] * self.augmentation.jitters
            found += ["areas", "ratios", "place"] * (self.augmentation.scale is not None)
        return found

    def feed(
        self, files: list[NDArray[np.uint8]], seed: int, epoch: int, samples: NDArray[np.int64]
    ) -> tuple[Any, ...]:
        """One batch for the pipeline: files' names, and what was drawn for them."""
        changes = draw_changes(self.augmentation, seed, epoch, samples)
        shift = self.augmentation.shift
        values: dict[str, Any] = {
            "file": files,
            "mirrored": changes.mirrored.astype(np.int32),
            "start": np.stack([changes.top - shift, changes.left - shift], 1).astype(np.int32),
            "twist": np.stack([changes.brightness, changes.contrast, changes.saturation, changes.hue], 1),
        }
        names = self.inputs()
        if "areas" in names:
            crops = draw_crops(self.augmentation, seed, epoch, samples)
            values |= dict(zip(("areas", "ratios", "place"), crops, strict=True))
        return tuple(values[name] for name in names)

    def build(self, source: Callable[[], tuple[Any, ...]]) -> Any:
        """Builds the pipeline.

        Args:
            source: Called for each batch, gives what :meth:`feed` returns, or raises StopIteration after an epoch.

        Returns:
            A ``nvidia.dali.Pipeline``; its outputs are the images, and the first and the last two bytes of each file.
        """
        from nvidia.dali import Pipeline, fn, types

        kinds = {
            "file": (types.UINT8, 1),
            "mirrored": (types.INT32, 0),
            "start": (types.INT32, 1),
            "twist": (types.FLOAT, 1),
            "areas": (types.FLOAT64, 1),
            "ratios": (types.FLOAT64, 1),
            "place": (types.FLOAT64, 1),
        }
        names = self.inputs()
        pipeline = Pipeline(self.batch_size, self.threads, self.device_id, prefetch_queue_depth=2)
        with pipeline:
            nodes = fn.external_source(
                source=source,
                num_outputs=len(names),
                batch=True,
                dtype=[kinds[name][0] for name in names],
                ndim=[kinds[name][1] for name in names],
            )
            fed = dict(zip(names, nodes, strict=True))
            encoded = fn.io.file.read(fed.pop("file"))
            shape = fn.peek_image_shape(encoded)
            # A file that would fill the memory is cut to one byte, which no decoder takes.
            fits = fn.cast(shape[0] * shape[1] <= most_pixels(), dtype=types.INT64)
            whole = encoded[: (encoded.shape()[0] - 1) * fits + 1]
            pipeline.set_outputs(
                self._images(whole, fn.cast(shape, dtype=types.FLOAT64), fed), encoded[:2], encoded[-2:]
            )
        return pipeline

    def _images(self, encoded: Any, shape: Any, fed: dict[str, Any]) -> Any:
        from nvidia.dali import fn, types

        decode: dict[str, Any] = {"device": "cpu", "output_type": types.RGB}
        if self.device_id is not None:
            hints = {"preallocate_width_hint": _WIDTH_HINT, "preallocate_height_hint": _HEIGHT_HINT}
            decode |= {"device": "mixed", **hints}
        region = {}
        if "areas" in fed:
            drawn = (fed["areas"], fed["ratios"], fed["place"])
            corner, sides = _random_crop(shape, drawn, self.augmentation.ratio)
            images = fn.decoders.image_slice(encoded, start=corner, shape=sides, axes=[0, 1], **decode)
        else:
            images = fn.decoders.image(encoded, **decode)
            if not self.training and self.augmentation.shorter_side is not None:
                shorter = round(self.size * self.augmentation.shorter_side)
                region = dict(zip(("roi_start", "roi_end"), _centre_crop(shape, self.size, shorter), strict=True))
        images = fn.resize(
            images, size=[self.size, self.size], interp_type=types.INTERP_LINEAR, antialias=True, **region
        )
        if "start" in fed:
            window = {"start": fed["start"], "shape": [self.size, self.size], "axes": [0, 1]}
            images = fn.slice(images, **window, out_of_bounds_policy="pad", fill_values=0)
        if "twist" in fed:
            twist = fed["twist"]
            images = fn.color_twist(images, brightness=twist[0], contrast=twist[1], saturation=twist[2], hue=twist[3])
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT16 if self.half else types.FLOAT,
            output_layout="HWC" if self.channels_last else "CHW",
            mean=self.mean.tolist(),
            std=self.std.tolist(),
            mirror=fed.get("mirrored", 0),
        )


def _random_crop(shape: Any, drawn: tuple[Any, ...], ratio: tuple[float, float]) -> tuple[Any, Any]:
    """``geometry.random_crop`` on the graph: corner and sides, int32."""
    from nvidia.dali import fn, math, types

    areas, ratios, place = drawn
    height, width = shape[0], shape[1]
    area = height * width * areas
    widths, heights = math.floor(math.sqrt(area * ratios) + 0.5), math.floor(math.sqrt(area / ratios) + 0.5)
    fitting = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    # Of those that fit the first has the highest score. Reductions take float32, which is exact for whole pixels.
    score = fn.cast(fitting, dtype=types.FLOAT) * types.Constant(np.arange(CROP_TRIES, 0, -1, dtype=np.float32))
    best = fn.reductions.max(score)
    first = fn.cast((score == best) & (score > 0), dtype=types.FLOAT)
    found = fn.cast(best > 0, dtype=types.FLOAT64)
    largest = (
        math.max(1.0, math.min(height, math.floor(width / ratio[0] + 0.5))),
        math.max(1.0, math.min(width, math.floor(height * ratio[1] + 0.5))),
    )
    sides = [
        fn.reductions.sum(first * fn.cast(tried, dtype=types.FLOAT)) + (1 - found) * otherwise
        for tried, otherwise in zip((heights, widths), largest, strict=True)
    ]
    place = found * place + (1 - found) * 0.5
    corner = [math.floor(place[axis] * (shape[axis] - sides[axis] + found)) for axis in range(2)]
    return fn.cast(fn.stack(*corner), dtype=types.INT32), fn.cast(fn.stack(*sides), dtype=types.INT32)


def _centre_crop(shape: Any, size: int, shorter: int) -> tuple[Any, Any]:
    """``geometry.centre_crop`` on the graph: begin and end of the region, float32."""
    from nvidia.dali import fn, math, types

    sides = shape[:2]
    resized = math.floor(sides * float(shorter) / math.min(sides[0], sides[1]))
    rest = fn.cast(resized - float(size), dtype=types.INT32)
    half = rest // 2
    corner = half + (rest & half & 1)  # rounds halves to even, as Python and torchvision do
    scale = sides / resized
    begin = corner * scale
    return fn.cast(begin, dtype=types.FLOAT), fn.cast(begin + float(size) * scale, dtype=types.FLOAT)
