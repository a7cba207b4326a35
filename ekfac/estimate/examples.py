"""Gradients of single examples, for any module at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ekfac.estimate.data import Batch, example_of, outputs_of
from ekfac.likelihoods import _real

# Elements of gradients that exist at a time.
BUDGET = 1 << 24


def example_rows(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    outputs: Tensor,
    pseudo: Sequence[Tensor],
) -> Iterator[Tensor]:
    """Yield ``J_n^T h_nk`` of every example ``n``, ``[K, P]``, in float32 at least.

    The model is called with one example at a time, or, where its inputs cannot be
    taken apart or its outputs are others then (the examples of a batch see each other,
    an argument without examples has as many rows), differentiated example by example.

    Args:
        model: The model.
        parameters: With respect to which.
        batch: The batch.
        outputs: The model's, with their graph.
        pseudo: ``K`` gradients of the outputs.
    """
    size, chosen = len(outputs), list(parameters.values())
    if not pseudo:
        return
    h = torch.stack(list(pseudo)).detach()
    for n in range(size):
        graph, weights = outputs, torch.zeros_like(h)
        weights[:, n] = h[:, n]
        if size > 1:
            # Attention's fast kernels cannot go back through several rows at once.
            with sdpa_kernel(SDPBackend.MATH):
                single = outputs_of(model, example_of(batch.inputs, n, size))
            if _agree(single, outputs[n : n + 1]):
                graph, weights = single, h[:, n : n + 1]
        yield _real(back_propagated([graph], chosen, [weights]))


def _agree(single: Tensor, of_batch: Tensor) -> bool:
    """Return whether two outputs are the same but for rounding."""
    if single.shape != of_batch.shape:
        return False
    largest = of_batch.detach().abs().max()
    precision = torch.finfo(of_batch.dtype).eps ** 0.5
    return bool((single - of_batch).detach().abs().max() <= precision * largest)


def back_propagated(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    retain: bool = True,
) -> Tensor:
    """Return ``J^T`` of several vectors at once, flat, ``[k, P]``.

    Args:
        outputs: Tensors, of which some may not depend on anything.
        inputs: What to differentiate with respect to.
        weights: ``[k, *]`` for each of ``outputs``.
        retain: Whether the graph is needed again.
    """
    k = len(weights[0])
    used = [i for i, output in enumerate(outputs) if output.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if used:
        sources = [outputs[i] for i in used]
        if k == 1:
            single = [weights[i][0] for i in used]
            plain = torch.autograd.grad(
                sources, inputs, single, retain_graph=retain, allow_unused=True
            )
            found = [None if g is None else g.unsqueeze(0) for g in plain]
        else:
            found = torch.autograd.grad(
                sources,
                inputs,
                [weights[i] for i in used],
                retain_graph=retain,
                allow_unused=True,
                is_grads_batched=True,
            )
    rows = [
        x.new_zeros(k, x.numel()) if g is None else g.reshape(k, -1)
        for g, x in zip(found, inputs, strict=True)
    ]
    return torch.cat(rows, dim=1)
