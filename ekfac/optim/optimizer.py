"""Base class of K-FAC and EKFAC: construction, step, state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, overload
from zlib import crc32

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.algorithms.join import Join
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_map_only
from typing_extensions import Self

from ekfac.capture import Capture
from ekfac.curvature import Curvature, LayerCurvature
from ekfac.curvature.collector import Collector
from ekfac.curvature.distributed import Ranks
from ekfac.curvature.distributed.allreduce import Standing
from ekfac.curvature.eigenbasis import ProjectedGradient
from ekfac.curvature.options import Options, check, check_group, refuse_replaced
from ekfac.curvature.state import Counters, Placement, start_momentum
from ekfac.errors import (
    CaptureError,
    EkfacWarning,
    UnsupportedOperationError,
    warn_outside,
)
from ekfac.hooks import loss_scale, profiled, without_autocast
from ekfac.kernels import Workspace
from ekfac.layers import Block, Coverage, Places, Structure, find_blocks, places
from ekfac.layers.base import local, shard_like
from ekfac.layers.blocks import shortened, unseen
from ekfac.layers.operands import OperandAdapter
from ekfac.matrices.eigen import absolute_damping
from ekfac.optim import checkpoint, distributed, update
from ekfac.optim.precondition import (
    Direction,
    moves_as_adamw,
    precondition,
    rounds,
    scalings_of,
    treatment,
)
from ekfac.optim.update import Description, describe
from ekfac.state_schema import CHECKSUMS, Record
from ekfac.vectors import named_parameters, unwrap

Params = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]]


COMPILED = (
    "A compiled model must not be called before the optimizer is constructed; if it "
    "was, call torch._dynamo.reset()."
)


class KroneckerOptimizer(Optimizer):
    """Base of :class:`KFAC` and :class:`EKFAC`; users do not construct it."""

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Refuse options of other optimizers, saying what to give in their place."""
        refuse_replaced(cls.__name__, given)
        return super().__new__(cls)

    def __init__(
        self,
        params: Params,
        model: nn.Module | None,
        options: Options,
        defaults: dict[str, Any],
        process_group: Any,
        gradient_workers: float,
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
        for key, value in defaults.items():
            check(key, value)
        self.options = options
        self._seed = torch.initial_seed() % 2**62
        self._model = model
        super().__init__(params, defaults)
        joined = distributed.join_ranks(
            process_group,
            gradient_workers,
            model,
            lambda: distributed.configuration(
                self, unwrap(model), options, gradient_workers, self._seed
            ),
        )
        self._ranks: Ranks | None = None
        if joined is not None:
            self._ranks, self._seed = joined
        self._by_itself = process_group is not None and joined is None
        members = distributed.own_members(self._ranks)
        distributed.check_sharding(unwrap(model), members)
        self._seed = distributed.shared_seed(unwrap(model), self._seed, members)
        if self._ranks is not None:
            self._ranks.keep_bases = options.scaling == "per_example"
        self._build()
        if self._ranks is not None:  # statistics of a copy do not overlap
            self._agree_on_layers(self._ranks)
            self._overlaps = True
            self._capture.averaged = distributed.Averaging(unwrap(model), self._ranks)

    # -- construction -----------------------------------------------------------------

    def _build(self) -> None:
        """Find the blocks, lay out their curvature and hook the model."""
        self._steps = 0
        self._join_config = distributed.NO_JOIN
        self._replicas_checked = False  # whether ranks have one model and gradient
        self._loaded = 0  # checksum of the state that was loaded
        self._warned: set[str] = set()
        self._fresh: set[str] = set()
        ranks, options = self._ranks, self.options
        self.curvature = Curvature(
            held=None if ranks is None else ranks.held,
            wanted=self._wanted,
            rank=options.rank,
            storage=options.storage,
            budget=options.memory_budget,
        )
        self._collector = Collector(
            self.curvature,
            options,
            self._seed,
            ranks,
            rounds=partial(rounds, options=options),
            damps=lambda layer: not moves_as_adamw(layer.block, options),
        )
        self._workspace = Workspace()
        self._capture = Capture(
            unwrap(self._model),
            [],
            self._collector,
            options.likelihood,
            options.fisher,
        )
        self._blocks: dict[Tensor, list[str]] = {}
        self._unseen: set[str] = set()  # layers with gradients and no statistics
        self._places: dict[Tensor, Places] = {}
        self._gone: set[Tensor] = set()  # parameters that have left the model
        self._lost: set[str] = set()  # modules that hold other parameters than before
        self._overlaps = False
        self._cover()
        self._collector.note_agreement()
        self._fresh.clear()

    def _wanted(self, block: Block) -> Placement:
        """Return what the processes store of a layer: no scalings for K-FAC."""
        moves = not moves_as_adamw(block, self.options)
        return Placement(scalings=self.options.scaling is not None, momentum=moves)

    def _cover(self) -> None:
        """Make blocks of the parameters that are in none yet; warn of what is left."""
        trained = dict.fromkeys(update.parameters_of(self.param_groups))
        self._frozen = [p for p in trained if not p.requires_grad]
        before, self._places = self._places, places(self.model)
        self._structure = Structure(self.model)
        self._gone = (self._gone | before.keys()) & trained.keys() - self._places.keys()
        self._coverage: Coverage = find_blocks(
            self.model,
            [
                p
                for p in trained
                if p.requires_grad and p not in self._blocks and p not in self._gone
            ],
            self.options.max_dim,
            math.inf if self.options.rank else self.options.max_aspect,
            conv_factors=self.options.conv_factors,
        )
        new = self._coverage.blocks
        if self._ranks is not None:
            self._ranks.extend(new, self.options.rank)
        self.curvature.extend(new)
        if any(group["momentum"] > 0 for group in self.param_groups):
            start_momentum(self.curvature[block.name] for block in new)
        self._fresh |= {block.name for block in new}
        for block in new:
            block.pin()
            for parameter in block.tensors():
                self._blocks.setdefault(parameter, []).append(block.name)
        self._capture.attach(new)
        self._collector.plan_step(self._steps + 1)
        rest = [name for name in self._coverage.reasons if name not in self._warned]
        if rest:
            self._warned |= set(rest)
            plural = "s" if len(rest) > 1 else ""
            warn_outside(
                f"{type(self).__name__} trains {len(rest)} parameter{plural} with a "
                "diagonal second moment, as AdamW would; describe() lists them:\n"
                f"{self._coverage.summary(rest)}"
            )

    def _follow_model(self) -> None:
        """Make new blocks where the model has changed.

        A block stays while the same modules hold its parameters, under the same names
        and of the same shapes. A layer that only has another name keeps its curvature.
        """
        if self._structure.is_that_of(self.model):
            return
        blocks = self.blocks()
        if any(block.sharded for block in blocks) and distributed.is_gathered(
            self.model
        ):
            return
        distributed.check_sharding(self.model, distributed.own_members(self._ranks))
        now, before = places(self.model), self._places
        fallen = [
            block
            for block in blocks
            if tuple(p.shape for p in block.tensors()) != block.sizes
            or any(now.get(p) != before.get(p) for p in block.tensors())
        ]
        trained = set(update.parameters_of(self.param_groups))
        self._lost |= {
            name
            for p, every in before.items()
            if p in trained
            for name, _, _ in every - now.get(p, frozenset())
        }
        kept = [(b, self.curvature[b.name].state_dict()) for b in fallen]
        names = {block.name for block in fallen}
        self._blocks = {
            p: standing
            for p, every in self._blocks.items()
            if (standing := [name for name in every if name not in names])
        }
        self._unseen -= names
        self._warned -= names
        for p in trained:
            moved = self.state.get(p, {}).get("exp_avg")
            if moved is not None and moved.shape != p.shape:
                del self.state[p]
        self._collector.forget(names)
        self._workspace = Workspace()
        self._collector.changed = True
        self._capture.detach()
        self._capture.attach(self.blocks())
        self._cover()
        self._take_over(kept)
        if self._overlaps and self._ranks is not None:
            self._capture.averaged = distributed.Averaging(self.model, self._ranks)

    def _warn_of_untrained(self) -> None:
        """Warn once of the model's new parameters that no group has."""
        if not self._lost:
            return
        trained = set(update.parameters_of(self.param_groups))
        untrained = [
            name
            for name, p in named_parameters(self.model).items()
            if p.requires_grad
            and p not in trained
            and any(name.startswith(f"{module}.".lstrip(".")) for module in self._lost)
        ]
        self._lost.clear()
        self._warn_once(
            untrained,
            f"the model has changed since {type(self).__name__} was constructed, and "
            f"holds parameters that it was not given: {untrained}. They are not "
            "trained; give them to add_param_group.",
        )

    def _take_over(self, kept: list[tuple[Block, dict[str, Any]]]) -> None:
        """Give layers that only changed their names their old curvature."""
        for old, state in kept:
            for layer in self.curvature.values():
                new = layer.block
                modules = [[u.adapter.module for u in b.uses] for b in (old, new)]
                same = all(
                    one is two
                    for one, two in zip(old.tensors(), new.tensors(), strict=False)
                )
                forms = [(b.shape, b.diagonal, b.exact) for b in (old, new)]
                if same and modules[0] == modules[1] and forms[0] == forms[1]:
                    layer.copy_state_(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; its layers get blocks of their own.

        Args:
            param_group: ``"params"``, and options of the group.

        Raises:
            TypeError: For options that are not a group's.
            ValueError: For a value that an option does not allow.
        """
        check_group(type(self).__name__, param_group)
        super().add_param_group(param_group)
        if hasattr(self, "_capture"):
            self._follow_model()
            self._cover()
            self._collector.changed = True

    # -- the step ---------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # where a user compiles the whole of a training step
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step; return what ``closure`` returned.

        Args:
            closure: Evaluates the model again and returns the loss.

        Raises:
            CaptureError: If there are gradients, but nothing was recorded of the
                layers; nothing has changed then.
            RankError: If a rank takes no part, is at another step or has other options.
            ValueError: If ranks have different models or gradients, or if
                ``torch.distributed`` was initialised after the construction.
        """
        if self._ranks is None:
            return self._step(closure)
        with self._ranks.failures.reported():
            return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._own_precision():
            self._do_step()
        return loss

    def _own_precision(self) -> AbstractContextManager[object]:
        """Compute in the parameters' types where the caller is inside autocast."""
        trained = update.parameters_of(self.param_groups)
        return without_autocast({p.device.type for p in trained})

    def _do_step(self) -> None:
        """Do one step with the gradients that there are."""
        self._follow_model()
        if any(p.requires_grad for p in self._frozen):
            self._cover()
            self._collector.changed = True
        self._warn_of_untrained()
        if self._steps == 0 and self._only_initialises():
            return
        self._capture.flush()
        step, scale = self._steps + 1, loss_scale()
        if self._ranks is None and not self._by_itself:
            distributed.check_alone()
        self._reduce(scale, step, trains=True)
        self._check_recorded()
        groups = self._groups_of_layers()
        projected = self._collector.commit(
            step,
            scale,
            self._layers_to_project(groups),
            lambda layer: (groups[layer.name], treatment(layer, self.options)),
        )
        with profiled("ekfac::precondition"):
            directions = self._directions(projected, groups)
        for group in self.param_groups:
            chosen = [p for p in group["params"] if p in directions]
            if chosen:
                update.apply_(group, chosen, [directions[p] for p in chosen])
        self._end_step(step)

    def _only_initialises(self) -> bool:
        """Return whether a step has no rate, no gradient and nothing recorded.

        ``torch.distributed.checkpoint.state_dict`` initialises states by such a step.
        """
        if self._collector.window.statistics:
            return False
        return not any(float(group["lr"]) for group in self.param_groups) and not any(
            local(p.grad).any()
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        )

    def _layers_to_project(self, names: Iterable[str]) -> list[LayerCurvature]:
        """Return the layers whose gradients the step projects on their bases.

        They are those with a gradient. Layers that move as with AdamW need scalings for
        diagnostics alone: when factors are updated.
        """
        updates = self._collector.window.plan.factors
        return [
            layer
            for layer in map(self.curvature.__getitem__, names)
            if layer.block.tensors()[0].grad is not None
            and (updates or not moves_as_adamw(layer.block, self.options))
        ]

    def _end_step(self, step: int) -> None:
        self._steps = step
        self._fresh.clear()
        self._collector.clear()
        self._collector.plan_step(step + 1)

    def _check_recorded(self) -> None:
        """Raise or warn where a layer has a gradient but nothing was recorded of it."""
        window = self._collector.window
        if not window.plan.factors:
            return
        trained = [
            layer
            for name, layer in self.curvature.items()
            if layer.block.tensors()[0].grad is not None and name not in self._fresh
        ]
        # Whether an operation uses an operand is known only after the forward pass.
        hooked = any(not isinstance(t.block.adapter, OperandAdapter) for t in trained)
        expected = hooked or self._capture.eval_forwards
        missed = "".join(
            f"\n  {shortened(list(dict.fromkeys(names)))} ({why})"
            for why, names in window.missed.items()
        )
        if missed:
            missed = f" Calls that leave no statistics:{missed}"
        if trained and expected and not window.statistics:
            problem = (
                "no statistics were recorded of any layer before this step. The model "
                "given to the optimizer must be the module whose forward is called, in "
                f"training mode (forward passes in eval mode: "
                f"{self._capture.eval_forwards}), and its output must lead to the loss "
                "whose backward() adds to .grad (torch.autograd.grad does not)."
            )
            if not any(layer.ready for layer in self.curvature.values()):
                raise CaptureError(f"{problem} {COMPILED}{missed}")
            self._warn_once([""], f"{problem} Those of earlier steps are used.{missed}")
            return
        self._warn_once(
            list(window.missed),
            "the statistics are of only a part of the calls that made .grad. Compute "
            "the loss from calls of the model in training mode, or pause the capture "
            f"in the other calls if that is meant.{missed}",
        )
        without = [
            layer
            for layer in trained
            if layer.name not in window.statistics and layer.block.is_reached
        ]
        never = {layer.name: layer for layer in without if not layer.ready}
        self._unseen |= never.keys()
        self._unseen -= window.statistics.keys()
        self._warn_once(
            list(never),
            f"layers have gradients but no statistics; {type(self).__name__} trains "
            "them with a diagonal second moment until they have some. "
            f"{COMPILED}\n{unseen(layer.block for layer in never.values())}",
        )
        old = {f"{layer.name} unseen": layer for layer in without if layer.ready}
        self._warn_once(
            list(old),
            "layers have gradients but no statistics since the last step; those of "
            f"earlier steps are used:\n{unseen(layer.block for layer in old.values())}",
        )

    def _warn_once(self, subjects: list[str], text: str) -> None:
        """Warn the caller of ``step`` unless all ``subjects`` were warned of before."""
        if not self._warned.issuperset(subjects):
            self._warned |= set(subjects)
            warn_outside(text)

    def _directions(
        self, projected: list[ProjectedGradient], groups: dict[str, int]
    ) -> dict[Tensor, Tensor]:
        """Return the direction of every parameter that has a gradient."""
        projected = [
            one
            for one in projected
            if not moves_as_adamw(one.layers[0].block, self.options)
        ]
        ready = {layer.name for one in projected for layer in one.layers}
        directions: dict[Tensor, Tensor] = {}
        by_group: list[list[Direction]] = []
        places = {name: place for place, name in enumerate(groups)}
        for number, group in enumerate(self.param_groups):
            rest = [
                p
                for p in group["params"]
                if p.grad is not None
                and (p not in self._blocks or not ready.issuperset(self._blocks[p]))
            ]
            moved = update.adamw_directions(
                [self.state[p] for p in rest],
                [shard_like(p.grad, p) for p in rest],
                group["momentum"],
                self.options.grafting,
            )
            directions |= zip(rest, moved, strict=True)
            members = [one for one in projected if groups[one.layers[0].name] == number]
            found = precondition(members, group, self.options, self._workspace)
            # On all ranks in one order.
            by_group.append(sorted(found, key=lambda one: places[one.layer.name]))
        every = [direction for members in by_group for direction in members]
        ranks = self._ranks
        if ranks is not None and ranks.assignment.divided:
            # A layer's worker sends its direction to the ranks of its row.
            names = [(d.layer.name, d.tensors()) for d in every]
            sent = [(ranks.assignment.worker(name), name, own) for name, own in names]
            ranks.exchange_(sent, ranks.row)
        update.scatter_(every, directions)
        for parameter, tensor in directions.items():
            directions[parameter] = shard_like(tensor, parameter)
        forms = [[d.form for d in ds if d.form is not None] for ds in by_group]
        update.clip_kl_(self.param_groups, forms, directions)
        return directions

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in the model, unwrapped."""
        trained = set(update.parameters_of(self.param_groups))
        every = named_parameters(self.model)
        return {name: p for name, p in every.items() if p in trained}

    def _groups_of_layers(self) -> dict[str, int]:
        """Return the number of each layer's group, by name and group by group."""
        return {
            layer.name: number
            for number, group in enumerate(self.param_groups)
            for layer in self._layers_in(group)
        }

    def _layers_in(self, group: dict[str, Any]) -> list[LayerCurvature]:
        """Return the layers of a group: it has their first parameter."""
        return [
            layer
            for parameter in group["params"]
            for name in self._blocks.get(parameter, [])
            if (layer := self.curvature[name]).block.tensors()[0] is parameter
        ]

    # -- several ranks -----------------------------------------------------------------

    def _check_ranks(self, ranks: Ranks) -> None:
        """Raise unless the ranks that have run out of data take part in steps."""
        joins = self._join_config.enable
        if (
            not joins
            and getattr(self._model, "_join_config", distributed.NO_JOIN).enable
        ):
            raise ValueError(
                "model.join() covers the model alone, and the optimizer would wait for "
                "the ranks that have run out of data; write `with "
                "torch.distributed.algorithms.Join([model, optimizer]):`."
            )
        if joins:
            Join.notify_join_context(self)  # type: ignore[arg-type]

    def _reduce(self, scale: Tensor | float, step: int, *, trains: bool) -> None:
        """Sum statistics over the ranks; first agree on layers where they changed."""
        ranks = self._ranks
        if ranks is not None and trains:
            self._check_ranks(ranks)
        if not self._collector.reduce(scale, self._standing(step, trains=trains)):
            assert ranks is not None
            self._agree_on_layers(ranks)
            standing = self._standing(step, trains=trains)
            self._collector.reduce(scale, standing, again=True)
        if ranks is not None and trains and not self._join_config.enable:
            self._check_replicas(ranks)

    def _agree_on_layers(self, ranks: Ranks) -> None:
        """Raise on all ranks unless they have the same layers and options."""
        own = distributed.configuration(
            self, self.model, self.options, ranks.fraction, self._seed
        )
        owners = ranks.assignment.owners
        layers = {b.name: (b.shape, b.diagonal, owners[b.name]) for b in self.blocks()}
        distributed.check_layers(ranks, own, layers)
        self._collector.note_agreement()
        self._replicas_checked = False

    def _check_replicas(self, ranks: Ranks) -> None:
        """Raise unless the ranks have one model; once, and after changes and loads."""
        reduced = self._collector.window.reduced
        if reduced is None or not reduced.unchecked:
            return
        parameters = self.named_parameters()
        replicas = {f"parameter {n!r}": p.detach() for n, p in parameters.items()}
        if ranks.assignment.divided:
            loaded = torch.tensor(float(self._loaded))
            replicas["the loaded state's checksum"] = loaded
        else:
            for name, layer in self.curvature.items():
                for key, average in layer.averages.items():
                    if average.held:
                        replicas[f"layer {name!r}, {key}"] = average.total
        gradients = {name: p.grad for name, p in parameters.items()}
        distributed.check_replicas(ranks, gradients, replicas)
        self._replicas_checked = True

    def _standing(self, step: int, *, trains: bool) -> Standing | None:
        """Return what this rank tells the others at a step, ``None`` if alone."""
        if self._ranks is None:
            return None
        if not trains:
            return Standing(step, trains=False)
        gradients = {
            name: layer.block.tensors()[0].grad is not None
            for name, layer in self.curvature.items()
        }
        checked = self._replicas_checked
        return Standing(
            step, True, distributed.group_options(self), gradients, checked=checked
        )

    @torch.no_grad()
    def shadow_step(self) -> None:
        """Take part in a step of the other ranks when this one has no data left."""
        step = self._steps + 1
        with self._own_precision():
            self._reduce(1.0, step, trains=False)
            self._collector.commit(step, 1.0)
        self._end_step(step)

    def follow(self, is_last_joiner: bool) -> None:
        """Take over the state of a rank that trained to the end, if this one did not.

        Args:
            is_last_joiner: Whether this rank trained to the end.
        """
        ranks = self._ranks
        if ranks is None:
            return
        rank = torch.tensor([ranks.rank if is_last_joiner else -1], device=ranks.device)
        least, most = ranks.range(rank, "ending the training with Join")
        if least == -1:
            source = int(most)
            own = self.state_dict() if ranks.rank == source else None
            state = tree_map_only(Tensor, Tensor.cpu, own)
            state = ranks.send(state, source)
            if not is_last_joiner:
                self.load_state_dict(state)

    def join_hook(self, **kwargs: Any) -> distributed.ShadowStep:
        """Return what ``Join`` calls on a rank that has run out of data.

        Raises:
            ValueError: If ``gradient_workers`` is below 1: the gradients of the other
                ranks do not reach one without data.
        """
        if self._ranks is not None and self._ranks.assignment.divided:
            raise ValueError(
                f"Join needs gradient_workers=1.0, not {self._ranks.fraction}: a rank "
                "without data does not receive the gradient that it would have to "
                "precondition for others."
            )
        return distributed.ShadowStep(self)

    @property
    def join_device(self) -> torch.device:
        """The device of ``Join``'s own tensors."""
        return torch.device("cpu") if self._ranks is None else self._ranks.device

    @property
    def join_process_group(self) -> Any:
        """The group that ``Join`` works in."""
        group = None if self._ranks is None else self._ranks.parent
        return torch.distributed.group.WORLD if group is None else group

    # -- state -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state: torch's own, ``"curvature"`` and ``"progress"``.

        Hooks registered by ``register_state_dict_post_hook`` see all of it.
        ``torch.distributed.checkpoint.state_dict`` gets it in a form that it keeps.

        Raises:
            UnsupportedOperationError: If this rank holds only a part of it.
        """
        with checkpoint.hooks_taken(self, "_optimizer_state_dict_post_hooks") as hooks:
            if checkpoint.asked_by_torch():
                state = checkpoint.carry(super().state_dict(), self)
            else:
                state = self._plain_state()
        for hook in hooks:
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    def _plain_state(self) -> dict[str, Any]:
        if self._ranks is not None and self._ranks.assignment.divided:
            raise UnsupportedOperationError(
                f"state_dict: gradient_workers={self._ranks.fraction} spreads the "
                f"curvature over {self._ranks}. Save "
                "ekfac.optim.DistributedState(optimizer) with "
                "torch.distributed.checkpoint."
            )
        return checkpoint.written(self, {**super().state_dict(), **self.own_state()})

    def own_state(self) -> dict[str, Any]:
        """Return copies of the curvature that this process holds, and the progress."""
        counts, background = self._collector.counts, self._collector.background
        noise = self._collector.noise
        progress = {
            "format": checkpoint.FORMAT,
            "made_with": checkpoint.made_with(self.options),
            "steps": self._steps,
            "seed": self._seed,
            "rows": dict(self._collector.rows),
            "counts": None if counts is None else [float(count) for count in counts],
            "noise": None if noise is None else float(noise),
            # Each of several ranks has the pending bases of the layers that it owns.
            "background": background.state_dict(),
            "parameters": checkpoint.parameter_names(self),
        }
        return {"curvature": self.curvature.state_dict(), "progress": progress}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, or change nothing and raise.

        Hooks registered by ``register_load_state_dict_pre_hook`` may change all of it.

        Raises:
            StateMismatchError: If it is the state of another model or optimizer.
        """
        Record({}, more=True).check(state_dict)
        state_dict = dict(state_dict)
        with (
            checkpoint.hooks_taken(
                self, "_optimizer_load_state_dict_pre_hooks"
            ) as before,
            checkpoint.hooks_taken(
                self, "_optimizer_load_state_dict_post_hooks"
            ) as after,
        ):
            for hook in before:
                changed = hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
            self._load(state_dict)
        for hook in after:
            hook(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        whole = checkpoint.carried(state_dict)
        if whole is not None:
            checkpoint.DistributedState(self).load_state_dict(whole)
            return
        schema = checkpoint.check_state(self, state_dict)
        state = checkpoint.converted(self, state_dict)
        # Copies of torch's entries, since averages are updated in place.
        parts = {k: schema.fields[k].write(state[k]) for k in ("state", "param_groups")}
        super().load_state_dict(parts)
        # Once more: torch has cast them to the parameters' types.
        checkpoint.take_moments(self, parts["state"])
        self.restore(state["curvature"], state["progress"])

    def restore(self, curvature: dict[str, Any], progress: dict[str, Any]) -> None:
        """Take over what :meth:`own_state` returned, once it has been checked."""
        self.curvature.copy_state_(curvature)
        self._steps, self._seed = progress["steps"], progress["seed"]
        self._loaded = crc32(repr(sorted(progress.get(CHECKSUMS, {}).items())).encode())
        counts = progress["counts"]
        known = None if counts is None else torch.tensor(counts, dtype=torch.float64)
        self._collector.counts = None if known is None else (known[0], known[1])
        noise = progress["noise"]
        self._collector.noise = (
            None if noise is None else torch.tensor(noise, dtype=torch.float64)
        )
        self._collector.rows = dict(progress["rows"])
        ranks, pending = self._ranks, progress["background"]
        if ranks is not None:
            pending = {n: p for n, p in pending.items() if ranks.assignment.owns(n)}
        self._collector.background.load_state_dict(pending)
        self._collector.seed = self._seed
        self._replicas_checked = False
        self._collector.clear()
        self._collector.plan_step(self._steps + 1)

    def __getstate__(self) -> dict[str, Any]:
        own = self.own_state()
        own |= {"model": self._model, "options": self.options, "ranks": self._ranks}
        own["by_itself"] = self._by_itself
        return {**super().__getstate__(), "ekfac": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "ekfac" not in state:  # torch's own load_state_dict passes through here
            super().__setstate__(state)
            return
        own = state["ekfac"]
        super().__setstate__({k: v for k, v in state.items() if k != "ekfac"})
        self._model, self.options = own["model"], own["options"]
        self._ranks, self._by_itself = own["ranks"], own["by_itself"]
        self._seed = own["progress"]["seed"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EkfacWarning)
            self._build()
        self.restore(own["curvature"], own["progress"])

    # -- the rest ---------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what was recorded of the passes that made them."""
        super().zero_grad(set_to_none)
        self._collector.clear()
        self._capture.discard()

    @property
    def counters(self) -> Counters:
        """Counts of what happened to the decompositions."""
        return self._collector.counters

    def describe(self) -> Description:
        """Return a table of the layers: kind, block, method, bytes, reason."""
        if self._ranks is None:  # ranks follow the model together, at a step
            self._follow_model()
        return describe(
            self.curvature,
            self._coverage,
            self.options,
            self._unseen,
            trained=update.parameters_of(self.param_groups),
        )

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
        """What records the model; ``with optimizer.capture.paused():`` pauses it."""
        return self._capture

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Evaluate the model inside the ``with`` block without a trace in training.

        No statistics are taken; random generators and buffers are put back.
        """
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            with self.capture.paused(), torch.random.fork_rng(list(devices)):
                yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    def dampings(self) -> Iterator[tuple[LayerCurvature, Tensor | float, float]]:
        """Yield each layer with its last absolute damping and examples per loss term.

        With ``gradient_workers`` below 1 they are the layers that this rank works on.
        """
        share, counts, ranks = 1.0, self._collector.counts, self._ranks
        if counts is not None and self.options.loss_reduction != "sum":
            share = float(counts[0]) / max(1.0, float(counts[1]))
        for group in self.param_groups:
            for layer in self._layers_in(group):
                here = ranks is None or ranks.assignment.works(layer.name)
                if here and self._collector.usable(layer):
                    mean = layer.mean(scalings_of(layer, self.options))
                    damping, mode = group["damping"], self.options.damping_mode
                    factor = layer.damping_factor
                    added = absolute_damping(damping, mean, mode, factor)
                    yield layer, added, share

    def blocks(self) -> list[Block]:
        """Return the blocks, in the model's order."""
        return [layer.block for layer in self.curvature.values()]

    def close(self) -> None:
        """Remove every hook from the model, as leaving a ``with`` block does.

        The optimizer stays readable.
        """
        self._capture.close()
        self._collector.background.close()

    def __enter__(self) -> KroneckerOptimizer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
