"""How gates act in the big student: who shares a draw, what a closed one hides, and what seeds repeat."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmerge
from architectures import BATCH, BY_NAME, ZOO, Architecture, merged, teachers_of
from closed_channels import change_closed_channels
from teachers import OPEN, relative_error, select_gates, set_gates

N, C = 5, 8


class Probe(nn.Module):
    """Hidden channels that are 1 and are read by identity layers, so that the output is half the first teacher's gates."""

    channel_dim = 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.write(x))
        return self.read(hidden), self.read_again(hidden)


class LinearProbe(Probe):
    channel_dim = -1

    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Linear(2, C)
        self.read, self.read_again = nn.Linear(C, C), nn.Linear(C, C)


class ConvolutionProbe(Probe):
    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Conv2d(2, C, 3, padding=1)
        self.read, self.read_again = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)


class ResidualProbe(LinearProbe):
    """The second reader sits behind a block that adds zero to the same stream, which is gated again there."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(C, C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.write(x))
        later = F.relu(hidden + self.block(hidden))
        return self.read(hidden), self.read_again(later)


class PoolingProbe(ConvolutionProbe):
    """One reader reads the tensor, the other reads it pooled, chunked and put together again."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.write(x))
        halves = F.max_pool2d(hidden, 2).chunk(2, dim=1)
        return self.read(hidden), self.read_again(torch.cat(halves, dim=1))


class TimeMajorProbe(Probe):
    """Reads its channels with time first and the samples second; as many time steps as samples, so that shapes agree."""

    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Conv1d(2, C, 3, padding=1)
        self.read, self.read_again = nn.Linear(C, C), nn.Conv1d(C, C, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.write(x))
        return self.read(hidden.permute(2, 0, 1)).permute(1, 2, 0), self.read_again(hidden)


class FramesProbe(ConvolutionProbe):
    """Folds the frames of a video (N, C, frames, H, W) into the batch: all frames of a sample see its draw."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, _, frames, height, width = x.shape
        hidden = F.relu(self.write(x.transpose(1, 2).reshape(n * frames, -1, height, width)))
        outputs = (self.read(hidden), self.read_again(hidden))
        first, again = (y.view(n, frames, C, height, width).transpose(1, 2) for y in outputs)
        return first, again


class OneBatchSizeProbe(LinearProbe):
    """Takes batches of one size only."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.write(x)).view(N, C)
        return self.read(hidden), self.read_again(hidden)


PROBES = [
    (LinearProbe, (N, 2)),
    (OneBatchSizeProbe, (N, 2)),
    (LinearProbe, (N, 3, 2)),
    (ConvolutionProbe, (N, 2, 4, 4)),
    (ResidualProbe, (N, 2)),
    (PoolingProbe, (N, 2, 4, 4)),
    (FramesProbe, (N, 2, 3, 4, 4)),
    (TimeMajorProbe, (N, 2, N)),
    (TimeMajorProbe, (N, 2, N + 2)),
]
every_probe = pytest.mark.parametrize(
    ("probe", "shape"), PROBES, ids=lambda v: v.__name__ if isinstance(v, type) else "x".join(map(str, v))
)


@torch.no_grad()
def probe_big(probe: type[Probe], shape: tuple[int, ...]) -> fastmerge.BigStudent:
    """A big student of a probe and a teacher that reads nothing; its gates are neither closed nor open."""
    first, second = probe(), probe()
    for teacher in (first, second):
        for name, layer in teacher.named_children():
            if name == "norm":
                continue
            layer.weight.zero_()
            layer.bias.fill_(1.0 if name == "write" else 0.0)
    for layer in (first.read, first.read_again):
        layer.weight.copy_(torch.eye(C).view(layer.weight.shape))
    big = fastmerge.BigStudent(first, second, example_inputs=torch.randn(shape))
    set_gates(big, 0.0)
    return big.train()


def first_teachers_gates(
    big: fastmerge.BigStudent, probe: type[Probe], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """What the two readers saw of the first teacher's channels, (N, C, positions) each."""
    outputs = [(2 * y.detach()).movedim(probe.channel_dim, 1) for y in big(torch.randn(shape))]
    first, again = (y.reshape(*y.shape[:2], -1) for y in outputs)
    return first, again


@every_probe
def test_one_draw_per_sample_and_channel_whoever_reads_it(probe: type[Probe], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    big = probe_big(probe, shape)
    first, again = first_teachers_gates(big, probe, shape)
    assert torch.equal(first, first[..., :1].expand_as(first)), "positions of one channel see different draws"
    seen_by_other = first**2 if probe is ResidualProbe else first
    assert torch.allclose(again[..., 0], seen_by_other[..., 0], atol=1e-6), (
        "two readers of one channel see different draws"
    )
    gates = first[..., 0]
    assert gates.min() >= 0
    assert gates.max() <= 1
    inside = gates[(gates > 0) & (gates < 1)]
    assert len(inside) > N
    assert len(inside.unique()) == len(inside), "two samples or two channels share a draw"


@every_probe
def test_linked_draws_as_unlinked(probe: type[Probe], shape: tuple[int, ...]) -> None:
    big = probe_big(probe, shape)
    torch.manual_seed(1)
    unlinked, _ = first_teachers_gates(big, probe, shape)
    big.link()
    torch.manual_seed(1)
    linked, _ = first_teachers_gates(big, probe, shape)
    assert torch.allclose(unlinked, linked)


class NormProbe(LinearProbe):
    """The second reader reads the same channels normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(C, affine=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.write(x))
        return self.read(hidden), self.read_again(self.norm(hidden))


def test_no_gate_straight_before_a_normalisation() -> None:
    """BatchNorm would undo it; and its statistics are those of the channel, not of the gate."""
    big, x = probe_big(NormProbe, (N, 2)), torch.rand(N, 2)
    with torch.no_grad():
        big.network.write.weight[:C, 0] = 1.0
    hidden = (1 + x[:, :1]).expand(N, C)
    gated, normalised = (2 * y.detach() for y in big(x))
    gates = gated / hidden
    torch.testing.assert_close(normalised, gates * F.batch_norm(hidden, None, None, training=True))


def test_seeds_repeat_and_differ() -> None:
    big = probe_big(LinearProbe, (N, 2))
    x = torch.randn(N, 2)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(big(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(big(x)[0], big(x)[0]), "two steps see the same draws"


def test_drawn_gates_follow_their_distribution() -> None:
    """Of many samples a third of closed, inside and open gates each as the closed forms say; teachers draw independently."""
    big = probe_big(LinearProbe, (N, 2))
    (gate,) = big.gates.values()
    torch.manual_seed(0)
    samples = 4000
    gates = 2 * big(torch.randn(samples, 2))[0].detach()
    closed = 1 - gate.open_probability()[:C].detach()
    error = 5 * (0.25 / samples) ** 0.5
    assert ((gates == 0).float().mean(0) - closed).abs().max() < error
    correlation = torch.corrcoef(gates.T) - torch.eye(C)
    assert correlation.abs().max() < 5 / samples**0.5


def test_eval_mode_and_open_gates_draw_nothing() -> None:
    big = probe_big(LinearProbe, (N, 2))
    x = torch.randn(N, 2)
    state = torch.get_rng_state()
    big.eval()(x)
    with big.train().open_gates():
        output = big(x)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output, torch.full_like(output, 0.5))


def test_open_gates_ends_with_its_context_even_after_an_error() -> None:
    big = probe_big(LinearProbe, (N, 2))
    with pytest.raises(RuntimeError, match="inside"), big.open_gates():
        raise RuntimeError("inside")
    assert (big(torch.randn(N, 2))[0] < 0.5).any()
    with big.open_gates():
        with big.open_gates():
            pass
        assert (big(torch.randn(N, 2))[0] == 0.5).all()


@pytest.mark.parametrize("count", [2, 3])
def test_keep_is_the_most_open_candidates_ascending(count: int) -> None:
    architecture = BY_NAME["unet"]
    teachers = [architecture.make() for _ in range(count)]
    big = fastmerge.BigStudent(*teachers, example_inputs=architecture.inputs(2, dtype=torch.float32))
    with torch.no_grad():
        for gate in big.gates.values():
            gate.loc.normal_()
    for name, kept in big.keep().items():
        loc = big.gates[name].loc
        assert kept.dtype == torch.int64
        assert kept.tolist() == sorted(kept.tolist())
        assert len(kept) == len(loc) // count
        assert set(kept.tolist()) == set(loc.argsort(descending=True)[: len(kept)].tolist())


def test_gate_loss_in_eval_mode_warns_once() -> None:
    """The big student takes over the mode of teachers that were evaluated last."""
    architecture = BY_NAME["lenet"]
    teachers = [architecture.make().eval() for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=architecture.inputs(2, dtype=torch.float32))
    with torch.no_grad():
        big.gate_loss()
    with pytest.warns(UserWarning, match=r"eval mode.*Call big.train\(\)"):
        big.gate_loss()
    big.gate_loss()
    fastmerge.BigStudent(
        *(t.train() for t in teachers), example_inputs=architecture.inputs(2, dtype=torch.float32)
    ).gate_loss()


@pytest.mark.parametrize(
    ("loc", "said"),
    [(4.0, "above 1/T = 0.50 in 4 of 4 channel groups"), (-9.0, "below 1/T"), (-1.6, "neither 0 nor 1")],
)
def test_compress_warns_of_gates_that_do_not_tell(loc: float, said: str) -> None:
    architecture = BY_NAME["lenet"]
    x = architecture.inputs(2, dtype=torch.float32)
    big = fastmerge.BigStudent(architecture.make(), architecture.make(), example_inputs=x)
    set_gates(big, loc)
    with pytest.warns(UserWarning, match="compress.. chooses by gates that have not settled") as found:
        big.compress()
    assert said in str(found[0].message)
    assert found[0].filename == __file__
    select_gates(big, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        big.compress()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_gate_loss_is_the_squared_distance_to_one_in_t(count: int) -> None:
    architecture = BY_NAME["lenet"]
    big = fastmerge.BigStudent(
        *(architecture.make() for _ in range(count)), example_inputs=architecture.inputs(2, dtype=torch.float32)
    )
    assert len(big.gates) == 4
    with torch.no_grad():
        for gate in big.gates.values():
            gate.loc.normal_(0, 2)
    expected = sum((1 / count - gate.open_probability().mean()) ** 2 for gate in big.gates.values())
    loss = big.gate_loss()
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(gate.loc.grad is not None and gate.loc.grad.abs().min() > 0 for gate in big.gates.values())
    assert all(parameter.grad is None for parameter in big.weight_parameters())


# the first layer of input_added reads the plain input, whose channels the groups know as those that it is added to
@pytest.mark.parametrize("architecture", [a for a in ZOO if a.name != "input_added"], ids=lambda a: a.name)
@torch.no_grad()
def test_what_a_closed_gate_hides_does_not_matter(architecture: Architecture) -> None:
    """Every weight and statistic of a channel whose gate is closed may be anything."""
    teachers, big, x = teachers_of(architecture.name), merged(architecture.name, 3), architecture.inputs(BATCH)
    opened = select_gates(big, x, seed=6)
    expected = big(*x)
    changed = change_closed_channels(teachers, big.groups, opened)
    assert any(
        not torch.equal(a, b)
        for t, c in zip(teachers, changed, strict=True)
        for a, b in zip(t.parameters(), c.parameters(), strict=True)
    )
    other = fastmerge.BigStudent(*changed, example_inputs=x, verify=False).eval()
    for name, gate in other.gates.items():
        gate.loc.fill_(-OPEN)
        gate.loc[opened[name]] = OPEN
    assert relative_error(other(*x), expected) <= 1e-9


class Scaled(nn.Module):
    """One value for all channels, which are 1, and identity layers after it: the output tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.scale, self.read = nn.Linear(2, C), nn.Parameter(torch.ones(())), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(F.relu(self.write(x)) * self.scale)
        return out


@pytest.mark.parametrize("kept_of_first", [0, 1, C // 2, C])
@torch.no_grad()
def test_one_value_for_all_channels_is_the_mean_over_those_kept(kept_of_first: int) -> None:
    teachers = [Scaled().double() for _ in range(2)]
    for t, teacher in enumerate(teachers):
        for layer, weight, bias in ((teacher.write, torch.zeros(C, 2), 1.0), (teacher.read, torch.eye(C), 0.0)):
            layer.weight.copy_(weight)
            layer.bias.fill_(bias)
        teacher.scale.fill_(2.0 + t)
    x = torch.randn(N, 2, dtype=torch.float64)
    big = fastmerge.BigStudent(*teachers, example_inputs=x).train()
    with big.open_gates():
        torch.testing.assert_close(big(x), torch.full((N, C), 2.5, dtype=torch.float64))
    (gate,) = big.gates.values()
    gate.loc.fill_(-OPEN)
    gate.loc[:kept_of_first] = gate.loc[C : 2 * C - kept_of_first] = OPEN
    expected = (2.0 * kept_of_first + 3.0 * (C - kept_of_first)) / C
    places = torch.arange(C)
    readers = ((places < kept_of_first).double() + (places < C - kept_of_first)) / 2
    torch.testing.assert_close(big(x), (expected * readers).expand(N, C))
    assert big.compress().scale.item() == pytest.approx(expected, rel=1e-12)


class ScalesItsOutputToo(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_one_value_for_hidden_channels_and_the_output_is_refused() -> None:
    with pytest.raises(ValueError, match="'scale' acts both on hidden channels and on the network's output"):
        fastmerge.BigStudent(ScalesItsOutputToo(), ScalesItsOutputToo(), example_inputs=torch.randn(N, 2))
