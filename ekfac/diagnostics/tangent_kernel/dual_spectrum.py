"""Exact spectrum of a Fisher matrix from its dual, and the linearised network.

``F = R R^T`` with ``R`` ``[P, N K]`` has the non-zero eigenvalues of the dual
``R^T R`` ``[N K, N K]`` (Karakida et al. 2020, appendix A.1; Ge 2025, equation 4.14),
a sum over layers: ``(a_n . a_m) (g_nk . g_mj)`` for a linear layer. A layer's summand
is the dual of its block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from ekfac.diagnostics.spectra import Spectrum, null_space
from ekfac.diagnostics.tangent_kernel.alignment import (
    centred,
    dense,
    kernel_alignment,
)
from ekfac.estimate import Jacobian, jacobian, ntk
from ekfac.estimate.data import Batch, choose, moved, outputs_of, prepared
from ekfac.estimate.layout import Recorder, lay_out
from ekfac.layers import find_blocks
from ekfac.likelihoods import resolve
from ekfac.spectral import Eigenpairs
from ekfac.spectral.operators import result


@result
class Dual:
    """The dual of a Fisher matrix, whole and by layer.

    Attributes:
        gram: ``[N K, N K]``, ``R^T R``, examples first.
        layers: Layer name -> its summand of ``gram``.
        sizes: Layer name -> number of parameters.
        roots: ``[N, C, K]``, with ``roots roots^T`` the outputs' Fisher matrix of each
            example, ``Q_n``.
        outputs: ``[N, C]``.
        source: Always ``"exact"``: nothing is approximated.
    """

    gram: Tensor
    layers: dict[str, Tensor]
    sizes: dict[str, int]
    roots: Tensor
    outputs: Tensor
    _pull_back: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    source: str = "exact"

    @property
    def size(self) -> int:
        """Number of parameters, ``P``."""
        return sum(self.sizes.values())

    @property
    def num_examples(self) -> int:
        """``N``."""
        return len(self.outputs)

    def spectrum(self) -> Spectrum:
        """Return the eigenvalues of the Fisher matrix."""
        return _spectrum(self.gram, self.size)

    def layer_spectra(self) -> dict[str, Spectrum]:
        """Return the eigenvalues of every layer's block of it."""
        return {n: _spectrum(gram, self.sizes[n]) for n, gram in self.layers.items()}

    def top_eigenpairs(self, k: int) -> Eigenpairs:
        """Return the ``k`` largest eigenvalues and their eigenvectors ``[P, k]``.

        An eigenvector is ``R w / sqrt(lambda)`` for ``w`` one of the dual: ``k``
        backward passes through the model as it is now.

        Raises:
            ValueError: If ``k`` is not between 1 and the rank of the dual.
        """
        values, vectors = torch.linalg.eigh(self.gram)
        rank = Spectrum(values.flip(0), len(values), "exact").rank
        if not 1 <= k <= rank:
            raise ValueError(f"k must be between 1 and the rank {rank}, got {k}.")
        values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
        n, _, outputs = self.roots.shape
        rooted = torch.bmm(self.roots, vectors.reshape(n, outputs, k))
        eigenvectors = self._pull_back(rooted.flatten(0, 1)) / (n * values).sqrt()
        return Eigenpairs.exact(values, eigenvectors)

    def mean_gradients(self) -> Tensor:
        """Return ``E[grad f_k]`` as columns ``[P, C]``.

        They span the eigenspace of the largest eigenvalues of a wide random network
        (Karakida et al. 2020, Theorem 3.2).
        """
        n, c = self.outputs.shape
        units = torch.eye(c).to(self.outputs).repeat(n, 1)
        return self._pull_back(units / n)


def _spectrum(gram: Tensor, size: int) -> Spectrum:
    values = torch.linalg.eigvalsh((gram + gram.mT) / 2).flip(0)
    return Spectrum(values[:size], size, "exact")


def dual(
    model: nn.Module,
    x: Any,
    likelihood: Any = "categorical",
    *,
    mean_subtracted: bool = False,
    progress: bool = False,
) -> Dual:
    """Return the exact dual of the Fisher matrix on some inputs.

    Memory is that of one ``[N C, N C]`` matrix per layer. Eigenvectors and mean
    gradients are computed by the model when asked for: do not change it before.

    Args:
        model: The model, in eval mode while it is called.
        x: Inputs: a tensor, a mapping of keyword arguments or a tuple of arguments.
        likelihood: As for :func:`ekfac.fisher`; ``"gaussian"`` is the metric of
            regression, the Gauss-Newton matrix of half the squared error.
        mean_subtracted: Whether the outputs' means over the examples are taken off,
            as a batch norm after the last layer does: the Fisher matrix of
            ``f_k - E[f_k]`` (Karakida et al. 2020, equation 22).
        progress: Whether to show a bar over the layers, if tqdm is installed.

    Raises:
        ValueError: If outputs are not finite.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> exact = dual(model, torch.randn(5, 3), "gaussian")
        >>> exact.gram.shape, exact.size
        (torch.Size([10, 10]), 8)
    """
    kernels = ntk(model, x, layerwise=True, progress=progress)
    J = jacobian(model, x)
    n, c = J.codomain.shapes["outputs"]
    with prepared(model, J.parameters):
        outputs = outputs_of(model, J.inputs).detach()
    pseudo = list(resolve(likelihood).exact(outputs))
    roots = torch.stack([h.flatten(1) for h in pseudo], dim=2).to(outputs.dtype)
    layers, gram = {}, None
    for name in list(kernels):
        kernel = dense(kernels.pop(name))
        if mean_subtracted:
            kernel = centred(kernel, c, "examples")
        layers[name] = weighted(kernel, roots) / n
        gram = layers[name] if gram is None else gram + layers[name]
    assert gram is not None

    def pull_back(columns: Tensor) -> Tensor:
        if mean_subtracted:
            by_example = columns.reshape(n, c, -1)
            columns = (by_example - by_example.mean(dim=0)).reshape(n * c, -1)
        gradients = J.T @ columns
        assert isinstance(gradients, Tensor)
        return gradients

    sizes = _sizes(model, J.parameters)
    return Dual(gram, layers, sizes, roots, outputs.flatten(1), pull_back)


def weighted(kernel: Tensor, roots: Tensor) -> Tensor:
    """Return ``B^T K B`` with ``B`` block-diagonal in the examples.

    Args:
        kernel: ``[N C, N C]``, examples first.
        roots: ``B`` ``[N, C, K]``.
    """
    n, c, k = roots.shape
    rows = torch.bmm(roots.mT, kernel.reshape(n, c, n * c))  # [N, K, N C]
    columns = rows.reshape(n * k, n, c).transpose(0, 1)  # [N, N K, C]
    return torch.bmm(columns, roots).transpose(0, 1).reshape(n * k, n * k)


def _sizes(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Return how many parameters every layer has, by the names of the kernels."""
    with prepared(model, parameters):
        layout = lay_out(model, parameters, {nn.Module: "diagonal"}, None)
    sizes: dict[str, int] = {}
    for block in layout.blocks:
        sizes[block.name] = sizes.get(block.name, 0) + prod(block.shape)
    for name, (_, members) in layout.groups.items():
        size = sum(parameters[member].numel() for member in members)
        sizes[name] = sizes.get(name, 0) + size
    return sizes


def eigenfunctions(pairs: Eigenpairs, J: Jacobian) -> Tensor:
    """Return ``u_i(x) = <v_i, grad f_k(x)> / sqrt(lambda_i)``, ``[N, C, k]``.

    Ge 2025, equation 4.24; George 2023, lemma 6.2.1. On the examples that the Fisher
    matrix of regression was taken on, ``(1/N) sum_nk u_i u_j`` is the identity.

    Args:
        pairs: Eigenpairs of a Fisher matrix; those of the null space, which have no
            function, are left out of the ``k``.
        J: The Jacobian at the examples ``x``.
    """
    nonzero = ~null_space(pairs.values)
    columns = J @ pairs.vectors[:, nonzero]
    assert isinstance(columns, Tensor)
    n, c = J.codomain.shapes["outputs"]
    return (columns / pairs.values[nonzero].sqrt()).reshape(n, c, -1)


_RELU = {
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    torch.ops.aten.leaky_relu.default,
    torch.ops.aten.leaky_relu_.default,
}


class AlphaScaled(nn.Module):
    """``f_0(x) + alpha (f(x) - f_0(x))``, with ``f_0`` the model as it is now.

    Chizat et al. 2019; George 2023, eq. 5.2.4. ``alpha = 1`` is the model itself, bit
    for bit; with a large ``alpha`` it trains like its linearisation: the same change of
    the outputs needs a change of the parameters ``alpha`` times smaller.

    For equal speed in the outputs, divide the learning rate of SGD by ``alpha^2``, that
    of Adam and of grafted K-FAC and EKFAC by ``alpha``. The natural-gradient step
    (``grafting=None``) shrinks by itself: keep its learning rate, and multiply an
    absolute damping by ``alpha^2``; a relative one scales with the curvature.

    Args:
        model: Trained from now on; a frozen copy of it is kept.
        alpha: Positive.

    Attributes:
        model: The model.
        initial: The copy.

    Raises:
        ValueError: If ``alpha`` is not positive. In ``forward``, if the model has batch
            norm or dropout in training mode, which ``f_0`` could not repeat.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> scaled = AlphaScaled(model, 100.0)
        >>> x = torch.randn(4, 3)
        >>> torch.equal(scaled(x), model(x))
        True
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        if not alpha > 0:
            raise ValueError(f"Invalid alpha: {alpha!r}; it must be > 0.")
        super().__init__()
        self.model, self.alpha = model, alpha
        self.initial = copy.deepcopy(model).eval().requires_grad_(False)
        self._random = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, (_BatchNorm, _DropoutNd))
        ]

    def train(self, mode: bool = True) -> AlphaScaled:
        """Set the mode of the model; the copy stays in eval mode."""
        super().train(mode)
        self.initial.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the scaled outputs, in the shape of the model's.

        Raises:
            ValueError: If a module is in training mode that depends on the batch or on
                chance there.
        """
        active = [name for name, module in self._random if module.training]
        if active:
            raise ValueError(
                f"{active} depend on the batch or on chance in training mode, so that "
                "alpha-scaling has no initial function to start from; put them in eval "
                "mode (after every call of train()), or leave them out."
            )
        outputs: Tensor = self.model(*args, **kwargs)
        with torch.no_grad():
            initial = self.initial(*args, **kwargs)
        return torch.lerp(initial, outputs, self.alpha)


class Linearised(nn.Module):
    """``f_0(x) + J_0(x) (w - w_0)``: the limit of :class:`AlphaScaled`.

    George 2023, eq. 5.2.3. Its parameters ``w`` start at the model's.

    Args:
        model: The model that is linearised, at its present parameters; not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.initial = copy.deepcopy(model).eval().requires_grad_(False)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        params = dict(model.named_parameters())
        self.weights = nn.ParameterList(params[n].detach().clone() for n in self.names)

    def train(self, mode: bool = True) -> Linearised:
        """Set the mode; the copy stays in eval mode."""
        super().train(mode)
        self.initial.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the linearised outputs, in the shape of the model's."""
        initial = dict(self.initial.named_parameters())
        start = tuple(initial[name] for name in self.names)
        change = tuple(w - w0 for w, w0 in zip(self.weights, start, strict=True))

        def function(*parameters: Tensor) -> Any:
            named = dict(zip(self.names, parameters, strict=True))
            return functional_call(self.initial, named, (x,))

        outputs, tangent = jvp(function, start, change)[:2]
        linear: Tensor = outputs + tangent
        return linear


@result
class Linearity:
    """Similarity of a network with its linearisation at the start; 1 where equal.

    Attributes:
        signs: Share of the ReLUs, over all examples, that are on or off as at the
            start; nan without ReLUs.
        kernel: Alignment of the tangent kernel with the first one, uncentred.
        representation: Alignment of the Gram matrices of the representation; nan
            without one.
    """

    signs: float
    kernel: float
    representation: float

    def __str__(self) -> str:
        return (
            f"signs {self.signs:.3f}, tangent kernel {self.kernel:.3f}, "
            f"representation {self.representation:.3f}"
        )


class LinearityProbe:
    """Comparison of a network with its state when the probe was made.

    The three measures of George 2023, section 5.2: sign similarity, tangent-kernel and
    representation alignment (eq. 5.2.5). The representation is the input of the last
    layer with an adapter.

    Args:
        model: The network; of an :class:`AlphaScaled` one, its ``model``.
        x: Inputs of some dozens to hundreds of examples, as for :func:`ekfac.ntk`.
        parameters: Of the tangent kernel, as for :func:`ekfac.ntk`.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> LinearityProbe(model, torch.randn(5, 3)).measure().signs
        1.0
    """

    def __init__(
        self, model: nn.Module, x: Any, *, parameters: Iterable[str] | None = None
    ) -> None:
        self.model = model
        self.parameters = None if parameters is None else list(parameters)
        first = next(iter(choose(model, self.parameters).values()))
        self.x = moved(x, first.device)
        self._signs, self._representation = self._forward()
        self._kernel = self._tangent_kernel()

    def measure(self) -> Linearity:
        """Return how similar the network is to its start."""
        signs, representation = self._forward()
        pairs = zip(signs, self._signs, strict=True)
        same = sum(int((now == then).sum()) for now, then in pairs)
        count = sum(sign.numel() for sign in signs)
        align = partial(kernel_alignment, centring="none")
        aligned = float("nan")
        if representation is not None and self._representation is not None:
            aligned = align(representation, self._representation)
        return Linearity(
            signs=same / count if count else float("nan"),
            kernel=align(self._tangent_kernel(), self._kernel),
            representation=aligned,
        )

    def _tangent_kernel(self) -> Tensor:
        return dense(ntk(self.model, self.x, parameters=self.parameters))

    def _forward(self) -> tuple[list[Tensor], Tensor | None]:
        """Return which ReLUs are on, and the Gram matrix of the representation."""
        parameters = choose(self.model, None)
        blocks = find_blocks(self.model, list(parameters.values()), 2**62).blocks
        with prepared(self.model, parameters), _Signs() as signs:
            if not blocks:
                outputs_of(self.model, self.x)
                return signs.found, None
            recorder = Recorder(self.model, blocks)
            try:
                recorded = recorder.forward(self.model, Batch(0, self.x, None))[-1]
            finally:
                recorder.close()
        last = list(recorded.calls.values())[-1][-1].inputs.detach()
        if not last.is_floating_point():
            return signs.found, None
        rows = last.flatten(1)
        return signs.found, rows @ rows.mT


class _Signs(TorchDispatchMode):
    """Records which inputs of ReLUs are positive, in modules and functions alike."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation; record its input if it is a ReLU."""
        if func in _RELU:
            self.found.append(args[0] > 0)
        return func(*args, **(kwargs or {}))
