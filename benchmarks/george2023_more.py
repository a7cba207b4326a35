"""More of George 2023: rates and laziness, depth, kernel PCA; on convolutions too.

    python benchmarks/george2023_more.py          # one thread, three seeds

C.5: from the same start a network is trained with smaller and smaller learning rates,
and lazily (``alpha = 100``), to one loss; how far the tangent kernel has turned is
measured. B.7: alignment of the kernel with the labels for networks of several depths.
3.7: the share of the tangent kernel's variance in its first two principal components,
and how well two classes are told apart by them, at the start and trained. Data are
scikit-learn's digits; the networks a convolutional and a fully connected one.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread, table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import LinearityProbe, label_alignment
from ekfac.diagnostics.tangent_kernel import AlphaScaled


def started(*layers: nn.Module) -> nn.Sequential:
    """Return layers with He's weights and no biases at the start."""
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def mlp(depth: int = 3, width: int = 40) -> nn.Sequential:
    """Return a ReLU network with ``depth`` hidden layers."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return started(*layers, nn.Linear(width, 10))


def convolutional() -> nn.Sequential:
    """Return a small network in the manner of VGG."""
    return started(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def descend(
    model: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int, stop: float
) -> tuple[int, float]:
    """Train until a loss is reached; return the steps and the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    value = float("nan")
    for step in range(steps):
        loss = cross_entropy(model(x), y)
        value = loss.item()
        if value <= stop:
            return step, value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps, value


def rates(
    kind: Any, seed: int, data: Any, limit: int
) -> dict[str, tuple[float, float]]:
    """Return loss and kernel's alignment with the start, by regime (C.5)."""
    x, y = data
    found = {}
    for alpha, lr in ((1, 0.03), (1, 0.003), (1, 0.001), (100, 0.03)):
        torch.manual_seed(seed)
        model = kind()
        probe = LinearityProbe(model, x[:30])
        scaled = AlphaScaled(model, alpha)
        _, loss = descend(scaled, x, y, lr / alpha**2, limit, 0.5)
        found[f"alpha {alpha}, lr {lr:g}"] = loss, float(probe.measure().kernel)
    return found


def depths(seed: int, data: Any, points: tuple[int, ...]) -> dict[int, list[float]]:
    """Return alignment with the labels at some steps, by depth (B.7)."""
    x, y = data
    found: dict[int, list[float]] = {}
    for depth in (1, 3, 6):
        torch.manual_seed(seed)
        model, done = mlp(depth), 0
        for point in points:
            descend(model, x, y, 0.01, point - done, 0.0)
            done = point
            aligned = label_alignment(model, x[:60], y[:60])
            found.setdefault(depth, []).append(float(aligned.whole.value))
    return found


def components(kind: Any, seed: int, data: Any, steps: int) -> dict[str, list[float]]:
    """Return share of variance and separation in two components (3.7)."""
    x, y = data
    chosen = y < 2
    two, labels = x[chosen][:60], y[chosen][:60]
    torch.manual_seed(seed)
    model = kind()
    found: dict[str, list[float]] = {"share": [], "separation": []}
    for stage in range(2):
        if stage:
            descend(model, x, y, 0.03, steps, 0.05)
        difference = nn.Sequential(model, _Difference())
        K = ekfac.ntk(difference, two).to_dense().double()
        norms = K.diagonal().sqrt()
        K = K / (norms[:, None] * norms)
        K = K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()
        values, vectors = torch.linalg.eigh(K)
        found["share"].append(float(values[-2:].sum() / values.clamp(min=0).sum()))
        points = vectors[:, -2:] * values[-2:].clamp(min=0).sqrt()
        a, b = points[labels == 0], points[labels == 1]
        within = (a.var(0).sum() + b.var(0).sum()).sqrt()
        found["separation"].append(float((a.mean(0) - b.mean(0)).norm() / within))
    return found


class _Difference(nn.Module):
    """The second output less the first."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, 1]``."""
        return x[:, 1:2] - x[:, :1]


def main() -> None:
    """Run all parts; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--limit", type=int, default=500)
    args = arguments.parse_args()
    points, size = (0, 10, 30, 60, 120, 240), 300
    if args.quick:
        args.seeds, args.limit, points, size = [0], 20, (0, 5), 120
    torch.set_num_threads(1)
    rows, saved = [], {}
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    x, y = (x - x.mean()) / x.std(), torch.tensor(digits.target)
    data = x[:size], y[:size]
    for name, kind in (("MLP", mlp), ("conv", convolutional)):
        runs = [rates(kind, s, data, args.limit) for s in bar(args.seeds, "seeds")]
        saved[f"rates, {name}"] = runs
        for regime in runs[0]:
            loss, kernel = zip(*(run[regime] for run in runs), strict=True)
            measured = f"kernel {spread(list(kernel))}, loss {spread(list(loss))}"
            rows.append({"part": "C.5", "case": f"{name}, {regime}", "found": measured})
        pca = [components(kind, seed, data, args.limit // 5) for seed in args.seeds]
        saved[f"components, {name}"] = pca
        for field in pca[0]:
            before, after = zip(*(run[field] for run in pca), strict=True)
            measured = f"{spread(list(before))} -> {spread(list(after))}"
            rows.append({"part": "3.7", "case": f"{name}, {field}", "found": measured})
    every = [depths(seed, data, points) for seed in bar(args.seeds, "seeds")]
    saved["depths"] = every
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for depth in every[0]:
        highest = [max(run[depth]) for run in every]
        when = [float(points[run[depth].index(max(run[depth]))]) for run in every]
        measured = f"highest {spread(highest)} at step {spread(when)}"
        rows.append({"part": "B.7", "case": f"depth {depth}", "found": measured})
        for number, run in enumerate(every):
            label = f"{depth} hidden layers" if number == 0 else None
            ax.plot(points, run[depth], color=f"C{depth // 2}", label=label)
    ax.set(xlabel="step", ylabel="alignment of the kernel with the labels")
    ax.legend()
    print(table(rows))
    print_seconds()
    save(args.output, "george2023_more", saved, figure)


if __name__ == "__main__":
    main()
