"""ResNet-50, ViT-B/16 and GPT-2 small with random weights and data, in torch alone.

He et al. 2016, Table 1; Dosovitskiy et al. 2021, Table 1; Radford et al. 2019, Table 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention


@dataclass(frozen=True)
class Problem:
    """A network and a batch.

    Attributes:
        model: Returns the network.
        data: Returns inputs and targets on a device.
        head: Name of the output layer's weight.
    """

    model: Callable[[], nn.Module]
    data: Callable[[torch.device], tuple[Tensor, Tensor]]
    head: str = "head.weight"

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return cross_entropy(model(x).flatten(0, -2), y.flatten())


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()

        def convolution(a: int, b: int, kernel: int, step: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False)
            return [conv, nn.BatchNorm2d(b)]

        outputs = 4 * inner
        self.body = nn.Sequential(
            *convolution(inputs, inner, 1),
            nn.ReLU(),
            *convolution(inner, inner, 3, stride),
            nn.ReLU(),
            *convolution(inner, outputs, 1),
        )
        same = inputs == outputs and stride == 1
        shortcut = [] if same else convolution(inputs, outputs, 1, stride)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Return the image with three convolutions added."""
        return (self.body(x) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """A ResNet of bottlenecks.

    Args:
        counts: Bottlenecks of each stage.
        width: Of the first stage.
        classes: Outputs.
    """

    def __init__(self, counts: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        inputs = width
        for stage, count in enumerate(counts):
            inner = width * 2**stage
            for number in range(count):
                stride = 2 if stage and not number else 1
                layers.append(Bottleneck(inputs, inner, stride))
                inputs = 4 * inner
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``[N, classes]``."""
        return self.head(self.body(x).mean(dim=(2, 3)))


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a residual stream of the same shape."""
        parts = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        y = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """Blocks between an embedding and an output layer.

    Args:
        width: Of the residual stream.
        depth: Blocks.
        length: Positions.
        outputs: Classes, or tokens.
        patch: Side of an image's patches; ``None`` for text, whose every position has
            an output.
    """

    def __init__(
        self, width: int, depth: int, length: int, outputs: int, patch: int | None
    ) -> None:
        super().__init__()
        self.text = patch is None
        self.embed = (
            nn.Embedding(outputs, width)
            if patch is None
            else nn.Conv2d(3, width, patch, patch)
        )
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        heads = max(1, width // 64)
        blocks = [Block(width, heads, self.text) for _ in range(depth)]
        self.body = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.head = nn.Linear(width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of each position, or of an image."""
        x = self.embed(x)
        x = self.body((x if self.text else x.flatten(2).mT) + self.places)
        return self.head(x if self.text else x.mean(dim=1))


def images(batch: int, size: int, classes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return random images with labels."""
    return lambda device: (
        torch.randn(batch, 3, size, size, device=device),
        torch.randint(classes, (batch,), device=device),
    )


def resnet50(quick: bool) -> Problem:
    """ResNet-50 on 64 images of 224 pixels."""
    if quick:
        return Problem(lambda: ResNet((1, 1), 4, 5), images(3, 16, 5))
    return Problem(lambda: ResNet((3, 4, 6, 3), 64, 1000), images(64, 224, 1000))


def vit_base(quick: bool) -> Problem:
    """ViT-B/16 on 64 images of 224 pixels."""
    if quick:
        return Problem(lambda: Transformer(16, 1, 4, 5, 4), images(3, 8, 5))
    return Problem(lambda: Transformer(768, 12, 196, 1000, 16), images(64, 224, 1000))


def gpt2_small(quick: bool) -> Problem:
    """GPT-2 small on 8 sequences of 1,024 tokens, its head not tied."""
    width, depth, length, tokens, batch = 768, 12, 1024, 50_257, 8
    if quick:
        width, depth, length, tokens, batch = 16, 1, 6, 11, 3

    def data(device: torch.device) -> tuple[Tensor, Tensor]:
        text = torch.randint(tokens, (batch, length + 1), device=device)
        return text[:, :-1], text[:, 1:]

    return Problem(lambda: Transformer(width, depth, length, tokens, None), data)


PROBLEMS = {"ResNet-50": resnet50, "ViT-B/16": vit_base, "GPT-2 small": gpt2_small}
