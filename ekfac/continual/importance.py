"""Diagonal penalties of paths and sensitivities in place of a Fisher matrix."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ekfac.continual.penalty import Mode, Penalty, nonnegative
from ekfac.continual.task_curvature import CountedData, by_block
from ekfac.continual.tasks import TaskPenalty, grown, part
from ekfac.errors import NotReadyError, StateMismatchError
from ekfac.estimate.build import output_sensitivity
from ekfac.hooks import adds_to_grad, when_backward_ends
from ekfac.matrices import CurvatureMatrix, DiagonalMatrix
from ekfac.state_schema import (
    Field,
    ListOf,
    MapOf,
    Number,
    Record,
    TensorField,
    check_same_dtype,
)
from ekfac.vectors import ParameterVector, named_parameters


class SynapticIntelligence(Penalty):
    """Penalty by how much each parameter lowered the loss (Zenke et al. 2017).

    Along the path of training each parameter lowers the loss by ``omega = -sum g
    dtheta``, with ``g`` the gradient of the task alone. At the end of a task its
    importance ``max(omega, 0) / (D^2 + damping)``, with ``D`` the parameter's
    displacement, adds to ``Omega``. The penalty is ``strength sum Omega (theta -
    theta*)^2`` (their ``c`` is ``strength``), so ``F`` is ``2 Omega``: the curvature of
    a quadratic loss that is trained to its minimum::

        loss = criterion(model(x), y) + si()
        loss.backward()
        with si.path():
            optimizer.step()

    The penalty's own share of ``.grad``, as its backward pass added it, is subtracted.
    So clip gradients inside the ``with`` block, and unscale a ``GradScaler``'s before.

    Args:
        model: The network.
        strength: As for :class:`Penalty`.
        damping: ``xi``, keeps the importance of parameters that hardly moved finite.
        mode: As for :class:`Penalty`.
        decay: As for :class:`Penalty`.
        layer_strengths: As for :class:`Penalty`.

    Raises:
        ValueError: As for :class:`Penalty`, and for ``damping`` likewise.
    """

    structure = "synaptic_intelligence"

    def __init__(
        self,
        model: nn.Module,
        strength: float = 1.0,
        damping: float = 1e-3,
        *,
        mode: Mode = "online",
        decay: float = 1.0,
        layer_strengths: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(
            model,
            strength=strength,
            mode=mode,
            decay=decay,
            layer_strengths=layer_strengths,
        )
        self.damping = nonnegative("damping", damping)
        self._work: dict[str, Tensor] = {}
        self._start = self._now()
        self._own: dict[str, Tensor] = {}
        self._accumulated: dict[str, Any] = {}

    def _now(self) -> dict[str, Tensor]:
        named = named_parameters(self.model)
        return {n: p.detach().clone() for n, p in named.items() if p.requires_grad}

    def _contributed(self, gradients: Mapping[str, Tensor]) -> None:
        """Note the penalty's share of ``.grad``.

        ``torch.autograd.grad`` adds nothing to it, and what was cleared is gone. The
        penalty's node runs before its gradients are added: ``.grad`` is still that of
        before the pass.
        """
        named = named_parameters(self.model)
        for name, grad in gradients.items():
            p = named[name]
            if not adds_to_grad(get_gradient_edge(p).node):
                continue
            if name in self._own and not self._cleared(name, p):
                grad = self._own[name] + grad
            self._own[name] = grad
        if torch._C._current_graph_task_id() != -1:
            when_backward_ends(self._note_gradients)

    def _note_gradients(self) -> None:
        """Remember which tensors hold the penalty's share."""
        named = named_parameters(self.model)
        self._accumulated = {
            name: None if (grad := named[name].grad) is None else weakref.ref(grad)
            for name in self._own
            if name in named
        }

    def _cleared(self, name: str, parameter: Tensor) -> bool:
        """Return whether ``.grad`` is no longer what the share was added to."""
        holder, grad = self._accumulated.get(name), parameter.grad
        if grad is None or holder is None or holder() is not grad:
            return True
        return not bool(grad.any())

    @contextmanager
    def path(self) -> Iterator[None]:
        """Follow the parameters through one optimizer step.

        Gradients are read when the block begins. A step that is skipped adds nothing,
        nor does one that leaves parameters that are not finite.
        """
        named = named_parameters(self.model)
        before = {
            n: (p.detach().clone(), p.grad.detach().clone())
            for n, p in named.items()
            if p.requires_grad and p.grad is not None
        }
        unpenalised = {
            n: share
            for n, share in self._own.items()
            if n in before and not self._cleared(n, named[n])
        }
        self._own = {}
        yield
        for name, (old, grad) in before.items():
            if name in unpenalised and unpenalised[name].shape == grad.shape:
                grad = grad - unpenalised[name]
            step = named[name].detach() - old
            work = -(grad * step)
            if not bool(torch.isfinite(work).all()):
                continue
            if name not in self._start:
                self._start[name] = old
            past = self._work.get(name)
            self._work[name] = work if past is None else grown(past, work) + work

    def consolidate(self, *, weight: float = 1.0) -> None:
        """Turn the path since the last call into importance, without data.

        Args:
            weight: Weight of the task, relative to others.

        Raises:
            NotReadyError: If no step was followed.
        """
        if not self._work:
            raise NotReadyError(
                "No step was followed since the last task; put optimizer.step() inside "
                "`with penalty.path():`."
            )
        now = self._now()
        blocks: dict[str, CurvatureMatrix] = {}
        for name, work in self._work.items():
            if name not in now:
                continue
            start = self._start[name]
            distance = (part(now[name], start.shape, name) - start).square()
            # The start of a grown parameter's new entries is not known.
            distance = grown(distance, work)
            scale = distance + self.damping
            usable = (work > 0) & (scale > 0)
            importance = torch.where(usable, 2 * work / scale, torch.zeros_like(work))
            blocks[name] = DiagonalMatrix(ParameterVector({name: importance}))
        self._commit(blocks, weight, None)
        self._work, self._own, self._start = {}, {}, now

    def _state(self) -> dict[str, Any]:
        """Return what is saved, the path of the running task included."""
        state = super()._state()
        state["damping"] = self.damping
        state["work"] = {name: t.clone() for name, t in self._work.items()}
        state["start"] = {name: t.clone() for name, t in self._start.items()}
        state["shapes"] = {name: list(t.shape) for name, t in self._start.items()}
        return state

    def _schema(self) -> dict[str, Field]:
        tensors = MapOf(TensorField())
        number = Number(float, minimum=0)
        sizes = MapOf(ListOf(Number(int, minimum=0)))
        fields = {"damping": number, "work": tensors, "start": tensors, "shapes": sizes}
        return super()._schema() | fields

    def _checked(self, state: Any) -> list[TaskPenalty]:
        tasks = super()._checked(state)
        named = named_parameters(self.model)
        for key in ("work", "start"):
            by_type: dict[torch.dtype, dict[str, Tensor]] = {}
            for name, tensor in state[key].items():
                if name not in named:
                    raise StateMismatchError.at(
                        f"{key}.{name}",
                        f"of a parameter that {type(self.model).__name__} lacks",
                        "of one that it has",
                    )
                part(named[name], tensor.shape, name)
                by_type.setdefault(named[name].dtype, {})[name] = tensor
            for tensors in by_type.values():
                check_same_dtype(tensors, key)
        shapes = {n: TensorField(tuple(s)) for n, s in state["shapes"].items()}
        Record(shapes).check(state["start"], "start")
        for name, work in state["work"].items():
            if name not in state["start"]:
                raise StateMismatchError.at(f"start.{name}", "missing", "present")
            part(work, state["start"][name].shape, name)
        return tasks

    def _take(self, state: Mapping[str, Any], tasks: list[TaskPenalty]) -> None:
        super()._take(state, tasks)
        named = named_parameters(self.model)

        def own(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: t.to(named[name].device).clone() for name, t in saved.items()}

        self.damping, self._own = float(state["damping"]), {}
        self._work, self._start = own(state["work"]), own(state["start"])


class MemoryAwareSynapses(Penalty):
    """Penalty by how sensitive the outputs are to a parameter (Aljundi et al. 2018).

    ``Omega = E_x |d |f(x)|^2 / d theta|``, from absolute gradients of single examples,
    without targets. The penalty is ``strength sum Omega (theta - theta*)^2``, so ``F``
    is ``2 Omega``.

    Args:
        model: The network.
        strength: As for :class:`Penalty`.
        mode: As for :class:`Penalty`.
        decay: As for :class:`Penalty`.
        layer_strengths: As for :class:`Penalty`.
        parameters: Names of parameters or layers. Default: what requires a gradient.
    """

    structure = "memory_aware_synapses"

    def __init__(
        self,
        model: nn.Module,
        strength: float = 1.0,
        *,
        mode: Mode = "online",
        decay: float = 1.0,
        layer_strengths: Mapping[str, float] | None = None,
        parameters: Iterable[str] | None = None,
    ) -> None:
        super().__init__(
            model,
            strength=strength,
            mode=mode,
            decay=decay,
            layer_strengths=layer_strengths,
        )
        self.parameters = None if parameters is None else tuple(parameters)

    def consolidate(
        self, data: Iterable[Any], *, weight: float = 1.0, progress: bool = False
    ) -> None:
        """Add the importance of the parameters for the outputs on ``data``.

        Args:
            data: Batches ``(x, y)`` or of inputs alone; one pass.
            weight: Weight of the task, relative to others.
            progress: Whether to show a bar, if tqdm is installed.

        Raises:
            ValueError: If the data are empty, or an importance or a parameter is not
                finite.
        """
        counted = CountedData(data)
        sensitivity = output_sensitivity(
            self.model, counted, parameters=self.parameters, progress=progress
        )
        self._commit(by_block(sensitivity * 2.0), weight, counted.examples)
