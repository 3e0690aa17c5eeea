"""Networks as one batched network, and out again."""

import pytest
import torch
from torch import nn

from fastmerge.big_student import BigStudent
from fastmerge.networks import SineMLP, small_lenet
from fastmerge.stack import BigStack, Stack


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


@pytest.mark.parametrize("gradients", [False, True])
def test_outputs_are_those_of_each_network(gradients):
    """Replayed without gradients, and as ever with them."""
    networks = [trained_a_little(Normed()) for _ in range(3)]
    x = torch.randn(3, 6, 2, 5, 5)
    expected = torch.stack([network(each) for network, each in zip(networks, x, strict=True)])
    stack = Stack(networks)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(stack(x), expected)
        assert expected.std(0).min() > 0  # three different networks, so a mix-up would show
        stack.skeleton.head.bias.data[1] += 1  # a second call sees the present weights
        torch.testing.assert_close(stack(x)[1], expected[1] + 1)
    assert bool(stack._replays) != gradients


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
    assert stack.skeleton.head.weight[0].abs().sum() > 0  # a copy


def test_given_networks_are_not_changed():
    network = Normed()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    stack = Stack([network, network])
    stack.skeleton.head.weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_tables_are_shared_only_where_they_are_alike():
    assert set(Stack([Normed(), Normed()]).shared) == {"table", "bn.num_batches_tracked"}
    stack = Stack([Normed(), Normed(torch.tensor([1, 0, 3, 2]))])
    assert "table" in stack.kinds[1]
    x = torch.randn(2, 4, 2, 5, 5)
    stack.eval()
    torch.testing.assert_close(stack(x)[1], stack.network(1).eval()(x[1]))


def test_big_students_stack_and_compress():
    bigs = [BigStudent(SineMLP(), SineMLP()).eval() for _ in range(2)]
    stack = BigStack(bigs)
    x = torch.rand(2, 7, 1)
    with torch.no_grad():
        torch.testing.assert_close(stack(x), torch.stack([big(each) for big, each in zip(bigs, x, strict=True)]))
        with stack.open_gates(), bigs[0].open_gates():
            torch.testing.assert_close(stack(x)[0], bigs[0](x[0]))
    student = stack.compress().network(1)
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


def make_bigs(count: int, drop: int = 0) -> list[BigStudent]:
    bigs = [BigStudent(small_lenet(), small_lenet()) for _ in range(count)]
    for big in bigs:
        for gate in big.gates.values():
            gate.loc.data[:drop] = -9.0
    return bigs


@pytest.mark.parametrize("momentum", [False, True])
def test_linking_a_stack_links_each_and_carries_the_momentum(momentum):
    bigs = make_bigs(2)
    stack = BigStack(bigs)
    optimizer = torch.optim.SGD(stack.weight_parameters(), 0.1, 0.9)
    singles = [torch.optim.SGD(big.weight_parameters(), 0.1, 0.9) for big in bigs]
    held = list(stack.parameters())
    if momentum:
        for number, parameter in enumerate(stack.weight_parameters()):
            optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
            for index, (single, big) in enumerate(zip(singles, bigs, strict=True)):
                its = list(big.weight_parameters())[number]
                single.state[its]["momentum_buffer"] = optimizer.state[parameter]["momentum_buffer"][index].clone()
    stack.link(optimizer)
    for big, single in zip(bigs, singles, strict=True):
        big.link(single)
    assert stack.linked
    assert all(ours is before for ours, before in zip(stack.parameters(), held, strict=True))  # optimizers hold them
    for number, parameter in enumerate(stack.weight_parameters()):
        for index, (single, big) in enumerate(zip(singles, bigs, strict=True)):
            its = list(big.weight_parameters())[number]
            assert torch.equal(parameter[index], its)
            if momentum:
                assert torch.equal(
                    optimizer.state[parameter]["momentum_buffer"][index], single.state[its]["momentum_buffer"]
                )


def test_a_stack_of_one_drops_channels_as_its_network_does():
    (big,) = make_bigs(1, drop=3)
    big.link()
    stack = BigStack([big])
    optimizers = torch.optim.SGD(stack.weight_parameters(), 0.1), torch.optim.SGD(stack.gate_parameters(), 0.1)
    done, expected = stack.compact(*optimizers), big.compact()
    assert done == expected
    assert sum(done.dropped.values()) > 0
    assert torch.allclose(stack.open_means()[0], big.open_state()[0])  # dropped channels count as closed
    for ours, theirs in zip(stack.parameters(), big.parameters(), strict=True):
        assert torch.equal(ours[0], theirs)
    fresh = BigStack(make_bigs(1))
    fresh.link()
    fresh.keep_only(fresh.candidates_in(dict(stack.named_buffers())))
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in stack.parameters()]
