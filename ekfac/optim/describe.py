"""What is trained how: the table that ``optimizer.describe()`` returns."""

from __future__ import annotations

from dataclasses import dataclass

from ekfac.curvature import Curvature
from ekfac.curvature.options import Options
from ekfac.layers import Coverage

BLOCKS = (
    "block: b x d_out x d_in, b independent matrices [weight | bias] of a layer "
    "(d_in counts the bias); of a parameter in no block, its shape"
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        layer: Name of the layer, or of a parameter that is in no block.
        kind: The layer's type.
        block: ``b x d_out x d_in``, or the parameter's shape.
        method: How it is preconditioned.
        bytes: Memory of its curvature.
        reason: Why this method, where it is not the usual one.
    """

    layer: str
    kind: str
    block: str
    method: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Description:
    """The table; printing it shows it."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """Return the table as text."""
        head = ("layer", "kind", "block", "method", "bytes", "reason")
        lines = [head, *[tuple(str(getattr(r, h)) for h in head) for r in self.rows]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                cell.ljust(width) for cell, width in zip(line, widths, strict=True)
            )
            for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([BLOCKS, *(line.rstrip() for line in text)])

    def __repr__(self) -> str:
        """Return the table as text."""
        return str(self)


def describe(
    curvature: Curvature,
    coverage: Coverage,
    options: Options,
) -> Description:
    """Return how every trained parameter is treated."""
    method = "K-FAC" if options.scaling is None else "EKFAC"
    rows = []
    for layer in curvature.values():
        block = layer.block
        kinds = "+".join(type(use.adapter.module).__name__ for use in block.uses)
        name, reason = method, ""
        if block.exact:
            name, reason = "exact", "small blocks are kept exactly"
        elif any(block.diagonal):
            sides = zip(("input", "output"), block.diagonal, strict=True)
            which = " and ".join(side for side, diagonal in sides if diagonal)
            name = f"{method}, diagonal {which}"
            wide = f"wider than max_dim={options.max_dim}"
            reason = "one-hot inputs" if block.adapter.diagonal_input else wide
        elif layer.truncated:
            sizes = zip(("G", "A"), block.shape[1:], strict=True)
            kept = [f"{d - layer.complement(side)} of {d}" for side, d in sizes]
            name, reason = f"{method}, {' x '.join(kept)}", "truncated bases"
        if len(block.uses) > 1:
            reason = f"{reason}; shared weight".lstrip("; ")
        shape = "x".join(map(str, block.shape))
        rows.append(Row(layer.name, kinds, shape, name, layer.bytes(), reason))
    for name, parameter in coverage.rest.items():
        shape = "x".join(map(str, parameter.shape)) or "1"
        size = parameter.numel() * parameter.element_size()  # of its second moment
        reason = coverage.reasons[name]
        rows.append(Row(name, "parameter", shape, "AdamW-like", size, reason))
    return Description(tuple(rows))
