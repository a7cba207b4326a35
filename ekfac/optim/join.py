"""An optimizer among others, and ranks that run out of data before the rest do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, JoinHook, _JoinConfig

from ekfac.capture import Capture
from ekfac.curvature.collector import Collector
from ekfac.curvature.distributed import Ranks
from ekfac.optim.ranks import Averaging, check_gradients

NO_JOIN = _JoinConfig.construct_disabled_join_config()


class ShadowStep(JoinHook):
    """What a rank without data does while the others still train.

    It takes its part in adding statistics, with none of its own, and in decomposing; at
    the end it gets the state of a rank that trained to the end.
    """

    def __init__(self, optimizer: Joining) -> None:
        self.optimizer = optimizer

    def main_hook(self) -> None:
        """Shadow the collectives of one step."""
        self.optimizer.shadow_step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Take over the state of a rank that trained to the end."""
        self.optimizer.follow(is_last_joiner)


def _on_cpu(tree: Any) -> Any:
    """Return nested state with its tensors on the CPU."""
    if isinstance(tree, Tensor):
        return tree.cpu()
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    return [_on_cpu(value) for value in tree] if isinstance(tree, list) else tree


class Joining:
    """What an optimizer does as one of several ranks; a base of it, after torch's.

    It has the interface of ``torch.distributed.algorithms.Joinable``.
    """

    _model: nn.Module
    _ranks: Ranks | None
    _collector: Collector
    _capture: Capture
    _steps: int
    if TYPE_CHECKING:

        def _end_step(self, step: int) -> None: ...
        def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...  # noqa: D102

    def _alone(self) -> None:
        """Start as an optimizer that has met no other rank yet."""
        self._join_config = NO_JOIN
        self._checked = False  # that the ranks have one gradient

    def _overlap(self, model: nn.Module) -> None:
        """Let statistics travel during backward passes; not those of a copy."""
        if self._ranks is not None:
            self._capture.averaged = Averaging(model, self._ranks)

    def _meet_ranks(self, ranks: Ranks, named: dict[str, nn.Parameter]) -> None:
        """Look, before the first step, whether the ranks train together."""
        joins = self._join_config.enable
        if not joins and getattr(self._model, "_join_config", NO_JOIN).enable:
            raise ValueError(
                "model.join() covers the model alone, and the optimizer would wait for "
                "the ranks that have run out of data; write `with "
                "torch.distributed.algorithms.Join([model, optimizer]):`."
            )
        if joins:
            Join.notify_join_context(self)  # type: ignore[arg-type]
        elif not self._checked:
            check_gradients(ranks, {name: p.grad for name, p in named.items()})
        self._checked = True

    @torch.no_grad()
    def shadow_step(self) -> None:
        """Take part in a step of the other ranks, without data of this one's own."""
        self._collector.meet(1.0)
        self._collector.commit(self._steps + 1, 1.0)
        self._end_step(self._steps + 1)

    def follow(self, is_last_joiner: bool) -> None:
        """Take over the state of a rank that trained to the end, if this did not."""
        ranks = self._ranks
        if ranks is None:
            return
        rank = torch.tensor([ranks.rank if is_last_joiner else -1], device=ranks.device)
        least, most = ranks.range(rank)
        if least == -1:
            source = int(most)
            state = _on_cpu(self.state_dict()) if ranks.rank == source else None
            state = ranks.send(state, source)
            if not is_last_joiner:
                self.load_state_dict(state)

    def join_hook(self, **kwargs: Any) -> ShadowStep:
        """Return what ``Join`` calls on a rank that has run out of data.

        Raises:
            ValueError: If gradients travel between ranks: those of the other ranks do
                not reach one without data.
        """
        if self._ranks is not None and self._ranks.assignment.divided:
            raise ValueError(
                f"Join needs gradient_workers=1.0, not {self._ranks.fraction}: a rank "
                "without data does not receive the gradient that it would have to "
                "precondition for others."
            )
        return ShadowStep(self)

    @property
    def join_device(self) -> torch.device:
        """Where ``Join``'s own tensors are laid."""
        return torch.device("cpu") if self._ranks is None else self._ranks.device

    @property
    def join_process_group(self) -> Any:
        """The group that ``Join`` works in."""
        group = None if self._ranks is None else self._ranks.group
        return torch.distributed.group.WORLD if group is None else group
