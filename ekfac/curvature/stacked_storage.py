"""The layers' curvature as a whole, and the banks that hold it.

Averages and bases of one size live in one stacked tensor, a bank, that the layers view:
decompositions, kernels and reductions over ranks work on the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ekfac import kernels
from ekfac.curvature.state import EVERYTHING, LayerCurvature, Placement
from ekfac.errors import NotReadyError, StateMismatchError
from ekfac.layers import Block
from ekfac.matrices import BlockDiagonalMatrix, EKFACMatrix, KFACMatrix
from ekfac.state_schema import Record
from ekfac.vectors import VectorSpace

# A saved factor in double precision, below which single would lose its entries.
TINY_SQUARES = 1e-20


class Curvature(Mapping[str, LayerCurvature]):
    """Layer name -> :class:`LayerCurvature`, over banks.

    Args:
        blocks: The layers.
        held: Which of a layer's tensors are stored here, by its name; default: all.
        rank: Of truncated eigenbases.
    """

    def __init__(
        self,
        blocks: Sequence[Block] = (),
        held: Callable[[str], Placement] = lambda name: EVERYTHING,
        rank: float | None = None,
    ) -> None:
        self._held, self._rank = held, rank
        self._layers: dict[str, LayerCurvature] = {}
        self._wide: set[str] = set()  # layers kept in double precision
        self.banks: list[Tensor] = []
        self.extend(blocks)

    def extend(self, blocks: Sequence[Block]) -> None:
        """Add layers, with banks of their own.

        The tensors are laid out on the parameters' devices, in float32 or, for float64
        parameters and layers that :meth:`widen` was called for, float64.
        """
        groups: dict[tuple[torch.device, torch.dtype], list[Block]] = {}
        for block in blocks:
            weight = block.tensors()[0]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            if block.name in self._wide:
                dtype = torch.float64
            groups.setdefault((weight.device, dtype), []).append(block)
        for (device, dtype), members in groups.items():
            plan = _BankPlan()
            for block in members:
                LayerCurvature(block, plan.ask, self._held(block.name), self._rank)
            plan.allocate(device, dtype)
            self.banks += plan.banks.values()
            for block in members:
                self._layers[block.name] = LayerCurvature(
                    block, plan.take, self._held(block.name), self._rank
                )
                self._layers[block.name].wide = block.name in self._wide
        order = [block.name for block in blocks]
        self._layers |= {name: self._layers.pop(name) for name in order}

    def follow_parameters(self) -> None:
        """Move everything to the devices and types that the parameters have now."""
        self.keep(list(self))

    def keep(self, names: Sequence[str]) -> None:
        """Forget all layers but these, and lay these out anew."""
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
            NotReadyError: Before a layer has the factors that the structure needs.
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
        for name in state:
            G = state[name].get("G")
            if G is not None and G.dtype == torch.float64 and G.numel():
                size = float(G.abs().amax())
                if self[name].dtype != torch.float64 and 0 < size < TINY_SQUARES:
                    self.widen(name)
            self[name].copy_state_(state[name])


class _BankPlan:
    """Counts the tensors of each shape, allocates their stacks, hands out views."""

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
