"""The optimizers' options, checked, and the schedule of their refreshes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ekfac.curvature.state import check_rank
from ekfac.likelihoods import Likelihood, resolve

CHOICES: Mapping[str, tuple[object, ...]] = {
    "damping_mode": ("relative", "absolute"),
    "damping_split": ("exact", "factored"),
    "grafting": ("rms", "sgd", None),
    "scaling": ("running_average", "per_example"),
    "fisher": ("empirical", "mc", "exact"),
    "loss_reduction": ("mean", "sum", "global_mean"),
    "sharing": ("expand", "reduce"),
    "power": (-1, -0.5),
    "precision": ("auto", "full"),
}


@dataclass(frozen=True)
class Schedule:
    """Which steps do what; a pure function of the step's number, from 1.

    Attributes:
        factors: Steps between updates of the factors.
        basis: Steps between refreshes of a layer's basis.
        scalings: Steps between updates of the scalings.
        delay: Steps between the start of a search for a basis and its adoption.
    """

    factors: int
    basis: int
    scalings: int
    delay: int = 0

    def factors_due(self, step: int) -> bool:
        """Return whether factors are updated: at first always, then by interval."""
        return step % self.factors == 0 or step <= 10

    def scalings_due(self, step: int) -> bool:
        """Return whether scalings are updated."""
        return step % self.scalings == 0 or step <= 10

    def basis_due(self, step: int, index: int, layers: int) -> bool:
        """Return whether the layer number ``index`` refreshes its basis.

        The first bases come from few batches, so all layers refresh at steps 1, 2, 4,
        8, ... until the interval is reached. From then on they take turns.
        """
        if step < self.basis:
            return step & (step - 1) == 0
        return step % self.basis == index * self.basis // layers

    def basis_adopted(self, step: int, index: int, layers: int) -> bool:
        """Return whether the layer moves to a new basis, due ``delay`` steps ago.

        What is due in the first interval is adopted at once.
        """
        begun = step if step < self.basis else step - self.delay
        late = begun < self.basis <= step
        return not late and self.basis_due(begun, index, layers)

    def refreshed(
        self, step: int, ready: Mapping[str, bool]
    ) -> tuple[frozenset[str], frozenset[str]]:
        """Return which layers move to a new basis, and for which a search begins.

        Args:
            step: Number of the step.
            ready: Layers in their order, and whether they have a basis; else one is
                found at once.
        """
        count, late = len(ready), self.delay > 0 and step >= self.basis
        adopt, begin = set(), set()
        for index, (name, known) in enumerate(ready.items()):
            if not known or self.basis_adopted(step, index, count):
                adopt.add(name)
            if late and self.basis_due(step, index, count):
                begin.add(name)
        return frozenset(adopt), frozenset(begin)


@dataclass(frozen=True)
class Settings:
    """What is fixed for a whole run, as opposed to what ``param_groups`` hold.

    Attributes are those of the constructors. ``scaling`` is ``None`` for K-FAC.
    """

    damping_mode: str
    damping_split: str
    grafting: str | None
    factor_decay: float
    scaling_decay: float
    schedule: Schedule
    scaling: str | None
    fisher: str
    loss_reduction: str
    likelihood: Likelihood
    sharing: str
    power: float
    max_dim: int
    tolerance: float
    nesterov: bool
    precision: str
    rank: float | None


def check(name: str, value: Any) -> Any:
    """Return ``value`` if the option ``name`` allows it.

    Raises:
        ValueError: With what was found and what is allowed.
    """
    if name in CHOICES:
        if value not in CHOICES[name]:
            allowed = ", ".join(repr(choice) for choice in CHOICES[name])
            raise ValueError(f"Invalid {name}: {value!r}; use one of {allowed}.")
    elif name in ("factor_decay", "scaling_decay", "momentum"):
        if not 0 <= value < 1:
            raise ValueError(f"Invalid {name}: {value!r}; it must be in [0, 1).")
    elif name.endswith("interval") or name == "max_dim":
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"Invalid {name}: {value!r}; it must be an integer >= 1.")
    elif name == "basis_delay":
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"Invalid {name}: {value!r}; it must be an integer >= 0.")
    elif name == "rank":
        check_rank(value)
    elif name == "kl_clip":
        if value is not None and not value > 0:
            raise ValueError(f"Invalid kl_clip: {value!r}; use None or a number > 0.")
    elif name == "nesterov":
        if not isinstance(value, bool):
            raise ValueError(f"Invalid nesterov: {value!r}; use True or False.")
    elif not value >= 0:
        raise ValueError(f"Invalid {name}: {value!r}; it must be >= 0.")
    return value


def settings(options: Mapping[str, Any]) -> Settings:
    """Return the checked settings of a constructor's keyword arguments.

    Raises:
        ValueError: For a value that an option does not allow.
    """
    for name, value in options.items():
        if name not in ("likelihood", "scaling"):
            check(name, value)
    if options["basis_delay"] >= options["basis_interval"]:
        raise ValueError(
            f"Invalid basis_delay: {options['basis_delay']}; a basis must be adopted "
            "before the search for the next begins: use less than basis_interval "
            f"({options['basis_interval']})."
        )
    special = {"schedule", "likelihood", "tolerance"}
    names = set(Settings.__dataclass_fields__) - special
    return Settings(
        **{name: options[name] for name in names},
        schedule=Schedule(
            options["factor_interval"],
            options["basis_interval"],
            options["scaling_interval"],
            options["basis_delay"],
        ),
        likelihood=resolve(options["likelihood"]),
        tolerance=options["basis_tolerance"],
    )
