"""A layer's bias that is computed from parameters becomes a sum after the layer.

Swin v2 and BEiT give their layer of queries, keys and values a bias whose middle third is zero. As a sum it is followed by the
rules for what is element by element, and the layer is one without a bias.
"""

from __future__ import annotations

import torch
from torch import fx

from fastmerge.channels.aten import LAYERS, bind, op_name


def part_computed_biases(graph: fx.Graph) -> None:
    """Takes them out of convolutions and linear layers, in place."""
    from_input: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "placeholder" or not from_input.isdisjoint(node.all_input_nodes):
            from_input.add(node)
        bias = bind(node).get("bias") if op_name(node) in LAYERS else None
        if not isinstance(bias, fx.Node) or bias.op == "get_attr" or bias in from_input:
            continue
        _, spatial_dims = LAYERS[op_name(node)]
        node.replace_input_with(bias, None)
        users = list(node.users)
        with graph.inserting_before(node.next):
            if spatial_dims:
                meta = {**bias.meta, "shape": (*bias.meta["shape"], *[1] * spatial_dims)}
                bias = graph.call_function(torch.ops.aten.view.default, (bias, [-1, *[1] * spatial_dims]))
                bias.meta = meta
            added = graph.call_function(torch.ops.aten.add.Tensor, (node, bias))
            added.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, added)
