"""The optimizer that K-FAC and EKFAC are two settings of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ekfac.capture import Capture
from ekfac.curvature import Curvature, LayerCurvature
from ekfac.curvature.collector import Collector
from ekfac.curvature.distributed import Ranks
from ekfac.curvature.options import check, settings
from ekfac.curvature.plan import Plan, Recipe
from ekfac.curvature.precondition import absolute_damping
from ekfac.curvature.sharded import local
from ekfac.errors import CaptureError, EkfacWarning
from ekfac.layers import Block, Coverage, find_blocks, unwrap
from ekfac.optim import update
from ekfac.optim.amp import loss_scale
from ekfac.optim.describe import Description, describe
from ekfac.optim.directions import Preconditioner
from ekfac.optim.join import Joining
from ekfac.optim.ranks import agree, check_alone, check_sharding, join_ranks
from ekfac.optim.saving import Saving

Params = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]]


COMPILED = (
    "A compiled model must not be called before the optimizer is constructed; if it "
    "was, call torch._dynamo.reset()."
)


class KroneckerOptimizer(Saving, Joining):
    """What :class:`KFAC` and :class:`EKFAC` share; not constructed by users."""

    def __init__(
        self, params: Params, model: nn.Module | None, options: dict[str, Any]
    ) -> None:
        if isinstance(params, nn.Module):
            model = params if model is None else model
            params = list(params.parameters())
        if model is None:
            name = type(self).__name__
            raise TypeError(
                f"{name} needs the model, not only its parameters: write {name}(model, "
                f"...) or {name}(params, ..., model=model)."
            )
        defaults = {
            key: check(key, options.pop(key))
            for key in ("lr", "momentum", "weight_decay", "damping", "kl_clip")
        }
        group, workers = options.pop("process_group"), options.pop("gradient_workers")
        self.settings = settings(options)
        if self.settings.nesterov and defaults["momentum"] == 0:
            raise ValueError("Invalid momentum: 0; nesterov=True needs a momentum > 0.")
        self._seed = torch.initial_seed() % 2**62
        self._model = model
        super().__init__(params, defaults)
        self._ranks = join_ranks(group, workers, self._model)
        self._by_itself = group is not None and self._ranks is None
        size = 1 if self._ranks is None else self._ranks.size
        check_sharding(unwrap(model), size, self.settings.fisher)
        if self._ranks is not None:
            self._ranks.keep_bases = self.settings.scaling == "per_example"
            self._seed = agree(self._ranks, unwrap(model), self.settings, self._seed)
        self._build()
        self._overlap(unwrap(model))

    # -- construction -----------------------------------------------------------------

    def _build(self) -> None:
        """Find the blocks, lay out their curvature and hook the model."""
        self._steps = 0
        self._alone()
        self._warned: set[str] = set()
        self._fresh: set[str] = set()
        self._counts: tuple[Tensor, Tensor] | None = None
        ranks = self._ranks
        chosen = self.settings
        if ranks is None:
            self.curvature = Curvature(rank=chosen.rank)
        else:
            self.curvature = Curvature((), ranks.held, chosen.rank)
        recipe = Recipe(
            chosen.sharing,
            chosen.fisher == "empirical",
            chosen.loss_reduction,
            chosen.factor_decay,
            chosen.scaling_decay,
            chosen.tolerance,
            self._seed,
        )
        self._collector = Collector(self.curvature, recipe, ranks)
        self._preconditioner = Preconditioner(self._collector, chosen)
        self._capture = Capture(
            unwrap(self._model), [], self._collector, chosen.likelihood, chosen.fisher
        )
        self._blocks: dict[Tensor, list[str]] = {}
        self._cover(stacklevel=5)
        self._fresh.clear()

    def _cover(self, stacklevel: int) -> None:
        """Cover the parameters that are in no block yet, and warn of what is left."""
        trained = {id(p): p for group in self.param_groups for p in group["params"]}
        self._frozen = [p for p in trained.values() if not p.requires_grad]
        self._coverage: Coverage = find_blocks(
            unwrap(self._model),
            [p for p in trained.values() if p.requires_grad and p not in self._blocks],
            self.settings.max_dim,
        )
        new = [b for b in self._coverage.blocks if b.name not in self.curvature]
        if self._ranks is not None:
            self._ranks.extend(new)
        self.curvature.extend(new)
        self._capture.attach(new)
        self._fresh |= {block.name for block in new}
        for block in new:
            block.pin_sharded()
            for parameter in block.tensors():
                self._blocks.setdefault(parameter, []).append(block.name)
        self._plan()
        left = {
            n: r for n, r in self._coverage.reasons.items() if n not in self._warned
        }
        if left:
            self._warned |= set(left)
            listed = ", ".join(f"{name} ({reason})" for name, reason in left.items())
            warnings.warn(
                f"{type(self).__name__} trains these parameters with a diagonal second "
                f"moment, as AdamW would: {listed}. See describe().",
                EkfacWarning,
                stacklevel=stacklevel,
            )

    def _plan(self) -> None:
        """Decide what the coming step takes from its batch."""
        step, schedule = self._steps + 1, self.settings.schedule
        ready = {name: layer.ready for name, layer in self.curvature.items()}
        refresh, begin = schedule.refreshed(step, ready)
        per_example = self.settings.scaling == "per_example"
        self._collector.plan = Plan(
            schedule.factors_due(step),
            per_example and schedule.scalings_due(step),
            refresh,
            self.settings.fisher == "empirical",
            begin,
        )
        self._collector.step = step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for every optimizer; its layers get blocks of their own."""
        for key in ("lr", "momentum", "weight_decay", "damping", "kl_clip"):
            if key in param_group:
                check(key, param_group[key])
        super().add_param_group(param_group)
        if hasattr(self, "_capture"):
            self._cover(stacklevel=3)

    # -- the step ---------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            CaptureError: If there are gradients and nothing was recorded of the layers;
                nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.requires_grad for p in self._frozen):
            self._cover(stacklevel=5)
        self._capture.flush()
        step, scale = self._steps + 1, loss_scale()
        if self._ranks is not None:
            self._meet_ranks(self._ranks, self.named_parameters())
        elif not self._by_itself:
            check_alone()
        self._collector.meet(scale)
        self._check_recorded()
        self._collector.commit(step, scale)
        self._counts = self._collector.window() or self._counts
        self._preconditioner.counts = self._counts
        with record_function("ekfac::precondition"):
            directions = self._directions(step)
        for group in self.param_groups:
            chosen = [p for p in group["params"] if p in directions]
            if chosen:
                update.apply_(
                    group,
                    chosen,
                    [directions[p] for p in chosen],
                    [self.state[p] for p in chosen],
                    self.settings.nesterov,
                )
        self._end_step(step)
        return loss

    def _end_step(self, step: int) -> None:
        self._steps = step
        self._fresh.clear()
        self._collector.clear()
        self._plan()

    def _check_recorded(self) -> None:
        """Raise or warn where a layer has a gradient but was not seen."""
        if not self._collector.plan.factors:
            return
        trained = [
            layer
            for name, layer in self.curvature.items()
            if layer.block.tensors()[0].grad is not None and name not in self._fresh
        ]
        if trained and not self._collector.statistics:
            found = (
                "no statistics were recorded before this step, of no layer. The model "
                "given to the optimizer must be the module whose forward is called, in "
                f"training mode (forward passes in eval mode: "
                f"{self._capture.eval_forwards}), and its output must lead to the loss."
            )
            if not any(layer.ready for layer in self.curvature.values()):
                raise CaptureError(f"{found} {COMPILED}")
            self._warn_once([""], f"{found} The old ones are used.")
            return
        unseen = [layer.name for layer in trained if not layer.ready]
        unseen = [name for name in unseen if name not in self._collector.statistics]
        self._warn_once(
            unseen,
            f"layers {unseen} have gradients but no statistics: they were not called "
            "in a training forward, their weights being used by other modules, or the "
            "outputs that fisher='mc' and 'exact' start from do not depend on them. "
            "Until they have some they are trained with a diagonal second moment. "
            f"{COMPILED}",
        )

    def _warn_once(self, subjects: list[str], text: str) -> None:
        """Warn the caller of ``step`` unless all ``subjects`` were warned of before."""
        if not self._warned.issuperset(subjects):
            self._warned |= set(subjects)
            warnings.warn(text, EkfacWarning, stacklevel=6)

    def _directions(self, step: int) -> dict[Tensor, Tensor]:
        """Return the direction of every parameter that has a gradient."""
        directions: dict[Tensor, Tensor] = {}
        tasks: list[tuple[LayerCurvature, int]] = []
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                layers = self._layers_of(parameter)
                if not layers or not all(self._preconditions(la) for la in layers):
                    directions[parameter] = update.diagonal_direction(
                        self.state[parameter],
                        parameter.grad,
                        self.settings.scaling_decay,
                        self.settings.grafting,
                    )
                tasks += [
                    (layer, number)
                    for layer in layers
                    if layer.block.tensors()[0] is parameter and self._usable(layer)
                ]
        products = self._preconditioner.add_directions(
            tasks, self.param_groups, step, directions
        )
        factors = update.kl_factor(self.param_groups, products)
        for group, factor in zip(self.param_groups, factors, strict=True):
            if factor is not None:
                for parameter in group["params"]:
                    if parameter in directions:
                        direction = local(directions[parameter])
                        direction.mul_(factor.to(direction))
        return directions

    def _preconditions(self, layer: LayerCurvature) -> bool:
        """Return whether the layer's block can precondition this step's gradient."""
        return self._usable(layer) and layer.block.tensors()[0].grad is not None

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in the model."""
        trained = {id(p) for group in self.param_groups for p in group["params"]}
        return {n: p for n, p in self.model.named_parameters() if id(p) in trained}

    def _layers_of(self, parameter: Tensor) -> list[LayerCurvature]:
        """Return the layers whose block the parameter is in."""
        return [self.curvature[name] for name in self._blocks.get(parameter, [])]

    def _usable(self, layer: LayerCurvature) -> bool:
        """Return whether the layer's block has what a preconditioner needs."""
        if not layer.ready:
            return False
        if self.settings.scaling == "per_example":
            return not layer.averages["s"].empty
        return True

    # -- the rest ---------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what was recorded of the backward that made them."""
        super().zero_grad(set_to_none)
        self._collector.clear()
        self._capture.discard()

    @property
    def counters(self) -> Any:
        """Counts of what happened to the decompositions."""
        return self._collector.counters

    def describe(self) -> Description:
        """Return a table of the layers: kind, block, method, bytes, reason."""
        return describe(self.curvature, self._coverage, self.settings)

    @property
    def steps(self) -> int:
        """How many steps have been done."""
        return self._steps

    @property
    def model(self) -> nn.Module:
        """The model, without wrappers."""
        return unwrap(self._model)

    @property
    def ranks(self) -> Ranks | None:
        """The processes that train together, or ``None`` for this one alone."""
        return self._ranks

    @property
    def capture(self) -> Capture:
        """What records the model; ``with optimizer.capture:`` pauses it."""
        return self._capture

    def dampings(self) -> Iterator[tuple[LayerCurvature, Tensor | float, float]]:
        """Yield each layer with its absolute damping and examples per loss term."""
        share = 1.0
        if self._counts is not None and self.settings.loss_reduction != "sum":
            share = float(self._counts[0]) / max(1.0, float(self._counts[1]))
        for group in self.param_groups:
            for parameter in group["params"]:
                for layer in self._layers_of(parameter):
                    if layer.block.tensors()[0] is parameter and self._usable(layer):
                        average = layer.averages["s"].read()
                        kronecker = self.settings.scaling is None or average is None
                        s = layer.kronecker_scalings() if kronecker else average
                        assert s is not None
                        mode = self.settings.damping_mode
                        damping = absolute_damping(layer, s, group["damping"], mode)
                        yield layer, damping, share

    def blocks(self) -> list[Block]:
        """Return the blocks, in the model's order."""
        return [layer.block for layer in self.curvature.values()]

    def close(self) -> None:
        """Remove every hook from the model; the optimizer stays readable."""
        self._capture.close()
        self._collector.background.close()

    def __enter__(self) -> KroneckerOptimizer:
        """Return itself; leaving the ``with`` block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()
