"""What a run on channel ids writes down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmerge.channels.layer_calls import LayerCall

NO_ID = -1


def compact(ids: Tensor, *others: Tensor, keep_first: bool = False) -> Any:
    """Index 0 along every dimension in which all tensors merely repeat (stride 0).

    Args:
        ids: an int64 tensor.
        others: more tensors of the same shape.
        keep_first: whether dimension 0 is left at its length.
    """
    tensors = [ids, *others]
    for d in range(int(keep_first), ids.dim()):
        if ids.shape[d] > 1 and all(t.stride(d) == 0 for t in tensors):
            tensors = [t.narrow(d, 0, 1) for t in tensors]
    return tensors if others else tensors[0]


@dataclass
class LayerRecord:
    """A convolution or linear layer: one weight, all its calls."""

    call: LayerCall
    inputs: np.ndarray
    outputs: np.ndarray


@dataclass
class IdRecord:
    """Everything a run on ids wrote down.

    Attributes:
        layers: by weight name.
        tensors: element ids of every other floating parameter and buffer that the forward uses, by name.
        united: pairs of ids that are one channel.
        tied: pairs of ids that are kept or dropped together without being one channel.
        memberships: per operation and output, the ids it computed, and a text that tells the operation apart.
        positions: ids that can't change places with others, each with its distinguishing text.
        mixed: (layer, operation, ids) where an operation mixed channels, which are one from there on.
        inputs: ids of the network's input channels.
        outputs: ids in the network's outputs.
        nonlinear_nodes: (mode, node name) of operations that do not commute with a mean.
        reads: by (mode, node name) of a layer call, the ids of the channels it reads.
        count: ids issued so far.
    """

    layers: dict[str, LayerRecord] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    united: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    tied: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    memberships: list[tuple[str, np.ndarray]] = field(default_factory=list)
    positions: list[tuple[str, int]] = field(default_factory=list)
    mixed: list[tuple[str, str, np.ndarray]] = field(default_factory=list)
    inputs: list[np.ndarray] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)
    nonlinear_nodes: set[tuple[str, str]] = field(default_factory=set)
    reads: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    count: int = 0

    def new_ids(self, n: int) -> Tensor:
        """n fresh ids."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Says that ids meeting in one number are one channel. ``a`` and ``b`` broadcast."""
        self._pair(self.united, a, b)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Says that channels can only be kept together."""
        self._pair(self.tied, a, b)

    def collapse(self, parts: list[Tensor], where: str, why: str) -> Tensor:
        """Unites all ids that an operation mixes: exact whatever it does, as one teacher's are kept as a whole."""
        ids = torch.cat([compact(p).reshape(-1) for p in parts])
        ids = torch.unique(ids[ids != NO_ID])
        if len(ids) > 1:
            self.unite(ids[:1].expand(len(ids) - 1), ids[1:])
            self.mixed.append((where, why, ids.numpy()))
        return ids[0] if len(ids) else torch.tensor(NO_ID)

    @staticmethod
    def _pair(pairs: list[tuple[np.ndarray, np.ndarray]], a: Tensor, b: Tensor) -> None:
        a, b = torch.broadcast_tensors(a, b)
        a, b = compact(a, b)
        keep = (a != b) & (a != NO_ID) & (b != NO_ID)
        if keep.any():
            both = torch.unique(a[keep] << 32 | b[keep])
            pairs.append(((both >> 32).numpy(), (both & 0xFFFFFFFF).numpy()))
