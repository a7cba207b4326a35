"""Loss over steps and over seconds beside every peer, each tuned over an equal budget.

    python benchmarks/peers.py autoencoder --data-dir MNIST
    python benchmarks/peers.py vgg11 --data-dir CIFAR
    python benchmarks/peers.py transformer
    python benchmarks/peers.py autoencoder --tables      # from the JSON, nothing is run

Problems: the deep auto-encoder of examples/autoencoder.py (784-1000-500-250-30 and
back, batch 200), VGG11 without batch norm of examples/cifar.py (a quarter as wide,
batch 64) and the transformer of examples/transformer.py (batch 32). Every optimizer has
six settings (see ``grid``), each tried for ``--tune-seconds`` with seed 0; the one with
the lowest loss over its last 20 steps is trained for ``--seconds`` with ``--seeds``
seeds. LBFGS does four evaluations in what is counted as a step. SOAP, Shampoo and Muon
are those of pytorch_optimizer, the others torch's and ours. Evaluation and the making
of batches are outside the clock. An interrupted run goes on where it was: every run is
kept in the JSON.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Store, example, has_mnist, parser
from peers_report import finish, smooth
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ekfac import EKFAC, KFAC

Setting = tuple[float, ...]
RMSPROP_GRAFTING = 3  # pytorch_optimizer's LayerWiseGrafting
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MUON = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class Problem:
    """A network with its data.

    Attributes:
        network: Makes the model.
        loss: Of a model on a batch.
        batches: Endless batches, from a generator.
        note: What the data are.
    """

    network: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[torch.Generator], Iterator[Any]]
    note: str


def autoencoder(args: argparse.Namespace) -> Problem:
    """Return the deep auto-encoder on MNIST, or on scikit-learn's digits."""
    module = example("autoencoder")
    mnist = has_mnist(args.data_dir)
    images = (module.mnist(args.data_dir) if mnist else module.digits())[0]
    widths = (32, 16, 32) if args.quick else module.WIDTHS

    def batches(generator: torch.Generator) -> Iterator[Tensor]:
        while True:
            for chosen in torch.randperm(len(images), generator=generator).split(
                args.batch or 200
            ):
                if len(chosen) == (args.batch or 200):
                    yield images[chosen]

    return Problem(
        lambda: module.network(images.shape[1], widths),
        module.reconstruction_loss,
        batches,
        f"{'MNIST' if mnist else 'digits'}, {len(images)} images",
    )


def vgg11(args: argparse.Namespace) -> Problem:
    """Return VGG11 without batch norm on CIFAR-10, or on enlarged digits."""
    module = example("cifar")
    data = module.load(args.data_dir, False)
    width = 2 if args.quick else 16
    return Problem(
        lambda: module.network("vgg11", width),
        lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        lambda generator: data.batches(args.batch or 64, generator),
        f"{data.name}, {len(data.x_train)} images, {width} channels first",
    )


def transformer(args: argparse.Namespace) -> Problem:
    """Return the character transformer on Python's own manual."""
    module = example("transformer")
    text = module.Text()
    length = 16 if args.quick else 64

    def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield module.windows(text.train, args.batch or 32, length, generator)

    return Problem(
        lambda: module.Transformer(len(text.alphabet), length),
        lambda model, batch: module.next_character_loss(model, *batch),
        batches,
        f"pydoc topics, {len(text.train)} characters",
    )


PROBLEMS = {"autoencoder": autoencoder, "vgg11": vgg11, "transformer": transformer}


def grid(problem: str) -> dict[str, list[Setting]]:
    """Return six settings of every optimizer."""
    steep = problem == "autoencoder"  # its loss is summed over 784 pixels
    sgd = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    ours = (5e-4, 1e-3, 2e-3) if steep else (3e-5, 1e-4, 3e-4)
    pairs = list(itertools.product(ours, (0.01, 0.03)))
    soap = (3e-3, 1e-2, 3e-2) if steep else (1e-3, 3e-3, 1e-2)
    return {
        "SGD": [(lr if steep else 10 * lr,) for lr in sgd],
        "Adam": [(lr,) for lr in RATES],
        "LBFGS": [(lr,) for lr in (1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)],
        "SOAP": list(itertools.product(soap, (10, 50))),
        "Shampoo": [(lr,) for lr in (3e-5, *RATES[:-1])],
        "Muon": [(lr,) for lr in ((*MUON[1:], 1.0) if steep else MUON)],
        "KFAC": list(pairs),
        "EKFAC": list(pairs),
        "EKFAC rank 32": list(pairs),
        "EKFAC per example": list(pairs),
    }


def muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return Muon for hidden weights; AdamW for the first, the last and vectors."""
    from pytorch_optimizer import Muon

    inner = [p for p in model.parameters() if p.dim() >= 2][1:-1]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": inner, "use_muon": True},
        {"params": rest, "use_muon": False},
    ]
    optimizer: torch.optim.Optimizer = Muon(
        groups, lr=lr, adamw_lr=min(lr, 3e-3), use_adjusted_lr=False
    )
    return optimizer


def build(name: str, setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer with a setting of the grid."""
    lr, parameters = setting[0], list(model.parameters())
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    if name == "LBFGS":
        return torch.optim.LBFGS(parameters, lr=lr, max_iter=4, history_size=10)
    if name == "Adam":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    if name in ("SOAP", "Shampoo", "Muon"):
        import pytorch_optimizer as peers

        if name == "Muon":
            return muon(model, lr)
        made: torch.optim.Optimizer
        if name == "SOAP":
            made = peers.SOAP(
                parameters,
                lr=lr,
                weight_decay=0.0,
                precondition_frequency=int(setting[1]),
            )
        else:
            made = peers.ScalableShampoo(
                parameters,
                lr=lr,
                start_preconditioning_step=5,
                preconditioning_compute_steps=50,
                graft_type=RMSPROP_GRAFTING,
            )
        return made
    if name == "KFAC":
        return KFAC(model, lr=lr, damping=setting[1])
    scaling = "per_example" if name == "EKFAC per example" else "running_average"
    rank = 32 if name == "EKFAC rank 32" else None
    return EKFAC(model, lr=lr, damping=setting[1], scaling=scaling, rank=rank)


def train(
    problem: Problem,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    seconds: float,
    seed: int,
    label: str,
) -> dict[str, list[float]]:
    """Return losses and seconds after every step of one run."""
    torch.manual_seed(seed)
    model = problem.network()
    optimizer = make(model)
    losses: list[float] = []
    clock: list[float] = []
    spent = 0.0
    with tqdm(total=seconds, desc=label, unit="s", leave=False) as bar:
        for batch in problem.batches(torch.Generator().manual_seed(seed)):
            start = time.perf_counter()

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = problem.loss(model, batch)
                loss.backward()
                return loss

            loss: Any = optimizer.step(closure)
            taken = time.perf_counter() - start
            spent += taken
            losses.append(loss.item())
            clock.append(spent)
            bar.update(min(taken, bar.total - bar.n))
            if spent >= seconds or not np.isfinite(losses[-1]):
                return {"losses": losses, "seconds": clock}
    raise AssertionError("batches are endless")


def thin(run: dict[str, list[float]]) -> dict[str, Any]:
    """Return smoothed losses at no more than 300 steps, with their seconds."""
    curve = smooth(run["losses"])
    places = np.unique(np.linspace(0, len(curve) - 1, 300).astype(int))
    return {
        "steps": [int(i) + 1 for i in places],
        "losses": [float(f"{curve[i]:.5g}") for i in places],
        "seconds": [round(run["seconds"][i], 3) for i in places],
    }


def study(args: argparse.Namespace, store: Store) -> None:
    """Tune and train every optimizer, keeping each run in the store."""
    problem = PROBLEMS[args.problem](args)
    store.get("about", lambda: about(args, problem.note))
    for name in args.optimizers:
        settings = grid(args.problem)[name][: 2 if args.quick else None]

        def run(setting: Setting, seconds: float, seed: int, name: str = name) -> Any:
            return thin(
                train(
                    problem,
                    lambda model: build(name, setting, model),
                    seconds,
                    seed,
                    f"{name} {setting}",
                )
            )

        scores: dict[Setting, float] = {}
        for setting in settings:
            found = store.get(
                f"tune|{name}|{list(setting)}",
                lambda setting=setting: run(setting, args.tune_seconds, 0),
            )
            last = found["losses"][-1]
            scores[setting] = last if np.isfinite(last) else float("inf")
        best = min(scores, key=scores.__getitem__)
        if store.runs.get(f"best|{name}", list(best)) != list(best):
            # The grid has changed since: what was trained is not the best any more.
            for key in [f"best|{name}", *(f"run|{name}|{s}" for s in range(100))]:
                store.runs.pop(key, None)
        store.get(f"best|{name}", lambda best=best: list(best))
        for seed in range(args.seeds):
            store.get(
                f"run|{name}|{seed}",
                lambda seed=seed, best=best: run(best, args.seconds, seed),
            )


def about(args: argparse.Namespace, note: str) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "problem": args.problem,
        "data": note,
        "seconds": args.seconds,
        "tune_seconds": args.tune_seconds,
        "seeds": args.seeds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    """Run what is not known yet, print the tables, draw the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("problem", choices=PROBLEMS)
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--tune-seconds", type=float, default=15.0)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--batch", type=int, help="examples in a batch")
    arguments.add_argument("--optimizers", nargs="+", default=list(grid("vgg11")))
    arguments.add_argument("--tables", action="store_true", help="from the JSON only")
    args = arguments.parse_args()
    if args.quick:
        args.seconds, args.tune_seconds, args.seeds = 0.3, 0.1, 1
    suffix = f"-{args.batch}" if args.batch else ""
    path: Path = args.output / f"peers-{args.problem}{suffix}.json"
    store = Store(path)
    if not args.tables:
        study(args, store)
    finish(store.runs, path)


if __name__ == "__main__":
    main()
