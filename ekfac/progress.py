"""Progress bars, where tqdm is installed; without it nothing is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def counted(
    total: int, description: str, *, progress: bool
) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a bar by a number of units.

    Args:
        total: Expected units; 0 if that is not known.
        description: Text of the bar.
        progress: Whether to show it.
    """
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            with tqdm(total=total or None, desc=description, leave=False) as bar:
                yield bar.update
            return
    yield lambda units: None


def shown(
    items: Iterable[T], description: str, *, progress: bool, total: int = 0
) -> Iterator[T]:
    """Yield the items, with a bar that counts them.

    Args:
        items: Iterated over once.
        description: Text of the bar.
        progress: Whether to show it.
        total: Length of items that have none.
    """
    length = length_hint(items) or total
    with counted(length, description, progress=progress) as advance:
        for item in items:
            yield item
            advance(1)
