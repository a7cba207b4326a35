"""The curvature of all layers, and the banks that hold it.

Averages and bases of one size live in one stacked tensor, a bank, that the layers view:
decompositions, kernels and reductions over ranks work on the stack.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ekfac import kernels
from ekfac.curvature.state import (
    EVERYTHING,
    LayerCurvature,
    Placement,
    Storage,
    start_momentum,
    truncates,
)
from ekfac.errors import NotReadyError, StateMismatchError, warn_outside
from ekfac.layers import Block
from ekfac.layers.blocks import NARROW
from ekfac.matrices import BlockDiagonalMatrix, EKFACMatrix, KFACMatrix
from ekfac.state_schema import Record
from ekfac.vectors import VectorSpace

STORAGES: tuple[Storage, ...] = get_args(Storage)


class Curvature(Mapping[str, LayerCurvature]):
    """Layer name -> :class:`LayerCurvature`, over banks.

    Args:
        blocks: The layers.
        held: Layer name -> the parts that this process stores. Default: all.
        rank: Of truncated eigenbases, see :class:`ekfac.EKFAC`.
        storage: How factors and bases are stored, if the budget allows it.
        budget: Bytes that all layers may take, see :func:`storages_within`.
        wanted: Block -> the parts that some process stores. Default: all.

    Attributes:
        banks: The stacked tensors.
    """

    def __init__(
        self,
        blocks: Sequence[Block] = (),
        held: Callable[[str], Placement] | None = None,
        rank: float | None = None,
        storage: Storage = "full",
        budget: int | None = None,
        wanted: Callable[[Block], Placement] | None = None,
    ) -> None:
        self._held, self._rank = held or (lambda name: EVERYTHING), rank
        self._storage, self._budget = storage, budget
        self._wanted = wanted or (lambda block: EVERYTHING)
        self._layers: dict[str, LayerCurvature] = {}
        self._wide: set[str] = set()  # layers kept in double precision
        self.banks: list[Tensor] = []
        self.extend(blocks)

    def extend(self, blocks: Sequence[Block]) -> None:
        """Add layers, with banks of their own.

        The tensors are laid out on the parameters' devices, in float32 or, for float64
        parameters and layers that :meth:`widen` was called for, float64.
        """
        storages = self._storages(blocks)
        groups: dict[tuple[torch.device, torch.dtype], list[Block]] = {}
        for block in blocks:
            weight = block.tensors()[0]
            dtype = torch.float64 if block.name in self._wide else block.dtype
            groups.setdefault((weight.device, dtype), []).append(block)
        for (device, dtype), members in groups.items():
            plan = _BankPlan()
            # Those of one shape side by side, so that a stack of them is a view.
            alike = sorted(members, key=lambda block: (block.shape, block.diagonal))
            for bank in (plan.ask, plan.take):
                for block in alike:
                    self._layers[block.name] = LayerCurvature(
                        block,
                        bank,
                        self._placement(block),
                        self._rank,
                        storages[block.name],
                    )
                if bank == plan.ask:
                    plan.allocate(device, dtype)
            self.banks += plan.banks.values()
            for block in members:
                self._layers[block.name].wide = block.name in self._wide
        order = [block.name for block in blocks]
        self._layers |= {name: self._layers.pop(name) for name in order}

    def _storages(self, blocks: Sequence[Block]) -> dict[str, Storage]:
        """Return the storage of layers that are added: what the budget leaves."""
        storages = dict.fromkeys((block.name for block in blocks), self._storage)
        if self._budget is None or not blocks:
            return storages
        left = self._budget - sum(
            self._bytes(layer.block, layer.storage)
            for layer in self.values()
            if layer.name not in storages
        )
        sizes = {b.name: {s: self._bytes(b, s) for s in STORAGES} for b in blocks}
        return storages_within(left, storages, sizes)

    def _bytes(self, block: Block, storage: Storage) -> int:
        return state_bytes(block, self._rank, storage, self._wanted(block))

    def _placement(self, block: Block) -> Placement:
        pairs = zip(self._held(block.name), self._wanted(block), strict=True)
        return Placement(*(here and wanted for here, wanted in pairs))

    def follow_parameters(self) -> None:
        """Move everything to the devices and types that the parameters have now."""
        self.keep(list(self))

    def keep(self, names: Sequence[str]) -> None:
        """Forget all layers but these, which get new banks."""
        state = {name: self[name].state_dict() for name in names}
        self._wide &= set(names)
        blocks = [self[name].block for name in names]
        self._layers, self.banks = {}, []
        self.extend(blocks)
        self.copy_state_(state)

    def widen(self, name: str) -> LayerCurvature:
        """Keep a layer in double precision from now on; return it.

        For gradients whose squares leave the range of single precision.
        """
        layer, order = self[name], list(self)
        self._wide.add(name)
        state = layer.state_dict()
        self.extend([layer.block])
        self._layers = {key: self._layers[key] for key in order}
        self[name].copy_state_(state)
        return self[name]

    def __getitem__(self, name: str) -> LayerCurvature:
        """Return one layer's curvature."""
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over layer names in the model's order."""
        return iter(self._layers)

    def values(self) -> ValuesView[LayerCurvature]:
        """Return the layers' curvatures, in the model's order."""
        return self._layers.values()

    def items(self) -> ItemsView[str, LayerCurvature]:
        """Return layer names with their curvatures, in the model's order."""
        return self._layers.items()

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)

    def matrix(
        self,
        structure: Literal["ekfac", "kfac"] = "ekfac",
        *,
        parameters: nn.Module | Mapping[str, Tensor] | None = None,
    ) -> BlockDiagonalMatrix:
        """Return the curvature matrix over the live factors: no copy, no data pass.

        It follows the factors as they change. A truncated basis is completed when the
        matrix is first used after a refresh, at the memory of a full one.

        Args:
            structure: ``"ekfac"`` or ``"kfac"``.
            parameters: The model, or its parameters by name: the space of the matrix.
                Those of no layer here have zero curvature. Default: the layers' own
                parameters, in the layers' order.

        Raises:
            ValueError: For another structure.
            NotReadyError: If there is no layer, or one has not yet what the structure
                needs.
        """
        if structure not in ("ekfac", "kfac"):
            raise ValueError(
                "The live factors make structure='ekfac' or 'kfac', got "
                f"{structure!r}; ekfac.fisher(model, data, structure) has the others."
            )
        if not self:
            raise NotReadyError(
                "There is no layer with Kronecker factors to make a matrix of; "
                "describe() says why."
            )
        if parameters is None:
            parameters = {
                name: tensor
                for layer in self.values()
                for name, tensor in zip(
                    layer.parameter_names, layer.block.tensors(), strict=True
                )
            }
        space = VectorSpace.of(parameters)
        kind = EKFACMatrix if structure == "ekfac" else KFACMatrix
        blocks = {
            name: kind(layer, space.subspace(layer.parameter_names))
            for name, layer in self.items()
        }
        return BlockDiagonalMatrix(space, blocks)

    def state_dict(self) -> dict[str, Any]:
        """Return every layer's state by name."""
        return {name: layer.state_dict() for name, layer in self.items()}

    def schema(self, state: Any, key: str = "", steps: int | None = None) -> Record:
        """Return what a saved state has to be; see :meth:`LayerCurvature.schema`.

        Raises:
            StateMismatchError: Naming the layers that are missing or unknown.
        """
        Record({}, more=True).check(state, key)
        missing = [name for name in self if name not in state]
        unknown = [name for name in state if name not in self]
        if missing or unknown:
            raise StateMismatchError.at(
                key or "curvature",
                f"of another model (layers without a saved state: {missing}; saved "
                f"layers that this model lacks: {unknown})",
                "of this one",
                "Load it into the model it was saved from.",
            )
        return Record(
            {
                name: layer.schema(state[name], f"{key}.{name}" if key else name, steps)
                for name, layer in self.items()
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy ``state`` in, or change nothing and raise."""
        self.schema(state).check(state)
        self.copy_state_(state)

    def copy_state_(self, state: Mapping[str, Any]) -> None:
        """Copy in a state that has been checked."""
        # Layers refresh in turn, in the order in which they were added.
        self._layers = {name: self._layers[name] for name in state}
        for name, layer in state.items():
            if layer["wide"] and not self[name].wide:
                self.widen(name)
        start_momentum(self[name] for name, la in state.items() if "momentum" in la)
        for name, layer in state.items():
            self[name].copy_state_(layer)


def state_bytes(
    block: Block, rank: float | None, storage: Storage, held: Placement = EVERYTHING
) -> int:
    """Return the memory of a layer's state with its momentum, in bytes.

    A truncated basis whose number of vectors depends on the eigenvalues counts as full.
    """
    b, d_out, d_in = block.shape
    own = block.factor_shape[0]
    size = block.dtype.itemsize
    low = 2 if storage == "bfloat16" else size
    truncated = truncates(block, rank)
    used, entries = 0, 1
    for d, diagonal in zip((d_in, d_out), block.diagonal, strict=True):
        columns = d
        if truncated and isinstance(rank, int) and d > NARROW and 2 * rank < d:
            columns = rank
        values = columns + int(columns < d)
        factor = d if diagonal else kernels.packed_size((d, d), storage != "full")
        used += own * (factor + values) * size
        used += 0 if diagonal else own * d * columns * low
        entries *= values
    return used + b * (held.scalings * entries + held.momentum * d_out * d_in) * size


def storages_within(
    budget: int,
    storages: Mapping[str, Storage],
    sizes: Mapping[str, Mapping[Storage, int]],
) -> dict[str, Storage]:
    """Return how layers are stored so that together they keep within a budget.

    Packing costs no accuracy and comes first, the layers that save most before the
    others; then bfloat16. If that is not enough, it warns. All ranks find the same.
    The ``sizes`` are bytes by layer name and storage.
    """
    levels = dict(storages)
    needed = sum(sizes[name][levels[name]] for name in levels)
    for storage in STORAGES[1:]:
        saved = {
            name: sizes[name][levels[name]] - sizes[name][storage] for name in levels
        }
        for name in sorted(levels, key=lambda name: -saved[name]):
            if needed > budget and saved[name] > 0:
                levels[name] = storage
                needed -= saved[name]
    if needed > budget:
        warn_outside(
            f"memory_budget: the layers' state takes {needed} bytes in bfloat16, "
            f"{needed - budget} more than are left; give a larger memory_budget=, "
            "rank= or a lower max_dim=."
        )
    return levels


class _BankPlan:
    """Plan of the banks: counts tensors by shape, allocates stacks, returns views."""

    def __init__(self) -> None:
        self.sizes: dict[tuple[int, ...], int] = {}
        self.banks: dict[tuple[int, ...], Tensor] = {}
        self._used: dict[tuple[int, ...], int] = {}

    def ask(self, count: int, *shape: int) -> Tensor:
        """Reserve ``count`` tensors of ``shape``."""
        self.sizes[shape] = self.sizes.get(shape, 0) + count
        return torch.empty(count, *shape, device="meta")

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the stacks, filled with zeros."""
        for shape, count in self.sizes.items():
            like = torch.empty(0, device=device, dtype=dtype)
            aligned = kernels.aligned_empty((count, *shape), like) if shape else None
            zeros = torch.zeros(count, device=device, dtype=dtype)
            self.banks[shape] = zeros if aligned is None else aligned.zero_()

    def take(self, count: int, *shape: int) -> Tensor:
        """Return the next ``count`` tensors of ``shape`` as a view."""
        start = self._used.get(shape, 0)
        self._used[shape] = start + count
        return self.banks[shape][start : start + count]
