"""Curvature of one layer: averages, eigenbasis and scalings, and their saved state."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature.average import Average, PackedAverage
from ekfac.curvature.radial import is_free_of_scale, scale_factor
from ekfac.errors import StateMismatchError
from ekfac.kernels.decomposition import completed, counts, places, share_on_axes
from ekfac.kernels.eigenspaces import POOLED, Spaces, degenerate
from ekfac.layers import Block
from ekfac.layers.blocks import NARROW
from ekfac.state_schema import (
    Anything,
    Choice,
    Field,
    Number,
    Record,
    TensorField,
    entry,
)


class Placement(NamedTuple):
    """The parts of a layer that this process stores: all, unless ranks divide the work.

    Attributes:
        factors: The averages of ``A`` and ``G``.
        bases: ``Q_A`` and ``Q_G``, with the eigenvalues.
        scalings: The average of ``s``; K-FAC has none.
        momentum: The average of the gradients; the layer's direction is computed here.
    """

    factors: bool = True
    bases: bool = True
    scalings: bool = True
    momentum: bool = True


EVERYTHING = Placement()


def absent(*shape: int) -> Tensor:
    """Return a tensor of this shape without storage."""
    return torch.empty(shape, device="meta")


Storage = Literal["full", "packed", "bfloat16"]


def truncates(block: Block, rank: float | None) -> bool:
    """Return whether a block's basis is a truncated one."""
    dense = not block.exact and not any(block.diagonal)
    return rank is not None and dense and max(block.shape[1:]) > NARROW


@dataclass
class Counters:
    """Counts of what happened to the decompositions of one optimizer.

    Attributes:
        decomposed: Full decompositions.
        skipped: Refreshes that were not needed, the old basis still fitted.
        retried: Decompositions that succeeded only with jitter, in float64 or on the
            CPU.
        kept: Decompositions that failed altogether; the old basis was kept.
        rejected: Batches whose statistics were not finite and were left out.
        followed: Decompositions found from the old basis by matrix products.
        repeated: Decompositions whose search in a thread raised or was lost in a fork,
            and that were done again within the step.
    """

    decomposed: int = 0
    skipped: int = 0
    retried: int = 0
    kept: int = 0
    rejected: int = 0
    followed: int = 0
    repeated: int = 0

    def add(self, other: Counters) -> None:
        """Add the counts of others."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class BasisUpdate:
    """A layer's new basis: what a rank that decomposes sends to the others.

    Attributes:
        values: Eigenvalues by side, ``"A"`` and ``"G"``.
        vectors: New eigenvectors by side, of whatever rank if the basis is truncated;
            ``None`` where the basis stays.
    """

    values: dict[str, Tensor]
    vectors: dict[str, Tensor | None]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> BasisUpdate:
        """Return the update with ``function`` applied to every tensor."""
        return BasisUpdate(
            {side: function(values) for side, values in self.values.items()},
            {
                side: None if vectors is None else function(vectors)
                for side, vectors in self.vectors.items()
            },
        )

    def tensors(self) -> list[Tensor]:
        """Return what travels from one rank to another, in a fixed order."""
        vectors = [self.vectors[side] for side in ("A", "G")]
        present = [v for v in vectors if v is not None]
        return [*present, self.values["A"], self.values["G"]]


class LayerCurvature:
    """Factors, eigenbases and scalings of one block.

    Shapes: ``A`` ``[b or 1, d_in, d_in]``, ``G`` ``[b, d_out, d_out]``, ``Q_A`` and
    ``Q_G`` alike with eigenvectors in columns, ``s`` ``[b, d_out, d_in]``; ``d_in``
    counts the bias. A diagonal factor has one dimension less and no basis. ``None``:
    not computed yet. Where blocks share their factors, one of each is stored, and ``G``
    and ``Q_G`` repeat it.

    Args:
        block: The layer's form and parameters.
        bank: Returns a tensor of zeros of a given shape, for the averages and bases.
        held: The parts that this process stores.
        rank: How many eigenvectors are kept, see :class:`ekfac.EKFAC`.
        storage: How factors and bases are stored.

    Attributes:
        block: The layer's form and parameters.
        held: The parts that this process stores.
        averages: The averages of ``"A"``, ``"G"`` and ``"s"``.
        rank: How many eigenvectors are kept, see :class:`ekfac.EKFAC`; ``None``: all.
        truncated: Whether the basis is a truncated one. What is kept has then another
            shape (:mod:`ekfac.curvature.truncated`); the properties here complete it.
        version: The step at which factors, basis and scalings were last refreshed.
        concentrated: Whether few of the outputs' own axes hold most of ``G``:
            :func:`share_on_axes` is more than a half.
        changes: How often its tensors, or what depends on its basis, may have become
            others.
        stack: The last :class:`ekfac.curvature.stacks.Stack` whose first layer it was.
        wide: It is kept in double precision, whatever the parameters are.
        storage: ``"packed"``: one half of each symmetric factor is stored.
            ``"bfloat16"``: that half, and the bases in bfloat16; what is read is in
            the layer's type.
        momentum: Average of the gradients, ``[b, d_out, d_in]``: in the basis or, if
            that leaves directions out, in the parameters' coordinates. ``None``: not
            kept.
        agreement: Of its gradients in the last step, see ``damping_mode`` of
            :class:`ekfac.EKFAC`; 1 before it, and where it is not measured.
        radial: Average of how much of its gradients lies along its weights, ``[2]``
            (:mod:`ekfac.curvature.radial`).
        scale_factor: What the damping is multiplied by for that.
    """

    def __init__(
        self,
        block: Block,
        bank: Callable[..., Tensor],
        held: Placement = EVERYTHING,
        rank: float | None = None,
        storage: Storage = "full",
    ) -> None:
        self.block, self.held, self.rank = block, held, rank
        self.wide = False
        self.storage = storage
        b, d_out, d_in = block.shape
        self.truncated = truncates(block, rank)
        own = block.factor_shape[0]
        diagonal_in, diagonal_out = block.diagonal
        shapes = {
            "A": (own, d_in) if diagonal_in else (own, d_in, d_in),
            "G": (own, d_out) if diagonal_out else (own, d_out, d_out),
        }
        factors, bases, scalings = (bank if there else absent for there in held[:3])
        self.averages = {
            key: self._factor(factors, shape, bank(1)[0])
            for key, shape in shapes.items()
        }
        self.version = {"factors": 0, "basis": 0, "scalings": 0}
        self.concentrated = False
        self.changes = 0
        self.stack: object = None
        self.momentum: Average | None = None
        self.agreement: Tensor | float = 1.0
        self.radial = bank(2)
        self.scale_factor = scale_factor(self.radial)
        self._spaces: dict[tuple[str, bool], Spaces | None] = {}
        self._completed: dict[str, tuple[int, Tensor]] = {}
        entries, columns = (d_out, d_in), (d_out, d_in)
        if self.truncated:  # no banks: shapes change
            bases, scalings = (self._zeros if there else absent for there in held[1:3])
            entries, columns = (1, 1), (0, 0)
        low = self.storage == "bfloat16" and held.bases
        vectors = partial(self._zeros, dtype=torch.bfloat16) if low else bases
        self.averages["s"] = Average(scalings(b, *entries), bank(1)[0])
        self._bases = {
            "Q_A": None if diagonal_in else vectors(own, d_in, columns[1]),
            "Q_G": None if diagonal_out else vectors(own, d_out, columns[0]),
        }
        self._values = {"A": bases(own, entries[1]), "G": bases(own, entries[0])}

    def _factor(
        self, bank: Callable[..., Tensor], shape: tuple[int, ...], weight: Tensor
    ) -> Average:
        """Return the average of a factor, as it is stored."""
        stored = _stored_shape(shape, self.storage)
        if stored == shape:
            return Average(bank(*shape), weight)
        # Never in bfloat16, whose rounding of large entries hides small eigenvalues.
        zeros = weight.new_zeros(stored) if self.held.factors else absent(*stored)
        return PackedAverage(zeros, weight, shape[-1])

    def _repeated(self, factor: Tensor) -> Tensor:
        """Return what all blocks share ``[1, *]`` as ``[b, *]``, without a copy."""
        if not self.block.shared:
            return factor
        return factor.expand(self.block.shape[0], *factor.shape[1:])

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.averages["A"].weight.new_zeros(shape, dtype=dtype)

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
        """Input factor ``(1/(N S)) sum a a^T``, ``[b, d_in, d_in]`` or diagonal."""
        return self.averages["A"].read()

    @property
    def G(self) -> Tensor | None:
        """Output factor ``(1/N) sum g g^T``, ``[b, d_out, d_out]`` or diagonal."""
        factor = self.averages["G"].read()
        return None if factor is None else self._repeated(factor)

    @property
    def Q_A(self) -> Tensor | None:
        """Eigenvectors of ``A`` in columns, ``[b, d_in, d_in]``, or ``None``.

        There is none of a diagonal factor. A truncated basis is completed by any
        orthonormal vectors, which come first.
        """
        return self._complete("A") if self.ready else None

    @property
    def Q_G(self) -> Tensor | None:
        """Eigenvectors of ``G`` in columns, ``[b, d_out, d_out]``, or ``None``."""
        basis = self._complete("G") if self.ready else None
        return None if basis is None else self._repeated(basis)

    @property
    def eigenvalues_A(self) -> Tensor:
        """Eigenvalues of ``A`` when the basis was refreshed, ``[b or 1, d_in]``.

        In a truncated basis, those of the complement are their mean.
        """
        return self._spread(self._values["A"], "A")

    @property
    def eigenvalues_G(self) -> Tensor:
        """Eigenvalues of ``G`` when the basis was refreshed, ``[b, d_out]``."""
        return self._repeated(self._spread(self._values["G"], "G"))

    @property
    def s(self) -> Tensor | None:
        """Scalings in the basis, ``[b, d_out, d_in]``."""
        scalings = self.averages["s"].read()
        if scalings is None or not self.truncated:
            return scalings
        return scalings[:, self._places("G")][:, :, self._places("A")]

    @property
    def damping_factor(self) -> Tensor:
        """What ``damping_mode="adaptive"`` multiplied the last step's damping by."""
        return self.agreement * self.scale_factor

    @property
    def scale_free(self) -> bool:
        """Whether its loss does not depend on the scale of its weights."""
        return bool(is_free_of_scale(self.radial))

    @property
    def ready(self) -> bool:
        """Whether there is an eigenbasis."""
        return self.version["basis"] > 0

    def basis(self, side: str) -> Tensor | None:
        """Return ``Q_A`` or ``Q_G``, ready or not: the storage, or a copy of it.

        It is a copy, in the layer's type, where bases are stored in another.
        """
        stored = self._bases[f"Q_{side}"]
        return None if stored is None else stored.to(self.dtype)

    def set_basis_(self, side: str, vectors: Tensor) -> None:
        """Overwrite ``Q_A`` or ``Q_G``, of a basis that is not truncated."""
        stored = self._bases[f"Q_{side}"]
        assert stored is not None
        stored.copy_(vectors)

    def values(self, side: str) -> Tensor:
        """Return the storage of the eigenvalues."""
        return self._values[side]

    def kronecker_scalings(self, out: Tensor | None = None) -> Tensor:
        """Return the eigenvalues of ``A (x) G`` in the scalings' shape, in ``out``."""
        rows, columns = self._repeated(self._values["G"]), self._values["A"]
        return torch.mul(rows.unsqueeze(-1), columns.unsqueeze(-2), out=out)

    # -- degenerate eigenspaces -------------------------------------------------------

    def note_eigenvalues(self) -> None:
        """Forget what followed from the last basis; to be called after every change."""
        self.changes += 1
        self._spaces.clear()
        basis, values = self.basis("G"), self._values["G"]
        if basis is not None and not values.is_meta:
            self.concentrated = share_on_axes(basis, values) > 0.5

    def shared(self, scalings: Tensor, *, pooled: bool = False) -> Tensor:
        """Return :meth:`share_` of a copy, or the scalings where nothing is shared."""
        if all(self.spaces(side, pooled=pooled) is None for side in ("G", "A")):
            return scalings
        return self.share_(scalings.clone(), pooled=pooled)

    def share_(self, scalings: Tensor, *, pooled: bool = False) -> Tensor:
        """Overwrite scalings by their means over degenerate eigenspaces; return them.

        Equal eigenvalues leave the basis of their space to chance. With one scaling for
        each pair of spaces a step is a function of the gradients, whatever basis was
        chosen.

        Args:
            scalings: In their own shape.
            pooled: Eigenvectors below ``POOLED`` of the mean eigenvalue are one space
                too, with the complement: their scalings are mostly noise.
        """
        for side, dim in (("G", -2), ("A", -1)):
            if (spaces := self.spaces(side, pooled=pooled)) is not None:
                spaces.average_(scalings, dim)
        return scalings

    def spaces(self, side: str, *, pooled: bool) -> Spaces | None:
        """Return the spaces of one side that :meth:`share_` averages over, if any."""
        values = self._values[side]
        if self._bases[f"Q_{side}"] is None or values.is_meta:
            return None
        if (side, pooled) not in self._spaces:
            weights = self._weights(side)
            first, share = (0, POOLED) if pooled else (int(weights is not None), 0.0)
            self._spaces[side, pooled] = degenerate(values, first, share, weights)
        return self._spaces[side, pooled]

    def _weights(self, side: str) -> Tensor | None:
        """Return how many directions a truncated side's entries have, ``[1 + r]``."""
        return counts(self._stored(side)) if self.complement(side) else None

    # -- truncated bases --------------------------------------------------------------

    def complement(self, side: str) -> int:
        """Return how many directions the basis leaves out, which share one scaling."""
        basis = self._bases[f"Q_{side}"]
        return 0 if basis is None else basis.shape[-2] - basis.shape[-1]

    @property
    def complete(self) -> bool:
        """Whether there is a basis, and it leaves no direction out."""
        return self.ready and not (self.complement("G") or self.complement("A"))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all directions of values in the scalings' shape."""
        if not self.truncated:
            return values.mean()
        left, right = counts(self._stored("G")), counts(self._stored("A"))
        weighted = (left.unsqueeze(-1) * right * values).sum()
        _, d_out, d_in = self.block.shape
        return weighted / (len(values) * d_out * d_in)

    def replace_basis(self, side: str, values: Tensor, vectors: Tensor) -> None:
        """Replace one side of a truncated basis by another, of any rank.

        Scalings that another process holds get the shape that goes with it.
        """
        stored = self._bases[f"Q_{side}"]
        assert stored is not None
        # One layout, whatever made it or saved it: products round alike.
        self._bases[f"Q_{side}"] = vectors.to(stored.dtype).contiguous()
        self._values[side] = values
        scalings = self.averages["s"]
        if not scalings.held:
            entries = (self._values[side].shape[-1] for side in ("G", "A"))
            scalings.total = absent(len(scalings.total), *entries)

    def _stored(self, side: str) -> Tensor:
        basis = self.basis(side)
        assert basis is not None
        return basis

    def _places(self, side: str) -> Tensor:
        return places(self._stored(side))

    def _spread(self, values: Tensor, side: str) -> Tensor:
        if not self.truncated:
            return values
        if values.is_meta:
            return values.new_empty(*values.shape[:-1], self._stored(side).shape[-2])
        return values[..., self._places(side)]

    def _complete(self, side: str) -> Tensor | None:
        """Return the basis with all its columns."""
        stored = self.basis(side)
        if stored is None or not self.truncated:
            return stored
        version, complete = self._completed.get(side, (-1, stored))
        if version != self.version["basis"]:
            complete = completed(stored)
            self._completed[side] = (self.version["basis"], complete)
        return complete

    # ---------------------------------------------------------------------------------

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
        for name, slot, tensor, part in zip(
            self.block.parameters, slots, wholes, parts, strict=True
        ):
            if slot.rows is None:
                result[name] = part
            else:
                full = part.new_zeros(tensor.shape)
                slot.of(full).copy_(part)
                result[name] = full
        return result

    def _tensors(self) -> dict[str, Tensor]:
        """Return the storage by the names of the state dict."""
        tensors = {k: v for k, v in self._bases.items() if v is not None}
        for key, average in self.averages.items():
            if average.held:
                tensors |= {key: average.total, f"{key}_weight": average.weight}
        if self.momentum is not None:
            average = self.momentum
            tensors |= {"momentum": average.total, "momentum_weight": average.weight}
        tensors |= {f"eigenvalues_{side}": v for side, v in self._values.items()}
        tensors["radial"] = self.radial
        return {key: t for key, t in tensors.items() if not t.is_meta}

    @property
    def device(self) -> torch.device:
        """The device of the curvature."""
        return self.averages["A"].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the curvature, as it is read."""
        return self.averages["A"].weight.dtype

    @property
    def misplaced(self) -> bool:
        """Whether the parameters have another device or type than the curvature."""
        weight, dtype = self.block.tensors()[0], self.dtype
        if self.device != weight.device:
            return True
        if self.wide or weight.dtype != dtype:
            return dtype != (torch.float64 if self.wide else self.block.dtype)
        return False

    def bytes(self) -> int:
        """Return the memory of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def state_dict(self) -> dict[str, Any]:
        """Return copies as plain tensors and numbers."""
        state: dict[str, Any] = {**self._tensors(), "version": dict(self.version)}
        state |= {"storage": self.storage, "wide": self.wide}
        if self.truncated:  # known also where the bases are another process's
            state["columns"] = {s: self._stored(s).shape[-1] for s in ("A", "G")}
        return self._schema(state).write(state)

    def schema(self, state: Any, key: str = "", steps: int | None = None) -> Record:
        """Return what a saved state of this layer has to be.

        Args:
            state: The saved one: it says how many columns a truncated basis has, how
                factors are stored, and whether there is a basis.
            key: Its path, for errors.
            steps: How many steps had been done; no version is later.

        Raises:
            StateMismatchError: If the entries that say this are missing or wrong.
        """
        version, number = entry(state, key, "version"), Number(int, 0, steps)
        Record(dict.fromkeys(self.version, number)).check(version, f"{key}.version")
        storage = entry(state, key, "storage")
        Choice(*get_args(Storage)).check(storage, f"{key}.storage")
        Choice(False, True).check(entry(state, key, "wide"), f"{key}.wide")
        if self.truncated:
            advice = "Load it with the same rank (all or some of the eigenvectors)."
            Record({"columns": Anything()}, more=True, advice=advice).check(state, key)
            widths = {s: self._stored(s).shape[-2] for s in ("A", "G")}
            Record({s: Number(int, 0, d) for s, d in widths.items()}).check(
                state["columns"], f"{key}.columns"
            )
        return self._schema(state)

    def _schema(self, state: Mapping[str, Any]) -> Record:
        shapes = {k: tuple(tensor.shape) for k, tensor in self._tensors().items()}
        columns = self._shapes(state.get("columns", {}) if self.truncated else {})
        shapes |= {k: shape for k, shape in columns.items() if k in shapes}
        for side, average in self.averages.items():
            shape = tuple(average.shape)
            if side in shapes and side != "s":
                shapes[side] = _stored_shape(shape, state["storage"])
        shapes |= {"s": columns.get("s", tuple(self.averages["s"].shape))}
        shapes |= {"s_weight": (), "momentum": self.block.shape, "momentum_weight": ()}
        ready = state["version"]["basis"] > 0
        diagonal = dict(zip(("A", "G"), self.block.diagonal, strict=True))
        dense = {side for side in diagonal if not diagonal[side]}
        low = {"Q_A", "Q_G"} if state["storage"] == "bfloat16" else set()
        kept = torch.float64 if state["wide"] else None
        fields: dict[str, Field] = {}
        for key, shape in shapes.items():
            dtype = torch.bfloat16 if key in low else kept
            fields[key] = _field(key, shape, dtype, ready=ready, dense=key in dense)
        other = [key for key in fields if key not in low]
        fields["version"] = Record(dict.fromkeys(self.version, Number(int, 0)))
        fields["storage"] = Choice(*get_args(Storage))
        fields["wide"] = Choice(False, True)
        if self.truncated:
            fields["columns"] = Record(dict.fromkeys(("A", "G"), Number(int, 0)))
        return Record(
            fields,
            optional=OPTIONAL,
            same_dtype=(other,),
            rules=(_weights_match_versions, _with_their_weights),
            advice="Load the state of the same model, with the same max_dim and rank.",
        )

    def _shapes(self, columns: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a truncated basis with so many columns a side."""
        shapes: dict[str, tuple[int, ...]] = {}
        entries = {}
        for side, count in columns.items():
            b, d, _ = self._stored(side).shape
            entries[side] = count + int(count < d)
            shapes[f"Q_{side}"] = (b, d, count)
            shapes[f"eigenvalues_{side}"] = (b, entries[side])
        if columns:
            shapes["s"] = (self.block.shape[0], entries["G"], entries["A"])
        return shapes

    def update_schema(self, columns: Mapping[str, int]) -> Record:
        """Return what the saved tensors of a pending basis of this layer have to be.

        Args:
            columns: How many new eigenvectors there are, of the sides that have some.
        """
        fields: dict[str, Field] = {}
        for side, values in self._values.items():
            entries: int | None = values.shape[-1]
            basis = self._bases[f"Q_{side}"]
            if side in columns and basis is not None:
                count, (*lead, d) = columns[side], basis.shape[:-1]
                fields[f"Q_{side}"] = TensorField((*lead, d, count), orthonormal=True)
                entries = count + int(count < d)
            elif self.truncated:
                entries = None
            shape = (*values.shape[:-1], entries)
            fields[f"eigenvalues_{side}"] = TensorField(shape, minimum=0)
        return Record(fields, same_dtype=(tuple(fields),))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy ``state`` in, to this layer's device and dtype, or raise."""
        self.schema(state).check(state)
        self.copy_state_(state)

    def _in_own_precision(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a saved state with bases of less precision made orthonormal again."""
        bases = {
            key: _orthonormal(state[key].to(self.device, self.dtype))
            for key, stored in self._bases.items()
            if stored is not None
            and key in state
            and state["version"]["basis"] > 0
            and state[key].element_size() < stored.element_size()
        }
        return {**state, **bases}

    def copy_state_(self, state: Mapping[str, Any]) -> None:
        """Copy in a state that has been checked."""
        self._completed.clear()
        self.agreement = 1.0
        if "momentum" in state:
            start_momentum([self])
        else:
            self.momentum = None
        state = self._in_own_precision(state)
        if self.truncated:
            shapes, scalings = self._shapes(state["columns"]), self.averages["s"]
            scalings.total = scalings.total.new_empty(shapes["s"])
            for side, values in self._values.items():
                self._values[side] = values.new_empty(shapes[f"eigenvalues_{side}"])
                stored = self._bases[f"Q_{side}"]
                assert stored is not None
                self._bases[f"Q_{side}"] = stored.new_empty(shapes[f"Q_{side}"])
        self.averages["s"].clear_()
        for key, tensor in self._tensors().items():
            if key not in state:  # scalings, of which there are none yet
                continue
            average = self.averages.get(key)
            if average is None or tensor.shape == state[key].shape:
                tensor.copy_(state[key])
            elif len(average.shape) == state[key].dim():
                average.set_(state[key].to(self.device, self.dtype))
            else:
                stored = state[key].to(self.device, self.dtype)
                average.set_(kernels.unpack_symmetric(stored))
        self.version = {key: int(value) for key, value in state["version"].items()}
        self.scale_factor = scale_factor(self.radial)
        for key, average in self.averages.items():
            kind = "scalings" if key == "s" else "factors"
            never = average.weight if average.held else self.version[kind]
            average.empty = bool(never == 0)
        if self.momentum is not None:
            self.momentum.empty = bool(self.momentum.weight == 0)
        self.note_eigenvalues()


def start_momentum(layers: Iterable[LayerCurvature]) -> None:
    """Allocate the layers' averages of the gradients, where they are held.

    Those of one shape lie side by side, as their scalings do.
    """
    alike: dict[Hashable, list[LayerCurvature]] = {}
    for layer in layers:
        if layer.momentum is None and layer.held.momentum:
            key = layer.block.shape, layer.device, layer.dtype
            alike.setdefault(key, []).append(layer)
    for members in alike.values():
        (b, *sides), like = members[0].block.shape, members[0].averages["A"].weight
        shape = (len(members) * b, *sides)
        totals = kernels.aligned_empty(shape, like).zero_().split(b)
        weights = like.new_zeros(len(members)).unbind()
        for layer, total, weight in zip(members, totals, weights, strict=True):
            layer.momentum = Average(total, weight)


# Entries that a layer may lack: K-FAC has no scalings, an optimizer without momentum no
# average of the gradients, and some of several ranks have neither.
OPTIONAL = ("s", "s_weight", "momentum", "momentum_weight")


def _orthonormal(basis: Tensor) -> Tensor:
    """Return a basis without its rounding error, to first order.

    One step of Newton and Schulz goes towards the nearest orthogonal matrix.
    """
    return basis @ (1.5 * torch.eye(basis.shape[-1]).to(basis) - basis.mT @ basis / 2)


def _stored_shape(shape: tuple[int, ...], storage: Storage) -> tuple[int, ...]:
    """Return the shape that a factor ``[b, d]`` or ``[b, d, d]`` is stored in."""
    if storage == "full" or len(shape) == 2:
        return shape
    return shape[0], kernels.packed_size(shape[1:], symmetric=True)


def _field(
    key: str,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    *,
    ready: bool,
    dense: bool,
) -> TensorField:
    """Return what the saved tensor of a layer with the name ``key`` has to be.

    Before there is a basis (``ready``) its storage is zero. Factors are ``dense`` or
    diagonal.
    """
    if key.endswith("_weight"):
        return TensorField(shape, minimum=0, maximum=1 + 1e-3)
    if dense and key in ("A", "G"):  # a matrix, or one half of it
        return TensorField(shape, dtype, symmetric=len(shape) == 3)
    if key == "momentum":
        return TensorField(shape)
    if key == "radial":
        return TensorField(shape, minimum=0, maximum=1)
    if not ready and key not in ("A", "G", "s"):
        return TensorField(shape, dtype, minimum=0, maximum=0)
    if key.startswith("Q_"):
        return TensorField(shape, dtype, orthonormal=True)
    return TensorField(shape, minimum=0)


def _weights_match_versions(state: Mapping[str, Any], key: str) -> None:
    """Raise where an average's weight and the step of its last sample disagree."""
    version = state["version"]
    for average, kind in (("A", "factors"), ("G", "factors"), ("s", "scalings")):
        weight = state.get(f"{average}_weight")
        # Scalings are started from the eigenvalues before their first sample.
        started = average == "s" and version[kind] == 0
        if weight is None or started:
            continue
        if bool(weight > 0) != (version[kind] > 0):
            raise StateMismatchError.at(
                f"{key}.version.{kind}",
                str(version[kind]),
                f"in agreement with a weight of {float(weight):.3g} of {average!r}",
            )
    if version["basis"] > 0 and version["factors"] == 0:
        raise StateMismatchError.at(
            f"{key}.version.basis", str(version["basis"]), "0 where there is no factor"
        )


def _with_their_weights(state: Mapping[str, Any], key: str) -> None:
    """Raise where an average that may be missing has no weight, or a weight no sum."""
    for name in ("s", "momentum"):
        if (name in state) != (f"{name}_weight" in state):
            present, absent = (name, f"{name}_weight")
            if name not in state:
                present, absent = absent, present
            raise StateMismatchError.at(
                f"{key}.{absent}", "missing", f"present, since {present!r} is"
            )
