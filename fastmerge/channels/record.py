"""What a run on channel ids writes down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from fastmerge.channels.layer_calls import LayerCall
from fastmerge.channels.shapes import Shapes
from fastmerge.channels.tracing import module_path

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
class Issue:
    """Ids for the values that one operation computed, or moved in a way that changes them.

    Attributes:
        label: tells the operation (and which of its outputs) apart.
        ids: the fresh ids.
        sources: per operand the ids it computed them from, NO_ID where none.
        known: whether these sources are all that the values depend on.
    """

    label: str
    ids: np.ndarray
    sources: list[np.ndarray]
    known: bool


@dataclass
class IdRecord:
    """Everything a run on ids wrote down.

    Attributes:
        layers: by weight name.
        tensors: element ids of every other floating parameter and buffer that the forward uses, by name.
        united: pairs of ids that are one channel.
        tied: pairs of ids that are kept or dropped together without being one channel.
        issues: what operations computed, in the order of the run.
        patterns: ids that lie within one channel of what a layer reads, and a text that tells their arrangement apart.
        positions: ids that can't change places with others, each with its distinguishing text.
        mixed: (layer, operation, ids) where an operation mixed channels, which are one from there on.
        inputs: ids of the network's input channels.
        outputs: ids in the network's outputs.
        nonlinear_nodes: (mode, node name) of operations that do not commute with a mean.
        reads: by (mode, node name) of a layer call, the ids of the channels it reads.
        shapes: of every value in the graphs.
        sample_dims: by (mode, node name) of a layer call, the dimension of what it reads along which the samples lie.
        count: ids issued so far.
    """

    layers: dict[str, LayerRecord] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    united: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    tied: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)
    patterns: list[tuple[str, np.ndarray]] = field(default_factory=list)
    positions: list[tuple[str, int]] = field(default_factory=list)
    mixed: list[tuple[str, str, np.ndarray]] = field(default_factory=list)
    inputs: list[np.ndarray] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)
    nonlinear_nodes: set[tuple[str, str]] = field(default_factory=set)
    reads: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    sample_dims: dict[tuple[str, str], int] = field(default_factory=dict)
    count: int = 0

    def new_ids(self, n: int) -> Tensor:
        """n fresh ids."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def issue(self, label: str, ids: Tensor, sources: Sequence[Tensor] = (), known: bool = True) -> Tensor:
        """Fresh ids in the place of others that they are united with: the same channels, another value.

        Args:
            label: tells the operation apart.
            ids: what the values had until now.
            sources: further operands, of the same shape.
            known: see :class:`Issue`.
        """
        small, *others = compact(ids, ids, *(source.expand(ids.shape) for source in sources))
        old, first, inverse = np.unique(small.numpy(), return_index=True, return_inverse=True)
        fresh = self.new_ids(len(old))
        if len(old) and old[0] == NO_ID:
            fresh[0] = NO_ID
        new = fresh[torch.from_numpy(inverse.reshape(-1))].view(small.shape)
        real = old != NO_ID
        operands = [other.reshape(-1).numpy()[first][real] for other in others]
        self.issues.append(Issue(label, fresh.numpy()[real], operands, known))
        self.united.append((old[real], fresh.numpy()[real]))
        return new.expand(ids.shape)

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


class IdRun:
    """A run on ids under way: the record, and what it knows of the tensors that are alive.

    Args:
        record: to write to.

    Attributes:
        ids: the channel ids of a tensor, in a tensor of its shape.
        noise: tensors that hold nothing but noise.
        mixing: operations without a rule that were met.
        mode: which forward is run, "train" or "eval".
        node: the node that is run.
    """

    def __init__(self, record: IdRecord) -> None:
        self.record = record
        self.ids = WeakIdKeyDictionary()
        self.noise = WeakIdKeyDictionary()
        self.mixing: set[str] = set()
        self.mode = ""
        self.node: fx.Node | None = None

    def where(self) -> str:
        """Where in the network, for messages."""
        return module_path(self.node) if self.node is not None else "?"


@dataclass(frozen=True)
class Computed:
    """The ids of an output, and of all operands it was computed from.

    Attributes:
        ids: of the output's shape.
        operands: what it was computed from, shapes that broadcast to it.
    """

    ids: Tensor
    operands: list[Tensor]
