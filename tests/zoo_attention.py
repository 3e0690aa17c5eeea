"""Zoo: layer normalisation and attention, from modules and written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4))


def rms_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.RMSNorm(8), nn.SiLU(), nn.Linear(8, 4))


class PatchTransformer(nn.Module):
    """A small vision transformer: patches, class token, learned positions, ``nn.MultiheadAttention`` inside."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 5, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 10, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class WrittenAttention(nn.Module):
    """Attention as matrix products, normalised after the sum, over the tokens of a sequence."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(5, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 10), nn.Linear(10, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, s, width = x.shape
        q, k, v = self.qkv(x).reshape(n, s, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5).softmax(-1)
        x = self.norm1(x + self.out((weights @ v).transpose(1, 2).reshape(n, s, width)))
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        return self.head(x.mean(1))


class CosineAttention(nn.Module):
    """Swin v2's: queries and keys of length one, a scale per head, keys without a bias, positions from a table by an MLP."""

    table: Tensor

    def __init__(self, width: int = 12, heads: int = 3, tokens: int = 6) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(5, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), 2.0))
        self.positions = nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, heads, bias=False))
        self.register_buffer("table", torch.randn(tokens, tokens, 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, s, width = x.shape
        bias = self.qkv.bias.clone()
        bias[width : 2 * width].zero_()
        qkv = F.linear(x, self.qkv.weight, bias).reshape(n, s, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale.clamp(max=4.0).exp()
        weights = (weights + 3 * self.positions(self.table).permute(2, 0, 1).sigmoid()).softmax(-1)
        x = x + self.norm(self.out((weights @ v).transpose(1, 2).reshape(n, s, width)))
        return self.head(x.mean(1))


class ChannelsLastBlocks(nn.Module):
    """ConvNeXt's block: depthwise convolution, layer normalisation with channels last, a learned scale."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, stride=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class WrittenNorms(nn.Module):
    """Normalisations without their modules: channels first as in ConvNeXt, Llama's, two by variances, unit length."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.scale, self.shift, self.gain = (nn.Parameter(torch.ones(width)) for _ in range(3))
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def channels_first(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.scale[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.shift[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.channels_first(self.stem(x)))
        x = self.hidden[0](F.normalize(self.second(x), dim=1).mean((2, 3)))
        x = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        x = self.hidden[1](F.gelu(x))
        x = self.hidden[2]((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt())
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, unbiased=False)
        return self.head((x - mean) * (variance + 1e-5) ** -0.5)
