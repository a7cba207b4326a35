"""The first twenty steps and the 150th at the default learning rate, beside AdamW's.

    python benchmarks/first_steps.py

Small networks that start badly with many second-order methods: a SIREN fitted to one
image with all its pixels in every batch, a variational auto-encoder on scikit-learn's
digits, and a two-layer encoder of masked characters of Python's own manual.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import torch
from common import parser, table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
)
from tqdm import tqdm

from ekfac import EKFAC, KFAC

RATE = 1e-3
# A model, and its loss on the next batch of a generator.
Problem = tuple[nn.Module, Callable[[torch.Generator], Tensor]]

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=RATE),
    "EKFAC": lambda model: EKFAC(model, lr=RATE),
    "EKFAC, of one length": lambda model: EKFAC(model, lr=RATE, grafting="rms"),
    "KFAC": lambda model: KFAC(model, lr=RATE),
    "EKFAC, natural": lambda model: EKFAC(model, lr=RATE, direction="natural"),
}


class Siren(nn.Module):
    """Sines of linear layers (Sitzmann et al. 2020), 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        widths = (2, 64, 64, 64, 1)
        pairs = pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        for number, layer in enumerate(self.layers):
            width = layer.in_features
            bound = math.sqrt(6 / width) / 30 if number else 1 / width
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, 1]`` of places ``[N, 2]``."""
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        found: Tensor = self.layers[-1](x)
        return found


def siren() -> Problem:
    """Return a SIREN and the error of its picture."""
    axis = torch.linspace(-1, 1, 32)
    places = torch.cartesian_prod(axis, axis)
    u, v = places.split(1, dim=1)
    picture = torch.sin(7 * u) * torch.cos(5 * v) + torch.sin(9 * u * v).sign() / 2
    model = Siren()
    return model, lambda generator: mse_loss(model(places), picture)


class Variational(nn.Module):
    """A variational auto-encoder of 64 pixels, with 8 codes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes = nn.Linear(64, 128), nn.Linear(128, 16)
        self.decoder, self.output = nn.Linear(8, 128), nn.Linear(128, 64)

    def bound(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the negative evidence bound, averaged over the batch."""
        mean, log_variance = self.codes(self.encoder(x).relu()).chunk(2, dim=1)
        code = mean + noise * (log_variance / 2).exp()
        logits = self.output(self.decoder(code).relu())
        error = binary_cross_entropy_with_logits(logits, x, reduction="sum")
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
        total: Tensor = (error + divergence) / len(x)
        return total

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the same."""
        return self.bound(x, noise)


def variational() -> Problem:
    """Return the variational auto-encoder and its bound."""
    pixels, _ = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32)
    model = Variational()

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (128,), generator=generator)
        found: Tensor = model(images[chosen], torch.randn(128, 8, generator=generator))
        return found

    return model, loss


class Masked(nn.Module):
    """A two-layer encoder of characters in the manner of BERT, 64 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(130, 64), nn.Embedding(48, 64)
        layer = nn.TransformerEncoderLayer(
            64, 4, 256, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 130)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits ``[N, S, 130]``."""
        x = self.token(codes) + self.place.weight
        logits: Tensor = self.head(self.encoder(x))
        return logits


def bert() -> Problem:
    """Return the encoder and its loss on masked characters."""
    text = "\n".join(topics[name] for name in sorted(topics))
    codes = torch.tensor(list(text.encode("ascii", "replace")))
    model = Masked()

    def loss(generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(codes) - 48, (16, 1), generator=generator)
        x = codes[starts + torch.arange(48)]
        hidden = torch.rand(x.shape, generator=generator) < 0.15
        logits = model(x.masked_fill(hidden, 129))
        return cross_entropy(logits.mT, x.masked_fill(~hidden, -100))

    return model, loss


PROBLEMS = {"siren": siren, "variational": variational, "bert": bert}


def losses_of(problem: str, optimizer: str, steps: int) -> list[float]:
    """Return the losses of one run."""
    torch.manual_seed(0)
    model, loss = PROBLEMS[problem]()
    chosen = OPTIMIZERS[optimizer](model)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in tqdm(range(steps), desc=f"{problem} {optimizer}", leave=False):
        chosen.zero_grad()
        value = loss(generator)
        value.backward()
        chosen.step()
        losses.append(float(value.detach()))
    return losses


def main() -> None:
    """Run all, print the table, write the losses as JSON."""
    arguments: argparse.ArgumentParser = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=150)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    steps = 12 if args.quick else args.steps
    found: dict[str, dict[str, list[float]]] = {}
    rows = []
    for problem in PROBLEMS:
        found[problem] = {name: losses_of(problem, name, steps) for name in OPTIMIZERS}
        for name, losses in found[problem].items():
            rises = [b - a for a, b in pairwise(losses[:20])]
            places = {f"step {n}": losses[n - 1] for n in (1, 5, 10, 20) if n <= steps}
            end = statistics.fmean(losses[-10:])
            largest = max(0.0, *rises)
            row = {"problem": problem, "optimizer": name, **places}
            rows.append({**row, "largest rise in 20": largest, "last ten": end})
    print("", table(rows), sep="\n")
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    path = output / "first_steps.json"
    path.write_text(json.dumps({"rate": RATE, "losses": found}) + "\n")


if __name__ == "__main__":
    main()
