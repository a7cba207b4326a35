"""Small networks, and their curvature by definition, for the tests of penalties."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.functional import cross_entropy

import ekfac

CLASSES = 3


def network(seed: int = 0, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 5, bias=bias), nn.ReLU(), nn.Linear(5, CLASSES, bias=bias)
    ).double()


def images(seed: int = 0, count: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def batches(seed: int = 0, count: int = 30) -> list[tuple[Tensor, Tensor]]:
    """Uneven ones."""
    x, y = images(seed, count)
    return [(x[:7], y[:7]), (x[7:], y[7:])]


def move_(model: nn.Module, seed: int = 1, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, dtype=torch.float64, generator=generator)
            p.add_((size * noise).to(p))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def flat_grad(model: nn.Module) -> Tensor:
    return ekfac.ParameterVector.from_grad(model).flat()


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """Return ``[N, C, P]``."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def outputs(tensors: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, tensors, (one.unsqueeze(0),))[0]

    found = vmap(jacrev(outputs), in_dims=(None, 0))(parameters, x)
    return torch.cat([found[n].flatten(2) for n in parameters], dim=2)


def dense_fisher(model: nn.Module, x: Tensor) -> Tensor:
    """Return the exact Fisher matrix of softmax outputs, ``[P, P]``."""
    J, p = jacobians(model, x), model(x).detach().softmax(1)
    M = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("ncp,ncd,ndq->pq", J, M, J) / len(x)


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    parameters = list(model.named_parameters())
    shapes = [(n, p.shape) for n, p in parameters]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([s.numel() for _, s in shapes])
        named = {n: t.view(s) for (n, s), t in zip(shapes, parts, strict=True)}
        return cross_entropy(functional_call(model, named, (x,)), y)

    return hessian(loss)(flat(model))


def slices(model: nn.Module) -> Iterator[tuple[str, slice]]:
    """Yield where every linear layer's parameters are in the flat vector."""
    start = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            count = sum(p.numel() for p in module.parameters())
            yield name, slice(start, start + count)
            start += count


def block_diagonal(model: nn.Module, F: Tensor) -> Tensor:
    result = torch.zeros_like(F)
    for _, part in slices(model):
        result[part, part] = F[part, part]
    return result


def rows_of(module: nn.Linear) -> Tensor:
    """Return which of the layer's flat parameters stand in ``[W | b]``, row-major."""
    d_out, d_in = module.weight.shape
    weight = torch.arange(d_out * d_in).view(d_out, d_in)
    if module.bias is None:
        return weight.flatten()
    bias = d_out * d_in + torch.arange(d_out)
    return torch.cat([weight, bias.unsqueeze(1)], dim=1).flatten()


def factors(model: nn.Sequential, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``A`` and ``G`` of the exact Fisher matrix, by loops over examples."""
    p = model(x).detach().softmax(1)
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        inputs = x
        for other, before in model.named_children():
            if other == name:
                break
            inputs = before(inputs)
        bias = module.bias is not None
        inputs = inputs.detach()
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        a = torch.cat([inputs, ones], 1) if bias else inputs
        rest = nn.Sequential(*list(model.children())[int(name) + 1 :])
        G = torch.zeros(len(module.weight), len(module.weight), dtype=x.dtype)
        for n in range(len(x)):
            z = module(inputs[n]).detach()
            J = jacrev(lambda z, rest=rest: rest(z.unsqueeze(0))[0])(z)
            M = torch.diag(p[n]) - torch.outer(p[n], p[n])
            G += J.mT @ M @ J / len(x)
        found[name] = (a.mT @ a / len(x), G)
    return found


def assembled(model: nn.Sequential, blocks: dict[str, Tensor]) -> Tensor:
    """Return ``[P, P]`` of blocks over ``[W | b]``."""
    size = sum(p.numel() for p in model.parameters())
    result = torch.zeros(size, size, dtype=torch.float64)
    for name, part in slices(model):
        index = part.start + rows_of(model.get_submodule(name))  # type: ignore[arg-type]
        result[index.unsqueeze(1), index] = blocks[name]
    return result


def expected_matrix(structure: str, model: nn.Sequential, x: Tensor) -> Tensor:
    """Return the exact Fisher matrix in a structure, ``[P, P]``, by definition."""
    F = dense_fisher(model, x)
    if structure == "diagonal":
        return torch.diag(F.diagonal())
    if structure == "block_diagonal":
        return block_diagonal(model, F)
    blocks = {}
    for name, (A, G) in factors(model, x).items():
        if structure == "kfac":
            blocks[name] = torch.kron(G, A)
            continue
        U = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
        part = dict(slices(model))[name]
        index = part.start + rows_of(model.get_submodule(name))  # type: ignore[arg-type]
        own = F[index.unsqueeze(1), index]
        blocks[name] = (U * (U.mT @ own @ U).diagonal()) @ U.mT
    return assembled(model, blocks)
