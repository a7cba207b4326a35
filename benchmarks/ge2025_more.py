"""More of Ge (2025): Figures 4.3, 4.4 and 4.7, and ``T_100`` by number of images.

    python benchmarks/ge2025_more.py          # one thread, three seeds

A 64-64-64-64-10 network learns scikit-learn's digits. Every few epochs the effective
rank of the top eigenvectors of the Fisher matrix of softmax probabilities (4.7); at the
end the response ``u_i`` of eigenfunctions ``i = 1, 10, 100`` over test images in the
plane of the last hidden layer's first principal components (4.3 and 4.4, where the
thesis has t-SNE); the trace ratio for several numbers of images. Every digit follows
from the seeds on one thread; the script trains twice and says so.
"""

from __future__ import annotations

import statistics
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, table
from ge2025 import Spectrum, network
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac

COUNTS = (25, 50, 100, 200)


def support(model: nn.Module, x: Tensor, k: int) -> float:
    """Return the mean effective rank of the top eigenvectors."""
    found = Spectrum(model, x, probabilities=True).concentration(k)
    return float(found.support.mean())


def trained(seed: int, data: Any, epochs: int, images: Tensor | None) -> Any:
    """Return a trained network, with loss and support at its epochs."""
    x, y = data
    torch.manual_seed(seed)
    model = network(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found: dict[str, list[float]] = {"epoch": [], "loss": [], "support": []}
    for epoch in range(epochs + 1):
        if images is not None and (epoch in (0, 1, 2, 4, 8) or epoch == epochs):
            found["epoch"].append(epoch)
            found["loss"].append(cross_entropy(model(x), y).item())
            found["support"].append(support(model, images, 20))
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model, found


def responses(model: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """Return ``u_i`` of every image, its length over the classes, ``[N]``."""
    whole = nn.Sequential(model, nn.Softmax(1))
    J = ekfac.jacobian(whole, x)
    kernel = ekfac.ntk(whole, x).to_dense().double() / len(x)
    vectors = torch.linalg.eigh(kernel)[1]
    found = {}
    for i in (1, 10, 100):
        column = vectors[:, -i].to(x)
        direction = J.T @ column
        assert isinstance(direction, Tensor)
        direction = direction / direction.norm()
        image = J @ direction
        assert isinstance(image, Tensor)
        found[i] = image.reshape(len(x), -1).norm(dim=1)
    return found


def main() -> None:
    """Run all seeds; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--epochs", type=int, default=16)
    args = arguments.parse_args()
    counts = COUNTS
    if args.quick:
        args.seeds, args.epochs, counts = [0], 1, (25,)
    torch.set_num_threads(1)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    data, test, labels = (x[:1200], y[:1200]), x[1200:], y[1200:]
    runs, rows = [], []
    figure, axes = plt.subplots(1, 5, figsize=(19, 3.6), layout="constrained")
    for seed in bar(args.seeds, "seeds"):
        model, found = trained(seed, data, args.epochs, test[:60])
        again, _ = trained(seed, data, min(2, args.epochs), None)
        twice, _ = trained(seed, data, min(2, args.epochs), None)
        pairs = zip(again.parameters(), twice.parameters(), strict=True)
        run: dict[str, Any] = {"seed": seed, "curve": found}
        run["equal twice"] = all(torch.equal(p, q) for p, q in pairs)
        u = responses(model, test[:100])
        run["response"] = {i: float(value.mean()) for i, value in u.items()}
        torch.manual_seed(seed)
        first = network(64, 64)
        for count in counts:
            for stage, one in (("start", first), ("trained", model)):
                spectrum = Spectrum(one, test[:count], probabilities=True)
                run[f"T_100, {count} images, {stage}"] = spectrum.ratio(100)
        runs.append(run)
        axes[0].plot(found["epoch"], found["support"], "o-", label=f"seed {seed}")
        if seed == args.seeds[0]:
            hidden = model[:-1](test[:100]).detach()
            U, S, _ = torch.linalg.svd(hidden - hidden.mean(0), full_matrices=False)
            plane = (U * S)[:, :2]
            axes[1].scatter(*plane.T, c=labels[:100], cmap="tab10", s=12)
            axes[1].set_title("classes")
            for ax, (i, value) in zip(axes[2:], u.items(), strict=True):
                shown = ax.scatter(*plane.T, c=value, cmap="viridis", s=12)
                figure.colorbar(shown, ax=ax)
                ax.set_title(f"response of u_{i}")
    axes[0].set(xlabel="epoch", ylabel="effective rank of the top 20")
    axes[0].legend()
    for field in runs[0]:
        if field.startswith("T_100"):
            values = [run[field] for run in runs]
            found_text = (
                f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"
            )
            rows.append({"quantity": field, "found": found_text})
    for i in (1, 10, 100):
        each = " ".join(f"{run['response'][i]:.2g}" for run in runs)
        rows.append({"quantity": f"mean response of u_{i}", "found": each})
    for stage, index in (("start", 0), ("end", -1)):
        each = " ".join(f"{run['curve']['support'][index]:.0f}" for run in runs)
        rows.append({"quantity": f"effective rank, {stage}", "found": each})
    lowest = " ".join(f"{min(run['curve']['support']):.0f}" for run in runs)
    rows.append({"quantity": "effective rank, lowest", "found": lowest})
    equal = " ".join(str(run["equal twice"]) for run in runs)
    rows.append({"quantity": "equal when trained twice", "found": equal})
    print(table(rows))
    print_seconds()
    save(args.output, "ge2025_more", {"runs": runs}, figure)


if __name__ == "__main__":
    main()
