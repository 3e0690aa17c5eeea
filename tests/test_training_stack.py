"""Networks as one batched network, and out again."""

import pytest
import torch
from torch import nn

from fastmerge.big_student import BigStudent
from fastmerge.networks.sine_mlp import SineMLP
from fastmerge.training.stack import Stack


class Normed(nn.Module):
    """Has every kind of tensor: parameters, running statistics, a counter, a table."""

    def __init__(self, table: torch.Tensor | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("table", torch.arange(4).flip(0) if table is None else table, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.head(x[:, self.table])


def trained_a_little(network: nn.Module) -> nn.Module:
    network.train()
    network(3 * torch.randn(8, 2, 5, 5) + 1)
    return network.eval()


def test_outputs_are_those_of_each_network():
    networks = [trained_a_little(Normed()) for _ in range(3)]
    x = torch.randn(6, 2, 5, 5)
    expected = torch.stack([network(x) for network in networks])
    stack = Stack(networks)
    torch.testing.assert_close(stack(x), expected)
    assert expected.std(0).min() > 0  # three different networks, so a mix-up would show
    stack.parameters["head.bias"][1] += 1  # a second call sees the present weights
    torch.testing.assert_close(stack(x)[1], expected[1] + 1)


def test_network_comes_back_as_it_went_in():
    networks = [trained_a_little(Normed()) for _ in range(3)]
    stack = Stack(networks)
    for network, back in zip(networks, stack.networks(), strict=True):
        assert type(back) is Normed
        assert all(parameter.requires_grad for parameter in back.parameters())
        for name, value in network.state_dict().items():
            assert torch.equal(back.state_dict()[name], value), name
    taken = stack.network(0)
    with torch.no_grad():
        taken.head.weight.zero_()
    assert stack.parameters["head.weight"][0].abs().sum() > 0  # a copy


def test_given_networks_are_not_changed():
    network = Normed()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    stack = Stack([network, network])
    stack.parameters["head.weight"].zero_()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_tables_are_shared_only_where_they_are_alike():
    assert set(Stack([Normed(), Normed()]).shared) == {"table", "bn.num_batches_tracked"}
    stack = Stack([Normed(), Normed(torch.tensor([1, 0, 3, 2]))])
    assert "table" in stack.buffers
    x = torch.randn(4, 2, 5, 5)
    torch.testing.assert_close(stack(x)[1], stack.network(1).eval()(x))


def test_big_students_stack_and_compress():
    bigs = [BigStudent(SineMLP(), SineMLP()).eval() for _ in range(2)]
    stack = Stack(bigs)
    x = torch.rand(7, 1)
    torch.testing.assert_close(stack(x), torch.stack([big(x) for big in bigs]))
    student = stack.network(1).compress()
    expected = bigs[1].compress()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ([], "at least one"),
        ([SineMLP(), SineMLP(2)], r"hidden.weight is \(100, 1\) in number 0 and \(200, 1\) in number 1"),
        ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], "bias is .2,. in number 0 and missing"),
    ],
)
def test_what_can_not_be_stacked_is_refused(networks, message):
    with pytest.raises(ValueError, match=message):
        Stack(networks)
