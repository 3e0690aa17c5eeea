"""merge() takes the loaders as they are, and a merge that was broken off goes on with the batches it would have had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fastmerge
from fastmerge.data.loading import image_loaders
from image_files import write_tree


class StoppedError(Exception):
    """What breaks a merge off."""


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first, second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 6, 3)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


@pytest.mark.filterwarnings("ignore:P\\[g>0\\]")  # the stage is too short for the gates
@pytest.mark.parametrize("loader", ["dali", "device", "torch"])
def test_a_merge_goes_on_with_the_batches_it_would_have_had(tmp_path, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    pytest.importorskip("PIL")
    tree = write_tree(tmp_path / "tree", train_ant=7, train_cat=8, val_ant=3, val_cat=2)

    def run(out: Path, stop_after: int = 0, resume: bool = False) -> tuple[nn.Module, fastmerge.History]:
        workers = 0 if loader == "torch" else 1
        loaders = image_loaders(tree, 4, image_size=16, augmentation="cifar", loader=loader, seed=5, workers=workers)
        epochs = []

        def note(record: object) -> None:
            epochs.append(record)
            if len(epochs) == stop_after:
                raise StoppedError

        return fastmerge.merge(
            [network(0), network(1)],
            loaders.train,
            val_loader=loaders.val,
            merge_epochs=2,
            finetune_epochs=2,
            seed=1,
            checkpoint_dir=out,
            checkpoint_seconds=0,
            resume=resume,
            callback=note,
        )

    whole, history = run(tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(tmp_path / "broken", stop_after=3)
    resumed, _ = run(tmp_path / "broken", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    losses = [record.train.loss for record in history.epochs]
    assert len(set(losses)) == 4
