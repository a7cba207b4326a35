"""Matrices of known spectra."""

from __future__ import annotations

import torch
from torch import Tensor

N = 120
SPECTRA = {
    "decaying": torch.logspace(2, -3, N, dtype=torch.float64),
    "uniform": torch.linspace(-1, 2, N, dtype=torch.float64),
    "clustered": torch.cat(
        [torch.full((3,), 5.0), torch.linspace(0, 1, N - 3)]
    ).double(),
    "low_rank": torch.cat([torch.linspace(1, 3, 5), torch.zeros(N - 5)]).double(),
}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    noise = torch.randn(
        len(values), len(values), generator=gen(seed), dtype=values.dtype
    )
    Q = torch.linalg.qr(noise).Q
    return (Q * values) @ Q.mT
