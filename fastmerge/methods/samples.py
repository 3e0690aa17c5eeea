"""A few samples of the data, for methods that look at what channels do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge.checkpoints import aside
from fastmerge.evaluation import Criterion, Setting
from fastmerge.lock_step import Family, rows_of
from fastmerge.merging.checks import check_criterion, check_device, check_loader, pairs
from fastmerge.methods.cost import unwatched


def family_of(teachers: Sequence[nn.Module], batches: Iterable[Any], samples: int = 2) -> Family:
    """The teachers' channel groups, and samples of the data to run them on.

    Args:
        teachers: of one architecture.
        batches: yields (input, target); a tuple of tensors in place of the input goes to a network of several.
        samples: how many, the loader's first, or all where there are fewer; more than two are for statistics.

    Raises:
        TypeError, ValueError: the teachers can't be merged, the batches can't be iterated again and again or are no pairs, or
            there is no sample; or, where they are for statistics, one sample, or one that is not finite.
    """
    if samples < 2:
        raise ValueError(f"a method needs samples of at least 2; got {samples}")
    device, found, count = next(teachers[0].parameters()).device, list[tuple[Tensor, ...]](), 0
    for inputs, _ in pairs("batches", batches):
        if samples > 2 and not all(x.isfinite().all() for x in inputs if x.is_floating_point()):
            raise ValueError(
                f"a method that takes means and deviations needs finite samples; batch {len(found)} holds NaN or Inf"
            )
        shapes = [[tuple(x.shape[1:]) for x in each] for each in (found[0] if found else inputs, inputs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"a method that reads samples needs them of one shape; those of batch 0 are {shapes[0]}, of batch "
                f"{len(found)} {shapes[1]}. Let the collate_fn make them alike, such as by padding"
            )
        found.append(inputs)
        count += len(found[-1][0])
        if count >= samples:
            break
    if count < 2 < samples:
        raise ValueError("a method that takes means and deviations needs two samples or more; the loader has one")
    return Family.of(teachers, tuple(torch.cat(each)[:samples].to(device) for each in zip(*found, strict=True)))


def check_batches(name: str, batches: Iterable[Any], network: nn.Module, criterion: Criterion, **options: bool) -> None:
    """Checks a loader as ``check_loader`` does, whose options these are; random numbers and the loader stay as they were."""
    check_criterion(criterion)
    setting = Setting(check_device(None, network), criterion)
    with aside(batches, setting.device), unwatched():
        check_loader(name, batches, network, setting, **options)


def exact(values: Tensor) -> Tensor:
    """Values that can be squared and summed: float32 in place of 16 bits."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def second_moments(family: Family, networks: Sequence[nn.Module], *, weighted: bool) -> dict[str, Tensor]:
    """Inner products of what candidates are where layers read them, centred, summed over these layers.

    Args:
        family: of the networks.
        networks: T of them.
        weighted: whether a candidate counts by the norm of the weights that read it; else all have the norm 1, so that the
            products are correlations.

    Returns:
        By name of the group (T·n, T·n); groups that no layer reads are left out.
    """
    groups, found, seen = family.groups, dict[str, Tensor](), set[tuple[Any, int]]()
    tensors = [dict(network.named_parameters()) for network in networks]
    for moment in family.run(networks):
        if moment.call is None:
            continue
        weight, units = moment.call.weight, groups.inputs[moment.call.weight]
        numbers = units.numbers
        if not weighted:  # several layers that read one value say the same
            numbers = [n for n in numbers if (moment.call.input, n) not in seen]
            seen.update((moment.call.input, n) for n in numbers)
        elif moment.call.groups > 1:
            continue
        channels = moment.channels if numbers else []
        for number in numbers:
            group, places = groups[number], units.places(number, groups[number].size)
            rows = torch.cat([exact(rows_of(each, places)) for each in channels])
            rows = (rows - rows.mean(2, keepdim=True)).flatten(1)
            if weighted:
                dim = 1 - int(weight in groups.transposed)
                read = [exact(rows_of(each[weight].detach().movedim(dim, 0), places)).flatten(1) for each in tensors]
                rows = rows * torch.cat(read).norm(dim=1, keepdim=True)
            else:
                rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
            products = (rows @ rows.T).double()
            found[group.name] = found[group.name] + products if group.name in found else products
    return found
