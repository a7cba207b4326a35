"""
Which curvature matters for not forgetting
==========================================

A network learns digits, then the same with their pixels in another order, under a
penalty ``strength / 2 d^T F d`` around its first solution. ``F`` is the exact Fisher
matrix, an approximation of it, or a part of its spectrum. Ten directions of 910 give
most of the protection of the first task, and the other 900 give none by themselves; the
diagonal, with all of the trace, protects less than the Kronecker factors. The right
picture shows why: training on the second task moves along all directions and hardly
along the ten, yet most of the damage to the first task comes from these. Three tasks,
tuned strengths and principal components are in ``benchmarks/which_curvature.py``.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.continual import QuadraticPenalty
from ekfac.matrices import CurvatureMatrix, DenseMatrix

digits = load_digits()
x = torch.from_numpy(digits.data).float() / 16
y = torch.from_numpy(digits.target)
test = torch.arange(len(x)) % 5 == 0
order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
STRENGTH = 10.0


def train(model: nn.Module, inputs: torch.Tensor, penalty: QuadraticPenalty) -> None:
    """Take 150 steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = torch.randint(len(inputs), (64,))
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs[rows]), y[~test][rows]) + penalty()
        loss.backward()
        optimizer.step()


def accuracy(model: nn.Module, inputs: torch.Tensor) -> float:
    """Return the share of right answers."""
    return float((model(inputs).argmax(1) == y[test]).float().mean())


# %%
# The first task, its Fisher matrix on 300 images, and the spectrum.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
train(model, x[~test], QuadraticPenalty(model))
first = {name: value.clone() for name, value in model.state_dict().items()}
data = [(x[~test][:300], None)]
exact = ekfac.fisher(model, data, "dense")
values, vectors = torch.linalg.eigh(exact.to_dense().double())
values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)


def part(start: int, stop: int | None) -> CurvatureMatrix:
    """Return the eigenpairs of a range of ranks."""
    V = vectors[:, start:stop]
    return DenseMatrix(exact.space, (V * values[start:stop] @ V.mT).float())


PENALTIES = {
    "none": exact * 0.0,
    "diagonal": ekfac.fisher(model, data, "diagonal"),
    "K-FAC": ekfac.fisher(model, data, "kfac"),
    "EKFAC": ekfac.fisher(model, data, "ekfac"),
    "exact": exact,
    "its top 10": part(0, 10),
    "its top 50": part(0, 50),
    "all but its top 10": part(10, None),
    "all but its top 50": part(50, None),
}

# %%
# The second task under each of them, from the same start with the same batches.
results, ways = {}, {}
for name, F in PENALTIES.items():
    model.load_state_dict(first)
    penalty = QuadraticPenalty(model, strength=STRENGTH)
    penalty.consolidate(F)
    torch.manual_seed(1)
    start = ekfac.ParameterVector.from_model(model).flat()
    train(model, x[~test][:, order], penalty)
    ways[name] = ekfac.ParameterVector.from_model(model).flat() - start
    results[name] = accuracy(model, x[test]), accuracy(model, x[test][:, order])

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
place = torch.arange(len(results), dtype=torch.float32)
for shift, task in ((0.2, 0), (-0.2, 1)):
    shown = [result[task] for result in results.values()]
    axes[0].barh(place + shift, shown[::-1], 0.4, label=f"task {task + 1}")
axes[0].set_yticks(place, list(results)[::-1])
axes[0].set(xlabel="accuracy after both tasks", title=f"strength {STRENGTH:g}")
axes[0].set_xlim(0, 1.15)
axes[0].legend(loc="upper right")
energy = (vectors.mT @ ways["none"].double()).square()
damage = energy * values
ranks = range(1, len(values) + 1)
axes[1].semilogx(ranks, energy.cumsum(0) / energy.sum(), label="squared displacement")
axes[1].semilogx(ranks, damage.cumsum(0) / damage.sum(), label="$d^T F d$")
axes[1].set(xlabel="rank in the first task's spectrum", ylabel="share up to the rank")
axes[1].set_title("training on the second task without a penalty")
axes[1].legend()
