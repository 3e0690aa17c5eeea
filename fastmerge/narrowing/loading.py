"""What the state of a big student says of it: which candidates it had left, and whether it was linked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastmerge.channels.groups import ChannelGroups
from fastmerge.wide.layers import WideLayer
from fastmerge.wide.network import Layout
from fastmerge.wide.population import Population


def candidates_in(state_dict: Mapping[str, Tensor], prefix: str, groups: ChannelGroups) -> dict[str, Tensor]:
    """Which candidates a state has left, by group; empty for that of a big student that was not compacted."""
    given = {group.name: state_dict.get(f"{prefix}gates.{group.name}.candidates") for group in groups}
    return {name: candidates for name, candidates in given.items() if candidates is not None}


def is_linked_in(
    state_dict: Mapping[str, Tensor], prefix: str, network: nn.Module, layout: Layout, left: Population
) -> bool | None:
    """Whether weights in a state have their off-diagonal blocks; None if nothing in it tells.

    Args:
        state_dict: of a compacted big student.
        prefix: of its names.
        network: the wide modules of one before it was compacted.
        layout: of both.
        left: the candidates that the state has.
    """
    for weight, path in layout.layers.items():
        wide, given = network.get_submodule(path), state_dict.get(f"{prefix}network.{path}.weight")
        if isinstance(wide, WideLayer) and wide.wiring.has_off_diagonal and given is not None:
            along = left.groups.outputs if wide.geometry.out_dim == 1 else left.groups.inputs
            return given.shape[1] == int(left.is_left(along[weight]).sum())
    return None
