"""Hard concrete gates: stochastic switches in [0, 1] that learn which channels to keep.

Those of all channel groups are drawn side by side, handed out, and asked together what they keep.

Source: C. Louizos, M. Welling, D. Kingma, "Learning sparse neural networks through L0 regularization"
(arXiv 1712.01312), with the constants of M. Pašen, V. Boža, "Merging of neural networks" (arXiv 2204.09973).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge.channels.groups import ChannelGroups
from fastmerge.kernels.direct import apply
from fastmerge.kernels.gate import hard_concrete_mean, open_probability, sample_gates

BETA = 2 / 3
GAMMA = -0.1
ZETA = 1.1


class HardConcrete(nn.Module):
    """One hard concrete gate per channel.

    ``u ~ U(0, 1)``, ``s = sigmoid((log u - log(1 - u) + loc) / beta)``, ``g = clamp(s (zeta - gamma) + gamma, 0, 1)``.

    In training mode :meth:`forward` draws one gate per sample and channel; in eval mode it uses the deterministic
    gate of :meth:`mean`.

    Args:
        channels: number of gates, at least 1.
        beta: temperature, above 0.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end of the stretched interval, above 1.
        device: where ``loc`` lives.
        dtype: dtype of ``loc``; gates are computed in float32 or better whatever it is.

    Attributes:
        loc: parameter of shape (channels,), initialised from N(1, 0.01²). The larger, the more often open.
        candidates: int64 (channels,), the first numbers of the gates that are left; None while all are left. See
            :meth:`BigStudent.compact`.
        fixed: whether they are fixed for good, by :meth:`BigStudent.fix`: ``loc`` may not be changed by hand any more.

    Raises:
        ValueError: if an argument is outside its range.
    """

    candidates: Tensor | None

    def __init__(
        self,
        channels: int,
        beta: float = BETA,
        gamma: float = GAMMA,
        zeta: float = ZETA,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"HardConcrete needs at least one channel; got {channels}")
        if not (beta > 0 and gamma < 0 and zeta > 1):
            raise ValueError(f"HardConcrete needs beta > 0, gamma < 0 and zeta > 1; got {beta=}, {gamma=}, {zeta=}")
        self.channels, self.fixed = channels, False
        self.beta, self.gamma, self.zeta = beta, gamma, zeta
        self.loc = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.register_buffer("candidates", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``loc`` from N(1, 0.01²), the paper's start: most gates open."""
        nn.init.normal_(self.loc, mean=1.0, std=0.01)

    def sample(self, n: int) -> Tensor:
        """Draws gates for n samples.

        Returns:
            Gates in [0, 1], shape (n, channels), differentiable with respect to ``loc``.
        """
        return sample_gates(self.loc, n, beta=self.beta, gamma=self.gamma, zeta=self.zeta)

    def mean(self) -> Tensor:
        """The deterministic gate ``clamp(sigmoid(loc) (zeta - gamma) + gamma, 0, 1)``, shape (channels,)."""
        return hard_concrete_mean(self.loc, gamma=self.gamma, zeta=self.zeta)

    def numbers(self) -> Tensor:
        """The candidates that are left: int64 (channels,) on the CPU."""
        return torch.arange(self.channels, device="cpu") if self.candidates is None else self.candidates.cpu()

    def open_probability(self) -> Tensor:
        """``P[g > 0] = sigmoid(loc - beta log(-gamma / zeta))``, shape (channels,)."""
        return open_probability(self.loc, beta=self.beta, gamma=self.gamma, zeta=self.zeta)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the channels of ``x``, shape (N, channels, ...), by their gates."""
        gate = self.sample(x.shape[0]) if self.training else self.mean().unsqueeze(0)
        return x * gate.to(x.dtype).reshape(*gate.shape, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        return f"{self.channels}, beta={self.beta:.4g}, gamma={self.gamma}, zeta={self.zeta}"


def draw_gates(gates: Sequence[HardConcrete], samples: int | None, with_ones: bool) -> Tensor:
    """The matrix of gates, one group's columns after another's.

    Args:
        gates: of all groups.
        samples: how many to draw for, or None for the deterministic gates.
        with_ones: whether a last column of ones follows, for channels without a gate.

    Returns:
        (N, columns), or (1, columns) deterministic.
    """
    first, loc = gates[0], torch.cat([gate.loc for gate in gates])
    if samples is None:
        drawn = hard_concrete_mean(loc, gamma=first.gamma, zeta=first.zeta).unsqueeze(0)
    else:
        drawn = sample_gates(loc, samples, beta=first.beta, gamma=first.gamma, zeta=first.zeta)
    return torch.cat([drawn, drawn.new_ones(drawn.shape[0], 1)], dim=1) if with_ones else drawn


def kept_candidates(widths: Mapping[str, int], gates: nn.ModuleDict) -> dict[str, Tensor]:
    """Per group the candidates whose gates are the most open, ascending, as many as given; ties go to the lower index.

    Returns:
        int64 (width,) per group name; candidate t·n + j is channel j of teacher t.
    """
    kept = {}
    for name, width in widths.items():
        gate = gates[name]
        assert isinstance(gate, HardConcrete)
        order = torch.sort(gate.loc.detach(), descending=True, stable=True).indices
        top = order[:width].sort().values
        kept[name] = top if gate.candidates is None else gate.candidates[top]
    return kept


def checked_candidates(
    groups: ChannelGroups,
    num_teachers: int,
    gates: nn.ModuleDict,
    widths: Mapping[str, int],
    keep: Mapping[str, Any],
    what: str = "keep",
    more: bool = False,
) -> dict[str, Tensor]:
    """The candidates that a user wants to keep, ascending, by name of the group.

    Args:
        groups, num_teachers, gates: of the big student.
        widths: how many the student has, by name of the group.
        keep: what is given.
        what: the argument's name, for errors.
        more: whether there may be more of them than the student has.

    Raises:
        TypeError: it is no mapping.
        ValueError: a name is no group's, or what is given are not as many of its candidates as the student has.
    """
    if not isinstance(keep, Mapping):
        raise TypeError(f"{what} needs candidates by name of their channel group; got a {type(keep).__name__}")
    kept = {}
    for name, given in keep.items():
        if name not in groups.names:
            raise ValueError(f"{what} needs names of channel groups; got {name!r}, known are {', '.join(groups.names)}")
        gate, group = gates[name], groups[groups.names[name]]
        assert isinstance(gate, HardConcrete)
        try:
            chosen = torch.as_tensor(given, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            chosen = torch.zeros(0)  # which is refused
        integer = chosen.dim() == 1 and not (chosen.is_floating_point() or chosen.dtype == torch.bool)
        if (
            not integer
            or len(chosen.unique()) != len(chosen)
            or not (len(chosen) == widths[name] or (more and len(chosen) > widths[name]))
            or not torch.isin(chosen, gate.numbers()).all()
        ):
            left = "" if gate.candidates is None else " that compact() has left"
            number = f"{widths[name]} or more" if more else widths[name]
            raise ValueError(
                f"{what} needs {number} candidates of group '{name}', different numbers from 0 to "
                f"{num_teachers * group.size - 1}{left} (t·n + j is channel j of teacher t); got {given}"
            )
        kept[name] = chosen.long().sort().values
    return kept


def given_gates(
    drawn: Tensor, names: Sequence[str], sizes: Sequence[int], given: Mapping[str, Tensor], samples: int
) -> Tensor:
    """The matrix of gates with those of some groups as they are given.

    Args:
        drawn: the matrix, (N or 1, columns).
        names: of the groups.
        sizes: columns of each.
        given: by name, (candidates,) or (N, candidates).
        samples: N.

    Raises:
        TypeError: gates are no tensor.
        ValueError: a name is no group's, or gates are of another shape.
    """
    for name, gates in given.items():
        if name not in names:
            raise ValueError(f"gates need names of channel groups; got {name!r}, known are {', '.join(names)}")
        size = sizes[names.index(name)]
        if not isinstance(gates, Tensor):
            raise TypeError(f"gates of group '{name}' need to be a tensor; got a {type(gates).__name__}")
        if gates.shape not in ((size,), (1, size), (samples, size)):
            raise ValueError(
                f"gates of group '{name}' need the shape ({size},), or ({samples}, {size}) for a batch of {samples}; "
                f"got {tuple(gates.shape)}"
            )
    parts = list(drawn.split([*sizes, drawn.shape[1] - sum(sizes)], dim=1))
    for number, name in enumerate(names):
        if name in given:
            parts[number] = given[name].to(drawn).view(-1, sizes[number])
    rows = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(rows, -1) for part in parts], dim=1)


Run = tuple[int, int]  # first column, and how many


def hand_out_gates(gates: Tensor | None, runs: Sequence[Run], indices: Sequence[Tensor] = ()) -> tuple[Any, ...]:
    """The columns that each use of the matrix of gates multiplies by, cut out at once.

    Cut out one by one, each gradient would be added up in a matrix of zeros of its own.

    Args:
        gates: (N or 1, columns), or None for open gates.
        runs: the columns of each use that reads neighbours.
        indices: int64, those of each further use.

    Returns:
        (N or 1, columns of the use) for each run and then each index; views for runs. None for open gates.
    """
    if gates is None:
        return (None,) * (len(runs) + len(indices))
    if is_traced() or not gates.requires_grad:
        return _cut(gates, runs, indices)
    pieces: tuple[Any, ...] = apply(_HandOut, gates, tuple(runs), *indices)
    return pieces


def is_traced() -> bool:
    """Whether a compiler or torch.func follows what runs: they see plain operations, which they handle better."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


class _HandOut(torch.autograd.Function):
    """Columns of the matrix; backward adds the gradients of equal runs, many at once, and concatenates them."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, runs: tuple[Run, ...], *indices: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.columns, ctx.runs, ctx.indices = gates.shape[1], runs, indices
        return _cut(gates, runs, indices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_runs = [(run, grad) for run, grad in zip(ctx.runs, gradients, strict=False) if grad is not None]
        of_indices = [
            (index, grad)
            for index, grad in zip(ctx.indices, gradients[len(ctx.runs) :], strict=True)
            if grad is not None
        ]
        nothing = (None,) * (1 + len(ctx.indices))
        if not of_runs and not of_indices:
            return None, *nothing
        equal, gaps, overlapping = _side_by_side(tuple([run for run, _ in of_runs]), ctx.columns)
        totals = _sums([[of_runs[number][1] for number in numbers] for numbers in equal])
        like = next(grad for grad in gradients if grad is not None)
        for position, columns in gaps:
            totals.insert(position, like.new_zeros(like.shape[0], columns))
        total = torch.cat(totals, 1)
        for number in overlapping:
            run, grad = of_runs[number]
            total.narrow(1, *run).add_(grad)
        for index, grad in of_indices:
            total.index_add_(1, index, grad)
        return total, *nothing


@functools.lru_cache(maxsize=256)
def _side_by_side(runs: tuple[Run, ...], columns: int) -> tuple[list[list[int]], list[tuple[int, int]], list[int]]:
    """How runs lie in so many columns.

    Returns:
        Numbers of the runs, equal ones together, from left to right; the gaps between them, as positions in that list once
        those before are filled, and columns; numbers of the runs that overlap with others.
    """
    by_run: dict[Run, list[int]] = {}
    overlapping = []
    for number, run in enumerate(runs):
        if run not in by_run and any(run[0] < sum(other) and other[0] < sum(run) for other in by_run):
            overlapping.append(number)
        else:
            by_run.setdefault(run, []).append(number)
    gaps, column, position = [], 0, 0
    for run in [*sorted(by_run), (columns, 0)]:
        if run[0] > column:
            gaps.append((position, run[0] - column))
            position += 1
        column, position = sum(run), position + 1
    return [by_run[run] for run in sorted(by_run)], gaps, overlapping


def _cut(gates: Tensor, runs: Sequence[Run], indices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (*(gates.narrow(1, *run) for run in runs), *(gates.index_select(1, index) for index in indices))


def _sums(lists: list[list[Tensor]]) -> list[Tensor]:
    """The sum of each list of tensors, by one operation for the second tensors of all, one for the third and so on."""
    totals = [tensors[0] for tensors in lists]
    for position in range(1, max(map(len, lists), default=0)):
        long = [number for number, tensors in enumerate(lists) if len(tensors) > position]
        added = torch._foreach_add([totals[i] for i in long], [lists[i][position] for i in long])
        for number, total in zip(long, added, strict=True):
            totals[number] = total
    return totals


class GroupMeans:
    """Means over the candidates of each channel group, of which those that were dropped count as 0.

    Args:
        sizes: candidates that are left, by group.
        wholes: candidates that there were at first.
        device: where values will be, as far as is known.
    """

    def __init__(self, sizes: Sequence[int], wholes: Sequence[int], device: torch.device | None = None) -> None:
        self.sizes, self.wholes = [*sizes], [*wholes]
        self._on: dict[torch.device, tuple[Tensor, ...]] = {}
        self._constants(torch.device("cpu") if device is None else device)

    def __call__(self, values: Tensor) -> Tensor:
        """Means of values (..., candidates of all groups): (..., G)."""
        if is_traced() or values.dim() > 1:
            parts = values.split(self.sizes, -1)
            return torch.stack([part.sum(-1) / whole for part, whole in zip(parts, self.wholes, strict=True)], -1)
        offsets, numbers, wholes = self._constants(values.device)
        sums: Tensor = apply(_SegmentSums, values, offsets, numbers)
        return sums / wholes

    def _constants(self, device: torch.device) -> tuple[Tensor, ...]:
        """Where groups begin, the group of each candidate, and the wholes; on a device from the start, for a graph's sake."""
        if device not in self._on:
            counts = torch.tensor(self.sizes, device="cpu")
            numbers = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
            offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
            self._on[device] = tuple(t.to(device) for t in (offsets, numbers, torch.tensor(self.wholes, device="cpu")))
        return self._on[device]


class _SegmentSums(torch.autograd.Function):
    """Sums over segments of a vector; backward hands each element its sum's gradient, which PyTorch's own does one by one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor, numbers: Tensor) -> Tensor:
        ctx.numbers = numbers
        return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.numbers), None, None
