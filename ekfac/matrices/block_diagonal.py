"""Block-diagonal matrices; each block has a structure of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ekfac.errors import StateMismatchError
from ekfac.matrices.base import CurvatureMatrix, MatrixField, Stack, restored
from ekfac.state_schema import ListOf, MapOf, Record, Text, joined
from ekfac.vectors import VectorSpace


class BlockDiagonalMatrix(CurvatureMatrix):
    """A matrix of blocks over disjoint entries of the parameters, zero between them.

    The blocks may be dense (a block-diagonal matrix), K-FAC or EKFAC blocks of the
    layers, or any mixture. Two blocks may hold different entries of one parameter, like
    the projections packed in an attention's ``in_proj_weight``, but no entry belongs to
    two. Parameters of no block have zero curvature.

    Args:
        space: Names and shapes of the vectors it acts on.
        blocks: Matrices by name (of the layer, say), each over some of the parameters.

    Raises:
        ValueError: If there are no blocks.
        StateMismatchError: If blocks overlap or are over other parameters.
    """

    kind = "blocks"

    def __init__(
        self, space: VectorSpace, blocks: Mapping[str, CurvatureMatrix]
    ) -> None:
        super().__init__(space)
        if not blocks:
            raise ValueError("A block-diagonal matrix needs at least one block, got 0.")
        self.blocks = dict(blocks)
        entries: Stack = {}
        for key, block in self.blocks.items():
            self._check_block(key, block)
            for name, mask in _mask(block).items():
                entries[name] = entries[name] + mask if name in entries else mask
                if bool((entries[name] > 1).any()):
                    raise StateMismatchError(
                        f"Block {key!r} holds entries of {name!r} that another block "
                        "holds already."
                    )

    def _check_block(self, key: str, block: CurvatureMatrix) -> None:
        """Raise unless ``block`` is over parameters of the space, and zero outside."""
        for name, shape in block.space.shapes.items():
            expected = self.space.shapes.get(name)
            if shape != expected:
                actual = "no such parameter" if expected is None else list(expected)
                raise StateMismatchError(
                    f"Block {key!r} is over {name!r} of shape {list(shape)}; the "
                    f"matrix has {actual}."
                )
        if block.outside:
            raise StateMismatchError(
                f"Block {key!r} is {block.outside:g} times the identity on entries "
                "that it does not cover; take the power of the whole matrix instead."
            )

    @property
    def structure(self) -> str:
        """The blocks' structure: ``"block_diagonal"`` if dense, or ``"mixed"``."""
        structures = {block.structure for block in self.blocks.values()}
        if structures == {"dense"}:
            return "block_diagonal"
        return structures.pop() if len(structures) == 1 else "mixed"

    @property
    def covered(self) -> int:
        """Number of entries of a vector that the blocks cover."""
        return sum(block.covered for block in self.blocks.values())

    def _tensor(self) -> Tensor:
        """Return a tensor of the most precise block's dtype."""
        types = (block.dtype for block in self.blocks.values())
        dtype = functools.reduce(torch.promote_types, types)
        return torch.empty(
            0, dtype=dtype, device=next(iter(self.blocks.values())).device
        )

    # ------------------------------------------------- block by block, summed

    def _gathered(self, parts: Iterable[Stack], count: int) -> Stack:
        """Return the sum of the blocks' stacks of ``count`` vectors."""
        result: Stack = {}
        like = self._tensor()
        for part in parts:
            for name, rows in part.items():
                rows = rows.to(like.dtype)
                result[name] = result[name] + rows if name in result else rows
        for name, shape in self.space.shapes.items():
            if name not in result:
                result[name] = like.new_zeros(count, *shape)
        return result

    def _each(
        self, function: Callable[[CurvatureMatrix, Stack], Stack], stack: Stack
    ) -> Stack:
        """Return the sum of ``function(block, the block's part of stack)``."""
        count = next(iter(stack.values())).shape[0]
        blocks = self.blocks.values()
        return self._gathered((function(b, _part(b, stack)) for b in blocks), count)

    def _total(self, function: Callable[[CurvatureMatrix], Tensor]) -> Tensor:
        """Return the sum of ``function(block)``."""
        return torch.stack([function(b) for b in self.blocks.values()]).sum(dim=0)

    def _multiply(self, stack: Stack) -> Stack:
        return self._each(lambda block, part: block._multiply(part), stack)

    def _project(self, stack: Stack) -> Stack:
        return self._each(lambda block, part: block._project(part), stack)

    def _quadratic(self, stack: Stack) -> Tensor:
        return self._total(lambda block: block._quadratic(_part(block, stack)))

    def _solve(self, stack: Stack, damping: float) -> Stack:
        return self._each(lambda block, part: block._solve(part, damping), stack)

    def _solve_factored(self, stack: Stack, damping: float) -> Stack:
        return self._each(lambda b, part: b._solve_factored(part, damping), stack)

    def _inverse_root(self, stack: Stack, damping: float) -> Stack:
        return self._each(lambda block, part: block._inverse_root(part, damping), stack)

    def _trace(self) -> Tensor:
        return self._total(lambda block: block._trace())

    def _squared_norm(self) -> Tensor:
        return self._total(lambda block: block._squared_norm())

    def _logdet(self, damping: float) -> Tensor:
        return self._total(lambda block: block._logdet(damping))

    def _diagonal(self) -> Stack:
        return self._gathered((b._diagonal() for b in self.blocks.values()), 1)

    def _eigenvalues(self) -> Tensor:
        return torch.cat([block._eigenvalues() for block in self.blocks.values()])

    def _top(self, k: int) -> tuple[Tensor, Stack]:
        pairs = [block._top(min(k, block.covered)) for block in self.blocks.values()]
        best = torch.cat([values for values, _ in pairs]).topk(k)
        like, shapes = self._tensor(), self.space.shapes.items()
        result = {name: like.new_zeros(k, *shape) for name, shape in shapes}
        start = 0
        for values, stack in pairs:
            end = start + values.shape[0]
            members = ((best.indices >= start) & (best.indices < end)).nonzero()[:, 0]
            for name, rows in stack.items():
                result[name][members] = rows[best.indices[members] - start].to(
                    like.dtype
                )
            start = end
        return best.values, result

    # -------------------------------------------------- block by block, kept

    def _mapped(self, function: Callable[[CurvatureMatrix], CurvatureMatrix]) -> Self:
        """Return the matrix of ``function(block)``."""
        blocks = {key: function(block) for key, block in self.blocks.items()}
        return type(self)(self.space, blocks)

    def _power_matrix(self, exponent: float, damping: float) -> Self:
        return self._mapped(lambda block: block._power_matrix(exponent, damping))

    def _scaled(self, scalar: float) -> Self:
        return self._mapped(lambda block: block * scalar)

    def _converted(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self._mapped(lambda block: block._converted(function))

    def _sum(self, other: Self) -> Self:
        self._require_same_blocks(other)
        blocks = {key: block + other.blocks[key] for key, block in self.blocks.items()}
        return type(self)(self.space, blocks)

    def _merged(self, others: Sequence[Self], weights: Sequence[float]) -> Self:
        for other in others:
            self._require_same_blocks(other)
        blocks = {
            key: block._merged([other.blocks[key] for other in others], weights)
            for key, block in self.blocks.items()
        }
        return type(self)(self.space, blocks)

    def _require_same_blocks(self, other: Self) -> None:
        """Raise unless ``other`` has blocks of the same names and structures."""
        structures = {key: block.structure for key, block in self.blocks.items()}
        others = {key: block.structure for key, block in other.blocks.items()}
        if structures != others:
            different = {*structures.items()} ^ {*others.items()}
            self._unsupported(
                f"sum with one of other blocks (they differ in {sorted(different)})",
                "estimate both with the same structure, or use ImplicitMatrix.of("
                "matrix), whose sums hold any structures",
            )

    def _state(self) -> dict[str, Any]:
        blocks = {key: block.state_dict() for key, block in self.blocks.items()}
        return {"blocks": blocks, "layers": list(blocks)}

    @classmethod
    def _schema(cls, space: VectorSpace, state: Mapping[str, Any], key: str) -> Record:
        fields = {"blocks": MapOf(MatrixField()), "layers": ListOf(Text())}
        return Record(fields, rules=(_complete,))

    @classmethod
    def _from_state(cls, space: VectorSpace, state: Mapping[str, Any]) -> Self:
        blocks = {k: restored(block) for k, block in state["blocks"].items()}
        return cls(space, blocks)


def _complete(state: Mapping[str, Any], key: str) -> None:
    """Raise unless all blocks are there, at least one."""
    if not state["blocks"] or list(state["blocks"]) != list(state["layers"]):
        actual, expected = f"of {list(state['blocks'])}", f"of {state['layers']}"
        raise StateMismatchError.at(joined(key, "blocks"), actual, expected)


def _part(block: CurvatureMatrix, stack: Stack) -> Stack:
    """Return the part of a stack that a block acts on, in its dtype."""
    return {name: stack[name].to(block.dtype) for name in block.space.names}


def _mask(block: CurvatureMatrix) -> Stack:
    """Return a stack of one that is 1 where ``block`` covers an entry, else 0."""
    shapes = block.space.shapes.items()
    if block.covered == block.size:
        return {name: torch.ones(()).expand(1, *shape) for name, shape in shapes}
    return block._project({name: torch.ones(1, *shape) for name, shape in shapes})
