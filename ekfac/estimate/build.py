"""Curvature matrices of any structure, by passes over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ekfac import kernels
from ekfac.calls import LayerCall
from ekfac.curvature import Counters, LayerCurvature
from ekfac.curvature.eigenbasis import bases_alone
from ekfac.curvature.normal_form import (
    Rows,
    example_gradients,
    joined,
    normal_form,
    plus,
)
from ekfac.curvature.options import check_rank
from ekfac.curvature.statistics import BatchStatistics, factors
from ekfac.errors import NotReadyError
from ekfac.estimate.data import (
    NO_TARGETS,
    Batch,
    precision_of,
    predicted,
    prepared,
    space_of,
)
from ekfac.estimate.layout import (
    Layout,
    Recorder,
    Structure,
    StructureChoice,
    check_preconditioner,
    check_structure,
    lay_out,
)
from ekfac.estimate.output_hessians import Source, check_finite
from ekfac.estimate.products import (
    BUDGET,
    FisherProducts,
    Problem,
    example_rows,
    implicit_matrix,
)
from ekfac.layers import Block, ConvFactors
from ekfac.likelihoods import TargetMask
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


def build(
    problem: Problem,
    structure: StructureChoice,
    fallback: Structure | None,
    sharing: str,
    preconditioner: CurvatureMatrix | None,
    rank: float | None,
    conv_factors: ConvFactors,
) -> CurvatureMatrix:
    """Return the matrix of a problem in a structure; arguments as for ``fisher``."""
    if not isinstance(structure, Mapping):
        check_structure(structure, get_args(Structure))
    if fallback is not None:
        needs_none = ("dense", "block_diagonal", "diagonal", "low_rank")
        check_structure(fallback, needs_none, "fallback")
    problem.data.first()
    check_rank(rank)
    used = structure.values() if isinstance(structure, Mapping) else [structure]
    if rank is not None and "ekfac" not in used:
        raise ValueError(
            f"rank={rank!r} truncates the eigenbases of structure='ekfac' alone, got "
            f"{structure=}."
        )
    if conv_factors not in get_args(ConvFactors):
        raise ValueError(
            f"Invalid conv_factors: {conv_factors!r}; use one of "
            f"{list(get_args(ConvFactors))}."
        )
    kronecker = {"kfac", "ekfac"} & set(used) and "quasi_diagonal" not in used
    if conv_factors != "patches" and not kronecker:
        raise ValueError(
            f"{conv_factors=} is for structure='kfac' and 'ekfac', got {structure=}."
        )
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"sharing must be 'expand' or 'reduce', got {sharing!r}.")
    whole = ("dense", "low_rank", "implicit")  # over all parameters together
    single = structure if isinstance(structure, str) and structure in whole else None
    check_preconditioner(preconditioner, structure)
    if single == "implicit":
        return implicit_matrix(FisherProducts(problem), preconditioner)
    with prepared(problem.model, problem.parameters):
        if single:
            layout = Layout(groups={"": (single, list(problem.parameters))})
        else:
            layout = lay_out(
                problem.model, problem.parameters, structure, fallback, conv_factors
            )
    estimate = _Estimate(problem, layout, sharing, rank)
    estimate.run()
    matrix = estimate.group("", problem.space) if single else estimate.matrix()
    # The mean is over examples so far; a loss may be one over targets or weights.
    examples = float(estimate.examples)
    if estimate.weight == examples:
        return matrix
    return matrix * (examples / estimate.weight)


class _Estimate:
    """The sums over the data, for every layer in its structure.

    A diagonal sums the squares of gradients or another ``entry``: absolute values.
    """

    def __init__(
        self,
        problem: Problem,
        layout: Layout,
        sharing: str,
        rank: float | None,
        entry: Callable[[Tensor], Tensor] = torch.square,
    ) -> None:
        self.problem, self.layout, self.sharing = problem, layout, sharing
        self.rank, self.entry = rank, entry
        self.bases: dict[Block, LayerCurvature] = {}
        self.factors: dict[Block, KroneckerFactors] = {}
        self.statistics: dict[Block, BatchStatistics] = {}
        self.moments = {
            block: MomentSums(block, s == "quasi_diagonal" and _has_bias(block), entry)
            for block, s in layout.blocks.items()
            if s not in ("kfac", "ekfac")
        }
        self.unresolved: dict[Block, None] = {}
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {}
        self.pending: dict[str, list[Tensor]] = {}
        self.examples = torch.tensor(0)
        self.dtype = precision_of(problem.parameters.values())
        self.weight = 0.0  # that of the data in the mean

    # -- passes over the data ---------------------------------------------------------

    def run(self) -> None:
        """Go through the data and take all sums."""
        blocks = list(self.layout.blocks)
        recorder = Recorder(self.problem.model, blocks)
        with closing(recorder):
            with self.problem.passes("curvature") as batches:
                for batch in batches:
                    self._first(recorder, batch)
            if not int(self.examples):
                raise ValueError(NO_TARGETS)
            self._commit_factors()
            scaled = [b for b, s in self.layout.blocks.items() if s == "ekfac"]
            scaled = [b for b in scaled if b in self.statistics]
            if scaled:
                self.take_scalings(recorder, scaled)
                self._commit_scalings(scaled)
        for name in list(self.pending):
            self._reduce(name)
        if self.unresolved:
            self._resolve()

    def _prepare(
        self, outputs: Tensor, batch: Batch
    ) -> tuple[TargetMask, Iterator[Tensor]]:
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
        outputs, batch, recorded = recorder.forward(self.problem.model, batch)
        terms, pseudo = self._prepare(outputs, batch)
        self.examples = self.examples + terms.examples.cpu()
        self.weight += float(self.problem.source.share(outputs.detach(), batch))
        vectors = list(pseudo) if self.layout.groups else None
        gradients = iter(vectors) if vectors is not None else pseudo
        if self.layout.blocks:
            by_example = [
                block
                for block in self.layout.blocks
                if (block in self.moments and block not in self.unresolved)
                or block.exact
                or self.sharing == "reduce"
                or terms.mask is not None
            ]
            mixing = recorder.mixing(outputs, recorded, by_example)
            self.unresolved.update((b, None) for b in self.moments if b in mixing)
            apart = [b for b in mixing if b.exact and b not in self.moments]
            recorder.send(outputs, recorded, gradients, terms, self._take, apart=apart)
        if vectors is None:
            return
        names = [name for _, group in self.layout.groups.values() for name in group]
        params = {name: self.problem.parameters[name] for name in names}
        with recorder.paused():
            rows = example_rows(self.problem.model, params, batch, outputs, vectors)
            for row in rows:
                self._take_row(row)

    def _take(
        self,
        block: Block,
        pairs: Sequence[LayerCall],
        terms: TargetMask | None,
        repeated: bool,
    ) -> None:
        if block in self.moments:
            moments = self.moments[block]
            if block not in self.unresolved and not moments.add(pairs, terms):
                self.unresolved[block] = None
            return
        if block not in self.statistics:
            layer = packing_of(block)
            self.statistics[block] = BatchStatistics(layer, block.dtype, sketched=False)
        self.statistics[block].add_factors(pairs, terms, self.sharing, repeated)

    def _parts(self, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every group with its columns of gradients ``[K, P]``."""
        sizes = [
            sum(self.problem.parameters[name].numel() for name in names)
            for _, names in self.layout.groups.values()
        ]
        yield from zip(self.layout.groups, rows.split(sizes, dim=1), strict=True)

    def _take_row(self, rows: Tensor) -> None:
        """Add the gradients ``[K, P]`` of one example to every group."""
        for name, part in self._parts(rows):
            structure = self.layout.groups[name][0]
            if structure == "low_rank":
                self.rows.setdefault(name, []).append(part)
            elif structure in ("dense", "block_diagonal"):
                waiting = self.pending.setdefault(name, [])
                waiting.append(part)
                if len(waiting) * part.numel() > min(BUDGET, 512 * part.shape[1]):
                    self._reduce(name)
            else:
                self.sums[name] = plus(self.sums.get(name), self.entry(part).sum(dim=0))

    def _reduce(self, name: str) -> None:
        """Add the second moment of the pending rows of a group to its sum."""
        rows = torch.cat(self.pending.pop(name)).to(self.dtype)
        gram = self._sum(name, rows.shape[1], rows.shape[1])
        self.sums[name] = gram.addmm_(rows.mT, rows)  # autocast leaves it in place

    def _commit_factors(self) -> None:
        counters = Counters()
        for block, statistics in self.statistics.items():
            like = next(iter(statistics.sums.values())).grads
            assert like is not None
            n, weight = self.examples.to(like), torch.ones_like(like[:1].sum())
            A, G = factors(statistics, n, weight)
            statistics.sums.clear()
            if self.layout.blocks[block] == "kfac":
                G = G.expand(block.shape[0], *G.shape[1:])  # of shared factors, views
                self.factors[block] = KroneckerFactors(statistics.layer, A=A, G=G)
                continue
            by_side = {"A": A, "G": G}
            del A, G
            layer = bases_alone(block, by_side, counters, self.rank)
            self.bases[block] = statistics.layer = layer

    def take_scalings(self, recorder: Recorder, blocks: Sequence[Block]) -> None:
        """Sum the gradients' squared coordinates in a pass, and count its examples."""
        self.examples = torch.tensor(0)

        def take(
            block: Block, calls: Sequence[LayerCall], terms: TargetMask | None, _: bool
        ) -> None:
            self.statistics[block].add_scalings(calls, terms, squares=True)

        with self.problem.passes("scalings") as batches:
            for batch in batches:
                outputs, batch, recorded = recorder.forward(self.problem.model, batch)
                terms, pseudo = self._prepare(outputs, batch)
                self.examples = self.examples + terms.examples.cpu()
                apart = list(recorder.mixing(outputs, recorded, blocks))
                recorder.send(outputs, recorded, pseudo, terms, take, blocks, apart)
        if not int(self.examples):
            raise ValueError(NO_TARGETS)

    def _commit_scalings(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            scalings = self.statistics[block].scalings
            assert scalings is not None
            layer = self.bases[block]
            layer.averages["s"].update_(scalings / self.examples.to(scalings), 0.0)
            layer.version["scalings"] = 1
            self.statistics[block].scalings = None

    def _resolve(self) -> None:
        """Sum the moments of layers whose recorded calls mix the examples."""
        model, parameters = self.problem.model, self.problem.parameters
        blocks = list(self.unresolved)
        names = list(dict.fromkeys(n for b in blocks for n in b.parameters))
        params = {name: parameters[name] for name in names}
        space = space_of(params)
        for block in blocks:
            self.moments[block] = self.moments[block].fresh()
        with self.problem.passes("single examples") as batches:
            for batch in batches:
                outputs, batch = predicted(model, batch)
                pseudo = list(self._prepare(outputs, batch)[1])
                for rows in example_rows(model, params, batch, outputs, pseudo):
                    for gradient in map(space.vector, rows):
                        for block in blocks:
                            packed = packing_of(block).pack(gradient)
                            self.moments[block].add_gradients(packed.unsqueeze(0))

    # -- results ----------------------------------------------------------------------

    def group(self, name: str, space: VectorSpace) -> CurvatureMatrix:
        """Return the matrix of a group of parameters over ``space``."""
        structure = self.layout.groups[name][0]
        n = int(self.examples)
        if structure == "low_rank":
            empty = self._zeros(0, space.size)
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
                factors = self.factors.get(block)
                layer = self.bases[block] if factors is None else factors
                blocks[block.name] = kind(layer, part)
        for name, (structure, names) in self.layout.groups.items():
            subspace = space.subspace(names)
            if structure in ("diagonal", "quasi_diagonal"):
                entry = subspace.vector(self._sum(name, subspace.size) / count)
                diagonals.setdefault(name, {}).update(entry)
            else:
                blocks[_free(name, names, blocks)] = self.group(name, subspace)
        if not blocks:
            entries = {n: e for d in diagonals.values() for n, e in d.items()}
            for name, parameter in self.problem.parameters.items():
                entries.setdefault(name, self._zeros(*parameter.shape))
            ordered = {name: entries[name].to(self.dtype) for name in space.names}
            return DiagonalMatrix(space.vector_type(ordered))
        for name, entries in diagonals.items():
            vector = space.vector_type(entries)
            blocks[_free(name, list(entries), blocks)] = DiagonalMatrix(vector)
        return BlockDiagonalMatrix(space, blocks)

    def _zeros(self, *shape: int) -> Tensor:
        """Return zeros in the matrix's type."""
        return torch.zeros(shape, dtype=self.dtype, device=self.problem.data.device)

    def _sum(self, name: str, *shape: int) -> Tensor:
        """Return the sum for a group, zero where nothing came."""
        sum_ = self.sums.get(name)
        return self._zeros(*shape) if sum_ is None else sum_.to(self.dtype)

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
    """Return a block's name: that of its first parameter if ``name`` is taken."""
    return parameters[0] if name in taken else name


def packing_of(block: Block) -> LayerCurvature:
    """Return a layer without storage: ``pack`` and ``unpack`` of a block."""
    return LayerCurvature(block, lambda *shape: torch.empty(*shape, device="meta"))


class MomentSums:
    """Sums over examples of squared gradients, and of products with the bias's.

    Args:
        block: The layer.
        cross: Whether to sum the products of every weight with its row's bias.
        entry: ``torch.square``, or ``torch.abs``: absolute gradients in their place.

    Attributes:
        squares: ``[b, d_out, d_in]``.
        products: ``[b, d_out, d_in - 1]``.
    """

    def __init__(
        self, block: Block, cross: bool, entry: Callable[[Tensor], Tensor]
    ) -> None:
        weight = block.tensors()[0]
        b, d_out, d_in = block.shape
        self.block, self.cross, self.entry = block, cross, entry
        self.dtype = block.dtype
        zeros = torch.zeros(b, d_out, d_in, dtype=self.dtype, device=weight.device)
        self.squares, self.products = zeros, zeros[..., 1:].clone()

    def fresh(self) -> MomentSums:
        """Return empty sums of the same kind."""
        return MomentSums(self.block, self.cross, self.entry)

    def add(self, pairs: Sequence[LayerCall], terms: TargetMask | None) -> bool:
        """Add the calls of one backward pass.

        Returns:
            Whether the examples could be told apart; if not, the sums are worthless.
            They cannot where the layer was called without a batch dimension.
        """
        count = 0
        for uses in normal_form(pairs, terms, self.dtype):
            count += len(uses[0].grads)
            if not self._add_thin(uses):
                for gradients in example_gradients(uses, self.block.shape):
                    self.add_gradients(gradients)
        return terms is None or count == terms.size

    def _add_thin(self, uses: Sequence[Rows]) -> bool:
        """Add calls without forming gradients; return whether that is possible."""
        thin = joined(uses)
        if thin is None or self.cross:
            return False
        g, a = thin.grads, thin.inputs
        if self.entry is torch.abs:
            if thin.indexed or g.shape[1] > 1:
                return False
            # One position: |g a^T| = |g| |a|^T, summed by one product.
            g, a = g[:, 0].abs(), a[:, 0].abs().expand(-1, g.shape[2], -1)
            self.squares += torch.einsum("nbo,nbi->boi", g, a)
        elif thin.indexed:
            size = self.block.shape[2]
            self.squares += kernels.indexed_second_moment(g, a, size, None)
        else:
            self.squares += kernels.second_moment(g, a, None, None)[0]
        return True

    def add_gradients(self, gradients: Tensor) -> None:
        """Add gradients of examples, ``[n, b, d_out, d_in]``."""
        self.squares += self.entry(gradients).sum(dim=0)
        if self.cross:
            self.products += (gradients[..., :-1] * gradients[..., -1:]).sum(dim=0)


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
    layout = Layout(blocks=dict.fromkeys((la.block for la in layers.values()), "ekfac"))
    estimate = _Estimate(problem, layout, "expand", None)
    for layer in layers.values():
        statistics = BatchStatistics(layer, layer.block.dtype)
        estimate.statistics[layer.block] = statistics
    with closing(Recorder(model, list(layout.blocks))) as recorder:
        estimate.take_scalings(recorder, list(layout.blocks))
    return {
        block.name: statistics.scalings / int(estimate.examples)
        for block, statistics in estimate.statistics.items()
        if statistics.scalings is not None
    }


def output_sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    *,
    parameters: Iterable[str] | None = None,
    progress: bool = False,
) -> DiagonalMatrix:
    """Return ``E_x |d |f(x)|^2 / d theta|``, of single examples (Aljundi et al. 2018).

    The absolute value is taken of each example's gradient, not of a batch's. No targets
    are needed. The model is in eval mode meanwhile, and left as it was.

    Args:
        model: The model.
        data: Batches, as for :func:`ekfac.fisher`.
        parameters: Names of parameters or layers. Default: what requires a gradient.
        progress: Whether to show a bar, if tqdm is installed.

    Raises:
        ValueError: If the data are empty or not finite.
    """
    problem = Problem.of(model, data, _SquaredNorm(), parameters, progress)
    problem.data.first()
    layout = lay_out(model, problem.parameters, "diagonal", None)
    estimate = _Estimate(problem, layout, "expand", None, torch.abs)
    estimate.run()
    matrix = estimate.matrix()
    assert isinstance(matrix, DiagonalMatrix)
    return matrix


class _SquaredNorm(Source):
    """The gradient of the outputs' squared norm."""

    def pseudo_gradients(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield ``2 f``."""
        yield 2 * outputs
