"""A merge without training: keep the channels that explain all teachers' best, and let layers read the others through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmerge.channels.aten import bind, op_name
from fastmerge.channels.groups import ChannelGroups, squares
from fastmerge.channels.traced_network import tensor_at
from fastmerge.lock_step import Family, Moment
from fastmerge.methods.combination import combine, places_of_kept
from fastmerge.methods.registry import register
from fastmerge.methods.samples import exact, family_of, second_moments
from fastmerge.methods.transplant import largest, magnitudes
from fastmerge.narrowing.compression import sources_of

_NOISE = 1e-6  # of a channel's mean square, more than float32 rounds


@register("reconstruct", needs="samples", source="as J. Luo et al., ThiNet (arXiv 1707.06342), here between teachers")
@torch.no_grad()
def reconstruct(
    teachers: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    samples: int = 512,
    ridge: float = 0.03,
    keep: str = "pivots",
) -> nn.Module:
    """Keeps the channels that explain the others best, and refits the layers that read them by least squares.

    Of T·n candidates n are kept: the pivots of a column-pivoted QR of the values that layers read. Then teachers and student
    run side by side, and layer by layer the student's weights are fitted to compute from the kept channels what the teachers
    compute from all. BatchNorm gets statistics that give its channels the means and deviations of their teachers'.

    Source: as J. Luo et al., ThiNet (arXiv 1707.06342), here between teachers.

    Args:
        teachers: two or more.
        batches: of the data.
        samples: that the fits are made on.
        ridge: of the least squares, relative to a variable's mean square. Less makes large weights, and fine-tuning diverges.
        keep: "pivots", or "magnitude" as ``transplant`` does.

    Raises:
        ValueError: ``keep`` is neither.
    """
    if keep not in ("pivots", "magnitude"):
        raise ValueError(f'reconstruct keeps "pivots" or channels of the largest "magnitude"; got {keep!r}')
    family = family_of(teachers, batches, samples)
    groups = family.groups
    kept = largest(magnitudes(teachers, groups))
    if keep == "pivots":
        products = second_moments(family, teachers, weighted=True)
        kept |= {group.name: pivots(products[group.name], group.size) for group in groups if group.name in products}
    student = combine(teachers, groups, places_of_kept(groups, len(teachers), kept))
    refit(student, teachers, family, kept, ridge)
    balance(student, family)
    return student


def pivots(products: Tensor, count: int) -> Tensor:
    """The candidates that explain all of them best, one after another; ascending.

    A pivoted Cholesky decomposition of the inner products chooses as a column-pivoted QR does of what they are products of. Of
    two that the chosen ones explain wholly, it takes that which needs more of them: after a LayerNorm a channel is a sum of all
    others, and still needed, while another teacher's equal one is not.

    Args:
        products: (T·n, T·n).
        count: how many.
    """
    from scipy.linalg.lapack import dpstrf  # takes long to import

    found = products.double().cpu()
    found = found + (_NOISE * found.diagonal().mean()).expand(len(found)).diag()
    _, order, _, _ = dpstrf(found.numpy(), tol=0.0)
    chosen = torch.from_numpy(np.asarray(order, dtype=np.int64))[:count] - 1
    return chosen.sort().values


@torch.no_grad()
def refit(
    student: nn.Module, teachers: Sequence[nn.Module], family: Family, kept: Mapping[str, Tensor], ridge: float
) -> None:
    """Fits what the student's layers do with the kept channels to what the teachers' do with all, front to back.

    Args:
        student: changed in place.
        teachers: T networks, or one wider network whose channels the student has some of.
        family: their architecture, and samples.
        kept: by name of the group, which candidates the student's places hold.
        ridge: see :func:`reconstruct`.
    """
    done: set[str] = set()
    for moment in family.run([*teachers, student]):
        call = moment.call
        if call is not None and call.is_plain and call.groups == 1 and call.weight not in done:
            done.add(call.weight)
            if family.groups.inputs[call.weight].numbers:
                _refit_layer(moment, student, teachers, family.groups, kept, ridge)
        elif op_name(moment.node) == "batch_norm" and bind(moment.node)["running_mean"] is not None:
            _refit_norm(moment, student, teachers, family.groups, kept)


def _refit_layer(
    moment: Moment,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    groups: ChannelGroups,
    kept: Mapping[str, Tensor],
    ridge: float,
) -> None:
    call = moment.call
    assert call is not None
    inputs, outputs = groups.inputs[call.weight], groups.outputs[call.weight]
    written, read = call.geometry.out_dim, call.geometry.in_dim
    *theirs, mine = moment.channels
    common = torch.from_numpy(inputs.group < 0)
    rows_from, columns_from = (sources_of(units, groups, kept) for units in (outputs, inputs))
    shared = columns_from.common.nonzero().flatten()
    teacher, index = rows_from.owner, rows_from.index
    weight = torch.zeros_like(tensor_at(student, call.weight)).movedim((written, read), (0, 1))
    bias = None if call.bias is None else torch.zeros_like(tensor_at(student, call.bias))
    # of a transposed convolution not every output has all taps, by which a shift would go into the bias
    fit = LeastSquares(mine, ridge, centred=bias is not None and call.geometry.kind != "conv_transpose")
    for t, network in enumerate(teachers):
        mix, shift = fit.of(theirs[t])  # (read by the student, read by the teacher)
        mix[:, common], shift[common] = 0, 0
        mix[shared, columns_from.index[shared]] = 1
        rows = (teacher == t) | (teacher < 0)
        if not rows.any():
            continue
        share = torch.where(teacher < 0, 1 / len(teachers), 1.0)[rows].to(weight)
        own = tensor_at(network, call.weight).movedim((written, read), (0, 1))[index[rows].to(weight.device)]
        weight[rows] += torch.einsum("ij,oj...->oi...", mix, own) * share.view(-1, *[1] * (weight.dim() - 1))
        if bias is not None:
            theirs_bias = tensor_at(network, str(call.bias))[index[rows].to(bias.device)]
            bias[rows] += (own.reshape(*own.shape[:2], -1).sum(2) @ shift + theirs_bias) * share
    tensor_at(student, call.weight).copy_(weight.movedim((0, 1), (written, read)))
    if bias is not None:
        tensor_at(student, str(call.bias)).copy_(bias)


def _refit_norm(
    moment: Moment, student: nn.Module, teachers: Sequence[nn.Module], groups: ChannelGroups, kept: Mapping[str, Tensor]
) -> None:
    """Gives a BatchNorm the statistics by which its channels have the mean and deviation that they have in their teachers."""
    arguments = bind(moment.node)
    mean_name, variance_name = (str(arguments[key].target) for key in ("running_mean", "running_var"))
    _, units = groups.tensors[mean_name]
    source = sources_of(units, groups, kept)
    picked = (source.teacher, source.index)
    moments = [
        torch.var_mean(exact(x), [d for d in range(x.dim()) if d != 1], correction=0)
        for x in moment.values(arguments["input"])
    ]
    variance, mean = (torch.stack(each[:-1])[picked] for each in zip(*moments, strict=True))
    running_mean, running_variance = (
        torch.stack([exact(tensor_at(network, name)) for network in teachers])[picked]
        for name in (mean_name, variance_name)
    )
    eps, (now, centre) = arguments["eps"], moments[-1]
    deviation = ((running_variance + eps) * now / variance.clamp_min(1e-12)).sqrt()
    normalised = (mean - running_mean) / (running_variance + eps).sqrt()
    tensor_at(student, mean_name).copy_(centre - normalised * deviation)
    tensor_at(student, variance_name).copy_((deviation.square() - eps).clamp_min(0))


class LeastSquares:
    """Fits rows of values by others, with a little ridge: ``y ≈ mixᵀ x + shift``.

    Args:
        x: (variables, values).
        ridge: in means of the squares of a variable.
        centred: whether there is a shift.
    """

    def __init__(self, x: Tensor, ridge: float, centred: bool = True) -> None:
        x = exact(x)
        self.mean = x.mean(1) if centred else x.new_zeros(len(x))
        self.x, self.centred = x - self.mean[:, None], centred
        gram = (self.x @ self.x.T).double()
        size = gram.diagonal().mean().clamp_min(1e-12)
        self.factor = torch.linalg.cholesky(gram + (ridge * size).expand(len(gram)).diag())

    def of(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(x's variables, y's) and (y's,)."""
        z = exact(y)
        mean = z.mean(1) if self.centred else z.new_zeros(len(z))
        products = (self.x @ (z - mean[:, None]).T).double()
        mix = torch.cholesky_solve(products, self.factor).to(z)
        return mix.to(y), (mean - self.mean @ mix).to(y)


@torch.no_grad()
def balance(network: nn.Module, family: Family) -> None:
    """Gives each channel as much weight where it is written as where it is read, where that changes nothing.

    It does not for ReLU and pooling, but for BatchNorm or GELU; then the network is left as it is. The fit's large
    weights beside small ones would make fine-tuning at the teachers' learning rate diverge now and then.
    """
    groups, before = family.groups, _outputs(network, family)
    written, read = ([torch.zeros(group.size, dtype=torch.float64, device="cpu") for group in groups] for _ in range(2))
    tensors = dict(network.named_parameters())
    saved = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for axis, number, own in squares(groups, tensors):
        if axis.dim is not None:
            (read if axis.reads else written)[number] += own
    factors = [
        torch.where((w > 0) & (r > 0), (r / w.clamp_min(1e-12)).pow(0.25).clamp(1e-2, 1e2), 1.0)
        for w, r in zip(written, read, strict=True)
    ]
    rescale(tensors, groups, written=factors, read=[1 / factor for factor in factors])
    after = _outputs(network, family)
    if any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(after, before, strict=True)):
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


@torch.no_grad()
def rescale(
    tensors: Mapping[str, Tensor], groups: ChannelGroups, *, written: Sequence[Tensor], read: Sequence[Tensor]
) -> None:
    """Multiplies each channel's weights by one factor where it is written, and by another where it is read, in place.

    Args:
        tensors: of a network, by name; others that hold its channels are left as they are.
        groups: of the network.
        written: the factors of what is written of each group, (places,).
        read: the factors of what is read of it, (places,).
    """
    for axis in groups.axes():
        if axis.tensor not in tensors or axis.dim is None or not axis.units.numbers:
            continue
        factors = read if axis.reads else written
        scale = torch.ones(len(axis.units.group), dtype=torch.float64, device="cpu")
        for number in axis.units.numbers:
            places = torch.from_numpy(axis.units.places(number, groups[number].size))
            scale[places] = factors[number][:, None].to(scale)
        tensor = tensors[axis.tensor]
        tensor.mul_(scale.to(tensor).view([-1 if d == axis.dim else 1 for d in range(tensor.dim())]))


def _outputs(network: nn.Module, family: Family) -> list[Tensor]:
    """What the network gives on the samples."""
    *_, last = family.traced.graphs["eval"].nodes
    wanted = list(last.all_input_nodes)
    found: dict[Any, Tensor] = {}
    for moment in family.run([network]):
        if moment.node in wanted:
            (found[moment.node],) = moment.compute()
    return [value for value in found.values() if value.is_floating_point()]
