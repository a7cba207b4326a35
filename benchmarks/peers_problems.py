"""Nine networks with their data, for benchmarks/peers.py.

Every problem is small enough that one run with SGD takes seconds on one thread; batches
can be made several times as large. Image
sets come from ``--data-dir``: MNIST's idx files in it or in its ``mnist`` folder, a
``cifar10*.npz`` in it; else through torchvision; else scikit-learn's digits stand in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import example, has_mnist
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Problem:
    """A network, its loss and its data.

    Attributes:
        network: Makes the model.
        loss: Of a model on a batch.
        batches: Endless training batches, from a generator.
        train: Fixed training examples, in batches, for the final training loss.
        held_out: Fixed other examples, in batches.
        steps: Of a run.
        note: What the network and the data are.
        head: Last part of the output weight's name; embeddings are known by their type.
        held_out_loss: Of a model on a batch of ``held_out``; ``None``: ``loss``.
        constant: Whether the learning rate stays as it is after the warm-up.
    """

    network: Callable[[], nn.Module]
    loss: Loss
    batches: Callable[[torch.Generator], Iterator[Batch]]
    train: list[Batch]
    held_out: list[Batch]
    steps: int
    note: str
    head: str
    held_out_loss: Loss | None = None
    constant: bool = False


def shuffled(tensors: Batch, size: int) -> Callable[[torch.Generator], Iterator[Batch]]:
    """Return endless shuffled batches of equal size, as a function of a generator."""

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            for chosen in torch.randperm(len(tensors[0]), generator=generator).split(
                size
            ):
                if len(chosen) == size:
                    yield tuple(tensor[chosen] for tensor in tensors)

    return batches


def parts(tensors: Batch, count: int, size: int = 250) -> list[Batch]:
    """Return the first ``count`` examples in batches of ``size``."""
    pieces = [tensor[:count].split(size) for tensor in tensors]
    return list(zip(*pieces, strict=True))


def mnist(folder: Path, quick: bool) -> tuple[Tensor, Tensor, str]:
    """Return images ``[N, pixels]`` to train on, held-out ones, and the set's name."""
    module = example("autoencoder")
    for place in (folder, folder / "mnist", folder / "MNIST" / "raw"):
        if has_mnist(place):
            return *module.mnist(place), "MNIST"
    if not quick:
        try:
            return *module.mnist(folder), "MNIST"
        except (ImportError, OSError, RuntimeError) as error:
            print(f"no MNIST in {folder} ({error}): scikit-learn's digits instead")
    return *module.digits(), "digits"


def cifar(folder: Path, quick: bool) -> Any:
    """Return CIFAR-10, or the digits enlarged; see examples/cifar.py."""
    module = example("cifar")
    found = (
        any(folder.glob("cifar10*.npz")) or (folder / "cifar-10-batches-py").is_dir()
    )
    if found or quick:
        return module.load(folder, False)
    try:
        return module.load(folder, True)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"no CIFAR-10 in {folder} ({error}): scikit-learn's digits instead")
        return module.digits()


def autoencoder(folder: Path, quick: bool, times: int = 1) -> Problem:
    """Return George's (2023) deep auto-encoder at a quarter of its width."""
    module = example("autoencoder")
    train, test, name = mnist(folder, quick)
    widths = (32, 16, 32) if quick else (250, 125, 64, 30, 64, 125, 250)
    return Problem(
        lambda: module.network(train.shape[1], widths),
        lambda model, batch: module.reconstruction_loss(model, batch[0]),
        shuffled((train,), 200 * times),
        parts((train,), 500),
        parts((test,), 500),
        100,
        f"eight sigmoid layers {train.shape[1]}-{'-'.join(map(str, widths))}-"
        f"{train.shape[1]}, batch {200 * times}, {name}",
        "14.weight",
    )


def images(
    network: Callable[[], nn.Module],
    folder: Path,
    quick: bool,
    note: str,
    size: int,
    steps: int,
    head: str,
) -> Problem:
    """Return the classification of CIFAR-10's images in equal batches."""
    data = cifar(folder, quick)
    return Problem(
        network,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        shuffled((data.x_train, data.y_train), size),
        parts((data.x_train, data.y_train), 1000),
        parts((data.x_test, data.y_test), 1000),
        steps,
        f"{note}, batch {size}, {data.name}, {len(data.x_train)} images",
        head,
    )


def vgg11(folder: Path, quick: bool, times: int = 1) -> Problem:
    """Return VGG11 without batch norm."""
    width = 2 if quick else 8
    return images(
        lambda: example("cifar").network("vgg11", width),
        folder,
        quick,
        f"VGG11 without batch norm, {width} channels first",
        64 * times,
        120,
        "22.weight",
    )


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm and a shortcut (He et al. 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(c_out)
        self.second = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, c_out, H / stride, W / stride]``."""
        inner = self.first_norm(self.first(x)).relu()
        out: Tensor = self.second_norm(self.second(inner)) + self.shortcut(x)
        return out.relu()


def resnet_network(width: int) -> nn.Module:
    """Return ResNet-18 with a strided stem, ``width`` channels in its first stage."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels = width
    for stage in range(4):
        for index in range(2):
            stride = 2 if stage and not index else 1
            layers.append(ResidualBlock(channels, width * 2**stage, stride))
            channels = width * 2**stage
    head = nn.Linear(channels, 10)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def resnet18(folder: Path, quick: bool, times: int = 1) -> Problem:
    """Return ResNet-18 with batch norm."""
    width = 2 if quick else 8
    return images(
        lambda: resnet_network(width),
        folder,
        quick,
        f"ResNet-18 with batch norm, {width} channels first, stride 2 in the stem",
        64 * times,
        100,
        "13.weight",
    )


class VisionTransformer(nn.Module):
    """Patches, a learned place for each, pre-norm blocks, and the mean of the tokens.

    Args:
        patch: Side of a patch, in pixels.
        width: Features of a token.
        depth: Blocks.
    """

    def __init__(self, patch: int = 8, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn((32 // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, 10]``."""
        x = self.patches(x).flatten(2).mT + self.places
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def vit(folder: Path, quick: bool, times: int = 1) -> Problem:
    """Return a vision transformer."""
    width = 16 if quick else 64
    return images(
        lambda: VisionTransformer(width=width),
        folder,
        quick,
        f"ViT of 2 blocks, width {width}, 16 patches",
        64 * times,
        120,
        "head.weight",
    )


def text(
    network: Callable[[int, int], nn.Module],
    quick: bool,
    size: int,
    steps: int,
    note: str,
) -> Problem:
    """Return the prediction of the next character of Python's own manual."""
    module = example("transformer")
    manual, length = module.Text(), 16 if quick else 64
    fixed = torch.Generator().manual_seed(12345)

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield module.windows(manual.train, size, length, generator)

    return Problem(
        lambda: network(len(manual.alphabet), length),
        lambda model, batch: module.next_character_loss(model, *batch),
        batches,
        [module.windows(manual.train, 64, length, fixed) for _ in range(4)],
        [module.windows(manual.test, 64, length, fixed) for _ in range(4)],
        steps,
        f"{note}, {size} windows of {length} characters, Python's manual",
        "head.weight",
    )


class CharacterTransformer(nn.Module):
    """The transformer of examples/transformer.py with a head of its own."""

    def __init__(self, letters: int, length: int, width: int, depth: int = 2) -> None:
        super().__init__()
        module = example("transformer")
        self.token = nn.Embedding(letters, width)
        self.position = nn.Embedding(length, width)
        blocks = (module.Block(width, heads=4) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits ``[N, length, letters]``."""
        places = torch.arange(codes.shape[1])
        x = self.blocks(self.token(codes) + self.position(places))
        logits: Tensor = self.head(self.norm(x))
        return logits


def characters(width: int, size: int, quick: bool) -> Problem:
    """Return a character transformer on batches of ``size`` windows."""
    width, size = (16, 4) if quick else (width, size)
    return text(
        lambda letters, length: CharacterTransformer(letters, length, width),
        quick,
        size,
        150,
        f"transformer of 2 blocks, width {width}",
    )


def transformer(folder: Path, quick: bool, times: int = 1) -> Problem:
    """Return a character transformer."""
    return characters(64, 16 * times, quick)


def transformer128(folder: Path, quick: bool, times: int = 1) -> Problem:
    """Return one of the size of examples/transformer.py: twice as wide and as many."""
    return characters(128, 32 * times, quick)


class RecurrentModel(nn.Module):
    """An embedding, one ``nn.LSTM`` and a head."""

    def __init__(self, letters: int, width: int, hidden: int) -> None:
        super().__init__()
        self.token = nn.Embedding(letters, width)
        self.recurrent = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, letters)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits ``[N, length, letters]``."""
        hidden, _ = self.recurrent(self.token(codes))
        logits: Tensor = self.head(hidden)
        return logits


def lstm(folder: Path, quick: bool, times: int = 1) -> Problem:
    """Return a recurrent language model of characters."""
    hidden = 16 if quick else 128
    return text(
        lambda letters, length: RecurrentModel(letters, 64, hidden),
        quick,
        4 if quick else 16 * times,
        150,
        f"LSTM, {hidden} hidden units",
    )


class Coordinates(nn.Module):
    """A network of tanh layers on points of the square, times a bump at its border."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sides = [2, *[width] * depth]
        layers: list[nn.Module] = []
        for d_in, d_out in itertools.pairwise(sides):
            layers += [nn.Linear(d_in, d_out), nn.Tanh()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, points: Tensor) -> Tensor:
        """Return values ``[N]`` at points ``[N, 2]`` of the unit square."""
        values: Tensor = self.head(self.body(2 * points - 1)).squeeze(1)
        return values


def solution(points: Tensor) -> Tensor:
    """Return the solution of the Poisson problem, two waves across and three up."""
    waves = torch.sin(2 * math.pi * points[:, 0]) * torch.sin(
        3 * math.pi * points[:, 1]
    )
    return waves + 0.5 * torch.sin(math.pi * points).prod(1)


def source(points: Tensor) -> Tensor:
    """Return the negative Laplacian of :func:`solution`."""
    waves = torch.sin(2 * math.pi * points[:, 0]) * torch.sin(
        3 * math.pi * points[:, 1]
    )
    slow = torch.sin(math.pi * points).prod(1)
    return 13 * math.pi**2 * waves + math.pi**2 * slow


def poisson_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared residual of the equation, plus that of the border.

    Both in units of the solution: the residual is divided by the largest eigenvalue of
    the operator that occurs in it, ``13 pi^2``.
    """
    inside, border = batch
    points = inside.detach().requires_grad_(True)
    with torch.enable_grad():
        values = model(points)
        (slope,) = torch.autograd.grad(values.sum(), points, create_graph=True)
        laplacian = torch.zeros_like(values)
        for axis in range(2):
            (bend,) = torch.autograd.grad(
                slope[:, axis].sum(), points, create_graph=True
            )
            laplacian = laplacian + bend[:, axis]
        residual = (laplacian + source(points.detach())) / (13 * math.pi**2)
        return residual.square().mean() + model(border).square().mean()


def error(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error against the solution, over its mean square."""
    exact = solution(batch[0])
    return (model(batch[0]) - exact).square().mean() / exact.square().mean()


def square(count: int, generator: torch.Generator) -> Batch:
    """Return random points of the unit square and a quarter as many on its border."""
    border = torch.rand(count // 4, 2, generator=generator)
    side = torch.randint(4, (count // 4,), generator=generator)
    rows = torch.arange(len(border))
    border[rows, side % 2] = (side // 2).float()
    return torch.rand(count, 2, generator=generator), border


def pinn(folder: Path, quick: bool, times: int = 1) -> Problem:
    """Return a physics-informed network for a Poisson equation (second derivatives)."""
    fixed, width = torch.Generator().manual_seed(12345), 8 if quick else 64

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield square(256 * times, generator)

    return Problem(
        lambda: Coordinates(width, 3),
        poisson_loss,
        batches,
        [square(1000, fixed)],
        [square(4000, fixed)],
        250,
        f"Poisson equation on the unit square, 3 tanh layers of {width}, {256 * times} "
        "points a step; held out: squared error against the solution, relative",
        "head.weight",
        error,
    )


class Denoiser(nn.Module):
    """A small UNet that predicts the noise in an image, told the time.

    Args:
        channels: Of the first level; the second and third have twice and four times.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.time = nn.Sequential(
            nn.Linear(16, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c)
        )
        self.enter = nn.Conv2d(1, c, 3, 1, 1)
        self.down = nn.Conv2d(c, 2 * c, 3, 2, 1)
        self.down_again = nn.Conv2d(2 * c, 4 * c, 3, 2, 1)
        self.middle = nn.Conv2d(4 * c, 4 * c, 3, 1, 1)
        self.up = nn.Conv2d(6 * c, 2 * c, 3, 1, 1)
        self.up_again = nn.Conv2d(3 * c, c, 3, 1, 1)
        self.norms = nn.ModuleList(
            nn.GroupNorm(4, n) for n in (2 * c, 4 * c, 4 * c, 2 * c, c)
        )
        self.head = nn.Conv2d(c, 1, 3, 1, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return noise ``[N, 1, H, W]`` for images of that shape at times ``[N]``."""
        waves = time[:, None] * math.pi * 2.0 ** torch.arange(-1, 7)
        told = self.time(torch.cat([waves.sin(), waves.cos()], 1))[:, :, None, None]
        first = F.silu(self.enter(x))
        second = F.silu(self.norms[0](self.down(first)))
        third = F.silu(self.norms[1](self.down_again(second)) + told)
        third = third + F.silu(self.norms[2](self.middle(third)))
        rise = torch.cat([F.interpolate(third, second.shape[2:]), second], 1)
        rise = F.silu(self.norms[3](self.up(rise)))
        rise = torch.cat([F.interpolate(rise, first.shape[2:]), first], 1)
        noise: Tensor = self.head(F.silu(self.norms[4](self.up_again(rise))))
        return noise


def noised(images: Tensor, generator: torch.Generator) -> Batch:
    """Return images ``[N, 1, H, W]`` with noise, their times, and the noise.

    A cosine schedule: ``cos(pi t / 2) x + sin(pi t / 2) noise``.
    """
    time = torch.rand(len(images), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    angle = (time * math.pi / 2)[:, None, None, None]
    return angle.cos() * images + angle.sin() * noise, time, noise


def diffusion(folder: Path, quick: bool, times: int = 1) -> Problem:
    """Return a diffusion model's UNet on handwritten digits."""
    train, test, name = mnist(folder, quick)
    side, channels = math.isqrt(train.shape[1]), 4 if quick else 8
    train, test = (2 * x.view(-1, 1, side, side) - 1 for x in (train, test))
    size = 16 if quick else 32 * times
    fixed = torch.Generator().manual_seed(12345)

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        for (clean,) in shuffled((train,), size)(generator):
            yield noised(clean, generator)

    return Problem(
        lambda: Denoiser(channels),
        lambda model, batch: F.mse_loss(model(batch[0], batch[1]), batch[2]),
        batches,
        parts(noised(train[:500], fixed), 500),
        parts(noised(test[:500], fixed), 500),
        100,
        f"denoising UNet, {channels} channels first, batch {size}, {name}",
        "head.weight",
    )


# Made with the data's folder, whether to be quick, and how many times as large batches.
PROBLEMS: dict[str, Callable[..., Problem]] = {
    "autoencoder": autoencoder,
    "vgg11": vgg11,
    "resnet18": resnet18,
    "vit": vit,
    "transformer": transformer,
    "transformer128": transformer128,
    "lstm": lstm,
    "pinn": pinn,
    "diffusion": diffusion,
}


def evaluate(problem: Problem, model: nn.Module) -> tuple[float, float]:
    """Return the final training loss and the held-out loss, over fixed examples."""
    model.eval()

    def mean(loss: Loss, batches: list[Batch]) -> float:
        with torch.no_grad():
            losses = [loss(model, batch).item() for batch in batches]
        weights = [len(batch[0]) for batch in batches]
        return float(np.average(losses, weights=weights))

    return (
        mean(problem.loss, problem.train),
        mean(problem.held_out_loss or problem.loss, problem.held_out),
    )
