"""Ten doubtful verdicts of the five records once more, without this package's algebra.

    python benchmarks/independent.py                  # one thread, three seeds
    python benchmarks/independent.py --checks "SUA (George)"    # the others stay

Every matrix is dense, from ``torch.func`` or by hand; of the package only ``EKFAC``
trains where a record is about it. Seeds and sizes are others than the records': what is
compared is the verdict.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import bar, earlier, parser, print_seconds, save, spread, table
from matplotlib.figure import Figure
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.functional import cross_entropy, unfold

import ekfac

Check = Callable[[int, bool], dict[str, float]]


def digits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits in 0 to 1, ``[N, 64]``, and their classes."""
    found = load_digits()
    return torch.tensor(found.data, dtype=dtype) / 16, torch.tensor(found.target)


def layered(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out), activation()]
    return nn.Sequential(*layers[:-1])


def jacobian(
    model: nn.Module, x: Tensor, of: Callable[[Tensor], Tensor] = lambda f: f
) -> Tensor:
    """Return the outputs' derivatives ``[N, C, P]``."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values: dict[str, Tensor], example: Tensor) -> Tensor:
        return of(functional_call(model, values, (example.unsqueeze(0),))[0])

    J = vmap(jacrev(outputs), (None, 0))(parameters, x)
    return torch.cat([J[name].flatten(2) for name in parameters], dim=2)


def softmax_roots(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Q_n`` and its symmetric roots, ``[N, C, C]`` each."""
    g = logits.detach().softmax(dim=1)
    Q = torch.diag_embed(g) - g.unsqueeze(2) * g.unsqueeze(1)
    values, vectors = torch.linalg.eigh(Q)
    return Q, vectors * values.clamp(min=0).sqrt().unsqueeze(1) @ vectors.mT


def spectrum(rows: Tensor, count: int) -> Tensor:
    """Return the eigenvalues of ``rows^T rows / count``, descending."""
    rows = rows.double()
    return torch.linalg.eigvalsh(rows @ rows.mT / count).flip(0).clamp(min=0)


def descend(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    data: tuple[Tensor, Tensor],
    steps: int,
    batch: int = 64,
) -> Iterator[int]:
    """Train on drawn batches, and yield after each step."""
    x, y = data
    for step in range(steps):
        index = torch.randint(len(x), (batch,))
        model.zero_grad()
        cross_entropy(model(x[index]), y[index]).backward()
        for optimizer in optimizers:
            optimizer.step()
        yield step


def outliers(seed: int, quick: bool) -> dict[str, float]:
    """Karakida: outliers of ``F_cross``, and whether its mean has a factor C."""
    width, n, C = (20, 20, 3) if quick else (200, 100, 4)
    torch.manual_seed(seed)
    model = layered(width, width, width, C, activation=nn.Tanh)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=(3 / width) ** 0.5)
        nn.init.normal_(layer.bias, std=0.8)
    x = torch.randn(n, width)
    J = jacobian(model, x)
    Q, roots = softmax_roots(model(x))
    cross = spectrum((roots @ J).flatten(0, 1), n)
    linear = spectrum(J.flatten(0, 1), n)
    # With the factor it would be 4: the mean of F over C times beta_1.
    expected = Q.diagonal(dim1=1, dim2=2).sum(1).mean() * linear.sum() / C
    return {
        "lambda_3 / lambda_4, C = 4": float(cross[C - 2] / cross[C - 1]),
        "lambda_4 / lambda_5": float(cross[C - 1] / cross[C]),
        "trace over beta_1 tr F / C": float(cross.sum() / expected),
    }


def anisotropy(seed: int, quick: bool) -> dict[str, float]:
    """Ge: ``T_100`` of probabilities and logits, kurtosis with large changes undone."""
    x, y = digits()
    torch.manual_seed(seed)
    model = layered(64, *[16 if quick else 64] * 3, 10)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=0.05)
        nn.init.zeros_(layer.bias)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in descend(model, [optimizer], (x[:1200], y[:1200]), 20 if quick else 600):
        pass
    last = {name: value.clone() for name, value in model.state_dict().items()}
    change = torch.cat([(last[n] - first[n]).abs().flatten() for n in last])
    cut = change.quantile(0.95)
    undone = {
        n: torch.where((last[n] - first[n]).abs() > cut, first[n], last[n])
        for n in last
    }
    found = {}
    spaces = {"probabilities": lambda f: f.softmax(0), "logits": lambda f: f}
    for stage, state in (("start", first), ("trained", last), ("undone", undone)):
        model.load_state_dict(state)
        for kind, of in spaces.items():
            J = jacobian(model, x[1200:1300], of)
            _, roots, vectors = torch.linalg.svd(J.flatten(0, 1), full_matrices=False)
            share = roots[:100].square().sum() / roots.square().sum()
            found[f"T_100, {kind}, {stage}"] = float(share)
            if kind == "probabilities":
                kurtosis = stats.kurtosis(vectors[:20].numpy(), axis=1).mean()
                found[f"kurtosis of the top 20, {stage}"] = float(kurtosis)
    return found


def spacings(seed: int, quick: bool) -> dict[str, float]:
    """Haink: level spacings of a Hessian, with and without its null space."""
    x, y = digits(torch.float64)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    torch.manual_seed(seed)
    model = layered(64, *[4 if quick else 16] * 2, 10).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = x[:1400], y[:1400]
    for _ in descend(model, [optimizer], data, 20 if quick else 3500, 32):
        pass
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    flat = torch.cat([p.flatten() for p in parameters.values()])
    sizes = [p.numel() for p in parameters.values()]

    def loss(vector: Tensor) -> Tensor:
        parts = zip(parameters.items(), vector.split(sizes), strict=True)
        values = {name: part.view_as(p) for (name, p), part in parts}
        return cross_entropy(functional_call(model, values, (data[0],)), data[1])

    def product(vector: Tensor) -> Tensor:
        return jvp(grad(loss), (flat,), (vector,))[1]

    units = torch.eye(len(flat), dtype=flat.dtype).split(100)
    H = torch.cat([vmap(product)(part) for part in units])
    values = np.sort(torch.linalg.eigvalsh((H + H.mT) / 2).numpy())
    kept = values[np.abs(values) > 1e-10 * np.abs(values).max()]
    found = {}
    for name, levels in (("without null space", kept), ("with it", values)):
        local = (levels[20:] - levels[:-20]) / 20  # ten neighbours on each side
        s = np.diff(levels)[10:-10] / np.maximum(local[:-1], 1e-300)
        s = s / s.mean()
        test = stats.kstest(s, lambda t: 1 - np.exp(-np.pi * t * t / 4))
        found[f"{name}: distance from Wigner"] = float(test.statistic)
        found[f"{name}: p"] = float(test.pvalue)
    return found


def fluctuations(seed: int, quick: bool) -> dict[str, float]:
    """Haink 3.9, a linear network: exponent below the crossover, by order."""
    x, y = (part[:1000] for part in digits(torch.float64))
    lr, momentum, batch = 0.05, 0.9, 32
    start, stop = (20, 60) if quick else (60 * 31, 180 * 31)
    found = {}
    for name in ("epochs", "drawn"):
        torch.manual_seed(seed)
        model = nn.Linear(64, 10).double()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=momentum, weight_decay=2e-3
        )
        rows, order = [], torch.empty(0, dtype=torch.int64)
        for step in range(stop):
            if name == "drawn":
                index = torch.randint(1000, (batch,))
            else:
                order = torch.randperm(1000) if len(order) < batch else order
                index, order = order[:batch], order[batch:]
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            if step >= start:
                rows.append(model.weight.detach().flatten().clone())
        Q, _ = softmax_roots(model(x))
        H = torch.einsum("nab,ni,nj->aibj", Q, x, x).reshape(640, 640) / 1000
        values, vectors = torch.linalg.eigh(H)
        values = values + 2e-3
        paths = torch.stack(rows) @ vectors
        time = torch.arange(len(paths), dtype=paths.dtype)
        time = time - time.mean()
        paths = paths - paths.mean(0)
        paths = paths - time[:, None] * (time @ paths) / (time @ time)
        # They relax within a tenth of the recording.
        slowest = 10 * (1 - momentum) / (lr * len(paths))
        crossover = 3 * batch * (1 - momentum) / (lr * 1000)
        chosen = (values > slowest) & (values < max(crossover, 2 * slowest))
        a, b = values[chosen].log(), paths.var(0)[chosen].log()
        a = a - a.mean()
        found[f"exponent, {name}"] = float(a @ b / (a @ a))
        found[f"directions, {name}"] = float(chosen.sum())
    return found


def protection(seed: int, quick: bool) -> dict[str, float]:
    """Accuracy on a first task after a second one, by part of the Fisher matrix."""
    x, y = digits()
    test = torch.arange(len(x)) % 5 == 0
    torch.manual_seed(seed)
    order = torch.randperm(64)
    model = layered(64, 12, 10)

    def train(inputs: Tensor, F: Tensor | None, around: Tensor) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(5 if quick else 150):
            index = torch.randint(len(inputs), (64,))
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs[index]), y[~test][index])
            if F is not None:
                way = torch.cat([p.flatten() for p in model.parameters()]) - around
                loss = loss + 5 * way @ (F @ way)
            loss.backward()
            optimizer.step()

    train(x[~test], None, torch.zeros(0))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    around = torch.cat([p.detach().flatten() for p in model.parameters()])
    few = x[~test][:300]
    _, roots = softmax_roots(model(few))
    rows = (roots @ jacobian(model, few)).flatten(0, 1)
    F = rows.mT @ rows / len(few)
    values, vectors = torch.linalg.eigh(F)
    top = (vectors[:, -10:] * values[-10:]) @ vectors[:, -10:].mT
    found = {}
    for name, matrix in (
        ("none", 0 * F),
        ("its diagonal", F.diagonal().diag()),
        ("exact", F),
        ("its top 10", top),
        ("all but its top 10", F - top),
    ):
        model.load_state_dict(first)
        torch.manual_seed(seed + 1)
        train(x[~test][:, order], matrix, around)
        right = model(x[test]).argmax(1) == y[test]
        found[f"first task, {name}"] = float(right.float().mean())
    return found


def optimizers(seed: int, quick: bool) -> dict[str, float]:
    """Largest eigenvalue and effective rank at a loss of 0.3, by optimizer."""
    x, y = digits()
    found = {}
    for name in ("EKFAC", "AdamW"):
        torch.manual_seed(seed)
        model = layered(64, 32, 32, 10)
        if name == "EKFAC":
            optimizer: Any = ekfac.EKFAC(model, lr=3e-3)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        for step in descend(model, [optimizer], (x, y), 10 if quick else 1000):
            if step % 10 == 0:
                with torch.no_grad():
                    if cross_entropy(model(x), y) < 0.3:
                        break
        if name == "EKFAC":
            optimizer.close()
        _, roots = softmax_roots(model(x[:100]))
        values = spectrum((roots @ jacobian(model, x[:100])).flatten(0, 1), 100)
        share = values / values.sum()
        rank = torch.exp(-torch.special.xlogy(share, share).sum())
        found[f"largest, {name}"] = float(values[0])
        found[f"effective rank, {name}"] = float(rank)
    return found


def bound(seed: int, quick: bool) -> dict[str, float]:
    """Karakida's equation 23: losses of descent beside the bound, over the first."""
    torch.manual_seed(seed)
    width = 20 if quick else 60
    model = layered(40, width, width, 2, activation=nn.Tanh).double()
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=(3 / layer.in_features) ** 0.5)
        nn.init.normal_(layer.bias, std=0.8)
    x, y = torch.randn(50, 40).double(), torch.randn(50, 2).double()
    J = jacobian(model, x).flatten(0, 1)
    limit = 2 / float(spectrum(J, 50)[0])
    outputs = model(x).detach()
    kernel = J @ J.mT
    found = {}
    first = float((outputs - y).square().sum())
    for factor in (0.95, 1.05):
        residual = (outputs - y).flatten()
        for _ in range(400):
            residual = residual - factor * limit / 50 * (kernel @ residual)
        found[f"linearised, {factor}"] = float(residual.square().sum()) / first
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for factor in (0.95, 1.05, 2.0):
        model.load_state_dict(start)
        for _ in range(400):
            loss = (model(x) - y).square().sum() / 100
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= factor * limit * g
        found[f"network, {factor}"] = float((model(x) - y).square().sum()) / first
    return found


def uncorrelated(seed: int, quick: bool) -> dict[str, float]:
    """Distance of a convolution's K-FAC, EKFAC and SUA blocks from the exact one."""
    x, _ = digits()
    torch.manual_seed(seed)
    images = x[:20].reshape(-1, 1, 8, 8)
    inputs = nn.Conv2d(1, 4, 3, stride=2, padding=1)(images).relu().detach()
    head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    outputs = conv(inputs).detach()
    D = vmap(jacrev(lambda o: head(o.unsqueeze(0))[0]))(outputs)  # [N, C, 4, 4, 4]
    _, roots = softmax_roots(head(outputs))
    D = torch.einsum("nkc,ncoij->nkoij", roots, D).flatten(3).double()
    patches = unfold(inputs, 3, padding=1).double()  # [N, 36, 16]
    rows = torch.einsum("nkot,nit->nkoi", D, patches)
    n, positions = len(rows), patches.shape[2]
    exact = torch.einsum("nkoi,nkpj->oipj", rows, rows).reshape(144, 144) / n
    G = torch.einsum("nkot,nkpt->op", D, D) / (n * positions)
    A = torch.einsum("nit,njt->ij", patches, patches) / n
    channels = inputs.double().flatten(2)
    small = torch.einsum("nct,ndt->cd", channels, channels) / n
    found = {}
    eye = torch.eye(9, dtype=small.dtype)
    left = torch.linalg.eigh(G)[1].contiguous()
    channel = torch.linalg.eigh(small)[1].contiguous()
    for name, factor, right in (
        ("patches", A, torch.linalg.eigh(A)[1].contiguous()),
        # The basis of the channels; a kernel's offsets stay in their own axes.
        ("SUA", torch.kron(small, eye), torch.kron(channel, eye)),
    ):
        Q = torch.kron(left, right)
        scaled = Q @ (Q.mT @ exact @ Q).diagonal().diag() @ Q.mT
        blocks = {"K-FAC": torch.kron(G, factor), "EKFAC": scaled}
        for kind, block in blocks.items():
            distance = (block - exact).norm() / exact.norm()
            found[f"{kind}, {name}"] = float(distance)
    return found


def decorrelation(seed: int, quick: bool) -> dict[str, float]:
    """Correlation of a layer's gradients as parameters and in the eigenbasis."""
    x, y = digits()
    torch.manual_seed(seed)
    model = layered(64, 16, 16, 10)
    found = {}
    for stage in ("start", "trained"):
        if stage == "trained":
            with ekfac.EKFAC(model, lr=1e-3) as optimizer:
                for _ in descend(model, [optimizer], (x, y), 5 if quick else 280):
                    pass
        with torch.no_grad():
            inputs = model[:2](x[:500])
        outputs = model[2](inputs).detach().requires_grad_()
        loss = cross_entropy(model[3:](outputs), y[:500], reduction="sum")
        (D,) = torch.autograd.grad(loss, outputs)
        a = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
        D = D.double()
        rows = torch.einsum("no,ni->noi", D, a).flatten(1)
        sides = [torch.linalg.eigh(side.mT @ side)[1].contiguous() for side in (D, a)]
        basis = torch.kron(*sides)
        for name, values in (("parameters", rows), ("basis", rows @ basis)):
            C = values.mT @ values
            active = C.diagonal() > 1e-12 * C.diagonal().max()
            C = C[active][:, active]
            C = C / (C.diagonal()[:, None] * C.diagonal()).sqrt()
            off = C.abs().sum() - len(C)
            found[f"{stage}, {name}"] = float(off / (len(C) * (len(C) - 1)))
    return found


def kernel_rank(seed: int, quick: bool) -> dict[str, float]:
    """Effective rank of the centred tangent kernel through training, over its start."""
    x, y = digits()
    x = (x - x.mean()) / x.std()
    torch.manual_seed(seed)
    model = layered(64, *[40] * 4, 10)
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    ranks = []
    for step in descend(model, [optimizer], (x, y), 3 if quick else 301):
        if step in (0, 10, 30, 100, 300):
            J = jacobian(model, x[:40])
            J = (J - J.mean(0)).flatten(0, 1)
            share = spectrum(J, 1)
            share = share / share.sum()
            rank = torch.exp(-torch.special.xlogy(share, share).sum())
            ranks.append(float(rank))
    return {"least": min(ranks) / ranks[0], "end": ranks[-1] / ranks[0]}


CHECKS: dict[str, Check] = {
    "outliers of F_cross (Karakida)": outliers,
    "step bound (Karakida)": bound,
    "anisotropy (Ge)": anisotropy,
    "level spacings (Haink)": spacings,
    "variance and curvature (Haink)": fluctuations,
    "effective rank (George)": kernel_rank,
    "decorrelation (George)": decorrelation,
    "SUA (George)": uncorrelated,
    "which curvature protects": protection,
    "spectra of optimizers": optimizers,
}


def figure_of(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Return all seeds of all checks."""
    columns = (len(runs) + 1) // 2
    figure, axes = plt.subplots(
        2, columns, figsize=(5.2 * columns, 7), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(runs) :]:
        ax.set_axis_off()
    for ax, (name, each) in zip(axes.flat, runs.items(), strict=False):
        for place, key in enumerate(each[0]):
            ax.plot([run[key] for run in each], [place] * len(each), "o")
        values = [value for run in each for value in run.values()]
        if min(values) > 0 and max(values) > 1e3 * min(values):
            ax.set_xscale("log")
        ax.set_yticks(range(len(each[0])), list(each[0]), fontsize=8)
        ax.set_title(name, fontsize=10)
        ax.invert_yaxis()
    return figure


def main() -> None:
    """Run all checks with all seeds; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[70, 71, 72])
    arguments.add_argument("--checks", nargs="+", choices=[*CHECKS], default=[*CHECKS])
    args = arguments.parse_args()
    if args.quick:
        args.seeds = args.seeds[:1]
    torch.set_num_threads(1)
    saved = earlier(args.output, "independent").get("runs", {})
    for name in bar(args.checks, "checks"):
        saved[name] = [CHECKS[name](seed, args.quick) for seed in args.seeds]
        print(f"{name}: done", flush=True)
    runs = {name: saved[name] for name in CHECKS if name in saved}
    rows = [
        {"check": name, "quantity": key, "found": spread([run[key] for run in each])}
        for name, each in runs.items()
        for key in each[0]
    ]
    print(table(rows))
    print_seconds()
    save(args.output, "independent", {"rows": rows, "runs": runs}, figure_of(runs))


if __name__ == "__main__":
    main()
