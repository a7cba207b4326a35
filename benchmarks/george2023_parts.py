"""The experiments of george2023.py on images: what is trained and measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import digits, has_mnist, mnist
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import ekfac
from ekfac.diagnostics import LinearityProbe, label_alignment
from ekfac.diagnostics.papers.george import (
    ComplexityMeasure,
    GroupCurves,
    GroupRecorder,
    consistency_scores,
    difficulty_groups,
    example_losses,
)
from ekfac.diagnostics.tangent_kernel import AlphaScaled
from ekfac.diagnostics.tangent_kernel.alignment import centred

LOSSES = partial(cross_entropy, reduction="none")


@dataclass(frozen=True)
class Images:
    """Flat standardised images ``[N, d]`` and classes ``[N]``."""

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def subset(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` random training examples."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.x), generator=generator)[:count]
        return self.x[chosen], self.y[chosen].clone()


def load(folder: Path) -> Images:
    """Return MNIST at 14 x 14 pixels, or the digits of scikit-learn."""
    on_mnist = has_mnist(folder)
    data = mnist(folder) if on_mnist else digits()
    small = (avg_pool2d(x, 2) if on_mnist else x for x in (data.x_train, data.x_test))
    train, test = (images.flatten(1) for images in small)
    name = "MNIST, 14 x 14" if on_mnist else "digits, 8 x 8"
    return Images(name, train, data.y_train, test, data.y_test)


def mlp(*widths: int, he: bool = False, seed: int = 0) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        linear = nn.Linear(wide, narrow)
        if he:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sgd(
    model: nn.Module, x: Tensor, y: Tensor, lr: float, seed: int, batch: int = 100
) -> Iterator[int]:
    """Train without end; yield the number of steps done."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    done = 0
    while True:
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            done += 1
            yield done


def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of wrong predictions."""
    with torch.no_grad():
        return float((model(x).argmax(dim=1) != y).double().mean())


def relabelled(y: Tensor, count: int, seed: int) -> Tensor:
    """Return labels of which the first ``count`` are changed to wrong ones."""
    generator = torch.Generator().manual_seed(seed)
    y = y.clone()
    y[:count] = (y[:count] + torch.randint(1, 10, (count,), generator=generator)) % 10
    return y


# -- chapter 6: alignment --------------------------------------------------------------


def alignment(
    model: nn.Module,
    images: Images,
    seed: int,
    points: tuple[int, ...],
    *,
    lr: float = 0.02,
    share: float = 0.1,
    size: int = 100,
    batch: int = 100,
) -> dict[str, Any]:
    """Train with some random labels; follow the kernel's alignment and spectrum.

    Args:
        model: The network at its start.
        images: The data.
        seed: Of labels and batches.
        points: Steps at which to look.
        lr: Learning rate.
        share: Of the examples that get a random label.
        size: Number of examples in a kernel.
        batch: Number of examples in a step.
    """
    x, y = images.subset(len(images.x), seed)
    generator = torch.Generator().manual_seed(seed)
    hard = int(share * len(x))
    y[:hard] = torch.randint(10, (hard,), generator=generator)
    parts = {
        "difficult": (x[:size], y[:size]),
        "easy": (x[hard : hard + size], y[hard : hard + size]),
        "test": (images.x_test[:size], images.y_test[:size]),
    }
    found: dict[str, Any] = {"steps": list(points), "layers": {}}
    steps = sgd(model, x, y, lr, seed, batch)
    done = 0
    for point in points:
        while done < point:
            done = next(steps)
        for name, (inputs, labels) in parts.items():
            last = name == "test" and point == points[-1]
            aligned = label_alignment(model, inputs, labels, layerwise=last)
            found.setdefault(name, []).append(aligned.whole.value)
            if last:
                found["layers"] = {n: v.value for n, v in aligned.layers.items()}
        kernel: Tensor = ekfac.ntk(model, parts["easy"][0]).to_dense()
        values = torch.linalg.eigvalsh(centred(kernel, 10).double()).clamp(min=0)
        weights = values / values.sum()
        rank = torch.exp(-torch.special.xlogy(weights, weights).sum())
        found.setdefault("effective rank", []).append(float(rank))
        found.setdefault("largest", []).append(float(values.max()))
        found.setdefault("mean", []).append(float(values.mean()))
        top = float(weights.sort().values[-len(weights) // 25 :].sum())
        found.setdefault("top 4 %", []).append(top)
        wrong = error(model, images.x_test, images.y_test)
        found.setdefault("accuracy", []).append(1 - wrong)
        found.setdefault("accuracy, training", []).append(1 - error(model, x, y))
    return found


# -- chapter 5: lazy training ----------------------------------------------------------


def lazy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    groups: dict[str, Tensor],
    *,
    alpha: float,
    lr: float,
    seed: int,
    stop: float,
    reference: str | None,
    limit: int,
    batch: int = 100,
) -> tuple[GroupCurves, dict[str, list[float]]]:
    """Train one regime until the reference loss is low.

    Args:
        model: The network at its start.
        x: Inputs.
        y: Labels.
        groups: Whose losses are followed.
        alpha: 1 for ordinary training, large for the lazy regime.
        lr: In the outputs: it is divided by ``alpha^2``.
        seed: Of batches.
        stop: Loss of the reference group at which to stop.
        reference: The group that measures progress.
        limit: Steps at most.
        batch: Number of examples in a step.

    Returns:
        The groups' losses, and the measures of linearity along the way.
    """
    probe = LinearityProbe(model, x[:50])
    scaled = AlphaScaled(model, alpha)
    recorder = GroupRecorder(groups, reference=reference)
    linearity: dict[str, list[float]] = {"loss": []}
    recorder.record(0, example_losses(scaled, x, y, LOSSES))
    for step in sgd(scaled, x, y, lr / alpha**2, seed, batch):
        if step % 5 and step < limit:
            continue
        recorder.record(step, example_losses(scaled, x, y, LOSSES))
        progress = float(recorder.curves().progress[-1])
        over = progress <= stop or step >= limit
        if step % 50 == 0 or over:
            linearity["loss"].append(progress)
            for name, value in vars(probe.measure()).items():
                linearity.setdefault(name, []).append(value)
        if over:
            return recorder.curves(), linearity
    raise AssertionError("training has no end of its own")


def noisy_labels(images: Images, seed: int, count: int) -> Any:
    """Return inputs, labels of which 15 % are wrong, and the two groups."""
    x, y = images.subset(count, seed)
    wrong = int(0.15 * count)
    groups = {"noisy": torch.arange(wrong), "clean": torch.arange(wrong, count)}
    return x, relabelled(y, wrong, seed), groups


def scored_groups(images: Images, seed: int, count: int, repeats: int) -> Any:
    """Return inputs, labels and five groups by C-score, the most difficult first."""
    x, y = images.subset(count, seed)
    fits = iter(range(10**6))

    def fit(chosen: Tensor) -> Tensor:
        model = mlp(x.shape[1], 60, 10, seed=next(fits))
        steps = sgd(model, x[chosen], y[chosen], 0.1, seed, batch=20)
        for _ in range(60):
            next(steps)
        with torch.no_grad():
            return model(x).argmax(dim=1) == y

    generator = torch.Generator().manual_seed(seed)
    sizes = (count // 8, count // 4, count // 2)
    scores = consistency_scores(fit, count, sizes, repeats=repeats, generator=generator)
    return x, y, difficulty_groups(scores, 5)


# -- chapter 6: complexity -------------------------------------------------------------


def complexity(
    images: Images, *, width: int, noise: float, seed: int, count: int, limit: int
) -> dict[str, float]:
    """Train to a loss of 0.01; return the measure per example and the gap."""
    x, y = images.subset(count, seed)
    y = relabelled(y, int(noise * count), seed)
    model = mlp(x.shape[1], width, 10, seed=seed)
    measure = ComplexityMeasure(model, x[:200], every=20)
    loss = float("inf")
    for step in sgd(model, x, y, 0.1, seed):
        measure.update()
        if step % 20 == 0:
            with torch.no_grad():
                loss = float(cross_entropy(model(x), y))
        if loss < 0.01 or step >= limit:
            break
    gap = error(model, images.x_test, images.y_test) - error(model, x, y)
    # The sample is part of the training set: Tr K is in proportion to its size.
    scale = (count / len(measure.x)) ** 0.5 / count
    found = measure.result()
    return {
        "width": width,
        "noise": noise,
        "C/n": found.value * scale,
        "gap": gap,
        "loss": loss,
        "steps": found.updates,
    }


def spearman(a: list[float], b: list[float]) -> float:
    """Return the rank correlation."""
    ranks = torch.stack([torch.tensor(v).argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
