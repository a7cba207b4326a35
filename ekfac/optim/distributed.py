"""Several ranks: configuration, sharding, replicas, and ``Join``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import JoinHook, _JoinConfig
from torch.optim.optimizer import Optimizer

from ekfac.curvature.distributed import Ranks
from ekfac.curvature.distributed.group import Failures
from ekfac.curvature.options import GROUP_OPTIONS, Options
from ekfac.layers import is_sharded
from ekfac.layers.base import whole
from ekfac.optim.checkpoint import likelihood_name
from ekfac.vectors import named_parameters

SEED = "seed"  # the only entry of a configuration that may differ between ranks


def join_ranks(
    process_group: Any,
    workers: float,
    model: nn.Module,
    configured: Callable[[], Mapping[str, Any]],
) -> tuple[Ranks, int] | None:
    """Return the ranks that train together and the first one's seed.

    They are compared before any process group is made for them. A process that trains
    alone gets ``None``.

    Args:
        process_group: The user's.
        workers: Fraction of the ranks that precondition one layer.
        model: The network, on whose device the ranks communicate.
        configured: Returns the :func:`configuration` of this rank.

    Raises:
        ValueError: For a group without ``torch.distributed`` or without this process,
            for ranks that construct different optimizers, or for a fraction that they
            cannot form.
        RankError: If a rank does not construct an optimizer.
    """
    if not (isinstance(workers, int | float) and 0 < workers <= 1):
        raise ValueError(
            f"Invalid gradient_workers: {workers!r}; use the fraction of the ranks "
            "that precondition one layer, in (0, 1]."
        )
    distributed = (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    )
    if process_group is not None and not distributed:
        raise ValueError(
            f"Invalid process_group: {process_group!r}, but torch.distributed is not "
            "initialised; call torch.distributed.init_process_group first, or leave "
            "process_group out."
        )
    if not distributed or torch.distributed.get_world_size(process_group) == 1:
        return None
    rank = torch.distributed.get_rank(process_group)
    if rank < 0:
        raise ValueError("Invalid process_group: this process is not in it.")
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    configurations = _gathered(process_group, rank, device, configured())
    _refuse_difference(
        configurations,
        "Ranks 0 and {rank} construct different optimizers",
        "Give all ranks the same model and options, or a process_group of those that "
        "train together.",
    )
    return Ranks(process_group, device, workers), configurations[0][SEED]


def _gathered(
    group: Any, rank: int, device: torch.device, own: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """Return what every rank has configured."""
    group = group or torch.distributed.group.WORLD  # torch 2.6 has no members of None
    members = torch.distributed.get_process_group_ranks(group)
    failures = Failures(f"construction on {members}", rank, len(members), device)
    failures.forget()
    return failures.gather(own, group, "constructing the optimizer")


def configuration(
    optimizer: Optimizer, model: nn.Module, options: Options, workers: float, seed: int
) -> dict[str, object]:
    """Return by name what must be equal on ranks that train together, and the seed.

    Devices, batches and process groups' handles may differ, and so may seeds: the first
    rank's is used.
    """
    names = {id(p): name for name, p in named_parameters(model).items()}
    fixed = {f.name: getattr(options, f.name) for f in fields(options)}
    likelihood = fixed.pop("likelihood")
    options_by_name = {
        "the optimizer": type(optimizer).__name__,
        "gradient_workers": workers,
        **fixed,
        "likelihood": likelihood_name(likelihood),
        **group_options(optimizer),
    }
    for index, group in enumerate(optimizer.param_groups):
        params = [names.get(id(p), "not of the model") for p in group["params"]]
        options_by_name[f"params of group {index}"] = params
    shapes = {
        f"parameter {name!r}": (tuple(p.shape), str(p.dtype), p.requires_grad)
        for name, p in named_parameters(model).items()
    }
    return {SEED: seed, **options_by_name, **shapes}


def group_options(optimizer: Optimizer) -> dict[str, float]:
    """Return the param groups' options as numbers, by a name for errors; None is -1."""
    return {
        f"{key} of param group {index}": -1.0 if value is None else float(value)
        for index, group in enumerate(optimizer.param_groups)
        for key in GROUP_OPTIONS
        for value in (group[key],)
    }


def check_layers(
    ranks: Ranks, configured: Mapping[str, object], layers: Mapping[str, object]
) -> None:
    """Raise unless all ranks have the same layers and configuration.

    Raises:
        ValueError: On every rank, with two that differ and what differs.
    """
    own = {**configured, **{f"layer {n!r}": layer for n, layer in layers.items()}}
    _refuse_difference(
        ranks.agree(own),
        "the model or the param groups are, or have changed, otherwise on rank {rank} "
        "than on 0",
        "Give all ranks one model, and change it alike on all, between the same steps.",
    )


def _refuse_difference(
    configurations: Sequence[Mapping[str, object]], problem: str, advice: str
) -> None:
    """Raise unless the ranks' configurations are equal, but for the seed."""
    first = configurations[0]
    for rank, other in enumerate(configurations):
        differ = [
            name
            for name in {**first, **other}
            if name != SEED and first.get(name) != other.get(name)
        ]
        if differ:
            name = differ[0]
            raise ValueError(
                f"{problem.format(rank=rank)}: {name} is {first.get(name)!r} on rank 0 "
                f"and {other.get(name)!r} on rank {rank}. {advice}"
            )


class Averaging:
    """Callable: will the coming backward average gradients over the ranks?

    It is called when the model's forward begins. The answer is known for
    ``fully_shard``, and for ``DistributedDataParallel`` around the model, even if it
    was put there later.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.members = ranks.members()
        modules: Iterator[Any] = model.modules()
        self.sharded = [
            module._get_fsdp_state()
            for module in modules
            if hasattr(module, "set_requires_gradient_sync")
        ]

    def __call__(self) -> bool:
        """Return whether the coming backward is known to average."""
        if self.sharded:
            groups = [g for state in self.sharded for g in _groups(state)]
            return all(getattr(group, "reduce_grads", True) for group in groups)
        ddp: Any = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if ddp is None or not ddp.require_backward_grad_sync:
            return False
        if ddp._join_config.enable:  # ranks without data have no backward pass
            return False
        members = torch.distributed.get_process_group_ranks(ddp.process_group)
        return sorted(members) == self.members


def _groups(state: Any) -> list[Any]:
    """Return the parameter groups in a module's ``fully_shard`` state."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [state._fsdp_param_group] if groups is None else list(groups)


def is_gathered(model: nn.Module) -> bool:
    """Return whether ``fully_shard`` has gathered parameters at the moment."""
    modules: Iterator[Any] = model.modules()
    return any(
        not getattr(group, "is_sharded", True)
        for module in modules
        if hasattr(module, "set_requires_gradient_sync")
        for group in _groups(module._get_fsdp_state())
        if group is not None
    )


def check_alone() -> None:
    """Raise if ``torch.distributed`` was initialised after the construction.

    Raises:
        ValueError: With the number of ranks.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size > 1:
            raise ValueError(
                f"Invalid process_group: {size} ranks train, and the optimizer was "
                "constructed before torch.distributed was initialised. Construct it "
                "afterwards; a rank that trains alone takes a process_group of its own."
            )


def own_members(ranks: Ranks | None) -> list[int]:
    """Return the global ranks of the processes that train together."""
    if ranks is not None:
        return ranks.members()
    distributed = torch.distributed
    alone = not (distributed.is_available() and distributed.is_initialized())
    return [0 if alone else distributed.get_rank()]


def tensor_axes(parameter: Tensor, members: Sequence[int]) -> list[int]:
    """Return the axes of a parameter's mesh along which ranks have one batch.

    They are those of ``parallelize_module``; ``fully_shard`` has the others. The
    ``members`` are global ranks.
    """
    if not is_sharded(parameter):
        return []
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    numbers = torch.distributed.get_process_group_ranks
    return [
        axis
        for axis in range(mesh.ndim)
        if not set(numbers(mesh.get_group(axis))) <= set(members)
    ]


def shared_seed(model: nn.Module, seed: int, members: Sequence[int]) -> int:
    """Return the first one's seed to ranks that have parts of one layer and one batch.

    Their backward passes are one, so ``"mc"`` must draw the same targets on all.
    """
    for parameter in model.parameters():
        for axis in tensor_axes(parameter, members):
            group = parameter.device_mesh.get_group(axis)  # type: ignore[attr-defined]
            first = torch.distributed.get_global_rank(group, 0)
            box = [seed]
            torch.distributed.broadcast_object_list(box, first, group=group)
            return box[0]
    return seed


def check_sharding(model: nn.Module, members: Sequence[int]) -> None:
    """Raise if parameters are split in a way that cannot be trained.

    Allowed are ``fully_shard`` over the ranks that train together,
    ``parallelize_module`` over ranks that each train with others, and both together.

    Raises:
        ValueError: With the name of a parameter.
    """
    managed: set[int] = set()
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):  # FSDPModule
            managed |= {id(p) for p in module.parameters()}
    for name, parameter in named_parameters(model).items():
        if is_sharded(parameter):
            axes = tensor_axes(parameter, members)
            if id(parameter) in managed:
                _check_sharded(name, parameter, len(members), axes)
            else:
                _check_parallel(name, parameter, members)
        elif id(parameter) in managed:
            raise ValueError(
                f"parameter {name!r} is gathered at the moment by fully_shard; "
                "construct the optimizer before the first forward pass, or call "
                "reshard() on the model first."
            )


def _check_parallel(name: str, parameter: Any, members: Sequence[int]) -> None:
    """Raise if ranks that share one batch count as ranks with a batch each."""
    mesh = parameter.device_mesh
    together = sorted(set(mesh.mesh.flatten().tolist()) & set(members))
    if len(together) > 1 or mesh.ndim > 1:
        raise ValueError(
            f"parameter {name!r} is split by tensor parallelism over ranks {together} "
            f"(mesh {mesh}), which share one batch and may not count as ranks that "
            f"train together. {OF_DATA}; or, where there are no others, a group of "
            "each rank alone (torch.distributed.new_subgroups(1)[0])."
        )


OF_DATA = (
    "Give process_group those that have the same part, mesh['data'].get_group() of a "
    "mesh of two dimensions whose 'tensor' went to parallelize_module"
)


def _check_sharded(name: str, parameter: Any, size: int, axes: Sequence[int]) -> None:
    """Raise unless ``fully_shard`` has split a parameter over the ranks that train.

    ``parallelize_module`` has the ``axes`` of its mesh.
    """
    mesh, placements = parameter.device_mesh, parameter.placements
    own = [axis for axis in range(mesh.ndim) if axis not in axes]
    over = prod(mesh.size(axis) for axis in own or axes)
    if over != size:
        raise ValueError(
            f"parameter {name!r} is sharded over {over} ranks, and {size} train "
            "together; give process_group the ranks of its mesh."
        )
    split = [not placements[axis].is_replicate() for axis in own]
    if split != [False] * (len(own) - 1) + [True] or len(axes) > 1:
        raise ValueError(
            f"parameter {name!r} is a DTensor with placements {placements}. Parameters "
            "sharded by fully_shard over a mesh of one dimension, or replicated and "
            "sharded over two (HSDP), can be trained, after parallelize_module over "
            f"one dimension more too. {OF_DATA}; train others with another optimizer."
        )


@contextmanager
def gathered(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Replace sharded parameters of a model by whole tensors inside the block.

    The hooks of ``fully_shard`` and ``parallelize_module``, which second derivatives do
    not pass, are removed meanwhile. All ranks must call this.

    Yields:
        The tensors that stand for ``parameters``; a whole one stands for itself.
    """
    stand_ins: dict[Tensor, nn.Parameter] = {}
    before: list[tuple[Any, dict[Any, Any]]] = []
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "reshard"):
            module.reshard()
    try:
        for module in modules:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                own = [key for key, hook in hooks.items() if _handles_shards(hook)]
                if own:
                    before.append((hooks, dict(hooks)))
                for key in own:
                    del hooks[key]
            split = {k: p for k, p in module._parameters.items() if is_sharded(p)}
            if split:
                before.append((module._parameters, dict(module._parameters)))
            for name, parameter in split.items():
                if parameter not in stand_ins:
                    tensor = whole(parameter.detach()).clone()
                    stand_ins[parameter] = nn.Parameter(tensor, parameter.requires_grad)
                module._parameters[name] = stand_ins[parameter]
        yield [stand_ins.get(p, p) for p in parameters]
    finally:
        for place, entries in before:
            place.clear()
            place.update(entries)


def _handles_shards(hook: object) -> bool:
    module = str(getattr(hook, "__module__", ""))
    return module.startswith(("torch.distributed.fsdp", "torch.distributed.tensor"))


# Relative difference of norms that is more than rounding, and what to do. Every rank
# averages gradients in its own precision; replicas stay equal.
GRADIENT = (
    1e-3,
    "All must have the averaged gradient: wrap the model in DistributedDataParallel or "
    "fully_shard (outside no_sync), or average it before step().",
)
REPLICA = (
    1e-5,
    "All must begin with one model and load one checkpoint: DistributedDataParallel "
    "sends the first rank's model when it is made.",
)


def check_replicas(
    ranks: Ranks,
    gradients: Mapping[str, Tensor | None],
    replicas: Mapping[str, Tensor],
) -> None:
    """Raise on every rank if the ranks hold different models or gradients.

    Otherwise the replicas would drift apart. Sharded tensors are not compared.

    Raises:
        ValueError: With the name of a tensor that differs.
    """
    compared: list[tuple[str, Tensor | None, tuple[float, str]]] = [
        (f"parameter {name!r}: the norm of its gradient", gradient, GRADIENT)
        for name, gradient in gradients.items()
    ]
    compared += [(f"{name}: its norm", t, REPLICA) for name, t in replicas.items()]
    compared = [c for c in compared if not hasattr(c[1], "full_tensor")]
    if not compared:
        return
    norms = [
        torch.tensor(-1.0, dtype=torch.float64, device=ranks.device)
        if tensor is None
        else torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).to(
            ranks.device
        )
        for _, tensor, _ in compared
    ]
    finite_norms = torch.nan_to_num(torch.stack(norms))
    bounds = ranks.range(finite_norms, "comparing the replicas of the ranks")
    lists = (bound.tolist() for bound in bounds)
    for (name, _, rule), least, most in zip(compared, *lists, strict=True):
        allowed, advice = rule
        if most - least > allowed * abs(most):
            raise ValueError(
                f"{name} is between {least:.6g} and {most:.6g} on the {ranks.size} "
                f"ranks (-1: none). {advice} Ranks that train models of their own take "
                "a process_group of one rank each."
            )


NO_JOIN = _JoinConfig.construct_disabled_join_config()


class ShadowStep(JoinHook):
    """Steps of a rank without data while the others still train.

    The rank takes part in sums of statistics, with none of its own, and in
    decompositions; at the end it receives the state of a rank that trained to the end.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        """Shadow the collectives of one step."""
        self._optimizer.shadow_step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Take over the state of a rank that trained to the end."""
        self._optimizer.follow(is_last_joiner)
