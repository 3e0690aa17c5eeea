"""What networks return and take: maps beside predictions, parameters after the last layer, words, masks and keywords."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastmerge
from teachers import disturb_weights, make_batch, make_teachers, mean_output, relative_error, select_gates

BATCH = 6
INPUT = (make_batch(BATCH, (5,)),)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.trunk(x))


class WithFeatures(Base):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(x)
        return {"logits": self.head(features), "features": features}


class ReadsItsOutput(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        coarse = self.head(self.features(x))
        return coarse, self.fine(coarse)


class EndsInScale(Base):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)) * self.temperature


class EndsInBatchNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(self.features(x)))


class EndsInResidual(Base):
    """What the last layer is added to is read by a layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.features(x))
        return y + self.last(F.relu(y))


class Encoder(Base):
    """Without a head: a residual stream that its layers read is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.norm(x + self.down(F.relu(self.up(x))))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class GivesDataclass(Base):
    def forward(self, x: Tensor) -> Output:
        features = self.features(x)
        return Output(self.head(features), features)


def check_both_ends(big: fastmerge.BigStudent, teachers: list[nn.Module], x: tuple[Tensor, ...]) -> None:
    """Open gates give the teachers' mean; linked, with other weights, the student computes what was kept."""
    with big.open_gates():
        assert relative_error(big(*x), mean_output(teachers, x)) <= 1e-9
    big.link()
    disturb_weights(big)
    select_gates(big, x)
    assert relative_error(big.compress()(*x), big(*x)) <= 1e-9


def build(make: Callable[[], nn.Module], **options: object) -> tuple[fastmerge.BigStudent, list[nn.Module]]:
    teachers = make_teachers(make, INPUT, 3)
    return fastmerge.BigStudent(*teachers, example_inputs=(INPUT[0][:2],), **options), teachers


@pytest.mark.parametrize(
    "make", [WithFeatures, ReadsItsOutput, EndsInScale, EndsInBatchNorm, EndsInResidual, Encoder, GivesDataclass]
)
@torch.no_grad()
def test_exact_at_both_ends(make: type[nn.Module]) -> None:
    big, teachers = build(make)
    for training in (False, True):
        big.train(training)
        expected = mean_output([copy.deepcopy(teacher).train(training) for teacher in teachers], INPUT)
        with big.open_gates():
            output = copy.deepcopy(big)(*INPUT)
        assert type(output) is type(teachers[0](*INPUT))
        leaves = zip(pytree.tree_leaves(output), pytree.tree_leaves(expected), strict=True)
        assert all(relative_error(actual, mean) <= 1e-9 for actual, mean in leaves)
    big.link()
    disturb_weights(big.eval())
    for gate in big.gates.values():
        gate.loc.fill_(-40.0)
        gate.loc[torch.randperm(len(gate.loc))[: len(gate.loc) // 3]] = 40.0
    student = big.compress()
    assert type(student) is make
    teachers[0].load_state_dict(student.state_dict(), strict=True)
    for actual, expected in zip(big.predictions(student(*INPUT)), big.predictions(big(*INPUT)), strict=True):
        assert relative_error(actual, expected) <= 1e-9


def test_what_no_parameter_follows_is_a_prediction() -> None:
    big, _ = build(WithFeatures)
    assert [group.size for group in big.groups] == [8]
    output = big.eval()(*INPUT)
    (prediction,) = big.predictions(output)
    assert prediction is output["logits"]
    big, _ = build(ReadsItsOutput)
    coarse, fine = big.eval()(*INPUT)
    (prediction,) = big.predictions((coarse, fine))
    assert prediction is fine


def test_named_outputs_are_predictions() -> None:
    """The scores that another layer reads are the mean as well, so there is nothing to choose among them."""
    big, _ = build(ReadsItsOutput, outputs=(0, 1))
    assert [group.size for group in big.groups] == [8]
    assert len(big.predictions(big.eval()(*INPUT))) == 2
    with pytest.raises(ValueError, match=r"outputs names \('boxes',\).*returns 0, 1"):
        build(ReadsItsOutput, outputs=("boxes",))


class Words(nn.Module):
    """A sentence classifier: embeddings of words and positions, attention with a mask, arguments by keyword."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.places, self.norm = nn.Embedding(20, width), nn.Embedding(16, width), nn.LayerNorm(width)
        self.register_buffer("position_ids", torch.arange(16)[None], persistent=False)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        n, s = input_ids.shape
        if s > self.position_ids.shape[1] or not isinstance(input_ids, Tensor):
            raise ValueError("too long")
        x = self.norm(self.words(input_ids) + self.places(self.position_ids[:, :s]))
        q, k, v = (layer(x).view(n, s, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        allowed = None if mask is None else mask[:, None, None, :].bool()
        y = F.scaled_dot_product_attention(q * scale, k, v, attn_mask=allowed)
        return self.head(self.last(x + self.o(y.transpose(1, 2).reshape(n, s, -1))).mean(1))


def word_inputs(batch: int, length: int, seed: int = 0) -> tuple[tuple[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(20, (batch, length), generator=generator)
    return (words,), {
        "mask": (torch.rand(batch, length, generator=generator) > 0.3).long().index_fill(1, torch.tensor(0), 1)
    }


@torch.no_grad()
def test_words_masks_and_keywords() -> None:
    teachers = []
    for seed in range(2):
        torch.manual_seed(seed)
        teachers.append(Words().double().eval())
        for parameter in teachers[-1].parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    big = fastmerge.BigStudent(*teachers, example_inputs=word_inputs(2, 7)).eval()
    assert {group.size for group in big.groups} == {8, 2}  # the width, and the heads
    for batch, length in ((5, 7), (3, 9)):  # another length is another graph
        (words,), keywords = word_inputs(batch, length, seed=1)
        expected = sum(teacher(words, **keywords) for teacher in teachers) / 2
        with big.open_gates():
            assert relative_error(big(words, **keywords), expected) <= 1e-9
            assert relative_error(big(input_ids=words, **keywords), expected) <= 1e-9
    big.link()
    disturb_weights(big)
    for gate in big.gates.values():
        gate.loc.fill_(-40.0)
        gate.loc[torch.randperm(len(gate.loc))[: len(gate.loc) // 2]] = 40.0
    assert relative_error(big.compress()(words, **keywords), big(words, **keywords)) <= 1e-9


class TiedBert(Words):
    """Guesses words: a transform of its own, then the embedding's weight with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.transform, self.norm2, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 20)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.words(input_ids) + self.places(self.position_ids[:, : input_ids.shape[1]]))
        x = self.last(x + self.o(F.gelu(self.q(x))))
        return self.head(self.norm2(F.gelu(self.transform(x))))


class TiedGpt(nn.Module):
    """Every linear layer is a product with a parameter of (in, out), as GPT-2's, and so is the tied last one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, width), nn.Embedding(16, width)
        self.qkv, self.qkv_bias = nn.Parameter(torch.empty(width, 3 * width)), nn.Parameter(torch.empty(3 * width))
        self.out, self.norm, self.last = nn.Linear(width, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Parameter(torch.empty(width, 12)), nn.Parameter(torch.empty(12, width))

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.words.weight.t()

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        n, s, width = x.shape
        qkv = torch.addmm(self.qkv_bias, self.norm(x).view(-1, width), self.qkv).view(n, s, 3, 2, width // 2)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, s, width))
        return self.logits(self.last(x + F.gelu(x @ self.up) @ self.down))


class TiedLogProbabilities(TiedGpt):
    """The mean of the teachers' outputs is another one than that of their last layers."""

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.words.weight).log_softmax(-1)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("make", [TiedBert, TiedGpt, TiedLogProbabilities])
def test_a_last_layer_with_the_weight_of_the_embedding(make: type[nn.Module], count: int) -> None:
    teachers = []
    for seed in range(count):
        torch.manual_seed(seed)
        teachers.append(make().double().eval())
        for parameter in teachers[-1].parameters():
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.5)
    (words,), _ = word_inputs(5, 7, seed=1)
    big = fastmerge.BigStudent(*teachers, example_inputs=word_inputs(2, 7)[0])
    assert sum(group.size for group in big.groups) == (16 if make is TiedBert else 22)
    with torch.no_grad():
        expected = mean_output(teachers, (words,))
        for change in (lambda: None, big.link):
            change()
            with big.open_gates():
                assert relative_error(big(words), expected) <= 1e-9
        optimizer = torch.optim.Adam(big.parameters(), 0.01)
    for _ in range(2):  # drawn gates: every sample has a scale of its own
        optimizer.zero_grad()
        (big.train()(words).square().mean() + big.gate_loss()).backward()
        optimizer.step()
    select_gates(big, (words,))
    assert relative_error(big.compress()(words).detach(), big(words).detach()) <= 1e-9
    with torch.no_grad():
        disturb_weights(big)
        expected = big(words)
    student = big.compress(optimizer)
    assert relative_error(student(words).detach(), expected) <= 1e-9
    tied = [parameter for parameter in student.parameters() if parameter is student.words.weight]
    assert len(tied) == 1
    assert optimizer.state[student.words.weight]["exp_avg"].shape == student.words.weight.shape


class Resized(nn.Module):
    """Its code counts on the size of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.head = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.fine(x))
        coarse = F.interpolate(F.relu(self.coarse(fine)), size=fine.shape[2:])
        return self.head(torch.cat([fine, coarse], 1)).mean((2, 3))


@torch.no_grad()
def test_images_of_another_size() -> None:
    x = (make_batch(BATCH, (3, 8, 8)),)
    teachers = make_teachers(Resized, x, 2)
    big = fastmerge.BigStudent(*teachers, example_inputs=x)
    for side in (8, 12, 13, 8):
        x = (make_batch(BATCH, (3, side, side), seed=side),)
        with big.open_gates():
            assert relative_error(big(*x), mean_output(teachers, x)) <= 1e-9
    select_gates(big, x)
    assert relative_error(big.compress()(*x), big(*x)) <= 1e-9


class WritesParts(nn.Module):
    """Puts its maps together by writing them into a tensor that it made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.first(x))
        both = torch.zeros(x.shape[0], 16, dtype=x.dtype)
        both[:, :8] += u
        both[:, 8:].add_(F.relu(self.second(u)))
        both[:, 4:12] *= 2
        return self.head(F.relu_(both))


class Blocks(Base):
    """Parts of its code run without gradients, or in another precision; it asks a weight for its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            centre = x.mean(0, keepdim=True)
        with torch.autocast("cpu", enabled=False):
            features = self.features((x - centre).to(self.trunk.weight.dtype))
        return self.head(features)


class ChangesViews(Base):
    """Arithmetic in place on parts of a layer's output, each another view of it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        h[:, :4] += 1
        h[:, ::2].mul_(2)
        h.t()[2:6].tanh_()
        halves = h.view(-1, 2, 4)
        halves[:, 0].add_(halves[:, 1])
        return self.head(F.relu(h))


class Remembers(Base):
    """Keeps tensors in plain attributes: what it made once, and what it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.grids: dict[int, Tensor] = {}
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] not in self.grids:
            self.grids[x.shape[1]] = torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device)
        self.seen = self.features(x * self.grids[x.shape[1]])
        return self.head(self.seen)


class Centres(Base):
    """Takes off a running mean that it keeps itself, and in training the one that it has just changed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if self.training:
            self.centre.mul_(0.9).add_(features.detach().mean(0), alpha=0.1)
        return self.head(features - self.centre)


class MaskedEncoder(nn.Module):
    """A mask of PyTorch's own encoder, which asks its values whether it is causal."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 10, dropout=0.0, batch_first=True)
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 4)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.head(self.encoder(self.embed(x[..., None]), mask=mask)[:, -1])


class BestExperts(Base):
    """Each sample goes through the two of four experts that its features choose."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        weights, best = self.choice(features).softmax(1).topk(2)
        made = torch.stack([F.relu(expert(features)) for expert in self.experts], 1)
        chosen = made.gather(1, best[..., None].expand(-1, -1, 6))
        return self.head((chosen * weights[..., None]).sum(1))


def traced() -> nn.Module:
    """Every traced network has a class of its own."""
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)))


@pytest.mark.parametrize(
    "make", [WritesParts, Blocks, ChangesViews, Remembers, Centres, MaskedEncoder, BestExperts, traced]
)
@torch.no_grad()
def test_unusual_code(make: Callable[[], nn.Module]) -> None:
    big, teachers = build(make)
    check_both_ends(big, teachers, INPUT)


class Rotary(nn.Module):
    """Attention as in Llama: rotary positions by frequencies in a buffer, two queries for each key."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.gain = nn.Linear(5, width), nn.Parameter(torch.ones(width))
        self.q, self.k, self.v, self.o = (
            nn.Linear(width, 16),
            nn.Linear(width, 8),
            nn.Linear(width, 8),
            nn.Linear(16, width),
        )
        self.head = nn.Linear(width, 3)
        self.register_buffer("frequencies", 1 / 10 ** torch.arange(2), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        q, k, v = (layer(y).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (z.repeat_interleave(2, dim=1) for z in (self.rotated(k), v))
        y = F.scaled_dot_product_attention(self.rotated(q), k, v, is_causal=True)
        return self.head((x + self.o(y.transpose(1, 2).flatten(2))).mean(1))


@torch.no_grad()
def test_rotary_positions_leave_heads_apart() -> None:
    x = (make_batch(BATCH, (6, 5)),)
    teachers = make_teachers(Rotary, x, 2)
    for teacher in teachers:
        teacher.frequencies.copy_(1 / 10 ** torch.arange(2))
    big = fastmerge.BigStudent(*teachers, example_inputs=x)
    assert {group.name: group.size for group in big.groups} == {"embed": 8, "q": 2}
    check_both_ends(big, teachers, x)


class Sequence(nn.Module):
    """Attention over a sequence, whose rows PyTorch flattens with the samples as the faster index."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 10, dropout=0.0, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(5, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


@torch.no_grad()
def test_a_sample_has_its_own_gates_whatever_the_order_of_rows() -> None:
    x = make_batch(4, (3, 5))
    teachers = [Sequence().double() for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=x).train()
    big.link()
    for gate in big.gates.values():
        gate.loc.zero_()
    torch.manual_seed(1)
    first = big(x)
    x[1:] += 1  # the others' inputs
    torch.manual_seed(1)
    again = big(x)
    torch.testing.assert_close(again[0], first[0])
    gates = big._draw_gates((x,))
    changed = torch.cat([gates[:1], big._draw_gates((x,))[1:]])
    forward = big._programs["train", False, True].forward
    torch.testing.assert_close(forward(big.network, changed, x)[0][0], forward(big.network, gates, x)[0][0])
    assert not torch.equal(forward(big.network, changed, x)[0][1], forward(big.network, gates, x)[0][1])


class OneGraph(nn.Module):
    """A graph network on one graph, which it holds: it takes no other number of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("adjacency", torch.rand(BATCH, BATCH, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency @ self.head(F.relu(self.adjacency @ self.first(x)))


@torch.no_grad()
def test_a_matrix_that_all_teachers_have_alike() -> None:
    teachers = []
    for seed in range(2):
        torch.manual_seed(seed)
        teachers.append(OneGraph().double().eval())
    big = fastmerge.BigStudent(*teachers, example_inputs=INPUT)
    assert [group.size for group in big.groups] == [8]
    with big.open_gates():
        assert relative_error(big(*INPUT), mean_output(teachers, INPUT)) <= 1e-9
    select_gates(big, INPUT)
    assert relative_error(big.compress()(*INPUT), big(*INPUT)) <= 1e-9


class MessagePassing(nn.Module):
    """A graph network that takes the graph's edges, and its time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, time: Tensor, x: Tensor, edges: Tensor) -> Tensor:
        h = F.relu(self.first(x)) * time
        h = h + torch.zeros_like(h).index_add_(0, edges[1], F.relu(self.second(h))[edges[0]])
        to = edges[1, :, None].expand(-1, 3)
        y = self.head(h)
        return torch.zeros_like(y).scatter_add(0, to, y[edges[0]])


class Bags(nn.Module):
    """Means over bags of words of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(20, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor, starts: Tensor) -> Tensor:
        return self.head(self.words(words, starts))


def graph(nodes: int, edges: int) -> tuple[Tensor, ...]:
    time = torch.tensor(float(edges), dtype=torch.float64)
    return (
        time,
        make_batch(nodes, (5,)),
        torch.randint(nodes, (2, edges), generator=torch.Generator().manual_seed(edges)),
    )


BAGS = torch.arange(12), torch.tensor([0, 3, 5, 6, 9])


@pytest.mark.parametrize(
    ("make", "x", "other"),
    [
        (MessagePassing, graph(6, 20), graph(9, 31)),
        (Bags, BAGS, (BAGS[0][2:], BAGS[1][:3])),
    ],
)
@torch.no_grad()
def test_inputs_that_count_on_others(make: type[nn.Module], x: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    """Indices of nodes and of words, which only whole inputs have."""
    torch.manual_seed(0)
    teachers = [make().double().eval() for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=x)
    assert [group.size for group in big.groups] == [8]
    for given in (x, other):
        with big.open_gates():
            assert relative_error(big(*given), mean_output(teachers, given)) <= 1e-9
    select_gates(big, x)
    assert relative_error(big.compress()(*other), big(*other)) <= 1e-9


class Decoder(nn.Module):
    """Some positions look at the others, by thirds of the weight that they look at themselves by."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 4, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x, memory = self.embed(x[..., None]).split([2, 3], 1)
        x = x + self.attention(x, memory, memory, need_weights=False)[0]
        x = x + self.attention(x, memory, F.relu(memory), need_weights=False)[0]
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Halves(nn.Module):
    """Two layers by rows of one weight are one layer where their biases are the same rows."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start, self.weight, self.bias = start, nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = F.linear(x, self.weight[:4], self.bias[self.start :][:4])
        return self.head(torch.cat([first.relu(), F.linear(x.sin(), self.weight[4:], self.bias[4:]).tanh()], 1))


class ReadsItsOwnRows(Base):
    """A layer's input is the very rows that are its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight[:8]
        return self.head(self.features(x) @ F.linear(rows, rows))


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (ReadsItsOwnRows, [1]),
        (lambda: Decoder(True), [8, 4]),
        (lambda: Decoder(False), [8, 4]),
        (lambda: Halves(0), [4, 4]),
        (lambda: Halves(2), [1, 2]),
    ],
)
@torch.no_grad()
def test_layers_by_rows_of_one_weight(make: Callable[[], nn.Module], sizes: list[int]) -> None:
    big, teachers = build(make)
    assert [group.size for group in big.groups] == sizes
    check_both_ends(big, teachers, INPUT)
