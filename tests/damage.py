"""Ways to damage a saved state: every kind at every entry.

A state is nested dicts and lists of tensors, numbers and strings. What is put into its
place may be of another type, shape, precision or device, not finite, or out of range;
keys may be lost or renamed.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def read(tree: Any) -> Any:
    """Return a state whose saved bytes are what they hold."""
    if isinstance(tree, bytes):
        return {"as bytes": torch.load(io.BytesIO(tree), weights_only=True)}
    if isinstance(tree, dict):
        return {key: read(value) for key, value in tree.items()}
    return tree


def unread(tree: Any) -> Any:
    """Return it as it was saved."""
    if isinstance(tree, dict) and tree.keys() == {"as bytes"}:
        stream = io.BytesIO()
        torch.save(tree["as bytes"], stream)
        return stream.getvalue()
    if isinstance(tree, dict):
        return {key: unread(value) for key, value in tree.items()}
    return tree


Path = tuple[Any, ...]
Change = Callable[[Any, random.Random], Any]


def paths(tree: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of every entry of a state, inner ones too; of checksums two."""
    if path:
        yield path
    items: Any = ()
    if isinstance(tree, dict):
        items = list(tree.items())[: 2 if path[-1:] == ("checksums",) else None]
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    for key, value in items:
        yield from paths(value, (*path, key))


def at(tree: Any, path: Path) -> Any:
    """Return an entry."""
    for key in path:
        tree = tree[key]
    return tree


def with_one(number: float) -> Change:
    """Return what puts a number somewhere into a tensor."""

    def change(value: Tensor, rng: random.Random) -> Tensor:
        value = value.clone()
        value[tuple(rng.randrange(n) for n in value.shape)] = number
        return value

    return change


def with_another_bit(value: Tensor, rng: random.Random) -> Tensor:
    """Return a tensor of which the last bit of one element has turned."""
    value = value.detach().clone(memory_format=torch.preserve_format)
    bits = value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.itemsize])
    bits[tuple(rng.randrange(n) for n in value.shape)] ^= 1
    return value


def skewed(value: Tensor, rng: random.Random) -> Tensor:
    """Return a basis one column of which is turned."""
    value = value.clone()
    value[..., rng.randrange(value.shape[-1])] += 0.3
    return value


def on_diagonal(value: Tensor, rng: random.Random) -> Tensor:
    """Return a factor with a negative square."""
    value = value.clone()
    value[..., 0, 0] = -1
    return value


def exchanged(value: dict[Any, Any]) -> dict[Any, Any]:
    """Return a mapping in which the first two keys have each other's values."""
    first, second, *_ = value
    return {**value, first: value[second], second: value[first]}


ANYWHERE: dict[str, Change] = {
    "None": lambda value, rng: None,
    "text": lambda value, rng: "text",
    "in a list": lambda value, rng: [value],
    "in a dict": lambda value, rng: {"0": value},
    "truth": lambda value, rng: True,
    "three ones": lambda value, rng: torch.ones(3),
    "object": lambda value, rng: object(),
}
OF_TENSORS: dict[str, Change] = {
    "numbers": lambda t, rng: t.tolist(),
    "array": lambda t, rng: t.double().numpy(),
    "cut": lambda t, rng: t[..., :-1] if t.dim() else t[None],
    "flat": lambda t, rng: t.flatten() if t.dim() != 1 else t[None],
    "twice as wide": lambda t, rng: torch.cat([t, t], -1) if t.dim() else t[None],
    "half": lambda t, rng: t.half(),
    "bfloat16": lambda t, rng: t.bfloat16(),
    "double": lambda t, rng: t.double(),
    "integers": lambda t, rng: t.to(torch.int32),
    "complex": lambda t, rng: t.to(torch.complex64),
    "boolean": lambda t, rng: t.bool(),
    "eight bits": lambda t, rng: t.to(torch.float8_e4m3fn),
    "nested": lambda t, rng: torch.nested.nested_tensor([t, t]),
    "meta": lambda t, rng: t.to("meta"),
    "sparse": lambda t, rng: t.to_sparse(),
    "in another order": lambda t, rng: t.mT.contiguous().mT if t.dim() > 1 else t,
}
OF_FLOATS: dict[str, Change] = {
    "another bit": with_another_bit,
    "another sign": lambda t, rng: -t,
    "negative bit": lambda t, rng: torch.complex(t.float(), t.float()).conj().imag,
    "with a graph": lambda t, rng: t.clone().requires_grad_() * 1,
    "NaN": with_one(float("nan")),
    "infinity": with_one(float("inf")),
    "minus infinity": with_one(float("-inf")),
}
OF_NUMBERS: dict[str, Change] = {
    "minus": lambda n, rng: -n - 1,
    "NaN number": lambda n, rng: float("nan"),
    "infinite number": lambda n, rng: float("inf"),
    "more than a float holds": lambda n, rng: 10**400,
    "number as text": lambda n, rng: str(n),
    "two numbers": lambda n, rng: torch.tensor([n, n]),
}
OF_SEALED_NUMBERS: dict[str, Change] = {"one more": lambda n, rng: n + 1}
OF_VERSIONS: dict[str, Change] = {
    "no version": lambda n, rng: 0 if n else 3,
    "later version": lambda n, rng: n + 1000,
}
OF_BASES: dict[str, Change] = {
    "skewed": skewed,
    "scaled": lambda t, rng: t * 1.1,
    "backwards": lambda t, rng: t.flip(-1),
    "transposed": lambda t, rng: t.mT.contiguous(),
    "zeros": lambda t, rng: torch.zeros_like(t),
}
OF_SQUARES: dict[str, Change] = {"negative": with_one(-1.0)}
OF_FACTORS: dict[str, Change] = {"negative on the diagonal": on_diagonal}
OF_DICTS: dict[str, Change] = {
    "empty": lambda value, rng: {},
    "a list of pairs": lambda value, rng: list(value.items()),
    "a list of values": lambda value, rng: list(value.values()),
    "one more key": lambda value, rng: value | {"more": 1.0},
    "one entry twice": lambda value, rng: value | {"more": next(iter(value.values()))},
}
OF_SIBLINGS: dict[str, Change] = {
    "its first two entries exchanged": lambda value, rng: exchanged(value)
}
OF_LISTS: dict[str, Change] = {
    "empty": lambda value, rng: [],
    "longer": lambda value, rng: [*value, value[0]],
    "shorter": lambda value, rng: value[:-1],
}
OF_KEYS: dict[str, Callable[[dict[Any, Any], Any], None]] = {
    "lost": lambda parent, key: parent.pop(key),
    "renamed": lambda parent, key: parent.update({f"{key}x": parent.pop(key)}),
    "key in other letters": lambda parent, key: parent.update(
        {str(key).swapcase() + "_": parent.pop(key)}
    ),
}


def damages(state: Any, path: Path) -> dict[str, Change]:
    """Return the kinds of damage that an entry can take."""
    value, key = at(state, path), str(path[-1])
    kinds = dict(ANYWHERE)
    if key == "kl_clip":  # another value that is allowed
        kinds.pop("None")
    if isinstance(value, Tensor) and value.numel():
        kinds |= OF_TENSORS
        kinds |= OF_FLOATS if value.is_floating_point() else {}
        if key.startswith("Q_") and bool(value.any()):
            kinds |= OF_BASES
            # Products with a thin basis round as its memory is ordered.
            kinds.pop("in another order")
        if key in ("s", "exp_avg_sq") or key.startswith("eigenvalues"):
            kinds |= OF_SQUARES
        if key.endswith("_weight") and not value.dim():
            kinds |= OF_SQUARES
        if key in ("A", "G") and value.dim() == 3:
            kinds |= OF_FACTORS
    elif type(value) in (int, float):
        kinds |= OF_NUMBERS
        if not {"param_groups", "groups"} & set(path):  # other options are allowed
            kinds |= OF_SEALED_NUMBERS
        if "version" in path and key in ("factors", "basis"):
            kinds |= OF_VERSIONS
    elif isinstance(value, dict) and value:
        kinds |= OF_DICTS
        if len(value) > 1 and not {"param_groups", "groups"} & set(path):
            kinds |= OF_SIBLINGS
    elif isinstance(value, (list, tuple)) and value:
        kinds |= OF_LISTS
    return kinds


def every_damage(state: Any) -> Iterator[tuple[Path, str]]:
    """Yield each entry with each kind of damage that it can take."""
    for path in paths(state):
        kinds = [*damages(state, path)]
        if isinstance(at(state, path[:-1]), dict):
            kinds += OF_KEYS
        for kind in kinds:
            yield path, kind


def damaged(state: Any, path: Path, kind: str, seed: int) -> Any:
    """Return a copy of a state with one entry damaged."""
    state = copy.deepcopy(state)
    parent, key = at(state, path[:-1]), path[-1]
    if kind in OF_KEYS:
        OF_KEYS[kind](parent, key)
        return state
    change = damages(state, path)[kind]
    value = change(parent[key], random.Random(seed))
    if isinstance(parent, tuple):
        parent = list(parent)
        at(state, path[:-2])[path[-2]] = parent
    parent[key] = value
    return state
