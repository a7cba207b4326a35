"""
A layer of your own
===================

A layer that mixes its features by one matrix for each group of them. Four methods say
how its inputs, output gradients and weights look in the normal form ``[N, S, b, d]``;
``check_adapter`` compares every use of them with autograd.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from ekfac import EKFAC
from ekfac.layers import Adapter, register
from ekfac.testing import check_adapter


class GroupedLinear(nn.Module):
    """``y_b = W_b x_b`` for each group ``b`` of the features."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, groups * outputs]``."""
        groups, _, inputs = self.weight.shape
        y = torch.einsum("nbi,boi->nbo", x.unflatten(1, (groups, inputs)), self.weight)
        return y.flatten(1)


@register(GroupedLinear)
class GroupedLinearAdapter(Adapter):
    """Examples, one position, a block for every group, the group's features."""

    def groups(self, x: Tensor) -> Tensor:
        """Return ``[N, groups * d]`` as ``[N, 1, groups, d]``."""
        return x.view(len(x), 1, self.parameter(self.weight).shape[0], -1)

    def inputs(self, x: Tensor) -> Tensor:
        """Return ``[N, 1, groups, d_in]``."""
        return self.groups(x)

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return ``[N, 1, groups, d_out]``."""
        return self.groups(grad)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[groups, d_out, d_in]``."""
        return weight

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weight, and no bias."""
        return matrix, None


# %%
# Every method against autograd, in float64:
print(check_adapter(GroupedLinear(3, 4, 5), torch.randn(6, 12)))

# %%
# And trained: a teacher of the same form, whose inputs have very different sizes. The
# problem is small, smooth and badly conditioned: for ``direction="natural"``. Of 0.003,
# 0.01, 0.03 and 0.1 each optimizer has its best rate.
torch.manual_seed(0)
scales = torch.logspace(-1.5, 0.5, 48)
x = torch.randn(512, 48) * scales
teacher = nn.Sequential(GroupedLinear(3, 16, 12), nn.Tanh(), nn.Linear(36, 12))
y = teacher(x).detach()
curves: dict[str, list[float]] = {}
for name in ("AdamW", "EKFAC"):
    torch.manual_seed(1)
    model = nn.Sequential(GroupedLinear(3, 16, 12), nn.Tanh(), nn.Linear(36, 12))
    optimizer: torch.optim.Optimizer
    if name == "EKFAC":
        optimizer = EKFAC(model, lr=1e-2, direction="natural")
        print(optimizer.describe())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    curves[name] = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        curves[name].append(loss.item())

# %%
figure, axes = plt.subplots(figsize=(6, 4))
for name, losses in curves.items():
    axes.semilogy(losses, label=name)
axes.set(xlabel="step", ylabel="training loss")
axes.legend()
figure.tight_layout()
