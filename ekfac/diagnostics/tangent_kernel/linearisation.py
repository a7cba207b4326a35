"""Linearised training, and measures of how far a network is from it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from ekfac.diagnostics.tangent_kernel.alignment import kernel_alignment
from ekfac.estimate import ntk
from ekfac.estimate.data import Batch, choose, moved, outputs_of, prepared
from ekfac.estimate.layout import Recorder
from ekfac.layers import find_blocks
from ekfac.spectral.operators import result

_RELU = {
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    torch.ops.aten.leaky_relu.default,
    torch.ops.aten.leaky_relu_.default,
}


class AlphaScaled(nn.Module):
    """``f_0(x) + alpha (f(x) - f_0(x))``, with ``f_0`` the model as it is now.

    Chizat et al. 2019; George 2023, eq. 5.2.4. ``alpha = 1`` is the model itself, bit
    for bit; a large ``alpha`` trains like the model's linearisation, since the same
    change of the outputs needs a change of the parameters ``alpha`` times smaller.

    For equal speed in the outputs, divide the learning rate of SGD by ``alpha^2``, that
    of Adam and of grafted K-FAC and EKFAC by ``alpha``. The natural-gradient step
    (``grafting=None``) shrinks by itself: keep its learning rate, and multiply an
    absolute damping by ``alpha^2``; a relative one scales along.

    Args:
        model: Trained from now on; a frozen copy of it is kept.
        alpha: Positive.

    Attributes:
        model: The model.
        initial: The copy.

    Raises:
        ValueError: If ``alpha`` is not positive. In ``forward``, if the model has batch
            norm or dropout in training mode, of which ``f_0`` knows nothing.

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
        """Return the scaled outputs."""
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
        model: Of which the linearisation is taken; not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.initial = copy.deepcopy(model).eval().requires_grad_(False)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        chosen = dict(model.named_parameters())
        self.weights = nn.ParameterList(chosen[n].detach().clone() for n in self.names)

    def train(self, mode: bool = True) -> Linearised:
        """Set the mode; the copy stays in eval mode."""
        super().train(mode)
        self.initial.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        every = dict(self.initial.named_parameters())
        start = tuple(every[name] for name in self.names)
        change = tuple(w - w0 for w, w0 in zip(self.weights, start, strict=True))

        def function(*parameters: Tensor) -> Any:
            named = dict(zip(self.names, parameters, strict=True))
            return functional_call(self.initial, named, (x,))

        outputs, tangent = jvp(function, start, change)[:2]
        linear: Tensor = outputs + tangent
        return linear


@result
class Linearity:
    """How far a network is from its linearisation at the start; 1 if not at all.

    Attributes:
        signs: Share of the ReLUs, over all examples, that are on or off as they were;
            nan without ReLUs.
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
    """Compares a network with what it was when the probe was made.

    The three measures of George 2023, section 5.2: sign similarity, tangent-kernel and
    representation alignment (eq. 5.2.5). The representation is what the last layer with
    an adapter gets as input.

    Args:
        model: The network; of an :class:`AlphaScaled` one, its ``model``.
        x: Inputs of a few dozen to hundred examples, as for :func:`ekfac.ntk`.
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
        """Return how far the network is from its start."""
        signs, representation = self._forward()
        same = [
            (now == then).float().mean() * now.numel()
            for now, then in zip(signs, self._signs, strict=True)
        ]
        count = sum(sign.numel() for sign in signs)
        aligned = float("nan")
        if representation is not None and self._representation is not None:
            aligned = kernel_alignment(
                representation, self._representation, centring="none"
            )
        return Linearity(
            signs=float(torch.stack(same).sum()) / count if count else float("nan"),
            kernel=kernel_alignment(
                self._tangent_kernel(), self._kernel, centring="none"
            ),
            representation=aligned,
        )

    def _tangent_kernel(self) -> Tensor:
        kernel: Tensor = ntk(self.model, self.x, parameters=self.parameters).to_dense()
        return kernel

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
                _, recorded = recorder.forward(
                    self.model, Batch(0, self.x, None).inputs
                )
            finally:
                recorder.close()
        last = list(recorded.calls.values())[-1][-1].inputs.detach()
        if not last.is_floating_point():
            return signs.found, None
        rows = last.flatten(1)
        return signs.found, rows @ rows.mT


class _Signs(TorchDispatchMode):
    """Notes which inputs of ReLUs are positive, wherever ReLU is called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the operation."""
        if func in _RELU:
            self.found.append(args[0] > 0)
        return func(*args, **(kwargs or {}))
