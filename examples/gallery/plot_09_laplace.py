"""
Uncertainty: a Laplace posterior
================================

The penalty around a solution is a normal posterior over the weights. On a regression
its band widens where there are no data; on pictures that are no digits its
probabilities are less certain than those of the network itself.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from ekfac.continual import QuadraticPenalty

# %%
# A regression with a gap. The noise has a standard deviation of 0.1, so the Gaussian
# likelihood is that of targets in units of it.
NOISE = 0.1
generator = torch.Generator().manual_seed(0)
x = torch.cat([torch.rand(60, 1, generator=generator) * 2 - 3,
               torch.rand(60, 1, generator=generator) * 2 + 1])  # fmt: skip
y = torch.sin(1.5 * x) + NOISE * torch.randn(120, 1, generator=generator)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(1500):
    optimizer.zero_grad()
    mse_loss(model(x) / NOISE, y / NOISE).backward()
    optimizer.step()

unit = nn.Linear(1, 1, bias=False).requires_grad_(False)
nn.init.constant_(unit.weight, 1 / NOISE)
scaled = nn.Sequential(*model, unit)
penalty = QuadraticPenalty(scaled, structure="ekfac")
penalty.consolidate([(x, y / NOISE)], likelihood="gaussian")
posterior = penalty.posterior(prior_precision=1.0)
grid = torch.linspace(-5, 5, 200).unsqueeze(1)
prediction = posterior.predict(grid)
mean = prediction.outputs[:, 0] * NOISE
deviation = prediction.covariance[:, 0, 0].sqrt() * NOISE

# %%
# Digits: the largest probability of a class, on digits and on shuffled pixels.
digits = load_digits()
images = torch.from_numpy(digits.data).float() / 16
labels = torch.from_numpy(digits.target)
torch.manual_seed(0)
classifier = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
for _ in range(200):
    optimizer.zero_grad()
    cross_entropy(classifier(images[:1400]), labels[:1400]).backward()
    optimizer.step()
memory = QuadraticPenalty(classifier, structure="ekfac")
memory.consolidate([(images[:1400], labels[:1400])])
laplace = memory.posterior(prior_precision=1.0)
held_out = images[1400:]
shuffled = held_out[:, torch.randperm(64, generator=generator)]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
low, high = mean - 2 * deviation, mean + 2 * deviation
left.fill_between(grid[:, 0], low, high, alpha=0.3, label="2 deviations")
left.plot(grid, mean, label="mean")
left.plot(x, y, ".", color="black", markersize=3, label="data")
left.set(xlabel="x", ylabel="y", ylim=(-4, 4))
left.legend(loc="upper center")
bins = torch.linspace(0.1, 1, 19).tolist()
for name, data, style in (("digits", held_out, "-"), ("shuffled", shuffled, "--")):
    averaged = laplace.predict(data).probabilities
    assert averaged is not None
    for source, color, probabilities in (
        ("network", "C1", classifier(data).softmax(1)),
        ("posterior", "C0", averaged),
    ):
        largest = probabilities.amax(1).detach()
        label = f"{source}, {name}"
        right.hist(largest, bins, histtype="step", ls=style, color=color, label=label)
right.set(xlabel="largest probability of a class", ylabel="images")
right.legend(loc="upper left")
figure.tight_layout()
