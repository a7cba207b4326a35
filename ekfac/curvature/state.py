"""What is kept per layer, and in which tensors.

Averages and bases of one size live in one stacked tensor, a bank, that the layers view:
decompositions, kernels and reductions over ranks work on the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ekfac import kernels
from ekfac.curvature.average import EVERYTHING, Average, Held, absent
from ekfac.errors import NotReadyError, StateMismatchError
from ekfac.layers import Block
from ekfac.matrices import BlockDiagonalMatrix, EKFACMatrix, KFACMatrix
from ekfac.vectors import VectorSpace


class LayerCurvature:
    """Factors, eigenbases and scalings of one block.

    Shapes: ``A`` ``[b or 1, d_in, d_in]``, ``G`` ``[b, d_out, d_out]``, ``Q_A`` and
    ``Q_G`` alike with eigenvectors in columns, ``s`` ``[b, d_out, d_in]``. A diagonal
    factor has one dimension less and no basis. ``None``: not computed yet.

    Attributes:
        block: The layer's form and parameters.
        eigenvalues_A: ``[b or 1, d_in]``: of ``A`` when the basis was refreshed.
        eigenvalues_G: ``[b, d_out]``.
        version: The step at which factors, basis and scalings were last refreshed.
    """

    def __init__(
        self, block: Block, bank: Callable[..., Tensor], held: Held = EVERYTHING
    ) -> None:
        self.block, self.held = block, held
        b, d_out, d_in = block.shape
        b_in = b if block.exact or b > 1 else 1
        diagonal_in, diagonal_out = block.diagonal
        shapes = {
            "A": (b_in, d_in) if diagonal_in else (b_in, d_in, d_in),
            "G": (b, d_out) if diagonal_out else (b, d_out, d_out),
        }
        factors, bases, scalings = (bank if there else absent for there in held)
        self.averages = {
            key: Average(factors(*shape), bank(1)[0]) for key, shape in shapes.items()
        }
        self.averages["s"] = Average(scalings(b, d_out, d_in), bank(1)[0])
        self._bases = {
            "Q_A": None if diagonal_in else bases(b_in, d_in, d_in),
            "Q_G": None if diagonal_out else bases(b, d_out, d_out),
        }
        self.eigenvalues_A = bases(b_in, d_in)
        self.eigenvalues_G = bases(b, d_out)
        self.version = {"factors": 0, "basis": 0, "scalings": 0}

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.block.name

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Qualified names of the block's parameters."""
        return self.block.parameters

    @property
    def A(self) -> Tensor | None:
        """Input factor, ``(1/(N S)) sum a a^T``."""
        return self.averages["A"].read()

    @property
    def G(self) -> Tensor | None:
        """Output-gradient factor, ``(1/N) sum g g^T``."""
        return self.averages["G"].read()

    @property
    def Q_A(self) -> Tensor | None:
        """Eigenvectors of ``A`` in columns; ``None`` also if ``A`` is diagonal."""
        return self._bases["Q_A"] if self.ready else None

    @property
    def Q_G(self) -> Tensor | None:
        """Eigenvectors of ``G`` in columns; ``None`` also if ``G`` is diagonal."""
        return self._bases["Q_G"] if self.ready else None

    @property
    def s(self) -> Tensor | None:
        """Scalings in the basis."""
        return self.averages["s"].read()

    @property
    def ready(self) -> bool:
        """Whether there is an eigenbasis."""
        return self.version["basis"] > 0

    def basis(self, side: str) -> Tensor | None:
        """Return the storage of ``Q_A`` or ``Q_G``, ready or not."""
        return self._bases[f"Q_{side}"]

    def kronecker_scalings(self, out: Tensor | None = None) -> Tensor:
        """Return the eigenvalues of ``A (x) G`` as ``[b, d_out, d_in]``, in ``out``."""
        rows, columns = self.eigenvalues_G, self.eigenvalues_A
        return torch.mul(rows.unsqueeze(-1), columns.unsqueeze(-2), out=out)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return ``[b, d_out, d_in]`` of tensors by parameter name."""
        return self.block.pack([tensors[name] for name in self.block.parameters])

    def unpack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return tensors by parameter name of ``[b, d_out, d_in]``.

        Of a parameter of which the block has only some rows, the other rows are zero.
        """
        parts = self.block.unpack(matrix)
        slots, wholes = self.block.adapter.slots(), self.block.tensors()
        result = {}
        for name, slot, whole, part in zip(
            self.block.parameters, slots, wholes, parts, strict=True
        ):
            if slot.rows is None:
                result[name] = part
            else:
                full = part.new_zeros(whole.shape)
                slot.of(full).copy_(part)
                result[name] = full
        return result

    def _tensors(self) -> dict[str, Tensor]:
        """Return the storage by the names of the state dict."""
        tensors = {k: v for k, v in self._bases.items() if v is not None}
        for key, average in self.averages.items():
            if average.held:
                tensors |= {key: average.total, f"{key}_weight": average.weight}
        tensors["eigenvalues_A"] = self.eigenvalues_A
        tensors["eigenvalues_G"] = self.eigenvalues_G
        return {key: t for key, t in tensors.items() if not t.is_meta}

    @property
    def device(self) -> torch.device:
        """Where the curvature lies."""
        return self.averages["A"].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In which type it is kept."""
        return self.averages["A"].weight.dtype

    def bytes(self) -> int:
        """Return the memory of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def state_dict(self) -> dict[str, Any]:
        """Return copies as plain tensors and numbers."""
        state: dict[str, Any] = {k: v.clone() for k, v in self._tensors().items()}
        state["version"] = dict(self.version)
        return state

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise if ``state`` does not fit.

        Raises:
            StateMismatchError: Naming the layer and the tensor.
        """
        for key, tensor in self._tensors().items():
            if key not in state or tuple(state[key].shape) != tuple(tensor.shape):
                found = tuple(state[key].shape) if key in state else "nothing"
                raise StateMismatchError(
                    f"layer {self.name!r}: the saved {key} is {found}, this model's is "
                    f"{tuple(tensor.shape)}; load the state of the same model with the "
                    "same max_dim."
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy ``state`` in, to this layer's device and dtype."""
        self.check_state(state)
        for key, tensor in self._tensors().items():
            tensor.copy_(state[key])
        self.version = {key: int(value) for key, value in state["version"].items()}
        for key, average in self.averages.items():
            kind = "scalings" if key == "s" else "factors"
            absent = not average.held and self.version[kind] == 0
            average.empty = absent or (average.held and bool(average.weight == 0))


class Curvature(Mapping[str, LayerCurvature]):
    """Layer name -> :class:`LayerCurvature`, over banks.

    Args:
        blocks: The layers.
        held: Which of a layer's tensors are stored here, by its name; default: all.
    """

    def __init__(
        self,
        blocks: Sequence[Block] = (),
        held: Callable[[str], Held] = lambda name: EVERYTHING,
    ) -> None:
        self._held = held
        self._layers: dict[str, LayerCurvature] = {}
        self.banks: list[Tensor] = []
        self.extend(blocks)

    def extend(self, blocks: Sequence[Block]) -> None:
        """Add layers, with banks of their own.

        The tensors are laid out on the parameters' devices, in float32 or, for float64
        parameters, float64.
        """
        groups: dict[tuple[torch.device, torch.dtype], list[Block]] = {}
        for block in blocks:
            weight = block.tensors()[0]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            groups.setdefault((weight.device, dtype), []).append(block)
        for (device, dtype), members in groups.items():
            plan = _BankPlan()
            for block in members:
                LayerCurvature(block, plan.ask, self._held(block.name))
            plan.allocate(device, dtype)
            self.banks += plan.banks.values()
            for block in members:
                self._layers[block.name] = LayerCurvature(
                    block, plan.take, self._held(block.name)
                )
        order = [block.name for block in blocks]
        self._layers |= {name: self._layers.pop(name) for name in order}

    def follow_parameters(self) -> None:
        """Move everything to the devices that the parameters are on now."""
        state = self.state_dict()
        blocks = [layer.block for layer in self.values()]
        self._layers, self.banks = {}, []
        self.extend(blocks)
        self.load_state_dict(state)

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

        It follows the factors as they change.

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

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise if ``state`` is that of other layers.

        Raises:
            StateMismatchError: Naming the layers that are missing or unknown.
        """
        missing = [name for name in self if name not in state]
        unknown = [name for name in state if name not in self]
        if missing or unknown:
            raise StateMismatchError(
                "the saved curvature belongs to another model: "
                f"layers without a saved state: {missing}; saved layers that this "
                f"model lacks: {unknown}. Load it into the model it was saved from."
            )
        for name, layer in self.items():
            layer.check_state(state[name])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy ``state`` in, or change nothing and raise."""
        self.check_state(state)
        # Layers refresh in turn, in the order in which they were added.
        self._layers = {name: self._layers[name] for name in state}
        for name, layer in self.items():
            layer.load_state_dict(state[name])


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
