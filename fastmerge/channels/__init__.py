"""Which channels of a network live and die together: found by running it on channel ids.

`ids` runs the graphs of `tracing` on ids instead of numbers, layers (`layer_calls`) by their own rule, every other operation by
`rules`, and fills a `record`. From that `grouping` makes the `groups`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from fastmerge.channels.examples import example_arguments
from fastmerge.channels.grouping import group_channels
from fastmerge.channels.groups import ChannelGroup, ChannelGroups, permute
from fastmerge.channels.ids import run_on_ids
from fastmerge.channels.tracing import trace

__all__ = ["ChannelGroup", "ChannelGroups", "channel_groups", "permute"]


def channel_groups(model: nn.Module, example_inputs: Any = None) -> ChannelGroups:
    """Finds the channel groups of a network: which channels a merge would choose among.

    Args:
        model: any network that ``torch.export`` can trace; it is not changed.
        example_inputs: a tensor (N, C, ...), a tuple of positional arguments, a dict of keyword arguments, or a pair of both;
            inferred for networks with one image, signal or vector input.

    Returns:
        The groups; ``print`` shows them as a table.

    Raises:
        ValueError: if the network can't be traced or merged, naming the layer.
    """
    inputs = example_arguments(model, example_inputs)
    return group_channels(run_on_ids(trace(model, inputs), pytree.tree_leaves(inputs)))
