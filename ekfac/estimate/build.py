"""From data to a curvature matrix of any structure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.curvature import Counters, LayerCurvature
from ekfac.curvature.eigenbasis import bases_alone
from ekfac.curvature.normal_form import Pair
from ekfac.curvature.state import check_rank
from ekfac.curvature.statistics import BatchStatistics, factors
from ekfac.estimate.data import Batch, Data, choose, outputs_of, prepared, space_of
from ekfac.estimate.examples import BUDGET, example_rows
from ekfac.estimate.layers import Layout, StructureChoice, lay_out, whole
from ekfac.estimate.moments import MomentSums, packing_of
from ekfac.estimate.products import fisher_products
from ekfac.estimate.recorder import Recorder, nothing
from ekfac.estimate.sources import Source, check_finite
from ekfac.layers import Block
from ekfac.likelihoods import Terms, _real
from ekfac.matrices import (
    BlockDiagonalMatrix,
    CurvatureMatrix,
    DenseMatrix,
    DiagonalMatrix,
    EKFACMatrix,
    KFACMatrix,
    KroneckerFactors,
    LowRankMatrix,
    QuasiDiagonalMatrix,
)
from ekfac.vectors import VectorSpace


@dataclass
class Problem:
    """What an estimate is made of.

    Attributes:
        model: The model.
        parameters: The chosen parameters by name.
        data: The batches.
        source: The matrices of the outputs.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    data: Data
    source: Source

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Iterable[Any],
        source: Source,
        parameters: Iterable[str] | None,
        progress: bool,
    ) -> Problem:
        """Return the problem of a user's arguments."""
        chosen = choose(model, parameters)
        device = next(iter(chosen.values())).device
        return cls(model, chosen, Data(data, device, progress), source)

    @property
    def space(self) -> VectorSpace:
        """The space of the chosen parameters."""
        return space_of(self.parameters)

    @contextmanager
    def passes(self, purpose: str) -> Iterator[Iterator[Batch]]:
        """Open a pass over the data with the model prepared for it."""
        with (
            prepared(self.model, self.parameters),
            self.data.batches(purpose) as batches,
        ):
            yield batches


def build(
    problem: Problem,
    structure: StructureChoice,
    fallback: Any,
    sharing: str,
    preconditioner: CurvatureMatrix | None,
    rank: float | None = None,
) -> CurvatureMatrix:
    """Return the matrix of a problem in a structure."""
    check_rank(rank)
    chosen = structure.values() if isinstance(structure, Mapping) else [structure]
    if rank is not None and "ekfac" not in chosen:
        raise ValueError(
            f"rank={rank!r} truncates the eigenbases of structure='ekfac' alone, got "
            f"{structure=}."
        )
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"sharing must be 'expand' or 'reduce', got {sharing!r}.")
    single = whole(structure)
    if preconditioner is not None and single != "implicit":
        raise ValueError(
            "A preconditioner speeds up the solves of structure='implicit' alone, got "
            f"{structure=}."
        )
    if single == "implicit":
        return fisher_products(
            problem.model,
            problem.parameters,
            problem.data,
            problem.source,
            preconditioner,
        )
    with prepared(problem.model, problem.parameters):
        layout = (
            Layout(groups={"": (single, list(problem.parameters))})
            if single
            else lay_out(problem.model, problem.parameters, structure, fallback)
        )
    estimate = _Estimate(problem, layout, sharing, rank)
    estimate.run()
    if single:
        return estimate.group("", problem.space)
    return estimate.matrix()


class _Estimate:
    """The sums over the data, for every layer in its structure."""

    def __init__(
        self, problem: Problem, layout: Layout, sharing: str, rank: float | None
    ) -> None:
        self.problem, self.layout, self.sharing = problem, layout, sharing
        self.rank = rank
        self.bases: dict[Block, LayerCurvature] = {}
        self.factors: dict[Block, KroneckerFactors] = {}
        self.statistics: dict[Block, BatchStatistics] = {}
        self.moments = {
            block: MomentSums(block, s == "quasi_diagonal" and _has_bias(block))
            for block, s in layout.blocks.items()
            if s not in ("kfac", "ekfac")
        }
        self.unresolved: dict[Block, None] = {}
        self.separable = not self.moments
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {}
        self.pending: dict[str, list[Tensor]] = {}
        self.examples = torch.tensor(0)

    # -- passes over the data ---------------------------------------------------------

    def run(self) -> None:
        """Take all sums."""
        blocks = list(self.layout.blocks)
        recorder = Recorder(self.problem.model, blocks)
        with closing(recorder):
            with self.problem.passes("curvature") as batches:
                for batch in batches:
                    self._first(recorder, batch)
            if not int(self.examples):
                raise ValueError("No example of data has a target that counts.")
            self._commit_factors()
            scaled = [b for b, s in self.layout.blocks.items() if s == "ekfac"]
            scaled = [b for b in scaled if b in self.statistics]
            if scaled:
                with self.problem.passes("scalings") as batches:
                    for batch in batches:
                        self._second(recorder, batch, scaled)
                self._commit_scalings(scaled)
        for name in list(self.pending):
            self._reduce(name)
        if self.unresolved:
            self._resolve()

    def _prepare(self, outputs: Tensor, batch: Batch) -> tuple[Terms, Iterator[Tensor]]:
        """Return which targets count and the pseudo-gradients, checked."""
        check_finite(outputs, "The model's outputs", batch)
        source = self.problem.source

        def checked() -> Iterator[Tensor]:
            for h in source.signed(outputs.detach(), batch):
                check_finite(h, "The gradients of the outputs", batch)
                yield h

        return source.terms(outputs.detach(), batch), checked()

    def _first(self, recorder: Recorder, batch: Batch) -> None:
        """Add factors, moments and rows of one batch."""
        outputs, recorded = recorder.forward(self.problem.model, batch.inputs)
        terms, pseudo = self._prepare(outputs, batch)
        self.examples = self.examples + terms.examples.cpu()
        if not self.separable and len(outputs) > 1:
            self.separable = True
            mixing = recorder.mixing(outputs, recorded, terms, nothing)
            self.unresolved.update((b, None) for b in self.moments if b in mixing)
        kept = list(pseudo) if self.layout.groups else None
        given = iter(kept) if kept is not None else pseudo
        if self.layout.blocks:
            recorder.send(outputs, recorded, given, terms, self._take)
        if kept is None:
            return
        names = [name for _, found in self.layout.groups.values() for name in found]
        chosen = {name: self.problem.parameters[name] for name in names}
        with recorder:
            for row in example_rows(self.problem.model, chosen, batch, outputs, kept):
                self._take_row(row)

    def _take(
        self, block: Block, pairs: Sequence[Pair], terms: Terms | None, repeated: bool
    ) -> None:
        if block in self.moments:
            if block not in self.unresolved and not self.moments[block].add(
                pairs, terms
            ):
                self.unresolved[block] = None
            return
        if block not in self.statistics:
            dtype = torch.promote_types(block.tensors()[0].dtype, torch.float32)
            self.statistics[block] = BatchStatistics(
                packing_of(block), dtype, sketched=False
            )
        self.statistics[block].add_factors(pairs, terms, self.sharing, repeated)

    def _take_row(self, rows: Tensor) -> None:
        """Add the gradients ``[K, P]`` of one example to every group."""
        sizes = [
            sum(self.problem.parameters[name].numel() for name in names)
            for _, names in self.layout.groups.values()
        ]
        parts = rows.split(sizes, dim=1)
        for (name, (structure, _)), part in zip(
            self.layout.groups.items(), parts, strict=True
        ):
            if structure == "low_rank":
                self.rows.setdefault(name, []).append(part)
            elif structure in ("dense", "block_diagonal"):
                waiting = self.pending.setdefault(name, [])
                waiting.append(part)
                if len(waiting) * part.numel() > min(BUDGET, 512 * part.shape[1]):
                    self._reduce(name)
            else:
                square = part.square().sum(dim=0)
                self.sums[name] = self.sums.get(name, torch.zeros_like(square)) + square

    def _reduce(self, name: str) -> None:
        """Add the second moment of the rows that wait."""
        rows = torch.cat(self.pending.pop(name))
        total = self._sum(name, rows.shape[1], rows.shape[1])
        self.sums[name] = total.addmm_(rows.mT, rows)  # autocast leaves it in place

    def _commit_factors(self) -> None:
        counters = Counters()
        for block, statistics in self.statistics.items():
            like = next(iter(statistics.sums.values())).grads
            assert like is not None
            n, one = self.examples.to(like), torch.ones_like(like[:1].sum())
            A, G = factors(statistics, n, one)
            statistics.sums.clear()
            if self.layout.blocks[block] == "kfac":
                self.factors[block] = KroneckerFactors(statistics.layer, A=A, G=G)
                continue
            given = {"A": A, "G": G}
            del A, G
            found = bases_alone(block, given, counters, self.rank)
            self.bases[block] = statistics.layer = found

    def _second(
        self, recorder: Recorder, batch: Batch, blocks: Sequence[Block]
    ) -> None:
        """Add the scalings of one batch."""
        outputs, recorded = recorder.forward(self.problem.model, batch.inputs)
        terms, pseudo = self._prepare(outputs, batch)
        recorder.send(outputs, recorded, pseudo, terms, self._take_scalings, blocks)

    def _take_scalings(
        self, block: Block, pairs: Sequence[Pair], terms: Terms | None, repeated: bool
    ) -> None:
        self.statistics[block].add_scalings(pairs, terms, squares=True)

    def _commit_scalings(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            found = self.statistics[block].scalings
            assert found is not None
            layer = self.bases[block]
            layer.averages["s"].update_(found / self.examples.to(found), 0.0)
            layer.version["scalings"] = 1
            self.statistics[block].scalings = None

    def _resolve(self) -> None:
        """Sum the moments of layers whose recorded calls mix the examples."""
        model, parameters = self.problem.model, self.problem.parameters
        blocks = list(self.unresolved)
        names = list(dict.fromkeys(n for b in blocks for n in b.parameters))
        chosen = {name: parameters[name] for name in names}
        space = space_of(chosen)
        for block in blocks:
            self.moments[block] = self.moments[block].fresh()
        with self.problem.passes("single examples") as batches:
            for batch in batches:
                outputs = outputs_of(model, batch.inputs)
                pseudo = list(self._prepare(outputs, batch)[1])
                for rows in example_rows(model, chosen, batch, outputs, pseudo):
                    for tensors in map(space.vector, rows):
                        self._add_example(blocks, tensors)

    def _add_example(
        self, blocks: Sequence[Block], gradient: Mapping[str, Tensor]
    ) -> None:
        """Add one gradient to the moments of ``blocks``."""
        for block in blocks:
            packed = packing_of(block).pack(gradient).unsqueeze(0)
            self.moments[block].add_gradients(packed)

    # -- results ----------------------------------------------------------------------

    def group(self, name: str, space: VectorSpace) -> CurvatureMatrix:
        """Return the matrix of a group of parameters over ``space``."""
        structure = self.layout.groups[name][0]
        n = int(self.examples)
        parameter = _real(self.problem.parameters[space.names[0]])
        if structure == "low_rank":
            empty = torch.zeros(0, space.size).to(parameter)
            rows = torch.cat([empty, *self.rows.get(name, [])])
            return LowRankMatrix(space, rows / n**0.5)
        return DenseMatrix(space, self._sum(name, space.size, space.size) / n)

    def matrix(self) -> CurvatureMatrix:
        """Return the matrix over all chosen parameters."""
        space, count = self.problem.space, int(self.examples)
        blocks: dict[str, CurvatureMatrix] = {}
        diagonals: dict[str, dict[str, Tensor]] = {}
        for block, structure in self.layout.blocks.items():
            if block in self.moments:
                self._add_moments(block, structure, blocks, diagonals, space)
            elif block in self.statistics:
                kind = EKFACMatrix if structure == "ekfac" else KFACMatrix
                part = space.subspace(block.parameters)
                found = self.factors.get(block)
                layer = self.bases[block] if found is None else found
                blocks[block.name] = kind(layer, part)
        for name, (structure, names) in self.layout.groups.items():
            own = space.subspace(names)
            if structure in ("diagonal", "quasi_diagonal"):
                entry = own.vector(self._sum(name, own.size) / count)
                diagonals.setdefault(name, {}).update(entry)
            else:
                blocks[_free(name, names, blocks)] = self.group(name, own)
        if not blocks:
            entries = {n: e for d in diagonals.values() for n, e in d.items()}
            for name, parameter in self.problem.parameters.items():
                entries.setdefault(name, torch.zeros_like(_real(parameter)).detach())
            return DiagonalMatrix(
                space.vector_type({name: entries[name] for name in space.names})
            )
        for name, entries in diagonals.items():
            vector = space.vector_type(entries)
            blocks[_free(name, list(entries), blocks)] = DiagonalMatrix(vector)
        return BlockDiagonalMatrix(space, blocks)

    def _sum(self, name: str, *shape: int) -> Tensor:
        """Return the sum for a group, zero where nothing came."""
        like = _real(next(iter(self.problem.parameters.values())))
        return self.sums.get(name, torch.zeros(shape).to(like))

    def _add_moments(
        self,
        block: Block,
        structure: str,
        blocks: dict[str, CurvatureMatrix],
        diagonals: dict[str, dict[str, Tensor]],
        space: VectorSpace,
    ) -> None:
        """Add the diagonal or quasi-diagonal part of one layer."""
        sums, packing = self.moments[block], packing_of(block)
        n = int(self.examples)
        if structure == "quasi_diagonal" and _has_bias(block):
            blocks[block.name] = QuasiDiagonalMatrix(
                packing,
                diagonal=sums.squares / n,
                cross=sums.products / n,
                space=space.subspace(block.parameters),
            )
            return
        owner = block.parameters[0].rpartition(".")[0]
        entries = diagonals.setdefault(owner, {})
        for name, tensor in packing.unpack(sums.squares / n).items():
            entries[name] = entries[name] + tensor if name in entries else tensor


def _has_bias(block: Block) -> bool:
    return block.adapter.bias is not None


def _free(name: str, parameters: Sequence[str], taken: Mapping[str, Any]) -> str:
    """Return a name for a block that no other has."""
    return parameters[0] if name in taken else name
