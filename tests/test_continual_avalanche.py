"""The plugin, in a strategy that calls it as Avalanche 0.6 does, and in Avalanche."""

from __future__ import annotations

import pytest
import torch
from continual_cases import flat_grad, images, network
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ekfac import EKFAC
from ekfac.continual import (
    MemoryAwareSynapses,
    QuadraticPenalty,
    SynapticIntelligence,
)
from ekfac.continual.avalanche import PenaltyPlugin

CASES = {
    "ekfac": (lambda m: QuadraticPenalty(m, "ekfac", 3.0), {}),
    "mc": (lambda m: QuadraticPenalty(m, "kfac"), {"kind": "mc", "samples": 2}),
    "optimizer": (lambda m: QuadraticPenalty(m, "ekfac"), {"source": "optimizer"}),
    "si": (lambda m: SynapticIntelligence(m), {}),
    "mas": (lambda m: MemoryAwareSynapses(m), {}),
}


class Experience:
    def __init__(self, seed: int) -> None:
        x, y = images(seed)
        self.dataset = TensorDataset(x, y, torch.zeros_like(y))


class Strategy:
    """The order of calls of avalanche.training.templates.SGDUpdate."""

    train_mb_size = 10

    def __init__(self, model: nn.Module, plugin: PenaltyPlugin) -> None:
        self.model, self.plugin = model, plugin
        self.optimizer: torch.optim.Optimizer = EKFAC(model, lr=1e-2)
        self.grads: list[torch.Tensor] = []

    def train(self, experience: Experience) -> None:
        self.experience = experience
        self.plugin.before_training_exp(self)
        x, y, _ = experience.dataset.tensors
        for part in torch.arange(len(x)).split(self.train_mb_size):
            self.optimizer.zero_grad()
            self.loss = torch.zeros((), requires_grad=True) + cross_entropy(
                self.model(x[part]), y[part]
            )
            self.plugin.before_backward(self)
            self.loss.backward()
            self.grads.append(flat_grad(self.model))
            self.plugin.before_update(self)
            self.optimizer.step()
            self.plugin.after_update(self)
        self.plugin.after_training_exp(self)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_has_the_penalty_and_experiences_are_consolidated(case):
    make, options = CASES[case]
    plugin = PenaltyPlugin(make, **options)
    strategy = Strategy(network(), plugin)
    for seed in range(2):
        strategy.train(Experience(seed))
    penalty = plugin.penalty
    assert penalty.num_tasks == 2
    assert penalty() == 0
    start = len(strategy.grads)
    with torch.no_grad():
        strategy.model[0].weight += 0.1
    x, y = images(2)
    strategy.model.zero_grad()
    strategy.model.eval()
    cross_entropy(strategy.model(x[:10]), y[:10]).backward()
    expected = flat_grad(strategy.model) + penalty.gradient().flat()
    strategy.model.train()
    strategy.train(Experience(2))
    torch.testing.assert_close(strategy.grads[start], expected)
    assert penalty.num_tasks == 3


def test_what_the_plugin_refuses():
    with pytest.raises(ValueError, match="source must be one of"):
        PenaltyPlugin(lambda m: QuadraticPenalty(m), source="loader")
    plugin = PenaltyPlugin(lambda m: QuadraticPenalty(m), source="optimizer")
    strategy = Strategy(network(), plugin)
    strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="needs an optimizer of ekfac, got SGD"):
        strategy.train(Experience(0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", ["fixed", "growing", "multi"])
def test_in_avalanche(case, heads):
    pytest.importorskip("avalanche", reason="an extra: pip install avalanche-lib")
    from avalanche.benchmarks import tensors_benchmark
    from avalanche.models import (
        IncrementalClassifier,
        MTSimpleMLP,
        MultiTaskModule,
    )
    from avalanche.training.supervised import Naive

    assert MultiTaskModule.__name__ == "MultiTaskModule"
    if heads != "fixed" and case == "optimizer":
        pytest.skip("Avalanche replaces the parameters that the optimizer was made of")

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 8)
            self.head = IncrementalClassifier(8, initial_out_features=3, masking=False)

        def forward(self, x):
            return self.head(self.body(x).relu())

    torch.manual_seed(0)
    model: nn.Module
    if heads == "fixed":
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
    elif heads == "growing":
        model = Growing()
    else:
        model = MTSimpleMLP(input_size=4, hidden_size=8)
    data = [images(seed) for seed in range(2)]
    offset = 0 if heads == "multi" else 3
    train = [(x.float(), y + offset * i) for i, (x, y) in enumerate(data)]
    labels = [0, 1] if heads == "multi" else [0, 0]
    benchmark = tensors_benchmark(train, train, task_labels=labels)
    make, options = CASES[case]
    plugin = PenaltyPlugin(make, **options)
    optimizer: torch.optim.Optimizer
    if case == "optimizer":
        optimizer = EKFAC(model, lr=1e-2)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Naive(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=10,
        train_epochs=2,
        plugins=[plugin],
        evaluator=None,
    )
    for number, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        assert plugin.penalty.num_tasks == number + 1
    assert plugin.penalty() == 0
    with torch.no_grad():
        for p in strategy.model.parameters():
            p += 0.1
    assert plugin.penalty() > 0
