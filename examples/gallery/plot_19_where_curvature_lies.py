"""
Where a transformer's curvature lies: by layer and by head
==========================================================

The trace of the exact Fisher matrix of a transformer that reads the rows of a digit,
split by layer, and within attention by head: the rows of query, key and value and the
columns of the output that belong to it. Queries and keys hold a few percent of the
trace at most, embedding, values and outputs most of it, and no head is idle. Three
seeds and other optimizers are in ``benchmarks/transformer_curvature.py``.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention

import ekfac

BLOCKS, HEADS, WIDTH = 2, 4, 16
digits = load_digits()
x = torch.from_numpy(digits.images).float() / 16
y = torch.from_numpy(digits.target)


class Block(nn.Module):
    """Attention and a perceptron, each beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        """Return ``[N, S, WIDTH]``."""
        q, k, v = (
            layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.out(mixed)
        out: Tensor = h + self.down(relu(self.up(h)))
        return out


class Rows(nn.Module):
    """A transformer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.register_buffer("places", 0.1 * torch.randn(8, WIDTH))
        self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, 10]`` of images ``[N, 8, 8]``."""
        logits: Tensor = self.head(self.blocks(self.embed(x) + self.places).mean(dim=1))
        return logits


# %%
# Training with EKFAC, and the diagonal of the Fisher matrix of 100 images.
torch.manual_seed(0)
model = Rows()
optimizer = ekfac.EKFAC(model, lr=3e-3)
for _ in range(150):
    rows = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()
optimizer.close()
diagonal = ekfac.fisher(model, [(x[:100], None)], "diagonal").diagonal()
trace = sum(float(part.sum()) for part in diagonal.values())

layers: dict[str, float] = {}
for name, part in diagonal.items():
    layer = name.rpartition(".")[0].removeprefix("blocks.")
    layers[layer] = layers.get(layer, 0.0) + float(part.sum()) / trace

SIDES = ("query", "key", "value", "out")
shares = torch.zeros(len(SIDES), BLOCKS * HEADS)
for line, side in enumerate(SIDES):
    for block in range(BLOCKS):
        weight = diagonal[f"blocks.{block}.{side}.weight"] / trace
        entries = weight.sum(dim=0 if side == "out" else 1)
        by_head = entries.reshape(HEADS, -1).sum(dim=1)
        shares[line, block * HEADS : (block + 1) * HEADS] = by_head

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
axes[0].barh(list(layers)[::-1], list(layers.values())[::-1])
axes[0].set(xlabel="share of the Fisher matrix's trace", title="by layer")
image = axes[1].imshow(shares, norm="log", aspect="auto")
for line in range(len(SIDES)):
    for column in range(BLOCKS * HEADS):
        share = float(shares[line, column])
        axes[1].text(
            column, line, f"{share:.2%}", ha="center", va="center", fontsize=8,
            color="black" if share > 0.01 else "white",
        )  # fmt: skip
names = [f"{block}.{head}" for block in range(BLOCKS) for head in range(HEADS)]
axes[1].set_xticks(range(len(names)), names)
axes[1].set_yticks(range(len(SIDES)), SIDES)
axes[1].set(xlabel="block.head", title="by head")
figure.colorbar(image, ax=axes[1])
