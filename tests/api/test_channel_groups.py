"""Which channels live and die together, in networks where people can count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import fastmerge
import torchvision_networks as vision
from architectures import BY_NAME
from teachers import check_exact, make_batch

ACTIVATIONS = [
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish RReLU ReLU ReLU6 SELU SiLU Sigmoid",
    "Softplus Softshrink Softsign Tanh Tanhshrink Dropout Dropout2d AlphaDropout FeatureAlphaDropout Identity",
]
PER_CHANNEL: dict[str, nn.Module] = {
    "max_pool": nn.MaxPool2d(2),
    "average_pool": nn.AvgPool2d(3, 2, 1),
    "power_pool": nn.LPPool2d(2, 2),
    "fractional_pool": nn.FractionalMaxPool2d(2, 4),
    "adaptive_max": nn.AdaptiveMaxPool2d(3),
    "adaptive_average": nn.AdaptiveAvgPool2d(3),
    "nearest": nn.Upsample(scale_factor=2),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": nn.Upsample(scale_factor=2, mode="bicubic"),
    "zero_pad": nn.ZeroPad2d(1),
    "constant_pad": nn.ConstantPad2d(1, 0.5),
    "reflection_pad": nn.ReflectionPad2d(1),
    "replication_pad": nn.ReplicationPad2d(1),
    "batch_norm": nn.BatchNorm2d(6),
    "instance_norm": nn.InstanceNorm2d(6, affine=True),
    "group_norm": nn.GroupNorm(6, 6),
    "prelu": nn.PReLU(6),
    "prelu of one slope": nn.PReLU(),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6),
    "circular": nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="circular"),
    "shuffle": nn.ChannelShuffle(2),
}


def sizes(model: nn.Module, shape: tuple[int, ...] = (2, 3, 8, 8)) -> Counter[int]:
    return Counter(group.size for group in fastmerge.channel_groups(model, torch.randn(shape)))


def between_convolutions(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), layer, nn.Conv2d(6, 4, 3, padding=1))


def activations() -> list[nn.Module]:
    found = []
    for name in " ".join(ACTIVATIONS).split():
        cls = getattr(nn, name)
        found.append(cls())
        try:
            found.append(cls(inplace=True))
        except TypeError:
            continue
    return found


@pytest.mark.parametrize(
    "layer", [*activations(), nn.Threshold(0.1, 0.2), nn.Threshold(0.1, 0.2, inplace=True)], ids=repr
)
def test_activations_keep_channels_apart(layer: nn.Module) -> None:
    groups = fastmerge.channel_groups(between_convolutions(layer), torch.randn(2, 3, 8, 8))
    assert [group.size for group in groups] == [6]
    assert not groups.kept_whole


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_layers_that_work_channel_by_channel_keep_channels_apart(name: str) -> None:
    groups = fastmerge.channel_groups(between_convolutions(PER_CHANNEL[name]), torch.randn(2, 3, 8, 8))
    assert [group.size for group in groups] == [6]
    assert not groups.kept_whole


@pytest.mark.parametrize(
    "layer", [nn.Softmax2d(), nn.LocalResponseNorm(3), nn.GroupNorm(1, 6)], ids=lambda m: type(m).__name__
)
def test_what_mixes_channels_is_kept_from_one_teacher(layer: nn.Module) -> None:
    assert sizes(between_convolutions(layer)) == Counter([1])


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 2), (3, 3), (6, 6)])
def test_group_norm_ties_the_channels_it_normalises_together(groups: int, size: int) -> None:
    assert sizes(between_convolutions(nn.GroupNorm(groups, 6))) == Counter([size])


@pytest.mark.parametrize("groups", [2, 3])
def test_grouped_convolution_keeps_whole_blocks(groups: int) -> None:
    (group,) = fastmerge.channel_groups(
        between_convolutions(nn.Conv2d(6, 6, 3, groups=groups)), torch.randn(2, 3, 8, 8)
    )
    assert group.size == groups
    assert set(group.producers) == {"0", "1"}
    assert set(group.consumers) == {"1", "2"}


def test_lenet() -> None:
    groups = fastmerge.channel_groups(BY_NAME["lenet"].make())
    assert [(g.name, g.size, g.channels, g.producers, g.consumers) for g in groups] == [
        ("conv1", 6, 1, ("conv1",), ("conv2",)),
        ("conv2", 8, 1, ("conv2",), ("fc1",)),
        ("fc1", 12, 1, ("fc1",), ("fc2",)),
        ("fc2", 10, 1, ("fc2",), ("fc3",)),
    ]


def test_residual_stream_is_one_group() -> None:
    groups = fastmerge.channel_groups(BY_NAME["resnet_projected_shortcut"].make(), torch.randn(2, 3, 8, 8))
    assert Counter(group.size for group in groups) == Counter({4: 3, 8: 3})
    stream = next(group for group in groups if "conv1" in group.producers)
    assert set(stream.producers) == {"conv1", "layer1.0.conv2", "layer1.1.conv2"}
    assert set(stream.consumers) == {"layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0"}


def test_zero_padded_shortcut_splits_the_wider_stream() -> None:
    """The middle four of eight channels carry the narrow stream on; the other four are new."""
    groups = fastmerge.channel_groups(BY_NAME["resnet_padded_shortcut"].make(), torch.randn(2, 3, 8, 8))
    narrow, new = (
        next(g for g in groups if p in g.producers and q not in g.producers)
        for p, q in (("conv1", "-"), ("layer2.0.conv2", "conv1"))
    )
    assert narrow.size == new.size == 4
    assert "layer2.0.conv2" in narrow.producers


def test_parts_that_are_treated_differently_are_different_groups() -> None:
    pooled = fastmerge.channel_groups(BY_NAME["two_poolings"].make(), torch.randn(2, 3, 8, 8))
    assert sorted(g.size for g in pooled if "conv1" in g.producers) == [4, 4]
    activated = fastmerge.channel_groups(BY_NAME["two_activations"].make(), torch.randn(2, 3, 8, 8))
    assert sorted(g.size for g in activated) == [3, 4]


def test_one_value_for_all_channels_ties_none() -> None:
    groups = fastmerge.channel_groups(BY_NAME["one_value_for_all"].make(), torch.randn(2, 3, 8, 8))
    assert [group.size for group in groups] == [6, 5]
    assert not groups.kept_whole


class ReadsItsSlope(nn.Module):
    """One parameter is the slope of a layer and a channel that the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope, self.second = nn.Linear(4, 6), nn.Parameter(torch.ones(1)), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.leaky_relu(self.first(x)) * self.slope
        return self.second(torch.cat([x, self.slope.expand(x.shape[0], 1)], dim=1))  # type: ignore[no-any-return]


def test_a_value_that_is_a_channel_too_is_kept_with_what_it_acts_on() -> None:
    big = check_exact(ReadsItsSlope, (make_batch(6, (4,)),), torch.float64, 2)
    assert [group.size for group in big.groups] == [1]


def test_gated_linear_unit_pairs_its_halves() -> None:
    assert sizes(BY_NAME["gated_linear_unit"].make()) == Counter([6, 4])


def test_pixel_shuffle_ties_four_channels() -> None:
    groups = fastmerge.channel_groups(BY_NAME["pixel_shuffle"].make(), torch.randn(2, 3, 8, 8))
    assert [group.size for group in groups] == [3, 5]


@pytest.mark.parametrize("name", ["mobilenet", "depthwise_multiplier"])
def test_depthwise_convolution_passes_its_channels_on(name: str) -> None:
    groups = fastmerge.channel_groups(BY_NAME[name].make(), torch.randn(2, 3, 8, 8))
    expected = {"mobilenet": [4, 6, 8, 8, 10, 12], "depthwise_multiplier": [4]}[name]
    assert sorted(group.size for group in groups) == expected


TORCHVISION_SIZES = {
    "resnet18": {64: 3, 128: 3, 256: 3, 512: 3},
    "mobilenet_v2": {
        16: 1,
        24: 1,
        32: 2,
        64: 1,
        96: 2,
        144: 2,
        160: 1,
        192: 3,
        320: 1,
        384: 4,
        576: 3,
        960: 3,
        1280: 1,
    },
    "squeezenet1_1": {16: 2, 32: 2, 48: 2, 64: 7, 128: 4, 192: 4, 256: 4},
    "vgg11_bn": {64: 1, 128: 1, 256: 2, 512: 4, 4096: 2},
}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_torchvision_networks(name: str) -> None:
    assert sizes(vision.make(name), (2, 3, 64, 64)) == Counter(TORCHVISION_SIZES[name])


@pytest.mark.parametrize("name", ["lenet", "unet"])
def test_the_model_and_the_random_state_are_left_alone(name: str) -> None:
    architecture = BY_NAME[name]
    model = architecture.make().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    fastmerge.channel_groups(model, architecture.inputs(2, dtype=torch.float32))
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_gates_are_the_groups_of_all_teachers() -> None:
    make = partial(BY_NAME["shufflenet_v2"].make)
    x = torch.randn(2, 3, 8, 8)
    groups = fastmerge.channel_groups(make(), x)
    big = fastmerge.BigStudent(make(), make(), make(), example_inputs=x)
    assert {name: gate.loc.numel() for name, gate in big.gates.items()} == {g.name: 3 * g.size for g in groups}


class AttentionNames(nn.Module):
    """Layers named like methods of the dictionary that the gates lie in, and two that would get one name."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values, self.pop_, self.pop = (nn.Linear(5, 5) for _ in range(4))
        self.items = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.keys, self.values, self.pop, self.pop_):
            x = torch.relu(layer(x))
        return self.items(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("written_norms", {"stem": 6, "hidden_0": 6, "second": 6, "hidden_1": 6, "hidden_2": 6}),
        ("weight_standardised", {"stem": 6, "widen_weight": 4, "last": 5, "hidden": 7}),
        ("weight_normed", {"stem": 3, "up": 4, "hidden": 7}),
    ],
)
def test_written_norms_and_computed_weights_leave_channels_apart(name: str, sizes: dict[str, int]) -> None:
    architecture = BY_NAME[name]
    found = fastmerge.channel_groups(architecture.make().double(), architecture.inputs(2))
    assert {group.name: group.size for group in found} == sizes
    assert not found.kept_whole


class CastNorm(nn.Module):
    """T5's: what is squared alone is cast to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.gain * x.to(self.gain.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_casts_what_it_squares_leaves_channels_apart(dtype: torch.dtype) -> None:
    teachers = [nn.Sequential(nn.Linear(3, 6), CastNorm(), nn.Linear(6, 2)).to(dtype) for _ in range(2)]
    big = fastmerge.BigStudent(*teachers)
    assert [group.size for group in big.groups] == [6]
    x = torch.randn(4, 3, dtype=dtype)
    with big.open_gates(), torch.no_grad():
        torch.testing.assert_close(big(x), (teachers[0](x) + teachers[1](x)) / 2, rtol=0.02, atol=0.02)


class ScaledByInput(nn.Module):
    """Code that looks like a normalisation, whose mean or variance is a parameter, an input, or the mean of one."""

    def __init__(self, statistics: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.statistics = nn.Linear(6, 6), nn.Linear(6, 2), statistics
        self.mean, self.var = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x) - self.mean) * torch.rsqrt(self.statistics(self, x) + 1e-5))


@pytest.mark.parametrize(
    "statistics",
    [
        lambda own, x: own.var[0],
        lambda own, x: own.mean.square(),
        lambda own, x: own.mean,
        lambda own, x: own.var.mean(-1, keepdim=True)[0],
        lambda own, x: x.square(),
        lambda own, x: x.square().mean(-1, keepdim=True),
        lambda own, x: x.abs().mean(-1, keepdim=True),
    ],
)
def test_what_only_looks_like_a_normalisation_is_none(statistics: Callable[..., torch.Tensor]) -> None:
    teachers, x = [ScaledByInput(statistics).double() for _ in range(2)], torch.rand(4, 6).double()
    big = fastmerge.BigStudent(*teachers, example_inputs=x)
    with big.open_gates(), torch.no_grad():
        torch.testing.assert_close(big(x), (teachers[0](x) + teachers[1](x)) / 2)


class Rotated(nn.Module):
    """Multiplies its channels by numbers that are not saved."""

    def __init__(self, saved: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("angles", torch.linspace(0, 1, 3), persistent=saved)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x).view(-1, 2, 3) * self.angles.cos()).flatten(1))


@pytest.mark.parametrize(("saved", "sizes"), [(False, [2, 2, 2]), (True, [3])])
def test_buffers_that_are_not_saved_are_the_same_in_all_teachers(saved: bool, sizes: list[int]) -> None:
    assert [group.size for group in fastmerge.channel_groups(Rotated(saved))] == sizes


def test_heads_of_cosine_attention_are_chosen_among_as_streams_are() -> None:
    groups = fastmerge.channel_groups(
        BY_NAME["cosine_attention"].make().double(), BY_NAME["cosine_attention"].inputs(2)
    )
    assert {group.name: (group.size, group.channels) for group in groups} == {
        "embed": (12, 1),
        "qkv_weight": (3, 12),
        "table": (1, 1),
        "positions_0": (7, 1),
    }
    assert groups.kept_whole == [("table", "its use")]


class Windows(nn.Module):
    """Attention with a learned bias for each head and distance, as in Swin, which ``scaled_dot_product_attention`` adds."""

    def __init__(self, width: int = 12, heads: int = 3, tokens: int = 4) -> None:
        super().__init__()
        self.heads, self.embed, self.head = heads, nn.Linear(5, width), nn.Linear(width, 4)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.table = nn.Parameter(torch.randn(2 * tokens - 1, heads))
        self.register_buffer("distance", torch.arange(tokens)[:, None] - torch.arange(tokens) + tokens - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).relu()
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.table[self.distance].permute(2, 0, 1)[None]
        x = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        return self.head(x.transpose(1, 2).flatten(2).mean(1))  # type: ignore[no-any-return]


def test_a_learned_bias_of_attention_goes_with_its_head() -> None:
    big = check_exact(Windows, (make_batch(6, (4, 5)),), torch.float64, 2)
    assert sorted(group.size for group in big.groups) == [3, 12]
    assert not big.groups.kept_whole


class BiasedConvolution(nn.Module):
    """A convolution's bias is computed from a parameter, and no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.conv2d(x, self.weight, self.shift.tanh())
        return self.head(x.relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_a_computed_bias_leaves_its_layer_a_layer() -> None:
    big = check_exact(BiasedConvolution, (make_batch(6, (3, 8, 8)),), torch.float64, 2)
    assert [group.size for group in big.groups] == [6]


def test_layers_may_be_named_like_methods() -> None:
    teachers = [AttentionNames().double() for _ in range(2)]
    big = fastmerge.BigStudent(*teachers)
    assert [group.name for group in big.groups] == ["keys__2", "values__2", "pop__2", "pop_", "items_0"]
    x = torch.randn(3, 5, dtype=torch.float64)
    with big.open_gates():
        torch.testing.assert_close(big(x), (teachers[0](x) + teachers[1](x)) / 2)
    big.link()
    assert big.compress()(x).shape == (3, 2)


def test_a_strided_view_that_moves_numbers_keeps_its_channels_together() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x).mean((2, 3))
            return self.second(y.as_strided(y.shape, (1, y.shape[0])))

    (group,) = fastmerge.channel_groups(Transposed(), example_inputs=torch.randn(2, 3, 8, 8))
    assert group.size == 1
