"""
A language model beside Muon and AdamW
======================================

A character transformer of width 64, at equal steps, each optimizer at its best learning
rate, looked for in factors of two. Muon has the matrices of the blocks and the head;
AdamW the embeddings, vectors and norms beside it. EKFAC takes the whole model.
"""

import inspect
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim.lr_scheduler import LambdaLR

from ekfac import EKFAC

WIDTH, LENGTH, BATCH, STEPS = 64, 64, 16, 150
text = inspect.getsource(torch.nn.functional)[:200_000]
alphabet = sorted(set(text))
codes = torch.tensor([alphabet.index(character) for character in text])


class Block(nn.Module):
    """Causal attention and a two-layer network, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, length, width]``."""
        q, k, v = (
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        change: Tensor = self.down(nn.functional.gelu(self.up(self.second(x))))
        return x + change


class Transformer(nn.Module):
    """Embeddings, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(len(alphabet), WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(alphabet))

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits of the characters that follow."""
        x = self.token(codes) + self.position(torch.arange(LENGTH))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


# %%
# The three constructors.


def optimizers(name: str, model: Transformer) -> Sequence[torch.optim.Optimizer]:
    """Return what trains the model."""
    if name == "EKFAC":
        return [EKFAC(model, lr=1.2e-2)]
    if name == "AdamW":
        return [torch.optim.AdamW(model.parameters(), lr=2.4e-2)]
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    matrices = [*matrices, *model.head.parameters()][:-1]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, lr=4e-2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3),
    ]


def train(name: str) -> list[float]:
    """Return the loss of every step; the rate warms up and falls along a line."""
    torch.manual_seed(0)
    model = Transformer()
    trained = optimizers(name, model)
    schedules = [
        LambdaLR(o, lambda step: min((step + 1) / 15, 1 - step / STEPS))
        for o in trained
    ]
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(len(codes) - LENGTH, (BATCH, 1), generator=generator)
        places = starts + torch.arange(LENGTH)
        model.zero_grad()
        logits = model(codes[places])
        loss = cross_entropy(logits.flatten(0, 1), codes[places + 1].flatten())
        loss.backward()
        for optimizer, schedule in zip(trained, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
    return losses


# %%
figure, axes = plt.subplots(figsize=(6, 4))
for name in ("AdamW", "Muon", "EKFAC"):
    losses = torch.tensor(train(name))
    smooth = losses.unfold(0, 10, 1).mean(1)
    axes.plot(range(9, STEPS), smooth, label=f"{name}: {smooth[-1]:.3f} at the end")
axes.set(xlabel="step", ylabel="training loss, mean of ten steps")
axes.legend()
figure.tight_layout()
