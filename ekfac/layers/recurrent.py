"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells, each of which is one function.

In forward passes whose statistics are taken, and in no others, the function is replaced
by its steps, written with ``linear``; the result is the same to rounding. On one CPU
core forward and backward pass of such a layer then take 1.1 (GRU) to 1.8 times (LSTM)
as long, at 32 sequences of 64 positions and 128 to 256 features: 1 to 8 % on average if
one pass in ten has statistics (``benchmarks/recurrent.py``), half of that with one in
twenty, the default. On a GPU such passes run without cuDNN, so layers (not cells) need
the user's consent, :func:`unroll`.

All gates are one block, the matrix ``[gates H, d_in]`` that torch stores: closer to the
Fisher matrix than a block for each gate and, in equal time, better for training a GRU
and equal for an LSTM (the same script). The pre-activation of a gate is the sum of a
term of the input and one of the hidden state, so both have the same gradient; the
second term of a GRU's new gate is multiplied by the reset gate. Packed sequences are
padded to the longest; the padding does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from ekfac.layers.base import (
    COMPUTED,
    Adapter,
    FunctionalAdapter,
    Report,
    Slot,
    Tap,
    register,
)
from ekfac.layers.linear import LinearAdapter

_UNROLLED: WeakSet[nn.Module] = WeakSet()
# The functions that layers and cells call -> the key of their steps in STEPS.
_LAYERS = {
    torch.lstm: "LSTM",
    torch.gru: "GRU",
    torch.rnn_tanh: "RNN_TANH",
    torch.rnn_relu: "RNN_RELU",
}
_CELLS = {
    torch.lstm_cell: "LSTM",
    torch.gru_cell: "GRU",
    torch.rnn_tanh_cell: "RNN_TANH",
    torch.rnn_relu_cell: "RNN_RELU",
}


def unroll(model: nn.Module) -> None:
    """Allow recurrent layers on a GPU to run without cuDNN in some forward passes.

    In passes whose statistics are taken, one in ``factor_interval``, the layers then
    launch several kernels for every position. Call it before the optimizer is made;
    without it the layers have no block and are preconditioned by their diagonal.

    Args:
        model: An ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, or a module that contains some.
    """
    kinds = (nn.LSTM, nn.GRU, nn.RNN)
    _UNROLLED.update(m for m in model.modules() if isinstance(m, kinds))


@register(nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
class RecurrentAdapter(FunctionalAdapter, LinearAdapter):
    """One weight ``[gates H, d_in]``, of the input, hidden state or projection."""

    costly = True

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse computed weights, and layers on a GPU unless :func:`unroll` is on."""
        names = _weights(module)
        if any(module._parameters.get(name) is None for name in names):
            return COMPUTED
        on_gpu = any(p.is_cuda for p in module.parameters())
        if on_gpu and isinstance(module, nn.RNNBase) and module not in _UNROLLED:
            return (
                "cuDNN runs it; ekfac.layers.recurrent.unroll(model) before the "
                "optimizer is made lets the forward passes whose statistics are taken "
                "do without"
            )
        return None

    @classmethod
    def build(cls, module: nn.Module) -> dict[str, Adapter]:
        """Return the blocks by the weights' names."""
        blocks: dict[str, Adapter] = {}
        for name in _weights(module):
            bias = name.replace("weight", "bias", 1)
            slot = Slot(bias) if module._parameters.get(bias) is not None else None
            blocks[name] = cls(module, Slot(name), slot)
        return blocks


def _weights(module: nn.Module) -> list[str]:
    """Return the names of a layer's or cell's weights."""
    if isinstance(module, nn.RNNBase):
        return [n for names in module._all_weights for n in names if "weight" in n]
    return ["weight_ih", "weight_hh"]


class RecurrentTap(Tap):
    """Runs the function of a recurrent layer or cell step by step and reports it."""

    def __init__(
        self, module: nn.Module, adapters: Any, args: Any, kwargs: Any, report: Report
    ) -> None:
        super().__init__(module, adapters, args, kwargs, report)
        self.by_name = {adapter.weight.name: adapter for adapter in self.adapters}
        x = args[0] if args else kwargs["input"]
        # The examples of a packed sequence in the order of the batch.
        self.back = x.unsorted_indices if isinstance(x, PackedSequence) else None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``; those of recurrent layers and cells step by step."""
        run, mode = self._layer, _LAYERS.get(func)
        if mode is None:
            run, mode = self._cell, _CELLS.get(func)
        if mode is None:
            return func(*args, **(kwargs or {}))
        device = args[0].device.type
        # As autocast does: all of these functions on a GPU, oneDNN's LSTM on a CPU.
        lowers = device != "cpu" or func is torch.lstm
        if not (lowers and torch.is_autocast_enabled(device)):
            return run(mode, *args)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return run(mode, *tree_map_only(Tensor, partial(_lowered, dtype), args))

    def tell(
        self,
        name: str,
        x: Tensor,
        out: Tensor,
        rows: Rows | None = None,
        factor: Tensor | None = None,
    ) -> None:
        """Report a use of the weight ``name``, if it has a block.

        Args:
            name: The parameter's name.
            x: ``[rows, d_in]``, what the weight is applied to.
            out: ``[rows, *]``, whose gradient is that of the product.
            rows: Examples and positions of the rows; ``None`` if each is an example.
            factor: ``[rows, H]``, the derivative of the last ``H`` pre-activations with
                respect to the product; ``None`` if it is 1.
        """
        adapter = self.by_name.get(name)
        if adapter is None:
            return
        arrange = partial(_by_example, rows, factor)
        keep = None if rows is None else rows.keep
        self.report(adapter, _by_example(rows, None, x.detach()), out, arrange, keep)

    @_disable_dynamo
    def _cell(self, mode: str, x: Tensor, state: Any, *weights: Any) -> Any:
        """Return the new state of a cell."""
        h, c = state if mode == "LSTM" else (state, state)
        w_ih, w_hh, b_ih, b_hh = weights
        of_x, of_h = F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)
        self.tell("weight_ih", x, of_x)
        self.tell("weight_hh", h, of_h)
        new_h, new_c, _ = STEPS[mode](of_x, of_h, h, c)
        return (new_h, new_c) if mode == "LSTM" else new_h

    @_disable_dynamo
    def _layer(self, mode: str, x: Tensor, *rest: Any) -> Any:
        """Return output and last states of a layer, as the function does."""
        packed = isinstance(rest[2], list)  # then the batch sizes come first
        if packed:
            sizes, rest, data = rest[0].tolist(), rest[1:], x
        states, weights, _, depth, dropout, training, both, *first = rest
        batch_first = bool(first and first[0])
        if not packed:
            x = x.transpose(0, 1) if batch_first else x
            data, sizes = x.flatten(0, 1), [x.shape[1]] * len(x)
        h, c = states if mode == "LSTM" else (states, states)
        rows, sides = Rows.of(sizes, x.device, self.back), 2 if both else 1
        lasts: list[tuple[Tensor, Tensor]] = []
        names_by_layer: Any = self.module._all_weights
        for level in range(depth):
            outputs = []
            for side in range(sides):
                i = level * sides + side
                names = names_by_layer[i]
                start = i * len(names)
                part = weights[start : start + len(names)]
                named = dict(zip(names, part, strict=True))
                run = Direction(self, mode, named, rows, sizes, reverse=side > 0)
                out, *last = run(data, h[i], c[i])
                outputs.append(out)
                lasts.append((last[0], last[1]))
            data = torch.cat(outputs, dim=-1)
            if dropout and training and level < depth - 1:
                data = F.dropout(data, dropout, True)
        if not packed:
            data = data.unflatten(0, (len(sizes), sizes[0]))
            data = data.transpose(0, 1) if batch_first else data
        ends = [torch.stack(each) for each in zip(*lasts, strict=True)]
        return (data, *ends) if mode == "LSTM" else (data, ends[0])


class Rows:
    """Examples and positions of the rows ``[rows, d]`` of sequences, positions first.

    Args:
        index: ``[N, L]``, the row of an example's position, one past the last if none.
        keep: ``[N, L]``, whether there is a row, or ``None`` if there always is.
    """

    def __init__(self, index: Tensor, keep: Tensor | None) -> None:
        self.index, self.keep = index, keep

    @classmethod
    def of(
        cls, sizes: Sequence[int], device: torch.device, back: Tensor | None
    ) -> Rows:
        """Return the rows of a batch.

        Args:
            sizes: The number of sequences at each position.
            device: The device of the rows.
            back: Indices that undo the sorting of the sequences, or ``None``.
        """
        counts = torch.tensor(sizes)
        examples = torch.arange(max(sizes, default=0))
        keep = examples[:, None] < counts
        index = torch.where(
            keep, counts.cumsum(0) - counts + examples[:, None], sum(sizes)
        )
        index, keep = index.to(device), keep.to(device)
        if back is not None:
            index, keep = index[back], keep[back]
        return cls(index, None if len(set(sizes)) == 1 else keep)

    def at(self, position: int) -> Rows:
        """Return the rows of one position."""
        examples = self.index[:, position : position + 1]
        first = examples.min() if len(examples) else 0
        keep = None if self.keep is None else self.keep[:, position : position + 1]
        index = examples - first
        if keep is not None:
            index = torch.where(keep, index, keep.sum())
        return Rows(index, keep)

    def __call__(self, t: Tensor) -> Tensor:
        """Return ``[N, L, d]`` of ``[rows, d]``, zero where there is no row."""
        if self.keep is not None:
            t = F.pad(t, (0, 0, 0, 1))
        return t[self.index]


def _lowered(dtype: torch.dtype, t: Tensor) -> Tensor:
    """Return a floating-point tensor in ``dtype``, any other as it is."""
    return t.to(dtype) if t.is_floating_point() else t


def _by_example(rows: Rows | None, factor: Tensor | None, t: Tensor) -> Tensor:
    """Return ``[N, L, d]`` of ``[rows, d]``, the last features times a factor."""
    if factor is not None:
        size = factor.shape[-1]
        t = torch.cat([t[..., :-size], t[..., -size:] * factor], dim=-1)
    return t if rows is None else rows(t)


class Direction:
    """One layer of a recurrent module in one direction.

    Args:
        tap: Receives the weights' uses.
        mode: A key of :data:`STEPS`.
        weights: Names -> weights and biases.
        rows: The rows of all positions.
        sizes: The number of sequences at each position.
        reverse: Whether it starts at the last position.
    """

    def __init__(
        self,
        tap: RecurrentTap,
        mode: str,
        weights: dict[str, Tensor],
        rows: Rows,
        sizes: Sequence[int],
        *,
        reverse: bool,
    ) -> None:
        self.tap, self.mode, self.rows, self.sizes = tap, mode, rows, sizes
        self.reverse = reverse
        self.names = {name.split("_l")[0]: name for name in weights}
        self.weights = {name.split("_l")[0]: t for name, t in weights.items()}

    def __call__(self, x: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, ...]:
        """Return outputs ``[rows, H]`` and the last states ``[N, H]`` of ``x``."""
        weights, count = self.weights, len(self.sizes)
        inner = F.linear(x, weights["weight_ih"], weights.get("bias_ih"))
        if torch.is_grad_enabled() and not inner.requires_grad:
            inner = inner.detach().requires_grad_()  # the other weights' gradient
        parts = inner.split(list(self.sizes))
        order = list(range(count))[:: -1 if self.reverse else 1]
        size = self.sizes[order[0]]
        h, c = h0[:size], c0[:size]
        ended: list[tuple[Tensor, Tensor]] = []
        before, after, factors = [x] * count, [x] * count, [x] * count
        for t in order:
            size = self.sizes[t]
            if size < len(h):
                ended.append((h[size:], c[size:]))
            start = slice(min(len(h), size), size)
            h = torch.cat([h[:size], h0[start]]) if size > len(h) else h[:size]
            c = torch.cat([c[:size], c0[start]]) if size > len(c) else c[:size]
            before[t] = h
            of_h = F.linear(h, weights["weight_hh"], weights.get("bias_hh"))
            h, c, factors[t] = STEPS[self.mode](parts[t], of_h, h, c)
            h = after[t] = self._project(h, t)
        name, factor = self.names["weight_hh"], None
        if self.mode == "GRU":
            factor = torch.cat(factors).detach()
        self.tap.tell(self.names["weight_ih"], x, inner, self.rows)
        self.tap.tell(name, torch.cat(before), inner, self.rows, factor)
        ended.append((h, c))
        ends = [torch.cat(each[::-1]) for each in zip(*ended, strict=True)]
        return (torch.cat(after), *ends)

    def _project(self, h: Tensor, position: int) -> Tensor:
        """Return the projection of the hidden state, if there is one."""
        weight = self.weights.get("weight_hr")
        if weight is None:
            return h
        out = F.linear(h, weight)
        self.tap.tell(self.names["weight_hr"], h, out, self.rows.at(position))
        return out


# A step takes the terms of input and hidden state in the pre-activations [n, gates H],
# and the states h and c. It returns the new states and the factor of the second term's
# last part, see RecurrentTap.tell.
def _lstm(of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = (of_x + of_h).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c, c


def _gru(of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    size = h.shape[-1]
    gates = (of_x[:, : 2 * size] + of_h[:, : 2 * size]).sigmoid()
    reset, update = gates.chunk(2, dim=-1)
    new = (of_x[:, 2 * size :] + reset * of_h[:, 2 * size :]).tanh()
    h = (h - new) * update + new
    return h, h, reset


def _plain(activation: Any, of_x: Tensor, of_h: Tensor, *_: Any) -> tuple[Tensor, ...]:
    h = activation(of_x + of_h)
    return h, h, h


RecurrentAdapter.tap = RecurrentTap
STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": partial(_plain, torch.tanh),
    "RNN_RELU": partial(_plain, torch.relu),
}
