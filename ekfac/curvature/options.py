"""Options of the optimizers, checked, and the schedule of their refreshes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ekfac.curvature.state import Storage
from ekfac.layers import ConvFactors
from ekfac.likelihoods import Likelihood
from ekfac.matrices.eigen import DampingMode

Direction = Literal["spectral", "natural"]
Grafting = Literal["adaptive", "rms", "sgd"]
Scaling = Literal["running_average", "per_example"]
Fisher = Literal["empirical", "mc", "exact"]
LossReduction = Literal["mean", "sum", "global_mean"]
Sharing = Literal["expand", "reduce"]
Split = Literal["exact", "factored"]
Precision = Literal["auto", "full"]

CHOICES: Mapping[str, tuple[object, ...]] = {
    "direction": get_args(Direction),
    "damping_mode": get_args(DampingMode),
    "damping_split": get_args(Split),
    "grafting": (*get_args(Grafting), None),
    "scaling": get_args(Scaling),
    "fisher": get_args(Fisher),
    "loss_reduction": get_args(LossReduction),
    "sharing": get_args(Sharing),
    "conv_factors": get_args(ConvFactors),
    "power": (-1, -0.5),
    "precision": get_args(Precision),
    "storage": get_args(Storage),
}
GROUP_OPTIONS = ("lr", "momentum", "weight_decay", "damping", "kl_clip")

STACKED = "leave it out: equal layers are stacked"
REPLACED: Mapping[str, str] = {  # options of other optimizers, and what to give here
    "betas": "give momentum=betas[0] and, to EKFAC, scaling_decay=betas[1]",
    "eps": "give damping, relative to each layer's mean curvature",
    "amsgrad": "leave it out: scalings are averages, without a maximum",
    "dampening": "leave it out: momentum is an average of the gradients",
    "maximize": "minimise minus the loss",
    "differentiable": "leave it out: no gradient passes through a step",
    "capturable": "leave it out: a step is not captured in a CUDA graph",
    "foreach": STACKED,
    "fused": STACKED,
    "ns_steps": "leave it out: the polar factor takes three steps of its own",
    "ns_coefficients": "leave it out: the polar factor has coefficients of its own",
    "adjust_lr_fn": "leave it out: lr is the root mean square of a step",
    "precondition_frequency": "give basis_interval",
    "max_precond_dim": "give max_dim",
    "factor_update_steps": "give factor_interval",
    "inv_update_steps": "give basis_interval",
    "grad_worker_fraction": "give gradient_workers",
}


@dataclass(frozen=True)
class StepPlan:
    """What one step takes from its batch.

    Attributes:
        factors: Whether factors are updated.
        scalings: Whether scalings are updated, of whatever kind.
        refresh: Names of the layers whose basis is refreshed.
        begin: Names of those for which the search for a later basis begins.
    """

    factors: bool = False
    scalings: bool = False
    refresh: frozenset[str] = frozenset()
    begin: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Schedule:
    """The steps at which statistics are updated; a step's number begins at 1.

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
        """Return whether factors are updated: at steps 1, 3, 9, ... at first."""
        if step < self.factors:  # the last one not just before the first interval ends
            return is_power(step, 3) and 2 * step <= self.factors
        return step % self.factors == 0

    def scalings_due(self, step: int) -> bool:
        """Return whether scalings are updated: at the first ten steps always."""
        return step % self.scalings == 0 or step <= 10

    def basis_due(self, step: int, index: int, layers: int) -> bool:
        """Return whether the layer number ``index`` refreshes its basis.

        The first bases come from few batches, so all layers refresh whenever three
        times as many steps have been made, until the interval is reached, and always
        along with the factors: at steps 1, 3, 9, 20, 60 for intervals of 20 and 100.
        From then on they take turns. See :meth:`too_dear`, too.
        """
        if step < self.basis:
            updates = max(1, step // self.factors)
            return self.factors_due(step) and is_power(updates, 3)
        return step % self.basis == index * self.basis // layers

    def too_dear(self, age: int, passes: float) -> bool:
        """Return whether a basis that is due so early costs more than it is worth.

        In the first interval between updates of bases they are soon replaced. One that
        costs more than all passes through the layer since it was found waits, as those
        of convolutions with many channels on small images; in the first interval
        between updates of the factors one that costs more than all of its passes.

        Args:
            age: Steps since the layer's basis was found.
            passes: What finding another costs, in passes of a batch.
        """
        return passes > max(age, self.factors)

    def basis_adopted(self, step: int, index: int, layers: int) -> bool:
        """Return whether the layer adopts a basis that was due ``delay`` steps ago.

        A basis that is due in the first interval is adopted at once.
        """
        begun = step if step < self.basis else step - self.delay
        late = begun < self.basis <= step
        return not late and self.basis_due(begun, index, layers)

    def plan(self, step: int, ready: Mapping[str, bool]) -> StepPlan:
        """Return the plan of a step.

        Args:
            step: Its number.
            ready: Layer name -> whether it has a basis. One that has none finds it now.
        """
        count, late = len(ready), self.delay > 0 and step >= self.basis
        refresh, begin = set(), set()
        for index, (name, known) in enumerate(ready.items()):
            if not known or self.basis_adopted(step, index, count):
                refresh.add(name)
            if late and self.basis_due(step, index, count):
                begin.add(name)
        return StepPlan(
            self.factors_due(step),
            self.scalings_due(step),
            frozenset(refresh),
            frozenset(begin),
        )


@dataclass(frozen=True)
class Options:
    """Options that are fixed for a whole run, unlike those of ``param_groups``.

    Attributes are those of the constructors. The defaults of the last four are for
    K-FAC, which has no such options.

    Raises:
        ValueError: For a value that an option does not allow.
    """

    direction: Direction
    damping_mode: DampingMode
    damping_split: Split
    grafting: Grafting | None
    factor_decay: float
    factor_interval: int
    basis_interval: int
    basis_delay: int
    fisher: Fisher
    loss_reduction: LossReduction
    likelihood: Likelihood
    sharing: Sharing
    power: float
    max_dim: int
    max_aspect: float
    basis_tolerance: float
    nesterov: int
    precision: Precision
    storage: Storage
    memory_budget: int | None
    conv_factors: ConvFactors
    scaling: Scaling | None = None
    scaling_decay: float = 0.9
    scaling_interval: int = 1
    rank: float | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name != "likelihood" and (name != "scaling" or value is not None):
                check(name, value)
        if self.basis_delay >= self.basis_interval:
            raise ValueError(
                f"Invalid basis_delay: {self.basis_delay}; a basis must be adopted "
                "before the search for the next begins: use less than basis_interval "
                f"({self.basis_interval})."
            )
        if self.direction == "spectral" and self.power != -1:
            raise ValueError(
                f"Invalid power: {self.power!r} with direction='spectral', which "
                "divides by the root of the scalings before and after the polar "
                "factor; use power=-1, or direction='natural'."
            )

    @property
    def schedule(self) -> Schedule:
        """The steps at which statistics are updated."""
        intervals = self.factor_interval, self.basis_interval, self.scaling_interval
        return Schedule(*intervals, self.basis_delay)

    @property
    def empirical(self) -> bool:
        """Whether the recorded gradients are those of the user's own loss."""
        return self.fisher == "empirical"


def is_power(number: int, base: int) -> bool:
    """Return whether a positive number is a power of another; 1 is."""
    while number % base == 0:
        number //= base
    return number == 1


def check_rank(rank: Any) -> None:
    """Raise unless ``rank`` says how many eigenvectors to keep.

    Raises:
        ValueError: With what was found and what is allowed.
    """
    count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank < 1
    if not (rank is None or count or share):
        raise ValueError(
            f"Invalid rank: {rank!r}; use None (all eigenvectors), an integer >= 1 "
            "(that many of each factor) or a number between 0 and 1 (those with "
            "eigenvalues above this share of the factor's mean)."
        )


def refuse_replaced(optimizer: str, names: Iterable[str]) -> None:
    """Raise if there are options of other optimizers among ``names``.

    Raises:
        TypeError: With what to give, to the optimizer of that name, in their place.
    """
    advice = [f"{name} ({REPLACED[name]})" for name in names if name in REPLACED]
    if advice:
        raise TypeError(f"{optimizer} does not take {'; '.join(advice)}.")


def check_group(optimizer: str, group: Mapping[str, Any]) -> None:
    """Raise unless a param group holds what the optimizer of that name reads there.

    Raises:
        TypeError: For options of other optimizers, and for options of the constructor,
            which are fixed for all groups.
        ValueError: For a value that an option does not allow.
    """
    refuse_replaced(optimizer, group)
    fixed = {field.name for field in fields(Options)}
    if misplaced := [name for name in group if name in fixed]:
        raise TypeError(
            f"A param group of {optimizer} cannot set {', '.join(misplaced)}, only "
            f"{', '.join(GROUP_OPTIONS)}; the rest is given to the constructor, for "
            "all groups."
        )
    for name in GROUP_OPTIONS:
        if name in group:
            check(name, group[name])


def check(name: str, value: Any) -> None:
    """Raise unless the option ``name`` allows ``value``.

    Raises:
        ValueError: With what was found and what is allowed.
    """
    try:
        _check(name, value)
    except TypeError:  # of a comparison with a number
        raise ValueError(f"Invalid {name}: {value!r}; it must be a number.") from None


def _check(name: str, value: Any) -> None:
    """Raise as :func:`check`, or ``TypeError`` where a number is compared with none."""
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
    elif name == "max_aspect":
        if not value >= 1:
            raise ValueError(
                f"Invalid max_aspect: {value!r}; use a number >= 1, math.inf to have a "
                "basis for every side up to max_dim."
            )
    elif name == "basis_delay":
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"Invalid {name}: {value!r}; it must be an integer >= 0.")
    elif name == "rank":
        check_rank(value)
    elif name == "memory_budget":
        if value is not None and not (type(value) is int and value >= 1):
            raise ValueError(f"Invalid {name}: {value!r}; use None or bytes >= 1.")
    elif name == "kl_clip":
        if value is not None and not value > 0:
            raise ValueError(f"Invalid kl_clip: {value!r}; use None or a number > 0.")
    elif name == "nesterov":
        if not isinstance(value, int) or value < 0:
            raise ValueError(
                f"Invalid nesterov: {value!r}; use the number of steps to look ahead: "
                "0 or False, 1 or True (Nesterov's form), or more."
            )
    elif not value >= 0:
        raise ValueError(f"Invalid {name}: {value!r}; it must be >= 0.")
