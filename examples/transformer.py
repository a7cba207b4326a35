"""A small character-level transformer: EKFAC beside AdamW on Python's own manual.

    python examples/transformer.py

The text is the language reference that ``help()`` prints, which comes with Python. The
model shows what a transformer needs of an optimizer: ``nn.MultiheadAttention``, layer
norms, and an output head that shares the token embedding's weight. Learning rates: the
best of ``GRID`` by the final training loss (``--tune``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ekfac import EKFAC

WINDOW = 20  # steps over which the printed and drawn losses are averaged

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "AdamW": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr),
    "EKFAC": lambda model, lr: EKFAC(model, lr=lr, weight_decay=0.01),
}
GRID = {
    "AdamW": (0.001, 0.002, 0.004, 0.008),
    "EKFAC": (0.001, 0.002, 0.004, 0.008),
}
LEARNING_RATES = {"AdamW": 0.002, "EKFAC": 0.004}


@dataclass
class Run:
    """The training loss and the seconds spent, after every step."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    test_loss: float = float("nan")
    sample: str = ""

    def smooth(self) -> np.ndarray:
        """Return the mean loss of the last ``WINDOW`` steps, at every step."""
        total = np.concatenate([[0.0], np.cumsum(self.losses)])
        ends = np.arange(1, len(total))
        starts = np.maximum(ends - WINDOW, 0)
        mean: np.ndarray = (total[ends] - total[starts]) / (ends - starts)
        return mean


def plain(names: list[str]) -> str:
    """Return the text of these topics, one after the other, in ASCII."""
    text = "\n".join(topics[name] for name in names)
    return text.encode("ascii", "replace").decode()


class Text:
    """The manual as character codes, every tenth of its topics held out."""

    def __init__(self) -> None:
        names = sorted(topics)
        kept = [name for place, name in enumerate(names) if place % 10 != 9]
        self.alphabet = sorted(set(plain(names)))
        self.train, self.test = (
            self.encode(plain(kept)),
            self.encode(plain(names[9::10])),
        )

    def encode(self, text: str) -> Tensor:
        """Return the codes of a text."""
        codes = {character: code for code, character in enumerate(self.alphabet)}
        return torch.tensor([codes[character] for character in text])

    def decode(self, codes: Tensor) -> str:
        """Return the text of a vector of codes."""
        return "".join(self.alphabet[code] for code in codes.tolist())


def windows(
    codes: Tensor, count: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return random windows ``[count, length]`` and the characters that follow each."""
    starts = torch.randint(len(codes) - length, (count, 1), generator=generator)
    places = starts + torch.arange(length)
    return codes[places], codes[places + 1]


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_network = nn.LayerNorm(width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, length, width]``."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.norm_attention(x)
        attended, _ = self.attention(
            y, y, y, attn_mask=mask, is_causal=True, need_weights=False
        )
        x = x + attended
        change: Tensor = self.network(self.norm_network(x))
        return x + change


class Transformer(nn.Module):
    """Token and position embeddings, blocks, and a head tied to the token embedding."""

    def __init__(
        self, letters: int, length: int, width: int = 128, depth: int = 2
    ) -> None:
        super().__init__()
        self.length = length
        self.token = nn.Embedding(letters, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits ``[N, length, letters]`` of the characters that follow."""
        places = torch.arange(codes.shape[1])
        x = self.blocks(self.token(codes) + self.position(places))
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def write(self, codes: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return ``codes`` with ``count`` sampled characters appended."""
        for _ in range(count):
            logits = self(codes[None, -self.length :])[0, -1]
            following = torch.multinomial(logits.softmax(0), 1, generator=generator)
            codes = torch.cat([codes, following])
        return codes


def next_character_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy over windows and places."""
    return cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(name: str, learning_rate: float, text: Text, args: argparse.Namespace) -> Run:
    """Return the record of one training run."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = Transformer(len(text.alphabet), args.length)
    optimizer = OPTIMIZERS[name](model, learning_rate)
    run, spent = Run(name), 0.0
    bar = tqdm(range(args.steps), desc=f"{name:6s} lr={learning_rate:g}", unit="step")
    for _ in bar:
        x, y = windows(text.train, args.batch_size, args.length, generator)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = next_character_loss(model, x, y)
        loss.backward()
        optimizer.step()
        spent += time.perf_counter() - start
        run.losses.append(loss.item())
        run.seconds.append(spent)
        bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
    model.eval()
    with torch.no_grad():
        x, y = windows(text.test, 256, args.length, generator)
        run.test_loss = next_character_loss(model, x, y).item()
    written = model.write(text.test[:20], 0 if args.quick else 200, generator)
    run.sample = text.decode(written)
    return run


def tune(text: Text, args: argparse.Namespace) -> None:
    """Print the final losses of every learning rate of the grid."""
    rows = []
    for name, rates in GRID.items():
        for rate in rates:
            run = train(name, rate, text, args)
            loss = run.smooth()[-1]
            rows.append(f"{name:10s} {rate:>8g} {loss:>12.4f} {run.test_loss:>11.4f}")
    print("\noptimizer        lr   train loss   test loss", *rows, sep="\n")


def print_table(runs: list[Run]) -> None:
    """Print each run's end, and when it passed the end of AdamW."""
    target = runs[0].smooth()[-1]
    heading = (
        f"{'optimizer':10s} {'lr':>8s} {'ms/step':>8s} {'seconds':>8s} "
        f"{'train loss':>11s} {'test loss':>10s} "
        f"{'steps to ' + format(target, '.3f'):>15s} {'seconds':>8s}"
    )
    print(f"\n{heading}\n{'-' * len(heading)}")
    for run in runs:
        smooth, spent = run.smooth(), run.seconds[-1]
        passed = np.flatnonzero(smooth <= target)
        when = (
            f"{passed[0] + 1:>15d} {run.seconds[passed[0]]:>8.1f}"
            if len(passed)
            else f"{'-':>15s} {'-':>8s}"
        )
        print(
            f"{run.name:10s} {LEARNING_RATES[run.name]:>8g} "
            f"{1e3 * spent / len(smooth):>8.1f} {spent:>8.1f} "
            f"{smooth[-1]:>11.4f} {run.test_loss:>10.4f} {when}"
        )


def plot(runs: list[Run], path: Path) -> None:
    """Draw the training loss over steps and over seconds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in runs:
        smooth = run.smooth()
        left.plot(range(1, len(smooth) + 1), smooth, label=run.name)
        right.plot(run.seconds, smooth, label=run.name)
    left.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps")
    right.set(xlabel="seconds of training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    figure.suptitle("Character-level transformer, next-character loss")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="characters of context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="search the grid instead")
    parser.add_argument("--quick", action="store_true", help="a few steps, to try it")
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args()
    if args.quick:
        args.steps = 4
    return args


def main() -> None:
    """Train with both optimizers, print the table and save the figure."""
    args, text = parse(), Text()
    print(f"{len(text.train):,} characters of {len(text.alphabet)} kinds to train on")
    if args.tune:
        tune(text, args)
        return
    runs = [train(name, rate, text, args) for name, rate in LEARNING_RATES.items()]
    print_table(runs)
    for run in runs:
        print(f"\n--- {run.name} writes:\n{run.sample}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "transformer.png"
    plot(runs, path)
    print(f"\ncurves: {path}")


if __name__ == "__main__":
    main()
