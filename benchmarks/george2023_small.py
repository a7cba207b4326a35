"""The smaller experiments of george2023.py: toys, SuperNat, bounds, directions."""

from __future__ import annotations

from typing import Any

import torch
from george2023_parts import Images, mlp, sgd
from quadratic_model import QuadraticModel, flipped_labels, spurious_feature
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import ekfac
from ekfac.diagnostics import label_alignment, step_modes
from ekfac.diagnostics.papers.george import (
    GroupCurves,
    GroupRecorder,
    feature_descent,
    optimal_rescaling,
)
from ekfac.diagnostics.tangent_kernel import AlphaScaled
from ekfac.diagnostics.tangent_kernel.alignment import centred


def toy_data(number: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return Example 2 or 3 of section 5.4, and its odd fifth and the rest."""
    generator = torch.Generator().manual_seed(seed)
    n = 60
    y = (torch.randint(2, (n,), generator=generator) * 2 - 1).float()
    odd = torch.arange(n) < n // 5
    if number == 2:
        x, y = flipped_labels(y, odd, eta=0.7)
    else:
        x, y = spurious_feature(y, odd, strength=0.5, eta=0.7)
    return x, y, {"odd": odd.nonzero()[:, 0], "rest": (~odd).nonzero()[:, 0]}


def closed_form(number: int, seed: int) -> tuple[GroupCurves, GroupCurves]:
    """Return the curves of the quadratic model in both regimes (Figure 5.4)."""
    x, y, groups = toy_data(number, seed)
    model = QuadraticModel.of(x.double(), y.double())
    found = []
    methods = (model.theta, model.theta_linearised)
    for method, times in zip(methods, model.times(1e-3), strict=True):
        steps = torch.arange(2000)
        t = (steps / 2000).double().pow(3) * times.nan_to_num(0).max()
        losses = (model.outputs(method(t)) - y).square()
        by_group = {
            name: losses[:, chosen].mean(dim=1) for name, chosen in groups.items()
        }
        found.append(GroupCurves(steps, losses.mean(dim=1), by_group))
    return found[0], found[1]


def toy(number: int, seed: int, alpha: float, steps: int) -> GroupCurves:
    """Train a two-layer network on an example (Figure C.9)."""
    x, y, groups = toy_data(number, seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 50), nn.ReLU(), nn.Linear(50, 1))
    for p in model.parameters():
        p.data.mul_(0.5)
    scaled = AlphaScaled(model, alpha)
    parameters = [p for p in scaled.parameters() if p.requires_grad]
    rate = 0.01 if alpha == 1 else 0.05
    optimizer = torch.optim.SGD(parameters, lr=rate / alpha**2)
    recorder = GroupRecorder(groups)
    for step in range(steps):
        losses = (scaled(x)[:, 0] - y).square()
        recorder.record(step, losses.detach())
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return recorder.curves()


def supernat(seeds: range) -> tuple[int, list[tuple[float, float]]]:
    """Return how often SuperNat's test error is the lower, and both errors (E6.6)."""
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.tensor([1.0] + [10**-0.5] * 10)
        features = torch.randn(250, 11, generator=generator) * scale
        noise = torch.randn(50, generator=generator) * 0.1**0.5
        hidden = features[:50, 1:]
        y = features[:50, 0] + hidden @ (hidden.mT @ noise)
        test = (features[50:], features[50:, 0])
        errors = []
        for method in ("supernat", "gd"):
            run = feature_descent(features[:50], y, method=method, test=test)  # type: ignore[arg-type]
            assert run.test_loss is not None
            errors.append(float(run.test_loss[-1]))
        found.append((errors[0], errors[1]))
    return sum(mine < other for mine, other in found), found


def rescaled_bounds(count: int, stretch: tuple[float, ...], seed: int) -> list[Any]:
    """Return both norm bounds and the error on RBF features (Figure B.3).

    Gram matrix of random Fourier features in one dimension, its eigenvalues stretched
    as ``1 + c (l - 1)``; labels are the sign of the second eigenfunction.
    """
    torch.manual_seed(seed)
    x = torch.linspace(-3, 3, count, dtype=torch.float64)
    frequencies = torch.randn(count, dtype=torch.float64) * 2**0.5  # gamma = 1
    shift = torch.rand(count, dtype=torch.float64) * 2 * torch.pi
    features = (2 / count) ** 0.5 * torch.cos(x[:, None] * frequencies + shift)
    U, roots, Vh = torch.linalg.svd(features)
    y = U[:, 1].sign()
    rows = []
    for c in stretch:
        stretched = 1 + c * (roots.square() / roots[0].square() - 1)
        Phi = U @ torch.diag(stretched.clamp(min=0).sqrt()) @ Vh
        bounds, wrong = [], []
        for draw in range(20):
            generator = torch.Generator().manual_seed(draw)
            chosen = torch.randperm(count, generator=generator)[:50]
            K = Phi[chosen] @ Phi[chosen].mT
            found = optimal_rescaling(K, y[chosen], tolerance=1e-12)
            bounds.append((found.bound, found.euclidean))
            fit = torch.linalg.lstsq(Phi[chosen], y[chosen][:, None]).solution
            wrong.append(float(((Phi @ fit)[:, 0].sign() != y).double().mean()))
        optimal, plain = torch.tensor(bounds).mean(dim=0).tolist()
        rows.append((c, plain, optimal, sum(wrong) / len(wrong)))
    return rows


def perturbation(
    model: nn.Module, images: Images, seed: int, steps: int
) -> dict[str, float]:
    """Return the RMS change of the outputs along Jacobian and random directions."""
    x, y = images.subset(1000, seed)
    training = sgd(model, x, y, 0.05, seed)
    for _ in range(steps):
        next(training)
    J = ekfac.jacobian(model, x[:60]).to_dense()
    directions = torch.linalg.svd(J, full_matrices=False).Vh
    weights = ekfac.ParameterVector.from_model(model)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(10, J.shape[1], generator=generator)
    kinds = {
        "top 10": directions[:10],
        "41 to 50": directions[40:50],
        "random": random / random.norm(dim=1, keepdim=True),
    }
    result = {}
    for name, rows in kinds.items():
        moved = []
        for row in rows:
            with torch.no_grad():
                before = model(x[:60])
                _move(model, weights, 0.1 * row)
                moved.append(float((model(x[:60]) - before).square().mean().sqrt()))
                _move(model, weights, torch.zeros_like(row))
        result[name] = sum(moved) / len(moved)
    return result


def _move(model: nn.Module, weights: ekfac.ParameterVector, step: Tensor) -> None:
    change = weights.space.vector(step)
    for name, p in model.named_parameters():
        p.copy_(weights[name] + change[name])


def frequencies(seed: int) -> float:
    """Return how eigenvectors' order goes with their Fourier frequency (Figure B.2)."""
    x = torch.linspace(0, 1, 50)[:, None]
    model = mlp(1, *[256] * 6, 1, seed=seed)
    kernel: Tensor = ekfac.ntk(model, x).to_dense()
    vectors = torch.linalg.eigh(kernel.double()).eigenvectors.flip(1)
    dominant = torch.fft.rfft(vectors[:, :25], dim=0).abs().argmax(dim=0)
    ranks = torch.stack([torch.arange(25).double(), dominant.double()])
    return float(torch.corrcoef(ranks)[0, 1])


def disk(seed: int, steps: int) -> dict[str, float]:
    """Return how the kernel turns to the labels of a disk (Figure 6.1)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(300, 2, generator=generator) * 2 - 1
    y = (x.norm(dim=1) < (2 / torch.pi) ** 0.5).float() * 2 - 1
    model = mlp(2, *[256] * 6, 1, he=True, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    result = {}
    for step in range(steps + 1):
        if step in (0, steps):
            when = "end" if step else "start"
            kernel: Tensor = ekfac.ntk(model, x).to_dense()
            K = centred(kernel.double(), 1)
            values, vectors = torch.linalg.eigh(K)
            values, vectors = values.flip(0), vectors.flip(1)
            label = (y - y.mean()).double()
            top = (vectors[:, :20].mT @ label).square().sum() / label.square().sum()
            result[f"labels in top 20, {when}"] = float(top)
            result[f"lambda 20 / lambda 1, {when}"] = float(values[19] / values[0])
            result[f"mean eigenvalue, {when}"] = float(values.mean())
            aligned = label_alignment(model, x, y, layerwise=False)
            result[f"alignment, {when}"] = aligned.whole.value
        optimizer.zero_grad()
        nn.functional.softplus(-y * model(x)[:, 0]).mean().backward()
        optimizer.step()
    return result


def first_order(images: Images, seed: int) -> tuple[float, float]:
    """Return how well one step's change is foretold mode by mode (Lemma 6.2.1).

    The relative distance of the foretold change to the linearised one, and to the one
    that happened.
    """
    x, y = images.subset(40, seed)
    model = mlp(x.shape[1], 50, 50, 10, seed=seed).double()
    x, lr = x.double(), 1e-3
    target = nn.functional.one_hot(y, 10).double()

    def loss(outputs: Tensor) -> Tensor:
        return mse_loss(outputs, target, reduction="sum") / 2

    foretold = step_modes(model, x, loss, lr=lr).foretold.reshape(-1)
    outputs = model(x)
    grads = torch.autograd.grad(loss(outputs), list(model.parameters()))
    flat = torch.cat([g.reshape(-1) for g in grads])
    linear = ekfac.jacobian(model, x).to_dense() @ (-lr * flat)
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads, strict=True):
            p -= lr * g
        actual = (model(x) - outputs).reshape(-1)
    ends = (linear, actual)
    first, second = (float((foretold - v).norm() / v.norm()) for v in ends)
    return first, second
