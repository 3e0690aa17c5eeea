"""Networks of one architecture, run together node by node: what each of their channels is where a layer reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastmerge.channels.examples import example_arguments, few_samples
from fastmerge.channels.groups import ChannelGroups
from fastmerge.channels.layer_calls import LayerCall, layer_calls
from fastmerge.channels.traced_network import CONSTANT, TracedNetwork, tensor_at
from fastmerge.validation import check_teachers
from fastmerge.wide.blueprint import code_errors, common_buffers, read_network

_MOST_COLUMNS = 1 << 16  # samples and positions: enough for the second moments of some thousand channels


@dataclass(frozen=True)
class Family:
    """Networks of one architecture, traced once for all of them.

    Attributes:
        networks: they are never changed.
        inputs: what they are run on, flat.
        traced: the graphs of one.
        groups: the channel groups of each.
    """

    networks: tuple[nn.Module, ...]
    inputs: tuple[Any, ...]
    traced: TracedNetwork
    groups: ChannelGroups

    @classmethod
    def of(cls, networks: Sequence[nn.Module], inputs: Any = None) -> Family:
        """Finds the channel groups of networks.

        Args:
            networks: one or more of one architecture.
            inputs: what their forward takes, as ``example_inputs`` of :class:`~fastmerge.BigStudent`; of several samples where
                their statistics matter.

        Raises:
            TypeError, ValueError: as :class:`~fastmerge.BigStudent`.
        """
        if len(networks) > 1:
            check_teachers(networks)
        few = example_arguments(networks[0], few_samples(inputs))
        leaves = pytree.tree_leaves(few if inputs is None else inputs)
        common = common_buffers(networks)
        traced, groups, *_ = read_network(networks[0], few, None, common)
        if not traced.is_open["eval"]:
            few = example_arguments(networks[0], inputs)
            traced, groups, *_ = read_network(networks[0], few, None, common)
        for error in code_errors(traced, dict(enumerate(networks)), few):
            raise error
        return cls(tuple(networks), tuple(leaves), traced, groups)

    def run(self, networks: Sequence[nn.Module] | None = None) -> Iterator[Moment]:
        """Runs networks of the architecture in eval mode and without gradients, and stops before each operation.

        Args:
            networks: None: those of the family. Weights that are changed on the way count from there on.
        """
        networks = self.networks if networks is None else networks
        graph = self.traced.graphs["eval"]
        calls = layer_calls(graph, self.traced.root)
        runs = [_Run(self.traced, network, self.inputs) for network in networks]
        with torch.no_grad():
            for node in graph.nodes:
                if node.op == "output":
                    return
                moment = Moment(node, calls.get(node), runs)
                if node.op == "call_function":
                    yield moment
                if not moment.computed:
                    moment.compute()
                for run in runs:
                    run.forget(node)


class _Run(fx.Interpreter):
    """One network on its way through the graph."""

    def __init__(self, traced: TracedNetwork, network: nn.Module, inputs: Sequence[Any]) -> None:
        super().__init__(network, garbage_collect_values=True, graph=traced.graphs["eval"])
        self.constants = traced.root
        self.args_iter = iter([x.clone() if isinstance(x, Tensor) else x for x in inputs])  # the code may change them

    def fetch_attr(self, target: str) -> Any:
        return tensor_at(self.constants if target.startswith(f"{CONSTANT}.") else self.module, target)

    def forget(self, node: fx.Node) -> None:
        for used in self.user_to_last_uses.get(node, []):
            del self.env[used]


class Moment:
    """Networks that have run up to a node.

    Attributes:
        node: the operation that is next.
        call: the layer that it calls, if it is one.
        computed: whether it was run.
    """

    def __init__(self, node: fx.Node, call: LayerCall | None, runs: Sequence[_Run]) -> None:
        self.node, self.call, self._runs, self.computed = node, call, runs, False

    def values(self, node: Any) -> list[Tensor]:
        """What an earlier node gave, one tensor per network."""
        return [run.env[node] for run in self._runs]

    def compute(self, which: int | None = None) -> list[Tensor]:
        """Runs the operation, or again where weights have changed since; one tensor per network.

        Args:
            which: of the networks, to run one alone again.
        """
        for run in self._runs if which is None else [self._runs[which]]:
            run.env[self.node] = run.run_node(self.node)
        self.computed = True
        return self.values(self.node)

    @property
    def channels(self) -> list[Tensor]:
        """What the layer reads: per network (channels, samples and positions), not more than some ten thousand of these."""
        assert self.call is not None
        found = [x.movedim(self.call.geometry.channel_dim, 0).flatten(1) for x in self.values(self.call.input)]
        return thinned(found)


def thinned(rows: Sequence[Tensor]) -> list[Tensor]:
    """The same columns of each, at random where there are many."""
    count = rows[0].shape[1]
    if count <= _MOST_COLUMNS:
        return [*rows]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")
    chosen = order[:_MOST_COLUMNS].sort().values
    return [each.index_select(1, chosen.to(each.device)) for each in rows]


def rows_of(channels: Tensor, places: np.ndarray) -> Tensor:
    """What each place of a group is: (size, channels per place, samples and positions)."""
    return channels[torch.from_numpy(places).to(channels.device)]


def activations(network: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The values of each group's channels where the first layer reads them, in eval mode.

    Args:
        network: any that :func:`fastmerge.channel_groups` takes.
        inputs: a batch of its inputs, as ``example_inputs`` there.

    Returns:
        By name of the group (places, values): row p holds all values of the unit in place p, over samples, positions and the
        channels of a block or head. Of many samples and positions, 65,536 are taken at random. Groups that no layer reads are
        left out.

    Raises:
        TypeError, ValueError: the network can't be traced or merged.
    """
    family = Family.of([network], inputs)
    groups, found = family.groups, dict[str, Tensor]()
    for moment in family.run():
        if moment.call is not None:
            units = groups.inputs[moment.call.weight]
            missing = [n for n in units.numbers if groups[n].name not in found]
            channels = moment.channels[0] if missing else None
            for number in missing:
                group = groups[number]
                assert channels is not None
                found[group.name] = rows_of(channels, units.places(number, group.size)).flatten(1)
    return found
