"""Scalings in bases that are given, by one pass over data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.curvature import LayerCurvature
from ekfac.curvature.statistics import BatchStatistics
from ekfac.errors import NotReadyError
from ekfac.estimate.build import Problem
from ekfac.estimate.recorder import Recorder
from ekfac.estimate.sources import Source, check_finite


def scalings(
    model: nn.Module,
    data: Iterable[Any],
    layers: Mapping[str, LayerCurvature],
    source: Source,
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Return ``E[(Q_G^T dW Q_A)^2]`` of every layer in the basis that it has now.

    George et al. 2018, Algorithm 1, for bases that an optimizer keeps. The model is in
    eval mode meanwhile, and left as it was.

    Args:
        model: The model that the layers are of.
        data: Batches, as for :func:`ekfac.fisher`.
        layers: By name, each with an eigenbasis.
        source: Which pseudo-gradients.
        progress: Whether to show a bar, if tqdm is installed.

    Returns:
        ``[b, d_out, d_in]`` by layer name; layers that the outputs do not depend on
        are left out.

    Raises:
        NotReadyError: If a layer has no eigenbasis yet.
        ValueError: If the data are empty or not finite.
    """
    missing = [name for name, layer in layers.items() if not layer.ready]
    if missing:
        raise NotReadyError(
            f"Layers {missing} have no eigenbasis yet to take scalings in; do a step "
            "of the optimizer first."
        )
    names = [name for layer in layers.values() for name in layer.parameter_names]
    problem = Problem.of(model, data, source, names, progress)
    statistics = {
        layer.block: BatchStatistics(
            layer, torch.promote_types(layer.block.tensors()[0].dtype, torch.float32)
        )
        for layer in layers.values()
    }
    examples = torch.tensor(0)
    recorder = Recorder(model, list(statistics))
    with closing(recorder), problem.passes("scalings") as batches:
        for batch in batches:
            outputs, recorded = recorder.forward(model, batch.inputs)
            check_finite(outputs, "The model's outputs", batch)
            terms = source.terms(outputs.detach(), batch)
            pseudo = list(source.signed(outputs.detach(), batch))
            for h in pseudo:
                check_finite(h, "The gradients of the outputs", batch)
            examples = examples + terms.examples.cpu()
            recorder.send(
                outputs,
                recorded,
                pseudo,
                terms,
                lambda block, pairs, terms, _: statistics[block].add_scalings(
                    pairs, terms, squares=True
                ),
            )
    if not int(examples):
        raise ValueError("No example of data has a target that counts.")
    return {
        block.name: found.scalings / int(examples)
        for block, found in statistics.items()
        if found.scalings is not None
    }
