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
from fastmerge.channels.traced_network import module_path

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
        patterns: ids that lie within one channel of what a layer reads, or meet one entry of a constant, and a text that tells
            the arrangement or the entry apart.
        positions: ids that can't change places with others, each with its distinguishing text.
        mixed: (layer, operation, ids) where an operation mixed channels, which are one from there on.
        inputs: ids of the network's input channels.
        outputs: ids in the network's outputs.
        nonlinear_nodes: (mode, node name) of operations that do not commute with a mean.
        reads: by (mode, node name) of a layer call, the ids of the channels it reads.
        sample_dims: by (mode, node name) of a layer call, the dimension of what it reads along which the samples lie.
        fast_samples: (mode, node name) pairs of those where the samples are the faster index of that dimension.
        normalised: by (mode, node name) of a layer normalisation, the ids of the channels it reads.
        normalised_apart: likewise all ids that one without parameters reads, where they differ from position to position.
        without_channels: names of tensors that no dimension of channels was found in, so that one teacher's are kept whole.
        scalars: (id of a tensor of one element, ids of several channels that it acts on, each in its own place).
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
    sample_dims: dict[tuple[str, str], int] = field(default_factory=dict)
    fast_samples: set[tuple[str, str]] = field(default_factory=set)
    normalised: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    normalised_apart: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    without_channels: list[str] = field(default_factory=list)
    scalars: list[tuple[int, np.ndarray]] = field(default_factory=list)
    count: int = 0
    _constant: Tensor = field(default_factory=lambda: torch.zeros(1024, dtype=torch.bool, device="cpu"))
    _scalar: Tensor = field(default_factory=lambda: torch.zeros(1024, dtype=torch.bool, device="cpu"))

    def new_ids(self, n: int) -> Tensor:
        """n fresh ids."""
        self.count += n
        if self.count > len(self._constant):
            more = torch.zeros(max(self.count, 1024), dtype=torch.bool, device="cpu")
            self._constant, self._scalar = torch.cat([self._constant, more]), torch.cat([self._scalar, more])
        return torch.arange(self.count - n, self.count, device="cpu")

    def constant(self, label: str, n: int) -> Tensor:
        """Ids for channels that are the same for all teachers, none of which can change places with another."""
        ids = self.new_ids(n)
        self._constant[ids] = True
        self.inputs.append(ids.numpy())
        self.positions += [(label, i) for i in ids.tolist()]
        return ids

    def scalar(self) -> Tensor:
        """An id for a tensor of one element."""
        ids = self.new_ids(1)
        self._scalar[ids] = True
        return ids

    @property
    def scalar_ids(self) -> np.ndarray:
        """Which ids are those of tensors of one element, or of what is computed from nothing else: bool."""
        return self._scalar[: self.count].numpy()

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
        if known and all(self.is_constant(operand) for operand in (ids, *sources)):
            self._constant[fresh[torch.from_numpy(real)]] = True
        if known and all(self.is_scalar(operand) for operand in (ids, *sources)):
            self._scalar[fresh] = True
        operands = [other.reshape(-1).numpy()[first][real] for other in others]
        self.issues.append(Issue(label, fresh.numpy()[real], operands, known))
        self.united.append((old[real], fresh.numpy()[real]))
        return new.expand(ids.shape)

    def is_constant(self, ids: Tensor) -> bool:
        """Whether ids are those of the network's input alone, or of what is computed from nothing else."""
        return bool(self.constant_ids(compact(ids)).all())

    def constant_ids(self, ids: Tensor) -> Tensor:
        """Which of some ids are so, padding included: bool, of their shape."""
        return self._constant[ids] | (ids == NO_ID)

    def is_scalar(self, ids: Tensor) -> bool:
        """Whether ids are those of tensors of one element alone, or of what is computed from nothing else."""
        small = compact(ids)
        return small.numel() == 1 and bool(small != NO_ID) and bool(self._scalar[small])

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
        return ids[0] if len(ids) else torch.tensor(NO_ID, device="cpu")

    def holds_in_eval_mode(self) -> None:
        """Notes for eval mode what was found in training, too."""
        by_node: tuple[dict[tuple[str, str], Any], ...] = (self.reads, self.normalised, self.normalised_apart)
        for found in by_node:
            found.update({("eval", name): ids for (_, name), ids in found.items()})
        self.nonlinear_nodes |= {("eval", name) for _, name in self.nonlinear_nodes}

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
        tie_streams: whether channels that a LayerNorm or RMSNorm takes together can only be kept together.

    Attributes:
        ids: the channel ids of a tensor, in a tensor of its shape.
        noise: tensors that hold nothing but noise.
        mixing: operations without a rule that were met.
        mode: which forward is run, "train" or "eval".
        node: the node that is run.
    """

    def __init__(self, record: IdRecord, tie_streams: bool = False) -> None:
        self.record, self.tie_streams = record, tie_streams
        self.ids = WeakIdKeyDictionary()
        self.written: dict[int, Tensor] = {}  # by address of memory that ids were written to
        self.kept_alive: list[Tensor] = []  # so that the address stays its own
        self.noise = WeakIdKeyDictionary()
        self.mixing: set[str] = set()
        self.mode = ""
        self.node: fx.Node | None = None

    def find(self, tensor: Tensor) -> Tensor | None:
        """The ids of a tensor; None for what is the same for all teachers."""
        ids = self.ids.get(tensor)
        if ids is None and self.written and tensor.layout == torch.strided:
            memory = self.written.get(tensor.untyped_storage().data_ptr())
            if memory is not None and tensor.numel():
                ids = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
                self.ids[tensor] = ids
        return ids

    def is_made(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in memory that the code made, whatever was written to it since."""
        return tensor not in self.ids or tensor.untyped_storage().data_ptr() in self.written

    def write(self, tensor: Tensor, ids: Tensor) -> Tensor:
        """Notes that ids were written to a tensor that the code made, so that other views of its memory know them."""
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.element_size()
        if storage.data_ptr() not in self.written:
            self.written[storage.data_ptr()] = torch.full((size,), NO_ID, device="cpu")
        memory = self.written[storage.data_ptr()]
        memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(ids)
        self.kept_alive.append(tensor)
        return ids

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
