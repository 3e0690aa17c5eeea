"""BigStudent.compact: what is dropped during the merge stage changes nothing but the cost of a step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import fastmerge
from architectures import BY_NAME, ZOO, merged
from compaction_paths import raw
from teachers import OPEN, make_teachers, relative_error

# Steps in eval mode can be compared, whose gates are not drawn.
pytestmark = pytest.mark.filterwarnings("ignore:gate_loss.. is called for gradients:UserWarning")

CLOSED = -OPEN
# One of each kind: all groups shrink; streams are concatenated; some are left whole; the head is nonlinear.
SOME = [
    "resnet_projected_shortcut",
    "densenet",
    "unet",
    "shufflenet_v2",
    "lenet",
    "vgg",
    "squeezenet",
    "mlp",
    "token_mlp",
    "written_attention",
]


def merge(name: str, link: bool, count: int = 2) -> tuple[fastmerge.BigStudent, tuple[Tensor, ...]]:
    big = merged(name, count, link=link)
    if link:
        with torch.no_grad():
            for parameter in big.weight_parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return big, BY_NAME[name].inputs(6)


@torch.no_grad()
def close_gates(big: fastmerge.BigStudent, share: float = 0.5, seed: int = 0) -> None:
    """Closes that share of each group's gates; the others' are fully open, each a little differently."""
    generator = torch.Generator().manual_seed(seed)
    for gate in big.gates.values():
        order = torch.randperm(len(gate.loc), generator=generator)
        values = OPEN + torch.rand(len(gate.loc), generator=generator).double()
        values[order[: int(share * len(order))]] = CLOSED
        gate.loc.copy_(values)


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    if actual.keys() != expected.keys():
        return False
    return all(torch.equal(raw(actual[key]), raw(value)) for key, value in expected.items())


@pytest.mark.parametrize("link", [False, True], ids=["unlinked", "linked"])
@pytest.mark.parametrize("name", [architecture.name for architecture in ZOO])
def test_outputs_and_student_stay_the_same(name: str, link: bool) -> None:
    big, x = merge(name, link)
    close_gates(big)
    whole = copy.deepcopy(big)
    done = big.compact(multiple=1)
    sizes = {group.name: big.num_teachers * group.size for group in big.groups}
    assert done.left == {key: len(gate.loc) for key, gate in big.gates.items()}
    assert {key: done.dropped[key] + done.left[key] for key in sizes} == sizes
    assert all(done.left[group.name] >= group.size for group in big.groups)
    assert same(big.compress().state_dict(), whole.compress().state_dict())
    torch.testing.assert_close(big.gate_loss(), whole.gate_loss())
    with torch.no_grad():
        assert relative_error(big.eval()(*x), whole.eval()(*x)) <= 1e-9
        if not BY_NAME[name].stochastic:
            torch.manual_seed(1)
            expected = whole.train()(*x)
            torch.manual_seed(1)
            assert relative_error(big.train()(*x), expected) <= 1e-9


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["resnet_projected_shortcut", "vgg", "mlp", "resnet_squeeze_excitation"])
def test_linked_networks_lose_every_closed_channel(name: str, count: int) -> None:
    big, _ = merge(name, link=True, count=count)
    close_gates(big)
    done = big.compact(multiple=1)
    assert not done.whole
    for group in big.groups:
        assert done.left[group.name] == max(group.size, -(-count * group.size // 2))
    weights = [layer.weight for layer in big._layers]
    assert all(weight.numel() * weight.element_size() == weight.untyped_storage().nbytes() for weight in weights)


@pytest.mark.parametrize(("name", "group"), [("layer_norm", "2"), ("written_attention", "embed")])
def test_layer_normed_streams_lose_as_many_of_each_teacher(name: str, group: str) -> None:
    big, x = merge(name, link=True, count=3)
    close_gates(big)
    expected = big.eval()(*x)
    assert group not in big.compact(multiple=1).whole
    size = next(g.size for g in big.groups if g.name == group)
    counts = torch.bincount(big.gates[group].candidates // size, minlength=3)
    assert bool((counts == counts[0]).all() and counts[0] < size)
    assert relative_error(big(*x).detach(), expected.detach()) <= 1e-9


class Tokens(nn.Module):
    """A residual stream with a class token and learned positions, moved about by code that doesn't name its width."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, width, 4, stride=4), nn.Linear(width, 4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 5, width))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 10), nn.Linear(10, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = x + self.scale * self.down(torch.relu(self.up(self.norm(x))))
        out: Tensor = self.head(x[:, 0] + x.roll(1, dims=1).mean(1))
        return out


class NamesItsWidth(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).reshape(x.shape[0], 8, 4).transpose(1, 2)
        out: Tensor = self.head(self.down(torch.relu(self.up(self.norm(x)))).mean(1) + x.mean(1))
        return out


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("link", [False, True], ids=["unlinked", "linked"])
def test_streams_with_positions_lose_channels(link: bool, count: int) -> None:
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    big = fastmerge.BigStudent(*make_teachers(Tokens, (x,), count), example_inputs=x, verify=False)
    if link:
        big.link()
    close_gates(big)
    expected, student = big.eval()(x), big.compress().state_dict()
    optimizer = Adam(big.weight_parameters(), lr=0.0)
    big(x).sum().backward()
    optimizer.step()
    done = big.compact(optimizer, multiple=1)
    assert not done.whole
    assert all(done.dropped.values())
    places = [p for name, p in big.named_parameters() if "positions" in name]
    assert {p.shape for p in places} == {(1, 5, done.left["patches"] // count)}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in places)
    assert relative_error(big(x).detach(), expected.detach()) <= 1e-9
    assert same(big.compress().state_dict(), student)


def test_streams_whose_width_the_code_names_are_left_whole() -> None:
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    big = fastmerge.BigStudent(*make_teachers(NamesItsWidth, (x,), 2), example_inputs=x, verify=False)
    close_gates(big)
    assert "reshape" in big.compact(multiple=1).whole["patches"]


@pytest.mark.parametrize("name", ["mobilenet", "channels_last_blocks", "one_value_for_all", "channel_scale"])
def test_depthwise_convolutions_scales_and_single_values_go_with_their_channels(name: str) -> None:
    big, x = merge(name, link=True)
    close_gates(big)
    expected = big.eval()(*x)
    done = big.compact(multiple=1)
    assert not done.whole
    assert all(done.dropped.values())
    assert relative_error(big(*x).detach(), expected.detach()) <= 1e-9


@pytest.mark.parametrize("link", [False, True], ids=["unlinked", "linked"])
def test_layers_print_the_channels_that_are_there(link: bool) -> None:
    big, _ = merge("mlp", link)
    text = {name: str(module) for name, module in big.network.named_children()}
    assert "linear, 18 -> 14 channels of 2 teachers, streams -> streams" in text["fc2"]
    close_gates(big)
    big.compact(multiple=1)
    first, second = (len(big.gates[name].loc) for name in ("fc1", "fc2"))
    assert first < 18
    assert second < 14
    fc1, fc2, fc3 = (str(big.network.get_submodule(name)) for name in ("fc1", "fc2", "fc3"))
    assert f"-> {first} channels of 2 teachers, shared -> streams" in fc1
    assert f"linear, {first} -> {second} channels of 2 teachers" in fc2
    assert f"linear, {second} -> " in fc3


def test_normalisations_print_the_channels_that_are_there() -> None:
    big, _ = merge("vgg", link=True)
    norms = [m for m in big.network.modules() if type(m).__name__ == "WideBatchNorm"]
    before = [f"{m.weight.shape[0]} channels of 2 teachers" for m in norms]
    assert all(text in str(m) for text, m in zip(before, norms, strict=True))
    close_gates(big)
    big.compact(multiple=1)
    assert all(text not in str(m) for text, m in zip(before, norms, strict=True))
    assert all(f"({m.weight.shape[0]} channels of 2 teachers, eps=" in str(m) for m in norms)


def test_unlinked_streams_keep_as_many_each() -> None:
    big, _ = merge("mlp", link=False)
    gate = big.gates["fc1"]  # 9 places, 18 candidates
    with torch.no_grad():
        gate.loc.fill_(OPEN)
        gate.loc[[0, 1, 2, 3, 9, 17]] = torch.tensor([CLOSED, CLOSED - 1, CLOSED, CLOSED, CLOSED, CLOSED]).double()
    assert big.compact(multiple=1).left["fc1"] == 14
    # Of the first teacher those two stay that are the most open of its closed ones.
    assert gate.candidates.tolist() == [0, 2, 4, 5, 6, 7, 8, *range(10, 17)]


def test_the_least_that_stays_are_the_most_open() -> None:
    big, _ = merge("mlp", link=True)
    gate = big.gates["fc1"]
    with torch.no_grad():
        gate.loc.copy_(-20 - torch.arange(18.0))
        gate.loc[13] = OPEN
    big.compact(multiple=1)
    assert gate.candidates.tolist() == [*range(8), 13]


@pytest.mark.parametrize("link", [False, True], ids=["unlinked", "linked"])
@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_widths_are_multiples_and_whoever_is_open_stays(multiple: int, link: bool) -> None:
    big, x = merge("resnet_projected_shortcut", link)
    close_gates(big)
    whole = copy.deepcopy(big)
    opened = {name: gate.loc.detach() > 0 for name, gate in big.gates.items()}
    streams = 1 if link else 2  # linked, only the number in all counts
    assert big.compact(multiple=multiple).total
    for group in big.groups:
        kept = big.gates[group.name].candidates
        mask = (
            torch.ones(2 * group.size, dtype=torch.bool)
            if kept is None
            else torch.isin(torch.arange(2 * group.size), kept)
        )
        assert mask[opened[group.name]].all()
        widths, needed = mask.view(streams, -1).sum(1), opened[group.name].view(streams, -1).sum(1).max()
        whole_width = 2 * group.size // streams
        least = max(int(needed), -(-group.size // streams))
        assert set(widths.tolist()) == {min(whole_width, -(-least // multiple) * multiple)}
    with torch.no_grad():
        assert relative_error(big.eval()(*x), whole.eval()(*x)) <= 1e-9


def test_on_a_cpu_no_closed_channel_stays_for_a_round_number() -> None:
    big, _ = merge("mlp", link=True)
    close_gates(big)
    exact = copy.deepcopy(big)
    assert big.compact() == exact.compact(multiple=1)
    assert exact.compact().total == 0


@pytest.mark.parametrize(("multiple", "left"), [(1, 9), (2, 10), (4, 12), (16, 16), (32, 18)])
def test_a_round_number_stays(multiple: int, left: int) -> None:
    big, _ = merge("mlp", link=True)
    gate = big.gates["fc1"]
    with torch.no_grad():
        gate.loc.copy_(-20 - torch.arange(18.0).flip(0))
    big.compact(multiple=multiple)
    assert gate.candidates.tolist() == list(range(18 - left, 18)) if left < 18 else gate.candidates is None


@torch.no_grad()
def test_what_is_not_closed_for_good_stays() -> None:
    big, _ = merge("mlp", link=True)
    gate = big.gates["fc1"]
    gate.loc.fill_(OPEN)
    gate.loc[:4] = torch.tensor([-2.0, -3.0, -4.5, -6.0])  # P[g > 0] = 0.40, 0.20, 0.052, 0.012
    assert gate.mean()[1] == 0  # in eval mode, but every fifth sample opens it
    assert big.compact(threshold=0.01, multiple=1).total == 0
    done = big.compact(multiple=1, threshold=0.05, settled=True)
    assert done.total == 0
    assert "not settled" in next(iter(done.whole.values()))
    assert big.compact(multiple=1, threshold=0.05).total == 1
    gate.loc[:2] = CLOSED
    gate.loc[2] = OPEN
    assert big.compact(multiple=1, threshold=0.05, settled=True).total == 2
    gate.loc[0] = -2.0
    assert big.compact(multiple=1, threshold=0.45).total == 0  # its gate is above 0 in eval mode


@pytest.mark.parametrize("name", ["lenet", "shufflenet_v2", "group_norm", "two_activations", "permuted_channels"])
def test_groups_left_whole_say_why(name: str) -> None:
    big, _ = merge(name, link=True)
    close_gates(big)
    done = big.compact(multiple=1)
    assert done.whole
    assert all(why in str(done) and done.dropped[group] == 0 for group, why in done.whole.items())
    assert all(" " in why and "'" in why for why in done.whole.values())


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda groups: SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "adam": lambda groups: Adam(groups, lr=0.003),
    "amsgrad": lambda groups: AdamW(groups, lr=0.003, amsgrad=True),
}


def optimizers_of(big: fastmerge.BigStudent, make: Callable[..., Optimizer]) -> tuple[Optimizer, Optimizer]:
    return make(big.weight_parameters()), SGD(big.gate_parameters(), lr=0.1, momentum=0.9)


def step(big: fastmerge.BigStudent, optimizers: tuple[Optimizer, Optimizer], x: tuple[Tensor, ...]) -> float:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = (big(*x) - 0.3).square().mean() + big.gate_loss()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("link", [False, True], ids=["unlinked", "linked"])
@pytest.mark.parametrize(("name", "kind"), [*((name, "sgd") for name in SOME), ("mlp", "adam"), ("vgg", "amsgrad")])
def test_training_goes_on_as_if_nothing_had_been_dropped(name: str, kind: str, link: bool) -> None:
    """Twice in a row, with momentum, moments and statistics."""
    make = OPTIMIZERS[kind]
    big, x = merge(name, link)
    close_gates(big, 0.25)
    big.train()
    optimizers = optimizers_of(big, make)
    step(big, optimizers, x)
    whole = copy.deepcopy(big)
    others = optimizers_of(whole, make)
    for mine, theirs in zip(optimizers, others, strict=True):
        theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    parameters = list(big.parameters())
    for seed in (1, 2):
        big.compact(*optimizers, multiple=1)
        for _ in range(2):
            assert step(big, optimizers, x) == pytest.approx(step(whole, others, x), rel=1e-7)
        close_more(big, whole, seed)
    big.compact(*optimizers, multiple=1)
    assert all(a is b for a, b in zip(parameters, big.parameters(), strict=True)), "parameters stay the same objects"
    expected = whole.compress().state_dict()
    for key, value in big.compress().state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8)
    states = [(p, v) for o in optimizers for p, entry in o.state.items() for v in entry.values() if v.dim()]
    assert states
    assert all(value.shape == parameter.shape for parameter, value in states)


@torch.no_grad()
def close_more(big: fastmerge.BigStudent, whole: fastmerge.BigStudent, seed: int) -> None:
    """Closes some more of the gates that are left, in both networks."""
    generator = torch.Generator().manual_seed(seed)
    for key, gate in big.gates.items():
        every = torch.arange(len(gate.loc)) if gate.candidates is None else gate.candidates
        chosen = torch.randperm(len(every), generator=generator)[: len(every) // 6]
        gate.loc[chosen] = CLOSED
        whole.gates[key].loc[every[chosen]] = CLOSED


@pytest.mark.parametrize("name", ["mlp", "resnet_projected_shortcut", "densenet"])
def test_link_after_compact(name: str) -> None:
    big, x = merge(name, link=False)
    close_gates(big)
    optimizers = optimizers_of(big, OPTIMIZERS["sgd"])
    step(big.train(), optimizers, x)
    close_gates(big)
    big.compact(*optimizers, multiple=1)
    output = big.eval()(*x)
    big.link(optimizers[0])
    assert relative_error(big(*x), output) <= 1e-9
    step(big.train(), optimizers, x)
    close_gates(big, 0.6)
    output = big.eval()(*x)
    before = sum(len(gate.loc) for gate in big.gates.values())
    big.compact(*optimizers, multiple=1)
    assert sum(len(gate.loc) for gate in big.gates.values()) < before
    assert relative_error(big(*x), output) <= 1e-9
    step(big.train(), optimizers, x)


@pytest.mark.parametrize("link", [False, True], ids=["unlinked", "linked"])
@pytest.mark.parametrize("name", ["resnet_projected_shortcut", "densenet", "squeezenet"])
def test_copies_pickles_and_states_of_a_compacted_network(name: str, link: bool) -> None:
    big, x = merge(name, link)
    fresh = copy.deepcopy(merge(name, link=False)[0])
    close_gates(big)
    big.compact(multiple=1)
    output = big(*x)
    for again in (copy.deepcopy(big), pickle.loads(pickle.dumps(big))):
        assert relative_error(again(*x), output) == 0
        close_gates(again, 0.6)
        again.compact(multiple=1)
    fresh.load_state_dict(big.state_dict())
    assert fresh.linked == link
    assert relative_error(fresh(*x), output) == 0
    fresh.load_state_dict(big.state_dict())
    assert same(fresh.compress().state_dict(), big.compress().state_dict())


def test_the_state_of_a_whole_network_does_not_fit_a_compacted_one() -> None:
    big, _ = merge("mlp", link=True)
    close_gates(big)
    state = copy.deepcopy(big.state_dict())
    big.compact(multiple=1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        big.load_state_dict(state)


@pytest.mark.parametrize("name", ["mlp", "squeezenet"])
def test_open_gates_opens_those_that_are_left(name: str) -> None:
    big, x = merge(name, link=True)
    close_gates(big)
    big.compact(multiple=1)
    with torch.no_grad():
        output = big(*x)
        for gate in big.gates.values():
            gate.loc.clamp_(min=OPEN)
        expected = big(*x)
        with big.open_gates():
            assert relative_error(big(*x), expected) <= 1e-9
        assert (relative_error(output, expected) > 1e-9) == (name == "squeezenet")  # of which closed gates are left


@pytest.mark.parametrize("link", [False, True], ids=["unlinked", "linked"])
def test_a_loss_that_is_still_alive_does_no_harm(link: bool) -> None:
    """As in a training loop, whose variable holds the last step's graph until the next one's is made."""
    big, x = merge("resnet_projected_shortcut", link)
    close_gates(big)
    loss = big(*x).square().mean()
    loss.backward()
    big.compact(multiple=1)
    loss = big(*x).square().mean() + 0 * loss.detach()
    loss.backward()
    assert all(p.grad.shape == p.shape for p in big.weight_parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda big: big.compact(threshold=0), "threshold of P"),
        (lambda big: big.compact(threshold=0.5), "threshold of P"),
        (lambda big: big.compact(multiple=0), "multiple of at least 1"),
        (lambda big: big.keep_only({"fc1": torch.arange(3)}), r"needs 9 or more; got \[3, 0\]"),
        (lambda big: big.keep_only({"fc1": torch.arange(9, 19)}), "candidates that are left"),
        (lambda big: big.keep_only({"fc1": torch.arange(17, -1, -1)[:9]}), "ascending"),
        (lambda big: big.keep_only({"fc9": torch.arange(9)}), "no channel group of the name"),
    ],
)
def test_a_bad_call_changes_nothing(call: Callable[[fastmerge.BigStudent], object], message: str) -> None:
    big, x = merge("mlp", link=True)
    close_gates(big)
    before, output = copy.deepcopy(big.state_dict()), big(*x)
    with pytest.raises(ValueError, match=message):
        call(big)
    assert same(big.state_dict(), before)
    assert torch.equal(big(*x), output)


def test_memory_that_others_use_stays_theirs() -> None:
    big, x = merge("resnet_projected_shortcut", link=True)
    close_gates(big)
    output = big(*x)
    aliases = {name: tensor.detach() for name, tensor in big.state_dict().items()}
    values = {name: tensor.clone() for name, tensor in aliases.items()}
    big.compact(multiple=1)
    assert relative_error(big(*x), output) <= 1e-9
    assert same(aliases, values)


def test_in_place_compress_after_compact() -> None:
    for link in (False, True):
        big, _ = merge("resnet_projected_shortcut", link)
        close_gates(big, 0.4)
        big.compact(multiple=1)
        expected = big.compress().state_dict()
        assert same(big.compress(in_place=True).state_dict(), expected)


@pytest.mark.parametrize("name", ["resnet_projected_shortcut", "vgg"])
def test_fused_normalisations_shrink_along(name: str) -> None:
    big, x = merge(name, link=True)
    close_gates(big)
    big.fused = True
    output = big.train()(*x)
    big.compact(multiple=1)
    assert relative_error(big(*x), output) <= 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("link", [False, True], ids=["unlinked", "linked"])
@pytest.mark.parametrize("name", ["resnet_projected_shortcut", "densenet", "vgg"])
def test_on_a_gpu(name: str, link: bool) -> None:
    big, x = merge(name, link)
    big, x = big.cuda(), tuple(value.cuda() for value in x)
    big.fused = False  # float64, to the last digits
    close_gates(big, 0.25)
    optimizers = optimizers_of(big, OPTIMIZERS["amsgrad"])
    step(big.train(), optimizers, x)
    close_gates(big)
    output = big.eval()(*x)
    assert big.compact(*optimizers, multiple=1).total > 0
    assert relative_error(big(*x), output) <= 1e-9
    step(big.train(), optimizers, x)
    expected = big.compress().state_dict()
    assert same(big.compress(optimizers[0], in_place=True).state_dict(), expected)
