"""The optimizers of benchmarks/peers.py, as their authors mean them, and their grids.

Every optimizer has one number to tune, ``lr``; all else is its author's default, and
weight decay is zero for all. Muon, NorMuon, AdaMuon and SOAP, Shampoo (with the length
of RMSprop's step), SPlus, Conda and Kron are those of pytorch_optimizer. Its Muon takes
torch.optim.Muon's steps bit for bit (a test compares them), costs less, and flattens
convolutions as Muon's author does. The Muons' steps have the length of AdamW's (Liu et
al. 2025), so that one ``lr`` serves their AdamW part too: embeddings, vectors, and the
output layer, which "head" hands to Muon as well. Their momentum is the better of 0.9
and 0.95 in the first round (``peers.py first-round``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ekfac import EKFAC, KFAC

Optimizer = torch.optim.Optimizer
RMSPROP_GRAFTING = 3  # pytorch_optimizer's LayerWiseGrafting
SETTINGS = 3  # of every optimizer to begin with, a factor of 2 apart


def split(
    model: nn.Module, head: str | None
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return Muon's parameters and AdamW's: hidden weights, and all else."""
    tables = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.Embedding) or name == "places"
    }
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        known = parameter.dim() >= 2 and id(parameter) not in tables
        (hidden if known and name != head else rest).append(parameter)
    return hidden, rest


def muons(kind: str, all_hidden: bool, **options: Any) -> Callable[..., Optimizer]:
    """Return the making of one of Muon's family; ``all_hidden``: with the head."""

    def make(model: nn.Module, lr: float, head: str | None = None) -> Optimizer:
        import pytorch_optimizer

        hidden, rest = split(model, None if all_hidden else head)
        groups = [
            {"params": hidden, "use_muon": True, "lr": lr},
            {"params": rest, "use_muon": False, "lr": lr},
        ]
        made: Optimizer = getattr(pytorch_optimizer, kind)(groups, lr=lr, **options)
        return made

    return make


def peer(kind: str, **options: Any) -> Callable[..., Optimizer]:
    """Return the making of an optimizer of pytorch_optimizer."""

    def make(model: nn.Module, lr: float, head: str | None = None) -> Optimizer:
        import pytorch_optimizer

        made: Optimizer = getattr(pytorch_optimizer, kind)(
            model.parameters(), lr=lr, weight_decay=0.0, **options
        )
        return made

    return make


def ours(kind: type[EKFAC] | type[KFAC], **options: Any) -> Callable[..., Optimizer]:
    """Return the making of an optimizer of this package."""
    return lambda model, lr, head=None: kind(model, lr=lr, **options)


def sgd(model: nn.Module, lr: float, head: str | None = None) -> Optimizer:
    """Return SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def adamw(model: nn.Module, lr: float, head: str | None = None) -> Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


MUON = {"use_adjusted_lr": True}
NORMUON = {"update_scale": "match_rms"}
SHAMPOO = {
    "moving_average_for_momentum": True,
    "start_preconditioning_step": 5,
    "preconditioning_compute_steps": 10,
    "graft_type": RMSPROP_GRAFTING,
}


def normuon(
    all_hidden: bool, momentum: float, ahead: int = 1
) -> Callable[..., Optimizer]:
    """Return the making of NorMuon with a momentum.

    Args:
        all_hidden: With the output layer.
        momentum: Decay of its average of gradients.
        ahead: How many steps ahead the average is taken, as EKFAC's ``nesterov``; 1 is
            what its author has.
    """
    if ahead == 1:
        return muons("NorMuon", all_hidden, momentum=momentum, **NORMUON)
    plain = muons("NorMuon", all_hidden, momentum=0.0, nesterov=False, **NORMUON)

    def make(model: nn.Module, lr: float, head: str | None = None) -> Optimizer:
        made = plain(model, lr, head)
        averages: dict[nn.Parameter, torch.Tensor] = {}

        def average(*_: Any) -> None:
            for p in made.param_groups[0]["params"]:
                if p.grad is not None:
                    mean = averages.setdefault(p, torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - momentum)
                    p.grad.lerp_(mean, momentum**ahead)

        made.register_step_pre_hook(average)
        return made

    return make


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": sgd,
    "AdamW": adamw,
    "SOAP": peer("SOAP"),
    "Shampoo": peer("ScalableShampoo", **SHAMPOO),
    "Muon": muons("Muon", False, **MUON),
    "Muon 0.9": muons("Muon", False, momentum=0.9, **MUON),
    "Muon head": muons("Muon", True, **MUON),
    "Muon head 0.9": muons("Muon", True, momentum=0.9, **MUON),
    "NorMuon 0.9": normuon(False, 0.9),
    "NorMuon head 0.9": normuon(True, 0.9),
    "AdaMuon head": muons("AdaMuon", True, **MUON),
    "SPlus": peer("SPlus"),
    "Conda": peer("Conda", update_proj_gap=50),
    "Kron": peer("Kron"),
    "EKFAC": ours(EKFAC),
    "EKFAC rank 32": ours(EKFAC, rank=32),
    "EKFAC natural": ours(EKFAC, direction="natural"),
    "KFAC": ours(KFAC),
}
OURS = ("EKFAC", "EKFAC rank 32", "EKFAC natural", "KFAC")
CANDIDATES = (  # of the first round
    "Muon",
    "Muon 0.9",
    "Muon head",
    "Muon head 0.9",
    "NorMuon head 0.9",
    "AdaMuon head",
    "SPlus",
    "Conda",
    "Kron",
)

# Of Muon every problem takes the better one, with the output layer or without it;
# NorMuon has the output layer where Muon has.
VARIANTS = {
    "Muon": ("Muon 0.9", "Muon head 0.9"),
    "NorMuon": ("NorMuon 0.9", "NorMuon head 0.9"),
}

# The smallest exponent of the first window: lr = 0.001 * 2^exponent.
START = {
    "SGD": 5,
    "AdamW": 1,
    "SOAP": 1,
    "Shampoo": 1,
    "SPlus": 6,
    "Conda": 0,
    "Kron": -2,
}
START_OF = {
    ("SGD", "autoencoder"): 2,
    ("SGD", "vgg11"): 3,
    ("SGD", "transformer"): 4,
    ("SGD", "transformer128"): 4,
    ("SGD", "lstm"): 9,
    ("EKFAC", "vgg11"): -1,
    ("EKFAC rank 32", "vgg11"): -1,
    ("EKFAC natural", "vgg11"): -1,
    ("KFAC", "vgg11"): -1,
}


def first_exponent(name: str, problem: str) -> int:
    """Return the smallest exponent of an optimizer's first window."""
    usual = 3 if "Muon" in name else 1
    return START_OF.get((name, problem), START.get(name, usual))


def learning_rate(exponent: float) -> float:
    """Return the grid's learning rate, to four digits."""
    return float(f"{1e-3 * 2.0**exponent:.4g}")
