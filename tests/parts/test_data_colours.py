"""Jitter of colours: nothing drawn changes nothing, and what is drawn does what DALI's color_twist does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmerge.data.augmentation import AUGMENTATIONS, Changes, colour_maps, draw_changes, jitter_colours, map_colours
from image_files import pixels

IMAGES = np.stack([pixels(number, (48, 64)) for number in range(16)])


def test_a_jitter_of_nothing_changes_nothing() -> None:
    one, none = np.ones(16, np.float32), np.zeros(16)
    maps, offsets = colour_maps(Changes(none, none, none, one, one, one, none))
    torch.testing.assert_close(maps, torch.eye(3).expand(16, 3, 3), rtol=0, atol=1e-6)
    images = torch.from_numpy(IMAGES)
    assert torch.equal(map_colours(images, maps, offsets), images)


def test_grey_stays_grey_and_saturation_is_about_luminance() -> None:
    changes = draw_changes(AUGMENTATIONS["imagewoof"], 1, 0, np.arange(100))
    maps, _ = colour_maps(changes)
    gain = torch.from_numpy(changes.brightness * changes.contrast)
    # What becomes of grey; the numbers of the colour space have three digits, and grey a chrominance of 0.001.
    torch.testing.assert_close(maps.sum(2), gain[:, None].expand(-1, 3), rtol=0, atol=5e-3)
    luminance = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(luminance @ maps, gain[:, None] * luminance, rtol=1e-4, atol=1e-5)


def test_it_is_dalis_but_for_ties() -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import Pipeline, fn

    augmentation = AUGMENTATIONS["imagewoof"]
    changes = draw_changes(augmentation, 5, 0, np.arange(len(IMAGES)))
    twists = np.stack([changes.brightness, changes.contrast, changes.saturation, changes.hue], 1)
    pipeline = Pipeline(len(IMAGES), 1, None)
    with pipeline:
        images = fn.external_source(source=lambda: list(IMAGES), batch=True, layout="HWC")
        twist = fn.external_source(source=lambda: twists, batch=True)
        names = ("brightness", "contrast", "saturation", "hue")
        pipeline.set_outputs(fn.color_twist(images, **{name: twist[place] for place, name in enumerate(names)}))
    theirs = np.array(pipeline.run()[0].as_tensor()).astype(int)
    ours = jitter_colours(torch.from_numpy(IMAGES), augmentation, changes).numpy()
    differences = abs(ours - theirs)
    assert differences.max() <= 1
    assert (differences > 0).mean() < 1e-3
    assert abs(ours - IMAGES.astype(int)).mean() > 10  # there is something to compare
