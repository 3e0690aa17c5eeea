"""Copies of networks share nothing with them."""

from __future__ import annotations

import torch
from torch import nn

from fastmerge.isolation import copied


def test_a_copy_has_hooks_sets_and_weights_of_its_own() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network.tied = network[0].weight
    network.kept = network[1].alike = set()
    network[0].register_forward_hook(print)
    copy = copied(network)
    assert copy.tied is copy[0].weight is not network[0].weight
    assert torch.equal(copy.tied, network.tied)
    assert list(copy[0]._forward_hooks.values()) == [print]
    copy[1].register_forward_pre_hook(print)
    copy[1]._non_persistent_buffers_set.add("mean")
    copy.kept.add(1)
    assert not network[1]._forward_pre_hooks
    assert not network[1]._non_persistent_buffers_set
    assert not network.kept
    assert copy[1].alike is copy.kept
