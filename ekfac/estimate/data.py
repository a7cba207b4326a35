"""Data of an estimate, and the state of the model while it is being estimated."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.likelihoods import find_outputs
from ekfac.progress import shown
from ekfac.vectors import VectorSpace, _chosen, named_parameters

NOTHING = "data has no batches with examples; an estimate needs at least one."
NO_TARGETS = "No example of data has a target that counts."


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Attributes:
        number: Its place in the data, from zero.
        inputs: A tensor, a mapping of keyword arguments or a sequence of arguments.
        targets: The targets, or ``None``.
    """

    number: int
    inputs: Any
    targets: Any


def read(item: Any, number: int, device: torch.device) -> Batch:
    """Return what a loader yielded as a batch, see ``docs/batches_and_losses.md``.

    A pair is inputs and targets; a mapping is a model's keyword arguments with the
    targets, if any, under ``"labels"``; an object that can be moved (``item.to``), such
    as a graph, is the model's argument with the targets in ``item.y``; anything else is
    inputs alone.

    Raises:
        TypeError: For a tuple or list of more than two.
    """
    targets = None
    if isinstance(item, (tuple, list)):
        if len(item) not in (1, 2):
            raise TypeError(
                f"batch {number} is a {type(item).__name__} of {len(item)}, and which "
                "of them are inputs is not known; let data yield pairs (x, y), with "
                "several arguments of the model as ((x1, x2), y), or mappings of its "
                "keyword arguments with the targets under 'labels'."
            )
        inputs, targets = item[0], item[1] if len(item) == 2 else None
    elif isinstance(item, Mapping):
        inputs, targets = item, item.get("labels")
    else:
        inputs = item
        if not isinstance(item, Tensor) and hasattr(item, "to"):
            inputs = item.to(device)
            targets = getattr(inputs, "labels", getattr(inputs, "y", None))
    return Batch(number, moved(inputs, device), moved(targets, device))


def _mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return nested tensors with ``function`` applied to each."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        values = [_mapped(function, value) for value in tree]
        named = hasattr(tree, "_fields")
        return type(tree)(*values) if named else type(tree)(values)
    return tree


def moved(tree: Any, device: torch.device) -> Any:
    """Return nested tensors on ``device``."""

    def move(tensor: Tensor) -> Tensor:
        # What was made in inference mode cannot be saved for a backward pass.
        inference = tensor.is_inference()
        return tensor.to(device).clone() if inference else tensor.to(device)

    return _mapped(move, tree)


def _empty(tree: Any) -> bool:
    """Return whether the first tensor of a tree has a batch dimension of size 0."""
    if isinstance(tree, Tensor):
        return tree.dim() > 0 and not len(tree)
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    return isinstance(tree, (tuple, list)) and bool(tree) and _empty(tree[0])


def example_of(tree: Any, index: int, size: int) -> Any:
    """Return one example of nested tensors whose first dimension is the batch's."""

    def one(tensor: Tensor) -> Tensor:
        of_batch = tensor.dim() > 0 and tensor.shape[0] == size
        return tensor[index : index + 1] if of_batch else tensor

    return _mapped(one, tree)


def examples_of(targets: Any, start: int, end: int, size: int) -> Any:
    """Return the targets of some of ``size`` examples.

    Targets ``[N S]`` are ``S`` for each of ``N`` examples.
    """

    def some(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) % size:
            return tensor
        positions = len(tensor) // size
        return tensor[start * positions : end * positions]

    return _mapped(some, targets)


def doubled(targets: Any, size: int) -> Any:
    """Return the targets of a batch of ``size`` examples twice over."""

    def twice(tensor: Tensor) -> Tensor:
        of_batch = tensor.dim() > 0 and not len(tensor) % size
        return torch.cat([tensor, tensor]) if of_batch else tensor

    return _mapped(twice, targets)


def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """Return the model's predictions, with their graph.

    Raises:
        ValueError: If there are none, they are not finite or have no batch dimension.
    """
    return _predictions(model, _called(model, inputs))


def predicted(model: nn.Module, batch: Batch) -> tuple[Tensor, Batch]:
    """Return the model's predictions, and the batch with targets that belong to them.

    A causal language model of transformers compares its labels with the predictions one
    position before them. Whether a model does shows in the gradient of the loss that it
    returns: then the labels move by one position, and the last prediction has none.

    Raises:
        ValueError: As :func:`outputs_of`; if the loss counts other targets than those.
    """
    returned = _called(model, batch.inputs)
    outputs, y = _predictions(model, returned), batch.targets
    if isinstance(returned, dict):
        loss = returned.get("loss")
    else:
        loss = returned[0] if isinstance(returned, tuple) and returned else None
    if (
        not isinstance(batch.inputs, Mapping)
        or not isinstance(loss, Tensor)
        or loss.numel() != 1
        or not loss.requires_grad
        or not isinstance(y, Tensor)
        or y.is_floating_point()
        or outputs.shape[:-1] != y.shape
        or y.dim() != 2
    ):
        return outputs, batch
    (grad,) = torch.autograd.grad(
        loss.sum(), outputs, retain_graph=True, allow_unused=True
    )
    if grad is None:
        return outputs, batch
    counted, ignored = (grad != 0).any(dim=-1), -100
    after = torch.cat([y[:, 1:], torch.full_like(y[:, :1], ignored)], dim=1)
    if torch.equal(counted, y != ignored):
        return outputs, batch
    if not torch.equal(counted, after != ignored):
        raise ValueError(
            f"{type(model).__name__} computes a loss of batch {batch.number} that "
            f"counts {int(counted.sum())} of {counted.numel()} positions, which are "
            "neither those of its labels nor those before them; let data yield pairs "
            "(inputs, targets) with the target of every prediction, -100 for none."
        )
    return outputs, replace(batch, targets=after)


def _called(model: nn.Module, inputs: Any) -> Any:
    """Return what the model returns."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _predictions(model: nn.Module, returned: Any) -> Tensor:
    """Return the predictions among what a model returned."""
    outputs = find_outputs(returned)
    if outputs is None:
        scalar = isinstance(returned, Tensor) and returned.numel() == 1
        advice = (
            "if it is the loss, let the model return the predictions, and pass the "
            "loss as loss_fn"
            if scalar
            else "return the predictions, with or without other values, or an object "
            "with logits"
        )
        raise ValueError(
            f"{type(model).__name__} returned no floating point tensor with a batch "
            "dimension that depends on the chosen parameters, got "
            f"{_described(returned)}; {advice}."
        )
    return outputs


def _described(value: object) -> str:
    """Return what was returned, for an error message."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    constant = "" if value.requires_grad else ", which depends on none"
    return f"a {value.dtype} tensor {list(value.shape)}{constant}"


def require_batches(data: Any) -> Iterable[Any]:
    """Return ``data`` if it may be an iterable of batches.

    Raises:
        TypeError: If it is a single batch, or no iterable.
    """
    bare = isinstance(data, tuple) and any(isinstance(x, Tensor) for x in data)
    if isinstance(data, (Tensor, Mapping)) or bare:
        raise TypeError(
            f"data must be an iterable of batches (x, y), got one "
            f"{type(data).__name__}; pass [(x, y)] for a single batch."
        )
    if not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(
            f"data must be an iterable of batches (x, y), got {data!r}; pass a "
            "loader, or a list of batches."
        )
    batches: Iterable[Any] = data
    return batches


class Data:
    """Batches that are the same in every pass.

    Every pass starts from the random states that the global generators of torch, numpy
    and Python and the loader's own had when the object was made, so that a shuffling or
    augmenting loader repeats itself. It restores them at its end. Persistent workers
    are started anew. An iterator, which runs only once, is kept as a list. A pass whose
    first batch differs is an error.

    Args:
        data: Any iterable of batches, see :func:`read`.
        device: Where batches are moved to.
        progress: Whether to show a bar, if tqdm is installed.
    """

    def __init__(
        self, data: Iterable[Any], device: torch.device, progress: bool = False
    ) -> None:
        data = require_batches(data)
        self.data = list(data) if isinstance(data, Iterator) else data
        self.device, self.progress = device, progress
        self._generators = set(_generators(self.data))
        self._global = torch.get_rng_state()
        self._states = {g: g.get_state() for g in self._generators}
        self._others = [(restore, read()) for read, restore in _other_generators()]
        self._digest: float | None = None

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        """Start from the recorded random states, and restore the present ones."""
        devices = [self.device] if self.device.type == "cuda" else []
        before = {g: g.get_state() for g in self._generators}
        others = [(restore, read()) for read, restore in _other_generators()]
        with torch.random.fork_rng(devices), _fresh_workers(self.data):
            torch.set_rng_state(self._global)
            for generator, state in self._states.items():
                generator.set_state(state)
            for restore, other in self._others:
                restore(other)
            try:
                yield
            finally:
                for generator, state in before.items():
                    generator.set_state(state)
                for restore, other in others:
                    restore(other)

    @contextmanager
    def batches(self, purpose: str) -> Iterator[Iterator[Batch]]:
        """Open a pass over the batches: ``with data.batches("...") as batches:``.

        Raises:
            ValueError: If there are none, or none with examples.
        """
        with self._repeatable():
            yield self._read(shown(self.data, purpose, progress=self.progress))

    def first(self) -> Batch:
        """Return the first batch that has examples.

        Raises:
            ValueError: If there is none.
        """
        with self._repeatable():
            return next(self._read(self.data))

    def _read(self, items: Iterable[Any]) -> Iterator[Batch]:
        """Yield the batches that have examples."""
        count = 0
        for item in items:
            batch = read(item, count, self.device)
            if not _empty(batch.inputs):
                if not count:
                    self._check_same(batch)
                yield batch
                count += 1
        if not count:
            raise ValueError(NOTHING)

    def _check_same(self, batch: Batch) -> None:
        """Raise ``ValueError`` unless the first batch is the first pass's."""
        if isinstance(self.data, (list, tuple)):
            return
        digest = _digest(batch.inputs)
        if self._digest is None:
            self._digest = digest
        elif self._digest != digest:
            raise ValueError(
                f"{type(self.data).__name__} yields other batches at every pass, and "
                "an estimate goes through the data several times; pass list(data), or "
                "fix its order and its random augmentation."
            )


def _uncompiled() -> AbstractContextManager[None]:
    """Return a context in which compiled functions run as they are written."""
    # Not imported: nothing was compiled. Importing it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _digest(tree: Any) -> float:
    """Return a checksum of nested tensors."""
    if isinstance(tree, Tensor):
        flat = tree.detach().reshape(-1)
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        weights = torch.arange(1, len(flat) + 1, device=flat.device).double().cos()
        return float(torch.nan_to_num(flat.double()) @ weights)
    if isinstance(tree, Mapping):
        return sum(_digest(value) for value in tree.values())
    if isinstance(tree, (tuple, list)):
        return sum((i + 1) * _digest(value) for i, value in enumerate(tree))
    return 0.0


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """Yield the generators of a loader and of its nested samplers."""
    seen: list[Any] = []
    pending = [loader]
    while pending:
        owner = pending.pop()
        if owner is None or any(owner is other for other in seen):
            continue
        seen.append(owner)
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
        pending += [getattr(owner, n, None) for n in ("sampler", "batch_sampler")]


def _other_generators() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return how the states of Python's and numpy's generators are read and set."""
    states: list[Any] = [(random.getstate, random.setstate)]
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        states.append((numpy.random.get_state, numpy.random.set_state))
    return states


@contextmanager
def _fresh_workers(loader: Any) -> Iterator[None]:
    """Start new workers of a loader that keeps its own; restore those at the end.

    A second pass through the same workers draws other numbers than the first.
    """
    if not getattr(loader, "persistent_workers", False):
        yield
        return
    before = getattr(loader, "_iterator", None)
    loader._iterator = None
    try:
        yield
    finally:
        loader._iterator = before


@contextmanager
def prepared(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Put the model in eval mode with gradients for ``names``; restore it at the end.

    A compiled model runs uncompiled: its compiled code skips hooks, and its compiled
    backward cannot be differentiated.
    """
    parameters = named_parameters(model)
    modes = {module: module.training for module in model.modules()}
    frozen = [p for n in names if not (p := parameters[n]).requires_grad]
    with torch.inference_mode(False), torch.enable_grad(), _uncompiled():
        try:
            model.eval()
            for parameter in frozen:
                parameter.requires_grad_()
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for module, training in modes.items():
                module.training = training


def choose(
    model: nn.Module, parameters: Iterable[str] | None
) -> dict[str, nn.Parameter]:
    """Return the parameters of an estimate by name, in the model's order.

    Args:
        model: The model.
        parameters: Names of parameters, or of layers, which stand for all their
            parameters. Default: what requires a gradient.

    Raises:
        StateMismatchError: If a name is neither.
        ValueError: If nothing is chosen, or a parameter is on the meta device.
    """
    if parameters is None:
        params = _chosen(model, None)
    else:
        if isinstance(parameters, str):
            parameters = [parameters]
        everything, names = named_parameters(model), set()
        for name in parameters:
            inside = {n for n in everything if n == name or n.startswith(f"{name}.")}
            names |= inside or set(_chosen(model, [name]))
        params = {name: p for name, p in everything.items() if name in names}
    absent = [name for name, p in params.items() if p.is_meta]
    if absent:
        raise ValueError(
            f"Parameters {absent[:4]} of {type(model).__name__} are on the meta device "
            "and have no values; load them first (model.to_empty and load_state_dict)."
        )
    if not params:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient; name "
            "those to use with parameters=[...]."
        )
    return params


def precision_of(parameters: Iterable[Tensor]) -> torch.dtype:
    """Return the type of a matrix: the parameters' common one, float32 at least."""
    types = (p.dtype for p in parameters)
    return functools.reduce(torch.promote_types, types, torch.float32)


def space_of(parameters: Mapping[str, nn.Parameter]) -> VectorSpace:
    """Return the space of the chosen parameters."""
    return VectorSpace({name: p.shape for name, p in parameters.items()})
