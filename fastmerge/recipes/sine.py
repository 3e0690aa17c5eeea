"""Regression of a noisy sine curve by a network with one hidden layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmerge.data.dataset import Dataset
from fastmerge.data.decoding import OnBadImage
from fastmerge.data.sine import sine_curve, sine_dataset
from fastmerge.networks.sine_mlp import SineMLP
from fastmerge.training.recipe import Recipe


def sine() -> Recipe:
    """The paper's first experiment, at its full length.

    A run draws its points once, for all strategies and replicates, and every network reads them in an order of its own
    (the authors' script draws points per network and reads them in one order).
    """
    return Recipe(
        name="sine",
        metric="test_loss",
        make_network=SineMLP,
        load_data=_load,
        criterion=F.mse_loss,
        epochs=900,
        batch_size=32,
        lr=0.01,
        teacher_milestones=(250,),
        long_milestones=(800,),
        finetune_milestones=(100,),
        momentum=0.9,
        weight_decay=0.0,
        gate_lr=0.1,
        lam_start=0.01,
        lam_step=0.05,
        link_at=0.0,  # one hidden layer: there is nothing to link
        augment=None,
        test_every=15,
        stack=25,
        source="Pašen & Boža, Merging of neural networks, section 3.1 (50 replicates)",
        curve=curve,
    )


def curve() -> tuple[Tensor, Tensor]:
    """500 inputs from 0 to 1 and the sine there, each (500, 1)."""
    x = torch.linspace(0, 1, 500)[:, None]
    return x, sine_curve(x)


def _load(path: Path | None, seed: int, on_bad_image: OnBadImage = "raise") -> Dataset:
    if path is not None:
        raise ValueError(f"sine makes its own data; it takes no path, such as {path}")
    return sine_dataset(seed)
