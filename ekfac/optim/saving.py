"""What an optimizer saves and restores: its state, copies and pickles."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ekfac.curvature import Curvature
from ekfac.curvature.collector import Collector
from ekfac.curvature.distributed import Ranks
from ekfac.curvature.options import Settings
from ekfac.errors import EkfacWarning, StateMismatchError, UnsupportedOperationError


class Saving(Optimizer):
    """How the curvature travels with the state; a base of it, on torch's own."""

    curvature: Curvature
    settings: Settings
    _model: nn.Module
    _ranks: Ranks | None
    _by_itself: bool
    _collector: Collector
    _counts: tuple[Tensor, Tensor] | None
    _steps: int
    _seed: int
    if TYPE_CHECKING:

        def _build(self) -> None: ...
        def _plan(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state: torch's own, and ``"curvature"`` with plain tensors.

        Raises:
            UnsupportedOperationError: If this rank holds only a part of it.
        """
        if self._ranks is not None and self._ranks.assignment.divided:
            raise UnsupportedOperationError(
                f"state_dict: gradient_workers={self._ranks.fraction} spreads the "
                f"curvature over {self._ranks}. Save "
                "ekfac.optim.DistributedState(optimizer) with "
                "torch.distributed.checkpoint."
            )
        return {**super().state_dict(), **self.own_state()}

    def own_state(self) -> dict[str, Any]:
        """Return copies of the curvature that this process holds, and the progress."""
        counts = self._counts
        progress = {
            "steps": self._steps,
            "seed": self._seed,
            "rows": dict(self._collector.rows),
            "counts": None if counts is None else [c.clone() for c in counts],
            "background": self._on_its_way(),
        }
        return {"curvature": self.curvature.state_dict(), "progress": progress}

    def _on_its_way(self) -> dict[str, Any]:
        """Return the bases that a thread is at; not of several ranks.

        Each has but those of its own layers. Where a state is loaded they are found at
        the step at which they were to be adopted.
        """
        background = self._collector.background
        return background.state_dict() if self._ranks is None else {}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, or change nothing and raise.

        Raises:
            StateMismatchError: If it is the state of another model or optimizer.
        """
        if "curvature" not in state_dict or "progress" not in state_dict:
            raise StateMismatchError(
                f"the state has no curvature (its keys: {sorted(state_dict)}); it was "
                f"saved by another optimizer. Load one that {type(self).__name__}"
                ".state_dict() returned."
            )
        self.curvature.check_state(state_dict["curvature"])
        super().load_state_dict(state_dict)
        self.restore(state_dict["curvature"], state_dict["progress"])

    def restore(self, curvature: dict[str, Any], progress: dict[str, Any]) -> None:
        """Take over what :meth:`own_state` returned."""
        self.curvature.load_state_dict(curvature)
        self._steps, self._seed = progress["steps"], progress["seed"]
        counts = progress["counts"]
        self._counts = None if counts is None else (counts[0], counts[1])
        self._collector.rows = dict(progress["rows"])
        self._collector.background.load_state_dict(progress.get("background", {}))
        self._collector.reseed(self._seed)
        self._collector.clear()
        self._plan()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: the model is part of it."""
        own = self.own_state()
        own |= {"model": self._model, "settings": self.settings, "ranks": self._ranks}
        own["by_itself"] = self._by_itself
        return {**super().__getstate__(), "ekfac": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the hooks on the copied model."""
        if "ekfac" not in state:  # torch's own load_state_dict passes through here
            super().__setstate__(state)
            return
        own = state["ekfac"]
        super().__setstate__({k: v for k, v in state.items() if k != "ekfac"})
        self._model, self.settings = own["model"], own["settings"]
        self._ranks, self._by_itself = own["ranks"], own["by_itself"]
        self._seed = own["progress"]["seed"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EkfacWarning)
            self._build()
        self.restore(own["curvature"], own["progress"])
