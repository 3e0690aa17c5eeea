"""compress(optimizer=...): the run that goes on is that of a student built by hand, with the optimizer's state cut by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import fastmerge
from small_task import SmallNet, X, train_loader

CONV, HIDDEN, PIXELS = 6, 16, 9  # channels of SmallNet, and pixels of the map that is flattened
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.1),
}


def by_hand(name: str, wide: Tensor, keep: dict[str, Tensor], linked: bool) -> Tensor:
    """The kept part of a tensor of the big student of two SmallNets: candidate t·n + j lies at row or column t·n + j."""
    conv, hidden = keep["conv"], keep["hidden"]
    layer, attribute = name.split(".")
    if attribute == "num_batches_tracked":
        return wide[0]
    if layer in ("conv", "norm"):
        return wide[conv]
    if name == "head.weight":
        return wide[:, hidden]
    if name == "head.bias":
        return wide
    if name == "hidden.bias":
        return wide[hidden]
    dense = wide if linked else torch.block_diag(wide[:HIDDEN], wide[HIDDEN:])
    columns = (conv[:, None] * PIXELS + torch.arange(PIXELS)).flatten()
    return dense[hidden][:, columns]


def train(network: nn.Module, optimizers: list[Optimizer], steps: int) -> list[float]:
    losses = []
    torch.manual_seed(5)
    batches = iter(train_loader())
    for _ in range(steps):
        x, y = next(batches)
        loss = nn.functional.cross_entropy(network(x), y)
        if isinstance(network, fastmerge.BigStudent):
            loss = loss + network.gate_loss()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("link", [False, True], ids=["unlinked", "linked"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_continued_run_is_that_of_a_student_built_by_hand(
    make: Callable[..., Optimizer], link: bool, in_place: bool
) -> None:
    big = fastmerge.BigStudent(SmallNet(), SmallNet(), example_inputs=X[:2]).train()
    if link:
        big.link()
    optimizer, gates = make(big.weight_parameters()), SGD(big.gate_parameters(), lr=5.0)
    train(big, [optimizer, gates], 4)
    keep = big.keep()
    assert all(0 < (kept < len(kept)).sum() < len(kept) for kept in keep.values()), "both teachers' channels are kept"

    expected = SmallNet()
    others = make(expected.parameters())
    wide = dict(big.network.named_parameters())
    with torch.no_grad():
        expected.load_state_dict({n: by_hand(n, t, keep, link) for n, t in big.network.state_dict().items()})
        for name, parameter in expected.named_parameters():
            others.state[parameter] = {
                key: by_hand(name, value, keep, link).clone() if value.dim() else value.clone()
                for key, value in optimizer.state[wide[name]].items()
            }

    student = big.compress(optimizer, in_place=in_place)
    assert train(student, [optimizer], 4) == train(expected, [others], 4)
    for key, value in expected.state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key
    for name, parameter in student.named_parameters():
        mine, theirs = optimizer.state[parameter], others.state[dict(expected.named_parameters())[name]]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
