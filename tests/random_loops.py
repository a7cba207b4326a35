"""Random models with training loops, and what algebra says of them.

A case is a list of operations on one example. It is run twice: as a user's module with
batches, in the case's dtype (:class:`Net`), and as a function of the parameters and of
a displacement of every layer's output, in double precision (:class:`Algebra`).
``torch.func`` gives the gradients of single examples with respect to the displacements;
factors, scalings and steps follow from them with dense matrices. Nothing of the package
is called for it.

Shapes: ``N`` examples, ``S`` positions, ``b`` blocks, ``K`` samples of the outputs'
gradient (1 for the user's loss and for sampled labels, one per class for exact ones).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Parameters = dict[str, Tensor]


@dataclass
class Layer:
    """One layer: its kind, sizes, and what is done with its output."""

    kind: str
    d_in: int
    d_out: int
    bias: bool = True
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    hook: float | None = None  # a user's forward hook multiplies the output
    scaled: float | None = None  # a tensor hook multiplies its gradient
    trained: bool = True
    bias_trained: bool = True

    def build(self) -> Any:
        """Return torch's module."""
        if self.kind == "linear":
            return nn.Linear(self.d_in, self.d_out, bias=self.bias)
        if self.kind == "embedding":
            return nn.Embedding(self.d_in, self.d_out)
        if self.kind == "norm":
            return nn.LayerNorm(self.d_in)
        if self.kind == "attention":
            return nn.MultiheadAttention(
                self.d_in, self.groups, bias=self.bias, batch_first=True
            )
        kind: Any = nn.Conv1d if self.kind == "conv1d" else nn.Conv2d
        sizes = (self.d_in, self.d_out, self.kernel, self.stride, self.padding)
        return kind(*sizes, groups=self.groups, bias=self.bias)


@dataclass
class Case:
    """A model as a list of operations, a loop, and options."""

    seed: int
    layers: list[Layer] = field(default_factory=list)
    operations: list[tuple[str, int]] = field(default_factory=list)
    first: str = "linear"
    positions: int = 0
    image: tuple[int, int] = (0, 0)
    pooled: bool = False
    classes: int = 2
    batch: int = 2
    micro: int = 1
    steps: int = 1
    extras: list[str] = field(default_factory=list)
    loop: str = "plain"
    closure: bool = False
    precision: str = "float64"
    method: str = "KFAC"
    fisher: str = "empirical"
    reduction: str = "mean"
    direction: str = "natural"
    sharing: str = "expand"
    uncorrelated: bool = False
    basis_interval: int = 1
    damping: float = 1e-2

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        kept = {"autocast": "float32", "scaler": "float32"}
        dtype: torch.dtype = getattr(torch, kept.get(self.precision, self.precision))
        return dtype

    @property
    def eps(self) -> float:
        """Rounding error of the least precise numbers that the model computes with."""
        least = torch.bfloat16 if self.precision == "autocast" else self.dtype
        return float(torch.finfo(least).eps)

    @property
    def sequence(self) -> bool:
        """Whether outputs are ``[N, S, C]``."""
        return self.positions > 0 and not self.pooled


# -- drawing ---------------------------------------------------------------------------

EXTRAS = [
    "grad",
    "grad_output",
    "graph",
    "eval",
    "no_grad",
    "discarded",
    "deleted",
    "inputs",
    "paused",
    "functional",
    "vmap",
    "adversarial",
    "curvature product",
]
LOOPS = ["plain"] * 5 + ["penalty", "sharpness", "clipped", "checkpointed", "retained"]
PRECISIONS = ["float64"] * 6 + [
    "float32",
    "float32",
    "bfloat16",
    "float16",
    "autocast",
    "scaler",
]
IN_PLACE = ("relu_", "tanh_", "mul_", "+=", "+= saved")


def draw_case(seed: int) -> Case:
    """Return the case of a number."""
    r = random.Random(seed)
    case = Case(seed)
    case.precision = r.choice(PRECISIONS)
    case.first = r.choice(["linear", "linear", "conv1d", "conv2d", "embedding"])
    width = _draw_model(case, r)
    if case.eps > 1e-6:  # rounding decides on which side of a kink an input is
        smooth = {"relu_": "tanh_", "norm": "none"}
        case.operations = [(smooth.get(n, n), i) for n, i in case.operations]
    case.classes = r.randint(2, 3)
    if case.positions and r.random() < 0.4:
        case.pooled = True
        case.operations.append(("pool", 0))
    case.layers.append(Layer("linear", width, case.classes, r.random() < 0.8))
    case.operations.append(("layer", len(case.layers) - 1))
    _draw_hooks(case, r)
    _draw_loop(case, r)
    _draw_options(case, r)
    return case


def _draw_model(case: Case, r: random.Random) -> int:
    """Draw the layers but the last; return the width of their output."""
    layers, operations = case.layers, case.operations
    width = r.choice([2, 3, 4, 4, 10])
    case.positions = r.choice([0, 0, 1, 2, 3])
    if case.first == "conv1d":
        case.positions = max(1, case.positions)
        layers.append(Layer("conv1d", r.randint(1, 2), width, r.random() < 0.7, 2))
        operations.append(("layer", 0))
    elif case.first == "embedding":
        case.positions = max(1, case.positions)
        layers.append(Layer("embedding", r.randint(3, 5), width, False))
        operations.append(("layer", 0))
    elif case.first == "conv2d":
        width = _draw_images(case, r)
    for _ in range(r.randint(1, 3)):
        width = _draw_block(case, r, width)
    return width


def _draw_images(case: Case, r: random.Random) -> int:
    """Draw convolutions of images; return the width of what comes out of them."""
    size = r.choice([(3, 3), (4, 3)])
    case.image, channels = size, 2
    for _ in range(r.randint(1, 2)):
        groups = r.choice([1, 1, 2])
        out = r.choice([2, 4])
        kernel = r.choice([1, 2]) if min(size) < 3 else r.choice([1, 2, 3])
        stride, padding = r.choice([1, 1, 2]), r.choice([0, 1, 1])
        padding = max(padding, int(kernel > min(size)))
        spec = Layer("conv2d", channels, out, r.random() < 0.7, kernel)
        spec.stride, spec.padding, spec.groups = stride, padding, groups
        case.layers.append(spec)
        case.operations.append(("layer", len(case.layers) - 1))
        case.operations.append((r.choice(["relu_", "tanh", "tanh_", "+="]), 0))
        size = tuple((n + 2 * padding - kernel) // stride + 1 for n in size)
        channels = out
    case.operations.append(("tokens", 0))
    case.positions = size[0] * size[1]
    return channels


def _draw_block(case: Case, r: random.Random, width: int) -> int:
    """Draw a layer with what follows it; return the width of its output."""
    layers, operations = case.layers, case.operations
    if case.positions and width % 2 == 0 and r.random() < 0.3:
        layers.append(Layer("attention", width, width, r.random() < 0.7))
        layers[-1].groups = r.choice([1, 2])
        residual = r.random() < 0.6
        operations += [("save", 0)] * residual
        operations.append(("layer", len(layers) - 1))
        operations += [(r.choice(["+ saved", "+= saved"]), 0)] * residual
        return width
    if width > 2 and r.random() < 0.2:
        layers.append(Layer("norm", width, width))
        operations.append(("layer", len(layers) - 1))
        operations.append((r.choice(["none", "tanh"]), 0))
        return width
    reusable = [
        i
        for i, layer in enumerate(layers)
        if layer.kind == "linear" and layer.d_in == layer.d_out == width
    ]
    if reusable and r.random() < 0.4:
        index = r.choice(reusable)
    else:
        out = r.choice([width, r.choice([2, 3, 4, 9])])
        layers.append(Layer("linear", width, out, r.random() < 0.8))
        index = len(layers) - 1
    residual = layers[index].d_out == width and r.random() < 0.3
    operations += [("save", 0)] * residual
    operations.append(("layer", index))
    after = r.choice(["relu_", "tanh", "mul_", "+=", "none", "tanh_", "norm"])
    operations.append((after, 0))
    # The backward of tanh and ReLU needs their outputs as they were.
    ways = (
        ["+ saved"] if after in ("relu_", "tanh", "tanh_") else ["+ saved", "+= saved"]
    )
    operations += [(r.choice(ways), 0)] * residual
    return layers[index].d_out


def _draw_hooks(case: Case, r: random.Random) -> None:
    """Draw users' hooks and frozen parts."""
    layers, operations = case.layers, case.operations
    for layer in layers[:-1]:
        if layer.kind in ("linear", "conv1d", "conv2d"):
            layer.hook = r.choice([None, None, None, 1.5])
            layer.scaled = r.choice([None, None, None, 0.5])
    for place, (name, index) in enumerate(operations):
        # torch itself drops a tensor's hook where a view is then changed in place.
        rest = (name for name, _ in operations[place + 1 :] if name != "none")
        after = next(rest, "layer")
        if name == "layer" and layers[index].scaled is not None and after in IN_PLACE:
            layers[index].scaled = None
    if len(layers) > 2 and r.random() < 0.3:
        r.choice(layers[1:-1]).trained = False
    if r.random() < 0.15:
        frozen = r.choice(layers)
        frozen.bias_trained = frozen.kind in ("attention", "norm", "embedding")


def _draw_loop(case: Case, r: random.Random) -> None:
    """Draw the training loop."""
    case.batch, case.micro = r.choice([2, 3, 5]), r.choice([1, 1, 2, 3])
    case.steps = r.choice([1, 1, 2, 3])
    case.loop, case.closure = r.choice(LOOPS), r.random() < 0.2
    case.extras = r.sample(EXTRAS, r.randint(0, 3))
    case.reduction = r.choice(["mean", "mean", "sum"])
    if case.loop == "penalty" and (
        case.first == "embedding"
        or case.precision in ("bfloat16", "float16", "autocast", "scaler")
        or any(layer.kind == "attention" for layer in case.layers)
    ):
        case.loop = "plain"
    if case.loop == "sharpness" and case.micro > 1:
        case.micro = 1
    if case.closure and case.precision == "scaler":
        case.closure = False  # a GradScaler takes no closure


def _draw_options(case: Case, r: random.Random) -> None:
    """Draw the optimizer's options."""
    case.method = r.choice(["KFAC", "running average", "per example"])
    case.fisher = r.choice(["empirical", "empirical", "mc", "exact"])
    if case.loop == "penalty":
        case.fisher = "empirical"
    if case.fisher == "exact" and case.sequence:
        case.fisher = "mc"
    case.direction = r.choice(["natural", "natural", "natural", "spectral"])
    case.sharing = r.choice(["expand", "expand", "expand", "reduce"])
    case.uncorrelated = r.random() < 0.3
    case.basis_interval = r.choice([1, 1, 100])
    # Rounding of a factor is divided by the damping.
    case.damping = 1e-2 if case.precision == "float64" else 0.3


# -- the user's side -------------------------------------------------------------------


class UserHook:
    """Multiplies a layer's output, and the gradient that comes back to it."""

    def __init__(self, spec: Layer) -> None:
        self.spec = spec

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        if self.spec.scaled is not None and out.requires_grad:
            factor = self.spec.scaled
            out.register_hook(lambda g: g * factor)
        return out if self.spec.hook is None else out * self.spec.hook


class Net(nn.Module):
    """The case's model, as a user writes it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.parts = nn.ModuleList(spec.build() for spec in case.layers)
        for part, spec in zip(self.parts, case.layers, strict=True):
            part.requires_grad_(spec.trained)
            if not spec.bias_trained and part.bias is not None:
                part.bias.requires_grad_(False)

    def hook_outputs(self, first: bool = False) -> None:
        """Add the user's hooks, before or behind those that are there."""
        for part, spec in zip(self.parts, self.case.layers, strict=True):
            if spec.hook is not None or spec.scaled is not None:
                part.register_forward_hook(UserHook(spec), prepend=first)

    def forward(self, x: Tensor) -> Tensor:
        operations = self.case.operations
        if self.case.loop != "checkpointed":
            return self.run(x, operations)
        start = 1 if self.case.first == "embedding" else 0
        stop = next(
            (k for k, (name, _) in enumerate(operations) if "saved" in name),
            len(operations) // 2,
        )
        stop = max(stop + 1, start + 1)
        h = self.run(x, operations[:start])
        h = checkpoint(self.run, h, operations[start:stop], use_reentrant=False)
        return self.run(h, operations[stop:])

    def run(self, h: Tensor, operations: Sequence[tuple[str, int]]) -> Tensor:
        saved: list[Tensor] = []
        for name, index in operations:
            if name == "layer":
                h = self.layer(h, index)
            elif name == "save":
                saved.append(h)
            elif name == "+ saved":
                h = h + saved.pop()
            elif name == "+= saved":
                h += saved.pop()
            elif name == "tokens":
                h = h.flatten(2).transpose(1, 2)
            elif name == "pool":
                h = h.mean(1)
            else:
                h = self.act(name, h)
        return h

    def layer(self, h: Tensor, index: int) -> Tensor:
        kind, part = self.case.layers[index].kind, self.parts[index]
        if kind == "attention":
            out: Tensor = part(h, h, h, need_weights=bool(self.case.seed % 2))[0]
            return out
        out = part(h)
        return out.transpose(1, 2) if kind == "conv1d" else out

    @staticmethod
    def act(name: str, h: Tensor) -> Tensor:
        if name == "relu_":
            return F.relu_(h)
        if name == "tanh":
            return torch.tanh(h)
        if name == "tanh_":
            return h.tanh_()
        if name == "mul_":
            h.mul_(1.5)
        elif name == "+=":
            h += 0.3
        elif name == "norm":
            return F.layer_norm(h, h.shape[-1:])
        return h


def batch_of(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a step."""
    generator = torch.Generator().manual_seed(1000 * case.seed + step)
    n, spec = case.batch * case.micro, case.layers[0]
    shape = [n, case.positions] if case.sequence else [n]
    y = torch.randint(0, case.classes, shape, generator=generator)
    if case.first == "embedding":
        index = torch.randint(0, spec.d_in, (n, case.positions), generator=generator)
        return index, y
    if case.first == "conv1d":
        size = [n, spec.d_in, case.positions + spec.kernel - 1]
    elif case.first == "conv2d":
        size = [n, spec.d_in, *case.image]
    else:
        size = [n, case.positions, spec.d_in] if case.positions else [n, spec.d_in]
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    return x.to(case.dtype), y


# -- the algebra -----------------------------------------------------------------------


class Tape:
    """Displaces the output of every call and notes its inputs."""

    def __init__(self, deltas: Sequence[Tensor] | None) -> None:
        self.deltas = deltas
        self.calls: list[str] = []
        self.inputs: list[Tensor] = []
        self.shapes: list[torch.Size] = []

    def call(self, name: str, inputs: Tensor, out: Tensor) -> Tensor:
        """Note a call of a block: ``[S, b, d_in]``, ``[S, b, d_out]``."""
        number = len(self.calls)
        self.calls.append(name)
        self.inputs.append(inputs)
        self.shapes.append(out.shape)
        return out if self.deltas is None else out + self.deltas[number]


class Algebra:
    """One example as a function of parameters and displacements."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def run(self, params: Parameters, x: Tensor, tape: Tape) -> Tensor:
        """Return the outputs ``[S, C]`` of one example."""
        h, saved = x, []
        if self.case.first == "linear" and not self.case.positions:
            h = h.unsqueeze(0)
        for name, index in self.case.operations:
            if name == "layer":
                h = self.layer(index, params, h, tape)
            elif name == "save":
                saved.append(h)
            elif "saved" in name:
                h = h + saved.pop()
            elif name == "tokens":
                h = h.flatten(1).T
            elif name == "pool":
                h = h.mean(0, keepdim=True)
            elif name == "relu_":
                h = h.relu()
            elif name in ("tanh", "tanh_"):
                h = h.tanh()
            elif name == "mul_":
                h = h * 1.5
            elif name == "+=":
                h = h + 0.3
            elif name == "norm":
                h = F.layer_norm(h, h.shape[-1:])
        return h

    def layer(self, index: int, params: Parameters, h: Tensor, tape: Tape) -> Tensor:
        """Return a layer's output, of its user's hook if there is one."""
        spec, name = self.case.layers[index], f"parts.{index}"
        own = {
            key.removeprefix(f"{name}."): p
            for key, p in params.items()
            if key.startswith(f"{name}.")
        }
        call: Callable[..., Tensor] = getattr(self, spec.kind)
        h = call(name, spec, own, h, tape)
        if spec.scaled is not None:
            h = spec.scaled * h + ((1 - spec.scaled) * h).detach()
        return h if spec.hook is None else h * spec.hook

    def linear(self, name: str, _: Any, own: Parameters, h: Tensor, t: Tape) -> Tensor:
        out = h @ own["weight"].T
        if "bias" in own:
            out = out + own["bias"]
        return t.call(name, h[:, None], out[:, None])[:, 0]

    def embedding(
        self, name: str, spec: Layer, own: Parameters, h: Tensor, tape: Tape
    ) -> Tensor:
        one_hot = torch.eye(spec.d_in).to(own["weight"])[h]
        return tape.call(name, one_hot[:, None], (one_hot @ own["weight"])[:, None])[
            :, 0
        ]

    def norm(self, name: str, _: Any, own: Parameters, h: Tensor, tape: Tape) -> Tensor:
        plain = F.layer_norm(h, h.shape[-1:])
        out = plain * own["weight"] + own["bias"]
        return tape.call(name, plain[..., None], out[..., None])[..., 0]

    def conv1d(
        self, name: str, spec: Layer, own: Parameters, h: Tensor, tape: Tape
    ) -> Tensor:
        patches = h.unfold(-1, spec.kernel, 1).permute(1, 0, 2).flatten(1)
        flat = {**own, "weight": own["weight"].flatten(1)}
        return self.linear(name, spec, flat, patches, tape)

    def conv2d(
        self, name: str, spec: Layer, own: Parameters, h: Tensor, tape: Tape
    ) -> Tensor:
        size = [
            (n + 2 * spec.padding - spec.kernel) // spec.stride + 1
            for n in h.shape[-2:]
        ]
        patches = F.unfold(
            h[None], spec.kernel, padding=spec.padding, stride=spec.stride
        )[0].T.unflatten(1, (spec.groups, -1))
        weight = own["weight"].flatten(1).unflatten(0, (spec.groups, -1))
        out = torch.einsum("sbi,boi->sbo", patches, weight)
        if "bias" in own:
            out = out + own["bias"].unflatten(0, (spec.groups, -1))
        return tape.call(name, patches, out).flatten(1).T.unflatten(1, size)

    def attention(
        self, name: str, spec: Layer, own: Parameters, h: Tensor, tape: Tape
    ) -> Tensor:
        parts = []
        biases = own.get("in_proj_bias", torch.zeros(3 * spec.d_in).to(h))
        for key, weight, bias in zip(
            ("q_proj", "k_proj", "v_proj"),
            own["in_proj_weight"].chunk(3),
            biases.chunk(3),
            strict=True,
        ):
            one = {"weight": weight, "bias": bias}
            part = self.linear(f"{name}.{key}", spec, one, h, tape)
            parts.append(part.unflatten(1, (spec.groups, -1)).transpose(0, 1))
        q, k, v = parts
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).flatten(1)
        last = {"weight": own["out_proj.weight"]}
        if "out_proj.bias" in own:
            last["bias"] = own["out_proj.bias"]
        return self.linear(f"{name}.out_proj", spec, last, mixed, tape)

    def loss(
        self, params: Parameters, deltas: Any, x: Tensor, y: Tensor, penalty: float
    ) -> Tensor:
        """Return the loss of one example, with a penalty on the inputs' gradient."""

        def plain(one: Tensor) -> Tensor:
            out = self.run(params, one, Tape(deltas))
            return F.cross_entropy(out, y, reduction="sum")

        total = plain(x)
        if penalty:
            total = total + penalty * grad(plain)(x).square().sum()
        return total


PENALTY = 0.3


@dataclass
class Expected:
    """What the algebra says of one block.

    Attributes:
        A: ``[b or 1, d_in, d_in]``, ``d_in`` with the bias.
        G: ``[b, d_out, d_out]``.
        examples: Single examples' gradients, ``[K, N, b, d_out, d_in]``.
        gradient: Of the whole loss, ``[b, d_out, d_in]``.
    """

    A: Tensor
    G: Tensor
    examples: Tensor
    gradient: Tensor


def expected(
    case: Case,
    params: Parameters,
    x: Tensor,
    y: Tensor,
    pseudo: Tensor | None,
    gradients: Parameters,
) -> dict[str, Expected]:
    """Return the statistics of all trained blocks.

    Args:
        case: The case.
        params: Where they are taken; the algebra is in their precision.
        x: All inputs of the step.
        y: All targets.
        pseudo: Sampled gradients of the outputs, ``[N, *]``, for ``"mc"``.
        gradients: Of the whole loss, by parameter.
    """
    algebra, tape = Algebra(case), Tape(None)
    algebra.run(params, x[0], tape)
    dtype = next(iter(params.values())).dtype
    zeros = [torch.zeros(shape, dtype=dtype) for shape in tape.shapes]
    targets, calls = y.reshape(len(x), -1), tape.calls
    penalty = PENALTY if case.loop == "penalty" else 0.0

    def inputs_of(one: Tensor) -> list[Tensor]:
        noted = Tape(None)
        algebra.run(params, one, noted)
        return noted.inputs

    def back(one: Tensor, cotangent: Tensor) -> list[Tensor]:
        def outputs(deltas: list[Tensor]) -> Tensor:
            return algebra.run(params, one, Tape(deltas))

        result: list[Tensor] = vjp(outputs, zeros)[1](cotangent)[0]
        return result

    def own_loss(deltas: list[Tensor], one: Tensor, target: Tensor) -> Tensor:
        return algebra.loss(params, deltas, one, target, penalty)

    inputs = vmap(inputs_of)(x)
    if case.fisher == "empirical":
        samples = [vmap(grad(own_loss), (None, 0, 0))(zeros, x, targets)]
    elif case.fisher == "mc":
        assert pseudo is not None
        pseudo = pseudo.reshape(len(x), -1, case.classes).to(dtype)
        samples = [vmap(back)(x, pseudo)]
    else:
        out = vmap(lambda one: algebra.run(params, one, Tape(None)))(x)
        p = out.softmax(-1)
        roots = [
            (p - F.one_hot(torch.tensor(c), case.classes)) * p[..., c, None].sqrt()
            for c in range(case.classes)
        ]
        samples = [vmap(back)(x, root) for root in roots]
    result: dict[str, Expected] = {}
    for name in dict.fromkeys(calls):
        uses = [k for k, call in enumerate(calls) if call == name]
        rows = [inputs[k] for k in uses]
        grads = [[sample[k] for k in uses] for sample in samples]
        result |= blocks(case, name, rows, grads, gradients)
    return result


def blocks(
    case: Case,
    name: str,
    rows: list[Tensor],
    grads: list[list[Tensor]],
    gradients: Parameters,
) -> dict[str, Expected]:
    """Return the statistics of one layer's blocks.

    Args:
        case: The case.
        name: Of the layer.
        rows: Its inputs in every use, ``[N, S, b, d_in]``.
        grads: Its output gradients ``[N, S, b, d_out]``, by sample and use.
        gradients: Of the whole loss, by parameter.
    """
    spec = case.layers[int(name.split(".")[1])]
    if not spec.trained:
        return {}
    a = torch.cat(rows, dim=1)
    g = torch.stack([torch.cat(sample, dim=1) for sample in grads])
    weight, bias = packed_gradients(case, name, gradients)
    if case.uncorrelated and spec.kind.startswith("conv") and spec.groups == 1:
        taps = a.shape[-1] // spec.d_in
        if taps > 1:
            a = a[:, :, 0].unflatten(-1, (spec.d_in, taps)).transpose(-1, -2)
            weight = weight[0].unflatten(-1, (spec.d_in, taps)).permute(2, 0, 1)
            spread = g.expand(-1, -1, -1, taps, -1)
            found = {name: statistics(case, a, spread, weight, shared=True)}
            if bias is not None:
                ones = torch.ones_like(a[:, :, :1, :1])
                found[f"{name}.bias"] = statistics(case, ones, g, bias)
            return found
    if bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        weight = torch.cat([weight, bias], -1)
    if spec.kind == "norm":
        examples = torch.einsum("knsbo,nsbi->knboi", g, a)
        A = torch.einsum("knboi,knboj->bij", examples, examples) / len(a)
        return {name: Expected(A, torch.ones(len(A), 1, 1).double(), examples, weight)}
    return {name: statistics(case, a, g, weight)}


def statistics(
    case: Case, a: Tensor, g: Tensor, gradient: Tensor, *, shared: bool = False
) -> Expected:
    """Return the statistics of inputs ``[N, S, b, i]`` and gradients ``[K, *]``."""
    examples = torch.einsum("knsbo,nsbi->knboi", g, a)
    if case.sharing == "reduce":
        a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
    n, s = a.shape[:2]
    A = torch.einsum("nsbi,nsbj->bij", a, a) / (n * s)
    G = torch.einsum("knsbo,knsbp->bop", g, g) / n
    return Expected(A.mean(0, keepdim=True) if shared else A, G, examples, gradient)


def packed_gradients(
    case: Case, name: str, tensors: Parameters
) -> tuple[Tensor, Tensor | None]:
    """Return a layer's weight ``[b, d_out, d_in]`` and bias ``[b, d_out, 1]``.

    Args:
        case: The case.
        name: Of the block.
        tensors: By the parameters' names.
    """
    parts = name.split(".")
    spec, base = case.layers[int(parts[1])], ".".join(parts[:2])
    if spec.kind == "attention":
        if parts[2] == "out_proj":
            weight, bias = (tensors.get(f"{name}.{k}") for k in ("weight", "bias"))
        else:
            place = ("q_proj", "k_proj", "v_proj").index(parts[2])
            both = (tensors.get(f"{base}.in_proj_{k}") for k in ("weight", "bias"))
            weight, bias = (None if t is None else t.chunk(3)[place] for t in both)
    else:
        weight, bias = (tensors.get(f"{base}.{k}") for k in ("weight", "bias"))
    assert weight is not None
    if not spec.bias_trained:
        bias = None
    if spec.kind == "norm":
        assert bias is not None
        return weight[:, None, None], bias[:, None, None]
    if spec.kind == "embedding":
        return weight.T[None], None
    groups = spec.groups if spec.kind == "conv2d" else 1
    matrix = weight.flatten(1).unflatten(0, (groups, -1))
    return matrix, None if bias is None else bias.reshape(groups, -1, 1)


def whole_gradients(
    case: Case, params: Parameters, x: Tensor, y: Tensor
) -> tuple[Tensor, Parameters]:
    """Return the user's whole loss and its gradients, by the algebra."""
    algebra, targets = Algebra(case), y.reshape(len(x), -1)
    penalty = PENALTY if case.loop == "penalty" else 0.0

    def total(weights: Parameters) -> Tensor:
        losses = vmap(lambda one, t: algebra.loss(weights, None, one, t, penalty))
        loss: Tensor = losses(x, targets).sum()
        return loss / targets.numel() if case.reduction == "mean" else loss

    gradients, value = torch.func.grad_and_value(total)(params)
    return value, gradients


def has_zero_gradients(case: Case, params: Parameters, x: Tensor, y: Tensor) -> bool:
    """Return whether the loss of some target is so saturated that it has none."""
    algebra = Algebra(case)
    out = vmap(lambda one: algebra.run(params, one, Tape(None)))(x).to(case.dtype)
    targets = F.one_hot(y.reshape(len(x), -1), case.classes)
    return not bool((out.softmax(-1) - targets).any(-1).all())
