"""Deep copies of networks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TypeVar

from torch import nn

from fastmerge.isolation import without_search

Network = TypeVar("Network", bound=nn.Module)


def copied(network: Network) -> Network:
    """What ``copy.deepcopy`` gives, in half the time: empty dicts and sets, such as every module has for hooks, are ready."""
    attributes = (value for module in network.modules() for value in vars(module).values())
    with without_search():
        return copy.deepcopy(network, {id(v): type(v)() for v in attributes if type(v) in (OrderedDict, set) and not v})
