"""Alignment of the tangent kernel with the labels, and a step's change by its modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.estimate import ntk
from ekfac.estimate.data import choose, moved, outputs_of, prepared
from ekfac.matrices import CurvatureMatrix
from ekfac.spectral.operators import result

Centring = Literal["all", "examples", "none"]
# Groups of the delete-a-group jackknife.
GROUPS = 10


def centred(kernel: Tensor, outputs: int, centring: Centring = "all") -> Tensor:
    """Return a Gram matrix of centred features.

    Args:
        kernel: ``[n c, n c]``, examples first.
        outputs: ``c``.
        centring: ``"all"``: ``C K C`` with ``C = I - 1 1^T / (n c)`` (George 2023,
            eq. 6.3.3). ``"examples"``: each output's features are centred over the
            examples (section 6.3.1); the same for one output. ``"none"``: as it is.

    Raises:
        ValueError: For another ``centring``, or if ``outputs`` does not divide the
            kernel's side.
    """
    if centring not in get_args(Centring):
        raise ValueError(
            f"centring must be one of {list(get_args(Centring))}, got {centring!r}."
        )
    side = len(kernel)
    if outputs < 1 or side % outputs or kernel.shape != (side, side):
        raise ValueError(
            f"A kernel over examples and {outputs} outputs is [n c, n c] with c = "
            f"{outputs}, got {list(kernel.shape)}."
        )
    if centring == "none":
        return kernel
    groups = 1 if centring == "all" else outputs
    rows = kernel.reshape(-1, groups, side)
    rows = (rows - rows.mean(dim=0)).reshape(side, -1, groups)
    return (rows - rows.mean(dim=1, keepdim=True)).reshape(side, side)


def kernel_alignment(
    K: Tensor, L: Tensor, *, outputs: int = 1, centring: Centring = "all"
) -> float:
    """Return ``Tr[K L] / (|K|_F |L|_F)`` of two centred kernels, in [0, 1].

    George 2023, eq. 6.3.3; with ``centring="none"`` eq. 5.2.5. Positive multiples of a
    kernel have the same alignment; nan for a kernel that is zero after centring.

    Args:
        K: A Gram matrix ``[n c, n c]``.
        L: Another, of the same points.
        outputs: ``c``.
        centring: See :func:`centred`.

    Raises:
        ValueError: If the shapes differ or do not fit ``outputs``.

    Example:
        >>> K = torch.eye(4)
        >>> round(kernel_alignment(K, 3 * K), 6)
        1.0
    """
    if K.shape != L.shape:
        raise ValueError(
            f"Kernels of the same points are needed, got {list(K.shape)} and "
            f"{list(L.shape)}."
        )
    K, L = centred(K, outputs, centring), centred(L, outputs, centring)
    scale = torch.linalg.matrix_norm(K) * torch.linalg.matrix_norm(L)
    return float((K * L).sum() / scale) if scale > 0 else float("nan")


@result
class Aligned:
    """An alignment and its sampling error.

    Attributes:
        value: The alignment, in [0, 1]; nan if a kernel is zero.
        standard_error: By the jackknife that leaves out a tenth of the examples at a
            time; nan for fewer than four examples.
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


@result
class LabelAlignment:
    """Alignment of a network's tangent kernel with the labels.

    Attributes:
        whole: Of the kernel of all layers.
        layers: Of each layer's own kernel, by name.
        subsets: Of the whole kernel on each subset of the examples.
        centring: See :func:`centred`.
        num_examples: Number of examples.
    """

    whole: Aligned
    layers: dict[str, Aligned]
    subsets: dict[str, Aligned]
    centring: str
    num_examples: int

    def __str__(self) -> str:
        rows = [("all layers", self.whole), *self.layers.items()]
        rows += [(f"subset {name}", value) for name, value in self.subsets.items()]
        width = max(len(name) for name, _ in rows)
        head = f"alignment with the labels, {self.num_examples} examples"
        return "\n".join([head, *(f"  {n.ljust(width)}  {v}" for n, v in rows)])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the alignments of the layers and subsets as bars; return the axes."""
        ax = axes_or_new(ax)
        rows = {"all layers": self.whole, **self.layers, **self.subsets}
        colours = ["tab:gray"] + ["tab:blue"] * len(self.layers)
        colours += ["tab:orange"] * len(self.subsets)
        ax.barh(
            list(rows),
            [row.value for row in rows.values()],
            xerr=[row.standard_error for row in rows.values()],
            color=colours,
        )
        ax.invert_yaxis()
        ax.set(xlabel="centred alignment of the tangent kernel with the labels")
        return ax


def label_alignment(
    model: nn.Module,
    x: Any,
    y: Tensor,
    *,
    subsets: Mapping[str, Tensor] | None = None,
    layerwise: bool = True,
    centring: Centring = "all",
    parameters: Iterable[str] | None = None,
    progress: bool = False,
) -> LabelAlignment:
    """Return the alignment of the tangent kernel with the label kernel ``Y Y^T``.

    George 2023, sections 6.3.3 and 6.3.4. With ``Y_c`` and ``K_c`` centred it is
    ``Y_c^T K_c Y_c / (|K_c|_F |Y_c|^2)``. The kernel is made layer by layer from inputs
    and output gradients; the Jacobian is never formed. It takes ``c`` backward passes
    and the memory of one ``[n c, n c]`` matrix per layer, so about 100 examples fit.

    Args:
        model: In eval mode meanwhile.
        x: Inputs of ``n`` examples, as for :func:`ekfac.ntk`.
        y: Classes ``[n]``, or targets ``[n, c]`` or ``[n]`` as floating point numbers.
        subsets: Name -> indices into the examples. Alignments depend on the number of
            examples, so compare subsets of equal size.
        layerwise: Whether each layer's own kernel is compared as well.
        centring: See :func:`centred`.
        parameters: Of the kernel, as for :func:`ekfac.ntk`.
        progress: Whether to show a bar over the layers, if tqdm is installed.

    Raises:
        ValueError: If the targets do not fit the outputs, or a subset is empty.
    """
    if layerwise:
        kernels = ntk(
            model, x, layerwise=True, parameters=parameters, progress=progress
        )
        layers = {name: dense(kernel) for name, kernel in kernels.items()}
        kernel_sum = torch.stack(list(layers.values())).sum(dim=0)
    else:
        layers = {}
        kernel_sum = dense(ntk(model, x, parameters=parameters, progress=progress))
    Y = label_vector(y, len(kernel_sum)).to(kernel_sum)
    examples, outputs = len(y), len(kernel_sum) // len(y)

    def of(kernel: Tensor, indices: Tensor) -> Aligned:
        return _aligned(kernel, Y, indices, outputs, centring)

    everything = torch.arange(examples)
    by_subset = {}
    for name, subset in (subsets or {}).items():
        indices = everything[torch.as_tensor(subset).cpu()]
        if not len(indices):
            raise ValueError(f"subset {name!r} has no examples; leave it out.")
        by_subset[name] = of(kernel_sum, indices)
    return LabelAlignment(
        whole=of(kernel_sum, everything),
        layers={name: of(kernel, everything) for name, kernel in layers.items()},
        subsets=by_subset,
        centring=centring,
        num_examples=examples,
    )


def label_vector(y: Tensor, size: int) -> Tensor:
    """Return targets as one vector ``[n c]``, classes as concatenated one-hot rows.

    Args:
        y: Classes ``[n]``, or targets of floating point numbers.
        size: ``n c``.

    Raises:
        ValueError: If they do not fit.
    """
    outputs = size // len(y) if len(y) else 0
    classes = not y.is_floating_point() and outputs > 1 and y.dim() == 1
    if classes and (int(y.max()) >= outputs or int(y.min()) < 0):
        raise ValueError(
            f"y has classes from {int(y.min())} to {int(y.max())}, but the model has "
            f"{outputs} outputs; classes count from 0."
        )
    Y = one_hot(y.long(), outputs) if classes else y
    if Y.numel() != size:
        raise ValueError(
            f"y must be classes [n] or targets [n, c] with n c = {size} outputs, "
            f"got {list(y.shape)}."
        )
    return Y.reshape(-1)


def dense(kernel: Tensor | CurvatureMatrix) -> Tensor:
    """Return a kernel as a tensor."""
    tensor: Tensor = kernel if isinstance(kernel, Tensor) else kernel.to_dense()
    return tensor


def _rows(examples: Tensor, outputs: int) -> Tensor:
    """Return the rows of a kernel that belong to some examples."""
    return (examples[:, None] * outputs + torch.arange(outputs)).reshape(-1)


def _aligned(
    kernel: Tensor, Y: Tensor, subset: Tensor, outputs: int, centring: Centring
) -> Aligned:
    """Return the alignment on some examples, with its jackknife error."""

    def of(examples: Tensor) -> float:
        rows = _rows(examples, outputs).to(kernel.device)
        K = centred(kernel[rows[:, None], rows], outputs, centring)
        groups = outputs if centring == "examples" else 1
        part = Y[rows].reshape(-1, groups)
        if centring != "none":
            part = part - part.mean(dim=0)
        part = part.reshape(-1)
        scale = torch.linalg.matrix_norm(K) * part.dot(part)
        return float(part @ K @ part / scale) if scale > 0 else float("nan")

    value = of(subset)
    if len(subset) < 4:
        return Aligned(value, float("nan"))
    # Neighbours may be alike (classes in order), so a group takes every tenth.
    count = min(GROUPS, len(subset))
    fold = torch.arange(len(subset)) % count
    left = torch.tensor([of(subset[fold != i]) for i in range(count)])
    error = ((count - 1) / count * (left - left.mean()).square().sum()).sqrt()
    return Aligned(value, float(error))


@result
class StepModes:
    """A step's change of the outputs in the eigenvectors of the tangent kernel.

    Attributes:
        eigenvalues: ``lambda_j`` of ``J J^T``, descending, ``[n c]``.
        vectors: ``u_j`` in columns, ``[n c, n c]``, examples first.
        slopes: ``u_j^T grad_f L`` ``[n c]``.
        changes: ``-lr lambda_j u_j^T grad_f L`` ``[n c]``, to first order in ``lr``.
        outputs: The outputs before the step, ``[n, c]``.
        lr: The learning rate.
    """

    eigenvalues: Tensor
    vectors: Tensor
    slopes: Tensor
    changes: Tensor
    outputs: Tensor
    lr: float

    @property
    def foretold(self) -> Tensor:
        """Change of the outputs ``[n, c]``, to first order."""
        return (self.vectors @ self.changes).reshape(self.outputs.shape)

    @property
    def time_constants(self) -> Tensor:
        """Steps ``[n c]`` in which a mode's error falls to ``1/e``, kernel fixed.

        ``-1 / log(1 - lr lambda_j)`` for a squared error ``1/2 |f - y|^2`` (George
        2023, B.1.5.2, which prints the reciprocal); infinite where the kernel is zero,
        nan for modes that ``lr`` makes oscillate.
        """
        return -1 / torch.log1p(-self.lr * self.eigenvalues.clamp(min=0))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw magnitudes of slopes and changes over the modes; return the axes."""
        ax = axes_or_new(ax)
        ranks = range(1, len(self.slopes) + 1)
        ax.loglog(ranks, self.slopes.abs().tolist(), label="gradient in the mode")
        ax.loglog(ranks, self.changes.abs().tolist(), label="change of the function")
        ax.set(xlabel="mode, by eigenvalue of the tangent kernel")
        ax.legend()
        return ax


def step_modes(
    model: nn.Module,
    x: Any,
    loss_fn: Callable[[Tensor], Tensor],
    *,
    lr: float,
    parameters: Iterable[str] | None = None,
    progress: bool = False,
) -> StepModes:
    """Return how a gradient step changes the outputs (George 2023, lemma 6.2.1).

    Each mode changes by its eigenvalue times its share of the loss's gradient: those
    with large eigenvalues are learned first, the local spectral bias.

    Args:
        model: In eval mode meanwhile.
        x: Inputs of ``n`` examples, as for :func:`ekfac.ntk`; the step is on these.
        loss_fn: Loss of the outputs, a number.
        lr: Learning rate of the step.
        parameters: As for :func:`ekfac.ntk`.
        progress: Whether to show a bar over the layers, if tqdm is installed.
    """
    params = choose(model, parameters)
    with prepared(model, params):
        device = next(iter(params.values())).device
        outputs = outputs_of(model, moved(x, device)).detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss_fn(outputs), outputs)
    kernel = dense(ntk(model, x, parameters=params, progress=progress))
    values, vectors = torch.linalg.eigh((kernel + kernel.mT) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    slopes = vectors.mT @ slope.reshape(-1)
    return StepModes(
        eigenvalues=values,
        vectors=vectors,
        slopes=slopes,
        changes=-lr * values * slopes,
        outputs=outputs.detach().reshape(len(outputs), -1),
        lr=lr,
    )
