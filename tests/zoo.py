"""Small networks of many kinds in plain torch, for tests of symmetries; nothing here is a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


class Residual(nn.Module):
    """Two convolutions with BatchNorm, and a projection where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        project = stride != 1 or inner != outer
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
            if project
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(inside)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three blocks, as for CIFAR."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        widths = [width, 2 * width, 4 * width]
        blocks, inner = [], width
        for stage, outer in enumerate(widths):
            for number in range(3):
                blocks.append(Residual(inner, outer, 2 if stage and not number else 1))
                inner = outer
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(inner, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn(self.conv(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class VGG(nn.Module):
    """Convolutions, then maps of the flattened grid."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(6 * 4, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Attention(nn.Module):
    """One map for queries, keys and values, taken apart in one of two ways."""

    def __init__(self, width: int, heads: int, layout: str) -> None:
        super().__init__()
        self.heads, self.layout = heads, layout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        if self.layout == "unbind":
            parts = self.qkv(x).reshape(batch, length, 3, self.heads, -1)
            q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            thirds = self.qkv(x).chunk(3, dim=-1)
            q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in thirds)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, layout: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, layout)
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, a class token, positions, two blocks."""

    def __init__(self, layout: str, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.blocks = nn.ModuleList(Block(width, heads, layout) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Mamba(nn.Module):
    """A selective state space block: gate, short convolution, recurrence over time."""

    def __init__(self, width: int = 6, inner: int = 10, state: int = 4, rank: int = 3) -> None:
        super().__init__()
        self.rank, self.state = rank, state
        self.embed = nn.Embedding(12, width)
        self.norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner, state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.head = nn.Linear(width, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        u, gate = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[..., : u.shape[1]]).transpose(1, 2)
        parts = self.x_proj(u).split([self.rank, self.state, self.state], dim=-1)
        dt, b, c = F.softplus(self.dt_proj(parts[0])), parts[1], parts[2]
        decay = torch.exp(dt[..., None] * -torch.exp(self.A_log))
        put = dt[..., None] * b[:, :, None] * u[..., None]
        h, out = torch.zeros_like(put[:, 0]), []
        for t in range(u.shape[1]):
            h = decay[:, t] * h + put[:, t]
            out.append((h * c[:, t, None]).sum(-1))
        y = (torch.stack(out, 1) + self.D * u) * F.silu(gate)
        return self.head(x + self.out_proj(y))


class Recurrent(nn.Module):
    """Two layers of LSTM or GRU, in both directions."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(4, 6, num_layers=2, batch_first=True, bidirectional=True)  # type: ignore[arg-type]
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Convolutions(nn.Module):
    """Depthwise, grouped and transposed ones, GroupNorm, pixel shuffle, a gate, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(4, 8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.expand = nn.Conv2d(6, 32, 1)
        self.gate = nn.Conv2d(8 + 6, 10, 1)
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.depthwise(F.relu(self.first(x)))))
        x = F.relu(self.up(x))
        wide = F.leaky_relu(F.pixel_shuffle(self.expand(x), 2))
        x = torch.cat([wide, F.interpolate(x, scale_factor=2)], 1)
        return self.last(F.glu(self.gate(x), 1))


class Experts(nn.Module):
    """The best of four experts for each token, weights looked up by the router's choice."""

    def __init__(self, width: int = 5, inner: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.router = nn.Linear(width, 4)
        self.up = nn.Parameter(torch.zeros(4, inner, width))
        self.down = nn.Parameter(torch.zeros(4, width, inner))
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens.flatten())
        weight, chosen = self.router(x).softmax(-1).topk(1)
        chosen = chosen[:, 0]
        hidden = F.gelu(torch.bmm(self.up[chosen], x[:, :, None]))
        return self.head(x + weight * torch.bmm(self.down[chosen], hidden)[:, :, 0])


class Loop(nn.Module):
    """All of three experts in a Python loop, a layer used twice, maxima and repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.up = nn.Parameter(torch.zeros(3, 8, 5))
        self.down = nn.Parameter(torch.zeros(3, 5, 8))
        self.again = nn.Linear(5, 5)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        total = torch.zeros_like(x)
        for number in range(len(self.up)):
            total += F.linear(torch.tanh(F.linear(x, self.up[number])), self.down[number])
        steps = 0
        while steps < 1 or (total.norm() > 3 and steps < 5):
            total, steps = 2 * torch.tanh(self.again(total)), steps + 1
        total = total - total.max(-1, keepdim=True).values
        return self.out(total.repeat(1, 2))


class Bottleneck(nn.Module):
    """Two linear maps with nothing between them: any invertible matrix fits in."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 3, bias=False), nn.Linear(3, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(10, 12), body, nn.Linear(12, 4))


def pictures(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


TOKENS = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 3]])

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (mlp, [rows(5, 3)]),
    "resnet20": (ResNet20, [pictures(8)]),
    "vgg": (VGG, [pictures(8)]),
    "vit chunk": (lambda: ViT("chunk"), [pictures(8)]),
    "vit unbind": (lambda: ViT("unbind"), [pictures(8)]),
    "mamba": (Mamba, [TOKENS]),
    "lstm": (lambda: Recurrent(nn.LSTM), [rows(2, 5, 4)]),
    "gru": (lambda: Recurrent(nn.GRU), [rows(2, 5, 4)]),
    "convolutions": (Convolutions, [pictures(4)]),
    "encoder": (encoder, [TOKENS]),
    "experts": (Experts, [TOKENS]),
    "loop": (Loop, [rows(3, 4)]),
    "bottleneck": (Bottleneck, [rows(2, 6)]),
}
