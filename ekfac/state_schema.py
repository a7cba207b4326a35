"""Schema of a saved state: one description that both writes and checks it.

A schema is a tree of fields. :meth:`Field.write` copies the live values that the schema
lists; :meth:`Field.check` compares all of a saved value with it. A ``load_state_dict``
checks first and copies afterwards, so a refused state has changed nothing::

    schema = Record(
        {
            "format": Choice(1),
            "mean": TensorField((3, 3), torch.float32, symmetric=True),
            "weight": Number(float, minimum=0, maximum=1),
            "bases": Table({"fc": TensorField((3, 3), orthonormal=True)}),
        }
    )
    state = schema.write(values)
    schema.check(state)

Shapes that depend on the state itself (the columns of a truncated basis) are read from
entries that are checked beforehand.

:class:`~ekfac.errors.StateMismatchError` says which key, what was found and what is
expected.

Checksums of its entries seal a state. They refuse what a schema cannot tell and
``torch.load`` does not notice: a bit that a disc has turned, two layers of one shape
exchanged, an entry of another step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ekfac.errors import StateMismatchError

# Largest entry of ``Q^T Q - 1`` of orthonormal columns, by dtype. Eigensolvers' bases,
# and products of them, stay a hundred times below.
ORTHONORMAL = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
COMPLEX = (torch.complex64, torch.complex128)
ASYMMETRY = 1e-2  # share of the largest entry; even in bfloat16 rounding is far below


class Field(ABC):
    """One entry of a state."""

    @abstractmethod
    def check(self, value: Any, key: str = "") -> None:
        """Raise unless ``value`` is as described; change nothing.

        Raises:
            StateMismatchError: With the first entry that is not.
        """

    def write(self, value: Any) -> Any:
        """Return a copy of a live value, as it is saved."""
        return value


@dataclass(frozen=True)
class TensorField(Field):
    """A dense tensor with storage, whose values are finite.

    Attributes:
        shape: Its sizes, ``None`` for any size; ``None``: any shape.
        dtype: ``None``: any floating-point type that can be computed with, or any
            complex one.
        complex: Whether it is complex, where ``dtype`` does not say.
        minimum: Smallest value allowed, of a complex tensor's parts too.
        maximum: Largest value allowed.
        symmetric: The last two dimensions are symmetric, the diagonal not negative.
        indefinite: The diagonal of a symmetric one may be negative.
        orthonormal: The columns are orthonormal.
    """

    shape: tuple[int | None, ...] | None = None
    dtype: torch.dtype | None = None
    complex: bool = False
    minimum: float | None = None
    maximum: float | None = None
    symmetric: bool = False
    indefinite: bool = False
    orthonormal: bool = False

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless it is such a tensor."""
        expected = str(self)
        if not isinstance(value, Tensor) or not _has_values(value):
            raise StateMismatchError.at(key, described(value), expected)
        shape = tuple(value.shape)
        fits = self.shape is None or (
            len(shape) == len(self.shape)
            and all(b in (None, a) for a, b in zip(shape, self.shape, strict=True))
        )
        any_float = value.dtype in (COMPLEX if self.complex else ORTHONORMAL)
        typed = any_float if self.dtype is None else value.dtype == self.dtype
        if not (fits and typed):
            raise StateMismatchError.at(key, described(value), expected)
        wrong = self._wrong_values(_part_here(value))
        if wrong:
            raise StateMismatchError.at(key, f"{described(value)} {wrong}", expected)

    def _wrong_values(self, value: Tensor) -> str:
        """Return what is wrong with the values, or nothing."""
        if value.is_complex():
            value = torch.view_as_real(value)
        if value.numel() == 0:
            return ""
        if not bool(torch.isfinite(value).all()):
            kind = "NaN" if bool(torch.isnan(value).any()) else "an infinity"
            return f"with {kind} in it"
        low, high = value.min().item(), value.max().item()
        if self.minimum is not None and low < self.minimum:
            return f"with {low:.6g} in it"
        if self.maximum is not None and high > self.maximum:
            return f"with {high:.6g} in it"
        if self.symmetric:
            deviation = (value - value.mT).abs().max().item()
            if deviation > ASYMMETRY * max(abs(low), abs(high)):
                return f"that differs from its transpose by {deviation:.3g}"
            negative = bool((value.diagonal(dim1=-2, dim2=-1) < 0).any())
            if negative and not self.indefinite:
                return "with negative numbers on its diagonal"
        if self.orthonormal:
            exact = value.float() if value.element_size() < 4 else value
            eye = torch.eye(value.shape[-1], dtype=exact.dtype, device=value.device)
            deviation = (exact.mT @ exact - eye).abs().max().item()
            if not deviation <= ORTHONORMAL[value.dtype]:
                return f"whose columns are {deviation:.3g} from orthonormal"
        return ""

    def write(self, value: Tensor) -> Tensor:
        """Return a copy, without the rest of a view's storage."""
        return value.detach().clone()

    def __str__(self) -> str:
        """Return what is expected."""
        kind = "complex" if self.complex else "floating-point"
        kind = kind if self.dtype is None else _name(self.dtype)
        text = f"a finite {kind} tensor"
        if self.shape is not None:
            sizes = ", ".join("any" if n is None else str(n) for n in self.shape)
            text += f" [{sizes}]"
        limits = _limits(self.minimum, self.maximum)
        text += f" with values {limits}" if limits else ""
        text += ", symmetric" if self.symmetric else ""
        definite = self.symmetric and not self.indefinite
        text += " with a non-negative diagonal" if definite else ""
        return text + (" with orthonormal columns" if self.orthonormal else "")


@dataclass(frozen=True)
class Number(Field):
    """A finite Python number.

    Attributes:
        kind: ``int`` or ``float``. An integer of at most 64 bits is both, a truth value
            neither.
        minimum: Smallest value allowed.
        maximum: Largest value allowed.
    """

    kind: type[int] | type[float] = float
    minimum: float | None = None
    maximum: float | None = None

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless it is such a number."""
        typed = type(value) is int or (self.kind is float and type(value) is float)
        if (
            not typed
            or not -math.inf < value < math.inf
            or (type(value) is int and value.bit_length() > 63)
            or (self.minimum is not None and value < self.minimum)
            or (self.maximum is not None and value > self.maximum)
        ):
            name = "an integer" if self.kind is int else "a finite number"
            limits = _limits(self.minimum, self.maximum)
            expected = f"{name} {limits}" if limits else name
            raise StateMismatchError.at(key, described(value), expected)


@dataclass(frozen=True, init=False)
class Choice(Field):
    """One of some plain values."""

    values: tuple[str | int | float | bool | None, ...]

    def __init__(self, *values: str | float | bool | None) -> None:
        object.__setattr__(self, "values", values)

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless it is one of them, of the same type."""
        if not any(type(value) is type(v) and value == v for v in self.values):
            allowed = ", ".join(repr(v) for v in self.values)
            expected = allowed if len(self.values) == 1 else f"one of {allowed}"
            raise StateMismatchError.at(key, described(value), expected)


@dataclass(frozen=True)
class Text(Field):
    """Any string."""

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless it is a string."""
        if not isinstance(value, str):
            raise StateMismatchError.at(key, described(value), "a string")


@dataclass(frozen=True)
class Maybe(Field):
    """A field, or ``None``."""

    field: Field

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless it is ``None`` or as the field says."""
        if value is not None:
            self.field.check(value, key)

    def write(self, value: Any) -> Any:
        """Return a copy, or ``None``."""
        return None if value is None else self.field.write(value)


@dataclass(frozen=True)
class ListOf(Field):
    """A list or tuple of one kind of entries.

    Attributes:
        field: Field of each entry.
        length: Number of entries; ``None``: any.
    """

    field: Field
    length: int | None = None

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless it is such a list."""
        expected = "a list" if self.length is None else f"a list of {self.length}"
        if not isinstance(value, (list, tuple)):
            raise StateMismatchError.at(key, described(value), expected)
        if self.length not in (None, len(value)):
            raise StateMismatchError.at(key, f"a list of {len(value)}", expected)
        for number, item in enumerate(value):
            self.field.check(item, joined(key, number))

    def write(self, value: Iterable[Any]) -> list[Any]:
        """Return a list of copies."""
        return [self.field.write(item) for item in value]


@dataclass(frozen=True)
class Items(Field):
    """A list with a field for each entry."""

    fields: Sequence[Field]

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless it is a list of as many entries, each as described."""
        ListOf(Anything(), len(self.fields)).check(value, key)
        for number, (field, item) in enumerate(zip(self.fields, value, strict=True)):
            field.check(item, joined(key, number))

    def write(self, value: Sequence[Any]) -> list[Any]:
        """Return a list of copies."""
        return [f.write(item) for f, item in zip(self.fields, value, strict=True)]


Rule = Callable[[Mapping[str, Any], str], None]


@dataclass(frozen=True)
class Record(Field):
    """A mapping with fixed keys.

    Attributes:
        fields: Fields by key.
        optional: Keys that may be missing; all others must be there.
        more: Whether unknown keys are allowed; they are saved without a check.
        same_dtype: Groups of keys whose tensors, if present, share one dtype: a state
            in another precision is converted, but one such tensor alone is damaged.
        rules: Called with the mapping and its path once every entry is as described;
            they raise where entries contradict each other.
        advice: What to do about missing and unknown keys.
    """

    fields: Mapping[Any, Field]
    optional: Collection[Any] = ()
    more: bool = False
    same_dtype: Collection[Collection[Any]] = ()
    rules: tuple[Rule, ...] = ()
    advice: str = ""

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless it has these keys and all entries are as described."""
        if not isinstance(value, Mapping):
            raise StateMismatchError.at(key, described(value), "a dict")
        missing = [k for k in self.fields if k not in value and k not in self.optional]
        unknown = [] if self.more else [k for k in value if k not in self.fields]
        if missing or unknown:
            self._refuse_keys(key, missing, unknown)
        for name, field in self.fields.items():
            if name in value:
                field.check(value[name], joined(key, name))
        for names in self.same_dtype:
            check_same_dtype({n: value[n] for n in names if n in value}, key)
        for rule in self.rules:
            rule(value, key)

    def _refuse_keys(self, key: str, missing: list[Any], unknown: list[Any]) -> None:
        path = joined(key, (missing or unknown)[0])
        if not missing:
            known = f"one of {_short(list(self.fields))}"
            actual = "present"
            if unknown[1:]:
                actual += f" beside {_short(unknown[1:])}"
            raise StateMismatchError.at(path, actual, known, self.advice)
        actual = f"missing with {_short(missing[1:])}" if missing[1:] else "missing"
        actual += f", and {_short(unknown)} unknown" if unknown else ""
        raise StateMismatchError.at(path, actual, "present", self.advice)

    def write(self, value: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return copies of the entries that the schema lists, in its order.

        Raises:
            StateMismatchError: If one that must be there is not.
        """
        missing = [k for k in self.fields if k not in value and k not in self.optional]
        if missing:
            self._refuse_keys("", missing, [])
        listed = {k: f.write(value[k]) for k, f in self.fields.items() if k in value}
        others = (k for k in value if k not in self.fields)
        return listed | {k: deepcopy(value[k]) for k in others if self.more}


def Table(fields: Mapping[Any, Field]) -> Record:
    """Return the field of a mapping of which every key may be missing."""
    return Record(fields, optional=fields.keys())


@dataclass(frozen=True)
class MapOf(Field):
    """A mapping from strings to one kind of entries."""

    field: Field

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless it is such a mapping."""
        if not isinstance(value, Mapping):
            raise StateMismatchError.at(key, described(value), "a dict")
        for name, item in value.items():
            Text().check(name, f"{key}: a key")
            self.field.check(item, joined(key, name))

    def write(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of the entries."""
        return {name: self.field.write(item) for name, item in value.items()}


# Checksums that entries may have, by path; sharded entries have none.
CHECKSUMS = "checksums"
SEAL: Mapping[str, Field] = {CHECKSUMS: MapOf(ListOf(Number(int, 0)))}


def sealed(state: Mapping[str, Any], skip: Collection[str] = ()) -> dict[str, Any]:
    """Return a state with the checksums of its entries.

    Args:
        state: Nested dicts and lists of tensors and plain values.
        skip: Keys of it that may be changed afterwards.
    """
    kept = {key: value for key, value in state.items() if key not in skip}
    return {**state, CHECKSUMS: {path: _sums(v) for path, v in _entries(kept)}}


def check_seal(
    state: Mapping[str, Any],
    sums: Mapping[str, Collection[int]] | None,
    *,
    skip: Collection[str] = (),
    elsewhere: Callable[[str], bool] = lambda path: False,
    key: str = "",
) -> None:
    """Raise unless every entry is as it was when the state was sealed.

    Args:
        state: A state that a schema has checked.
        sums: Its checksums; without any nothing is compared.
        skip: As for :func:`sealed`.
        elsewhere: Returns whether a missing entry is another rank's.
        key: Path of the state, for the error.

    Raises:
        StateMismatchError: With the first entry that is not.
    """
    if sums is None:
        return
    present = dict(_entries({k: v for k, v in state.items() if k not in skip}))
    for path in sorted(present.keys() ^ sums.keys()):
        if path in present:
            raise StateMismatchError.at(
                joined(key, path), "present", "missing: it was not saved"
            )
        if not elsewhere(path):
            raise StateMismatchError.at(
                joined(key, path), "missing", "present: it was saved"
            )
    for path, value in present.items():
        own = _sums(value)
        if own and sums[path] and not set(own) <= set(sums[path]):
            raise StateMismatchError.at(
                joined(key, path),
                f"{described(value)} of the checksum {own[0]}",
                f"one of {' or '.join(map(str, sums[path]))}, as it was saved",
                "The state is damaged or was changed; to load one that was changed on "
                f"purpose, remove its {CHECKSUMS!r}.",
            )


def _entries(state: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the innermost entries, empty lists included, with their paths."""
    if isinstance(state, Mapping):
        for name, value in state.items():
            if name != CHECKSUMS:
                yield from _entries(value, joined(key, name))
    elif isinstance(state, (list, tuple)) and state:
        for number, value in enumerate(state):
            yield from _entries(value, joined(key, number))
    else:
        yield key, state


def _sums(value: Any) -> list[int]:
    """Return the checksum of an entry; a sharded tensor has none.

    That of a tensor is the sum of its elements' bits as integers, each with an odd
    weight of its own, modulo a power of two, computed on its device: it is exact in any
    order, and changes with any single element. Sums over rows and columns alone would
    not tell a permutation from the identity, or a matrix from its negative.
    """
    if not isinstance(value, Tensor):
        plain = list(value) if isinstance(value, tuple) else value
        return [crc32(repr(plain).encode())]
    if hasattr(value, "to_local"):
        return []
    bits = value.detach().resolve_conj().resolve_neg()
    bits = torch.view_as_real(bits) if bits.is_complex() else bits
    columns = bits.shape[-1] if bits.dim() else 1
    bits = bits.reshape(bits.numel() // max(1, columns), columns)
    if bits.element_size() == 8:  # in halves: the sum would lose the highest bit
        bits = bits.contiguous().view(torch.int32)
    else:
        bits = bits.view(_INTEGERS[bits.element_size()])
    rows, columns = bits.shape
    weights = _odd(0, rows, bits.device), _odd(1 << 40, columns, bits.device)
    total = 0
    for start in range(0, rows, step := max(1, _CHUNK // max(1, columns))):
        part = bits[start : start + step] * weights[1]
        total += int((part.sum(1) * weights[0][start : start + step]).sum())
    return [total % 2**63]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_CHUNK = 1 << 20  # elements whose products are in memory at a time


def _odd(start: int, count: int, device: torch.device) -> Tensor:
    """Return ``count`` odd integers without a pattern; ``start`` determines them."""
    mixed = torch.arange(start, start + count, device=device)
    mixed = mixed * -0x61C8864680B583EB  # modulo 2^64
    return (mixed ^ (mixed >> 32)) | 1


@dataclass(frozen=True)
class Sealed(Record):
    """A record that is written with the checksums of its entries."""

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless it is as described, and as it was written."""
        plain = value
        if isinstance(value, Mapping):
            seal = {k: v for k, v in value.items() if k == CHECKSUMS}
            Table(SEAL).check(seal, key)
            plain = {k: v for k, v in value.items() if k != CHECKSUMS}
        super().check(plain, key)
        check_seal(plain, value.get(CHECKSUMS), key=key)

    def write(self, value: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return copies of the entries, and the checksums."""
        return sealed(super().write(value))


def check_same_dtype(tensors: Mapping[Any, Any], key: str) -> None:
    """Raise unless all tensors share one dtype.

    Raises:
        StateMismatchError: With a tensor that has not the most common one.
    """
    dtypes = {name: t.dtype for name, t in tensors.items() if isinstance(t, Tensor)}
    if len(set(dtypes.values())) > 1:
        common = Counter(dtypes.values()).most_common(1)[0][0]
        name = next(name for name, dtype in dtypes.items() if dtype != common)
        raise StateMismatchError.at(
            joined(key, name),
            described(tensors[name]),
            f"a {_name(common)} tensor as the others beside it",
        )


def entry(state: Any, key: str, *path: Any) -> Any:
    """Return an entry of nested mappings, from which a schema is made.

    Raises:
        StateMismatchError: If a mapping on the way is missing or is none.
    """
    for name in path:
        Record({name: Anything()}, more=True).check(state, key)
        state, key = state[name], joined(key, name)
    return state


@dataclass(frozen=True)
class Anything(Field):
    """Any value, without a check."""

    def check(self, value: Any, key: str = "") -> None:
        """Accept it."""


def sizes(value: Any) -> tuple[int, ...]:
    """Return the shape of a saved tensor, ``()`` for anything else."""
    dense = isinstance(value, Tensor) and _has_values(value)
    return tuple(value.shape) if dense else ()


def joined(key: str, name: Any) -> str:
    """Return the path of the entry ``name`` of the value at ``key``."""
    return f"{key}.{name}" if key else str(name)


def described(value: Any) -> str:
    """Return what a value is, for an error."""
    if isinstance(value, Tensor):
        where = f" on {value.device}" if value.device.type != "cpu" else ""
        layout = "" if value.layout == torch.strided else f"{value.layout} "
        sizes = "of several sizes" if value.is_nested else f"{list(value.shape)}"
        kind = layout.removeprefix("torch.")
        return f"a {kind}{_name(value.dtype)} tensor {sizes}{where}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return _short(value)
    if isinstance(value, Mapping):
        return f"a dict with the keys {_short(list(value))}"
    if isinstance(value, (list, tuple, set, bytes)):
        return f"a {type(value).__name__} of {len(value)}"
    return _short(value)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # some types, and integers of thousands of digits
        text = f"of the type {type(value).__name__}, and cannot be shown"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _limits(minimum: float | None, maximum: float | None) -> str:
    parts = [] if minimum is None else [f">= {minimum:g}"]
    return " and ".join(parts + ([] if maximum is None else [f"<= {maximum:g}"]))


def _has_values(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and has a storage that can be read."""
    # A fake tensor has a device but no values; it is known by its class's name, since
    # the class is private to torch.
    fake = type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")
    dense = tensor.layout == torch.strided and not tensor.is_nested
    return dense and not (tensor.is_meta or tensor.is_quantized or fake)


def _part_here(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph; of a sharded one, this rank's part."""
    local = getattr(tensor, "to_local", None)
    part: Tensor = (tensor if local is None else local()).detach()
    return part
