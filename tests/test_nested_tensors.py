"""Layers called with nested tensors: sequences of unequal lengths without padding."""

from __future__ import annotations

import pytest
import torch
from support import collect, relative_error
from torch import Tensor, nn

from ekfac import EKFAC, KFAC
from ekfac.errors import CaptureError

pytestmark = pytest.mark.usefixtures("float64")

LENGTHS = [3, 1, 4, 2]


class Tokens(nn.Module):
    """An embedding, a norm and two linear layers over each sequence."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.embed, self.norm = nn.Embedding(7, 5), nn.LayerNorm(5)
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.down(torch.sin(self.up(self.norm(self.embed(ids)))))
        if self.pooled:
            return torch.nested.to_padded_tensor(y, 0).sum(1)  # type: ignore[no-any-return]
        return y  # type: ignore[no-any-return]


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_statistics_are_those_of_the_sequences(pooled: bool, sharing: str) -> None:
    torch.manual_seed(0)
    net = Tokens(pooled)
    sequences = [torch.randint(7, (n,)) for n in LENGTHS]
    weights = [torch.randn(n, 3) for n in LENGTHS]
    if pooled:
        weights = [w[:1].expand_as(w) for w in weights]
    ids = torch.nested.nested_tensor(sequences, layout=torch.jagged)

    def loss() -> Tensor:
        output = net(ids)
        if pooled:
            return (output * torch.stack([w[0] for w in weights])).sum()  # type: ignore[no-any-return]
        return (output.values() * torch.cat(weights)).sum()  # type: ignore[no-any-return]

    optimizer = collect(
        net, loss, loss_reduction="sum", scaling="per_example", sharing=sharing
    )
    net.pooled = False
    gradients = []
    for sequence, weight in zip(sequences, weights, strict=True):
        net.zero_grad()
        (net(sequence[None])[0] * weight).sum().backward()
        gradients.append({k: p.grad.clone() for k, p in net.named_parameters()})
    assert list(optimizer.curvature) == ["embed", "norm", "up", "down"]
    for name, layer in optimizer.curvature.items():
        packed = torch.stack([layer.pack(g) for g in gradients])
        if layer.block.exact:
            moment = torch.einsum("nboi,nboj->bij", packed, packed) / len(LENGTHS)
            assert relative_error(layer.A, moment) < 1e-10, name
            continue
        assert layer.Q_G is not None
        rotated = layer.Q_G.mT @ packed
        if layer.Q_A is not None and layer.Q_A.dim() == 3:
            rotated = rotated @ layer.Q_A
        assert relative_error(layer.s, rotated.square().mean(0)) < 1e-10, name
    if sharing == "expand":
        counts = torch.bincount(torch.cat(sequences), minlength=7) / sum(LENGTHS)
        assert relative_error(optimizer.curvature["embed"].A[0], counts) < 1e-12


@pytest.mark.parametrize("kind", [EKFAC, KFAC])
def test_a_nested_output_has_no_likelihood(kind: type[EKFAC | KFAC]) -> None:
    net = nn.Linear(5, 3)
    rows = [torch.randn(3, 5), torch.randn(2, 5)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    optimizer = kind(net, fisher="mc")
    with pytest.raises(CaptureError, match=r"needs a dense output.*fisher='empirical'"):
        net(x)
    optimizer.close()
